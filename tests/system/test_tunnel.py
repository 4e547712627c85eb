# SPDX-License-Identifier: GPL-2.0-or-later
"""What may happen to tunnelled packets on their way: routers between front end and back ends."""
from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host, freeze, wait_for
from tests.support.client import read_all, upload_many
from tests.support.network import move_behind_a_router
from tests.support.wire import queued

pytestmark = pytest.mark.modes("tunnel", "fast-tunnel", "nfqueue-tunnel", "ebpf-nfqueue")
NARROW = 1400
OUTER, HEADERS = 20, 52  # bytes of the outer header; of IP and TCP, with timestamps
LONG = b"X-Filler: " + b"f" * 3000 + b"\r\n"


def narrow(router: Host, mtu: int = NARROW) -> None:
    """The router's way to the back end takes no more; neither end is told before it sends more. For
    what is tunnelled: the front end's kernel would learn it from the control connections."""
    router.ip("rule", "add", "ipproto", "4", "lookup", "100")
    router.ip("route", "add", "10.9.0.33/32", "dev", "eth0", "mtu", "lock", str(mtu),
              "table", "100")


def mss(c: Cluster) -> int:
    """Bytes of payload that a client's segments have."""
    with c.client.connect(c.VIP) as s:
        return s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


def apart(c: Cluster, router: Host) -> None:
    """The front end reaches the router by an interface of its own."""
    c.fe_host.plug("eth1", f"{c.fe_host.port}x")
    c.fe_host.link_up("eth1")
    c.fe_host.ip("addr", "add", "10.8.0.1/24", "dev", "eth1")
    router.ip("addr", "add", "10.8.0.2/24", "dev", "eth0")
    c.fe_host.ip("route", "replace", "10.9.0.0/24", "via", "10.8.0.2")


@pytest.fixture
def routed(mode: dict[str, Any]) -> Iterator[tuple[Cluster, Host]]:
    """A cluster whose back end is behind a router."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        router = move_behind_a_router(c, c.be_hosts[0])
        apart(c, router)
        c.start()
        c.nginx[0].file("1k", size=1024)
        yield c, router
    finally:
        c.close()


def test_a_narrow_link_to_a_back_end(routed: tuple[Cluster, Host]) -> None:
    """Uploads and heads that are in their way while nobody knows of the link, and those after them,
    whose clients are offered what gets through."""
    c, router = routed
    narrow(router)
    upload_many(c, 1, 4 << 20, "-H", "Expect:")
    assert mss(c) == NARROW - OUTER - HEADERS
    got = c.bed.dir / "1k"
    c.get("/1k", "-H", LONG.decode().strip(), "-o", str(got))
    assert got.read_bytes() == (c.nginx[0].root / "1k").read_bytes()
    upload_many(c, 8, 1 << 20, "-H", "Expect:")


def widen(c: Cluster, router: Host) -> None:
    """Undo narrow(). The kernels forget, as when the time for that is over."""
    router.ip("rule", "del", "ipproto", "4")
    for host in (c.fe_host, c.client):
        host.ip("route", "flush", "cache")


@pytest.mark.parametrize("where", ("router", "own interface"))
def test_a_link_that_becomes_narrow(routed: tuple[Cluster, Host], where: str) -> None:
    """Connections that live are told; the front end forgets when its kernel does."""
    c, router = routed
    data = os.urandom(2 << 20)
    wide = mss(c)
    assert wide == 1500 - OUTER - HEADERS
    with c.client.connect(c.VIP) as s:
        s.sendall(b"GET /1k HTTP/1.1\r\nHost: lab\r\n" + LONG + b"\r\n")
        got = b""
        while len(got.partition(b"\r\n\r\n")[2]) < 1024:
            got += s.recv(65536)
        if where == "router":
            narrow(router)
        else:
            c.fe_host.ip("link", "set", "eth1", "mtu", str(NARROW))
        s.sendall(b"PUT /up/late HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert read_all(s).split()[1] in (b"201", b"204")
    assert (c.nginx[0].root / "up/late").read_bytes() == data
    assert mss(c) == wide - 100
    if c.datapath[0] == "ebpf":
        assert f"mtu {NARROW - OUTER}" in c.client.ip("route", "get", c.VIP)
        assert c.fe and c.fe.ctl("status")["packets"]["too_big"] > 0
    if where == "router":
        widen(c, router)
    else:
        c.fe_host.ip("link", "set", "eth1", "mtu", "1500")
        c.client.ip("route", "flush", "cache")
    wait_for(lambda: mss(c) == wide, "clients to be offered what they were before")


def test_outer_fragments(routed: tuple[Cluster, Host]) -> None:
    """A client without path MTU discovery lets routers cut, so that what they cut is the tunnelled
    packet: it arrives, whole."""
    c, router = routed
    c.client.sysctl("net.ipv4.ip_no_pmtu_disc", "1")
    c.be_hosts[0].nft("""table ip lab {
        counter cut { }
        counter alike { }
        chain in { type filter hook prerouting priority -450;
            ip protocol 4 ip frag-off & 0x1fff != 0 counter name cut ip id 0 counter name alike
        }
    }""")
    narrow(router)
    upload_many(c, 4, 1 << 20, "-H", "Expect:")
    assert c.be_hosts[0].nft_counter("cut") > 100
    assert c.be_hosts[0].nft_counter("alike") <= 1
    assert c.be[0].ctl("status")["packets"]["defragmented"] > 100


def mark(router: Host, which: str) -> None:
    """Such tunnelled packets have met congestion on the router (RFC 3168)."""
    router.nft(f"""table ip lab {{
        counter marked {{ }}
        chain through {{ type filter hook forward priority 0;
            ip protocol 4 {which} counter name marked ip ecn set ce
        }}
    }}""")


def delivered_ce(host: Host) -> int:
    """Segments of a host of which their receiver said that they had met congestion."""
    return int(host.run("nstat", "-asz", "TcpExtTCPDeliveredCE").stdout.split()[-2])


def test_congestion_on_the_way(routed: tuple[Cluster, Host]) -> None:
    """A mark on the outer header gets to the server's kernel, and so to the client (RFC 6040)."""
    c, router = routed
    c.client.sysctl("net.ipv4.tcp_ecn", "1")
    upload_many(c, 1, 1 << 20, "-H", "Expect:")
    assert delivered_ce(c.client) == 0
    mark(router, "ip ecn ect0")
    upload_many(c, 1, 4 << 20, "-H", "Expect:")
    assert router.nft_counter("marked") > 0
    assert delivered_ce(c.client) > 0


def test_congestion_that_a_packet_cannot_tell(routed: tuple[Cluster, Host]) -> None:
    """Its client takes a loss for that, and so it is lost; the client sends it again."""
    c, router = routed
    mark(router, "numgen inc mod 1000000 == 0")
    got = c.bed.dir / "1k"
    c.get("/1k", "-H", f"X-Filler: {'f' * 1000}", "-o", str(got))
    assert got.read_bytes() == (c.nginx[0].root / "1k").read_bytes()
    assert router.nft_counter("marked") == 1
    wait_for(lambda: c.be[0].ctl("status")["packets"]["not_ect"] == 1, "the count")


def test_a_front_end_that_comes_later(routed: tuple[Cluster, Host]) -> None:
    """Its kernel still knows."""
    c, router = routed
    assert c.fe
    narrow(router)
    upload_many(c, 1, 1 << 20, "-H", "Expect:")
    c.fe.stop()
    c.fe.start()
    c.connected()
    assert mss(c) == NARROW - OUTER - HEADERS


@contextmanager
def kept_from_its_stack(host: Host) -> Iterator[list[Any]]:
    """What clients send passes the host's datapath, and waits for accept() before the sockets."""
    kept: list[Any] = []
    with queued(host, kept.append, "INPUT", "-p", "tcp", "--dport", "80"):
        yield kept


@pytest.mark.modes("tunnel", "nfqueue-tunnel", "ebpf-nfqueue")
def test_bytes_that_the_front_end_acknowledged_late(routed: tuple[Cluster, Host]) -> None:
    """They were on their way to its socket when that was frozen, and nobody else has them. They go
    on in segments that fit, whatever was offered when the client connected."""
    c, router = routed
    assert c.fe
    fe, be, data = c.fe, c.be[0].process.pid, os.urandom(5000)
    fe.ctl("set", "dbglevel", "3")
    with c.client.connect(c.VIP) as s:
        name = "{}:{}".format(*s.getsockname())
        narrow(router)
        upload_many(c, 1, 1 << 20, "-H", "Expect:")
        before = fe.ctl("status")["counters"]["late_bytes"]
        with kept_from_its_stack(c.fe_host) as kept:
            s.sendall(b"PUT /up/late HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
                      b"Content-Length: %d\r\n\r\n" % len(data))
            s.sendall(data)
            wait_for(lambda: sum(p.get_payload_len() for p in kept) > len(data) + 5 * HEADERS,
                     "all of it")
            freeze(be)
            kept[0].accept()
            wait_for(lambda: f"{name}: offered to" in fe.log.read_text(), "the handoff")
            for packet in kept[1:]:
                packet.accept()
            wait_for(lambda: int(c.fe_host.run("ss", "-Htn", "dst", name).stdout.split()[1])
                     > len(data), "the socket to have it")
            os.kill(be, signal.SIGCONT)
            assert read_all(s).split()[1] in (b"201", b"204")
    assert fe.ctl("status")["counters"]["late_bytes"] == before + len(data)
    assert (c.nginx[0].root / "up/late").read_bytes() == data
