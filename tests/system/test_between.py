# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path on an imperfect network: between the front end and the back ends, with large
requests, without offloads, with many short connections."""
from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host, freeze, inside, wait_for
from tests.support.client import (
    REQUEST,
    body,
    connect_from,
    read_all,
    unacknowledged,
    upload_many,
)
from tests.support.network import let_grow, mac, nft_on_switch
from tests.support.state import fast, settle

pytestmark = pytest.mark.modes("fast-direct", "fast-tunnel")
BODY = os.urandom(2000)
SENT = 48 << 20
PUT = b"PUT /up/between HTTP/1.1\r\nHost: lab\r\nConnection: close\r\nContent-Length: 2000\r\n\r\n"


def forwarded(c: Cluster) -> str:
    """What the front end sends to back ends in the clients' name, for nft."""
    return "ip protocol 4" if c.forward == "tunnel" else f"ip saddr {c.client.address}"


@contextmanager
def between(c: Cluster, count: int,
            change: Callable[[list[bytes]], list[bytes]]) -> Iterator[list[bytes]]:
    """What the front end forwards with payload waits on the switch until there are so many frames,
    and leaves as change() says; whatever follows passes. Yields what has passed so far."""
    def tap(host: Host) -> socket.socket:
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        s.bind((host.port, 0x0003))
        return s
    to = {mac(h): inside(c.bed.switch, lambda h=h: tap(h)) for h in c.be_hosts}
    source = inside(c.bed.switch, lambda: tap(c.fe_host))
    source.settimeout(0.05)
    proto, least = (4, 100) if c.forward == "tunnel" else (6, 80)
    match = forwarded(c)
    nft_on_switch(c, f"""table bridge lab {{
        chain keep {{
            type filter hook forward priority 0
            iifname {c.fe_host.port} {match} ip length > {least} drop
        }}
    }}
    """)
    ended = threading.Event()
    waiting: list[bytes] = []
    passed: list[bytes] = []

    def work() -> None:
        while not ended.is_set():
            try:
                frame, address = source.recvfrom(65536)
            except TimeoutError:
                continue
            if address[2] == socket.PACKET_OUTGOING or frame[:6] not in to or \
                    frame[12:14] != b"\x08\0" or frame[23] != proto or \
                    int.from_bytes(frame[16:18], "big") <= least or \
                    (proto == 6 and b"\x02\x9a" in (frame[34:36], frame[36:38])):
                continue
            waiting.append(frame)
            if len(passed) or len(waiting) == count:
                out = waiting if passed else change(waiting)
                for f in out:
                    to[f[:6]].send(f)
                passed.extend(waiting)
                waiting.clear()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield passed
    finally:
        ended.set()
        thread.join()
        nft_on_switch(c, "")
        for s in (source, *to.values()):
            s.close()


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "request lost": lambda f: f[1:], "body lost": lambda f: f[:1],
    "request twice": lambda f: [f[0], *f], "request again behind the body": lambda f: [*f, f[0]],
    "both lost": lambda f: [], "in the other order": lambda f: f[::-1]}


@contextmanager
def a_lost_request(c: Cluster) -> Iterator[socket.socket]:
    """The front end has sent it, and the switch loses it until nft_on_switch(c, "")."""
    settle(c)
    nft_on_switch(c, f"""table bridge lab {{
        chain lose {{
            type filter hook forward priority 0
            iifname {c.fe_host.port} {forwarded(c)} ip length > 80 drop
        }}
    }}""")
    before = fast(c)
    s = connect_from(c, 20081)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        s.sendall(REQUEST)
        wait_for(lambda: fast(c) == before + 1, "the request on its way")
        yield s
    finally:
        s.close()
        nft_on_switch(c, "")
        c.client.nft("")
    settle(c)


def vanish(c: Cluster) -> None:
    """Nobody hears of the client any more."""
    c.client.nft("""table ip lab {
        chain out { type filter hook output priority 0; tcp dport 80 drop; }
    }""")


@pytest.mark.parametrize("then", ["reset", "gone", "patient"])
def test_a_request_that_does_not_arrive(cluster: Cluster, then: str) -> None:
    """The client gives up, or vanishes: the back end is asked, and the flow forgotten. One that
    waits is served in the end."""
    with a_lost_request(cluster) as s:
        if then == "reset":
            s.close()
        elif then == "gone":
            vanish(cluster)
        wait_for(lambda: cluster.fe and cluster.fe.ctl("status")["live"] == 0,
                 "the flow to be forgotten", 30)
        if then == "patient":
            nft_on_switch(cluster, "")
            assert len(body(read_all(s))) == 1024
        if then == "reset":  # nothing of it is in the way of the next one from its port
            nft_on_switch(cluster, "")
            with connect_from(cluster, 20081) as s:
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                assert struct.unpack_from("I", info, 100) == (0,), "the SYN was lost"
                s.sendall(REQUEST)
                assert len(body(read_all(s))) == 1024


def test_a_request_that_the_last_run_of_its_back_end_did_not_get(mode: dict[str, Any]) -> None:
    """It is not over: what an older connection left on the back end is not of this one."""
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        c.nginx[0].file("1k", size=1024)
        with connect_from(c, 20081) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
        with a_lost_request(c) as s:
            vanish(c)  # lest it is answered 503 meanwhile
            c.be[0].kill()
            c.be[0].start()
            c.connected()
            nft_on_switch(c, "")
            c.client.nft("")
            assert len(body(read_all(s))) == 1024
    finally:
        c.close()


@pytest.mark.parametrize("what", CHANGES)
def test_between_front_end_and_back_end(cluster: Cluster, what: str) -> None:
    """A request in one segment, its body in another. It is served once, and whole."""
    cluster.client.run("ethtool", "-K", "eth0", "tx", "off")  # frames that are sent on are complete
    settle(cluster)
    before = fast(cluster)
    name = what.replace(" ", "-")
    stored = cluster.nginx[0].root / "up" / name
    try:
        with between(cluster, 2, CHANGES[what]) as passed:
            with cluster.client.connect(cluster.VIP) as s:
                s.sendall(PUT.replace(b"between", name.encode()))
                s.sendall(BODY[:1000])
                s.sendall(BODY[1000:])
                assert read_all(s).split()[1] in (b"201", b"204")
            assert len(passed) >= 2
    finally:
        cluster.client.run("ethtool", "-K", "eth0", "tx", "on")
    assert stored.read_bytes() == BODY
    settle(cluster)
    assert fast(cluster) == before + 1
    served = [r for r in cluster.nginx[0].seen() if f"PUT /up/{name}" in r["request"]]
    assert len(served) == 1
    stored.unlink()


@pytest.mark.parametrize("size", [20_000, 60_000])
def test_request_in_one_large_packet(cluster: Cluster, size: int) -> None:
    """Head and body in one GSO packet, which the front end forwards as it is."""
    client, data = cluster.client, os.urandom(size)
    route = ("route", "replace", f"{cluster.VIP}/32", "dev", "eth0")
    client.ip(*route, "initcwnd", "60")
    settle(cluster)
    before = fast(cluster)
    try:
        for n in range(5):
            with client.connect(cluster.VIP) as s:
                s.sendall(PUT.replace(b"2000", b"%d" % size).replace(b"between", b"%d" % n) + data)
                assert read_all(s).split()[1] in (b"201", b"204")
            stored = cluster.nginx[0].root / "up" / str(n)
            assert stored.read_bytes() == data
            stored.unlink()
    finally:
        client.ip("route", "del", f"{cluster.VIP}/32")
    settle(cluster)
    assert fast(cluster) == before + 5


OFFLOADS = ("rx", "tx", "tso", "gso", "gro")


@pytest.mark.parametrize("where", ["client", "fe", "be", "all"])
def test_without_offloads(cluster: Cluster, where: str) -> None:
    """Checksums that are complete already, single segments: nothing depends on the offloads."""
    hosts = {"client": [cluster.client], "fe": [cluster.fe_host], "be": cluster.be_hosts,
             "all": [cluster.client, cluster.fe_host, *cluster.be_hosts]}[where]

    def switch(on: str) -> None:
        for h in hosts:
            h.run("ethtool", "-K", "eth0", *(x for o in OFFLOADS for x in (o, on)))
    before = fast(cluster)
    switch("off")
    try:
        for _ in range(10):
            with cluster.client.connect(cluster.VIP) as s:
                s.sendall(REQUEST)
                assert len(body(read_all(s))) == 1024
        upload_many(cluster, 8, 1 << 20, "-H", "Expect:")
        errors = cluster.fe_host.run("nstat", "-asz", "TcpInCsumErrors").stdout.split()[-2]
        assert [h.run("nstat", "-asz", "TcpInCsumErrors").stdout.split()[-2]
                for h in (cluster.client, *cluster.be_hosts)] == ["0", "0", "0"] and errors == "0"
    finally:
        switch("on")
    settle(cluster)
    assert fast(cluster) == before + 18


def test_packets_above_64_kilobytes(cluster: Cluster) -> None:
    """BIG TCP: the IP header says 0 of their length. All of an upload is known to have been sent,
    and so the client's FIN is believed."""
    assert cluster.fe
    fe, workers = cluster.fe, cluster.nginx[0].worker_pids()
    ends = [(h.ns, "eth0") for h in cluster.bed.hosts] + [(cluster.bed.switch, "br0")]
    ends += [(cluster.bed.switch, h.port) for h in cluster.bed.hosts]
    for ns, device in ends:
        let_grow(ns, device, 200_000)
    cluster.client.nft("""table ip lab {
        counter big { }
        chain out { type filter hook output priority 0; meta length > 65535 counter name big; }
    }""")
    try:
        with cluster.client.connect(cluster.VIP) as s:
            s.sendall(b"PUT /up/big HTTP/1.1\r\nHost: lab\r\n"
                      b"Content-Length: %d\r\n\r\n" % (SENT + 1))
            s.sendall(bytes(SENT))
            wait_for(lambda: unacknowledged(s) == 0, "all of it")  # the FIN has room behind it
            assert [r["state"] for r in fe.ctl("conns") if r["bytes"] > SENT] == ["forward"]
            freeze(*workers)
            s.shutdown(socket.SHUT_WR)
            wait_for(lambda: [r["state"] for r in fe.ctl("conns")] == ["closing"], "the FIN")
        assert cluster.client.nft_counter("big") > 20
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        cluster.client.nft("")
        for ns, device in ends:
            let_grow(ns, device, 65536)
    settle(cluster)


@contextmanager
def sharer(host: Host, device: str) -> Iterator[None]:
    """Somebody who wants all IPv4 packets of a device, as DHCP clients do."""
    with host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)) as s:
        s.bind((device, 0x0800))
        yield


def test_somebody_else_gets_the_packets_too(cluster: Cluster) -> None:
    """The kernel's own stack works on clones of them then, to which no socket can be assigned."""
    hosts = [cluster.client, cluster.fe_host, *cluster.be_hosts]
    before, resets = fast(cluster), counters(hosts)["TcpOutRsts"]
    with sharer(cluster.fe_host, "eth0"), sharer(cluster.be_hosts[0], "eth0"):
        for _ in range(10):
            with cluster.client.connect(cluster.VIP) as s:
                s.sendall(REQUEST)
                assert len(body(read_all(s))) == 1024
        upload_many(cluster, 8, 1 << 20, "-H", "Expect:")
        for _ in range(10):  # the front end makes a socket of these
            with cluster.client.connect(cluster.VIP) as s:
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
                s.send(REQUEST, socket.MSG_MORE)
                s.shutdown(socket.SHUT_WR)  # data and FIN in one segment
                assert len(body(read_all(s))) == 1024
    settle(cluster)
    assert fast(cluster) == before + 18
    assert counters(hosts)["TcpOutRsts"] == resets


def counters(hosts: list[Host]) -> dict[str, int]:
    """What a connection that goes wrong would leave, summed over the hosts."""
    names = ("TcpRetransSegs", "TcpExtTCPLossProbes", "TcpExtPAWSActive", "TcpExtPAWSEstab",
             "TcpEstabResets", "TcpOutRsts", "TcpExtTCPTimeouts")
    total = dict.fromkeys(names, 0)
    for h in hosts:
        for line in h.run("nstat", "-asz", *names).stdout.splitlines():
            if line.startswith(names):
                total[line.split()[0]] += int(line.split()[1])
    # a probe says that the machine was busy, not that something was lost (RFC 8985 section 7)
    total["TcpRetransSegs"] -= total.pop("TcpExtTCPLossProbes")
    return total


def test_100000_short_connections(cluster: Cluster) -> None:
    """Three times as many as the client has ports: each is used again, and nothing tells one
    connection on it from the next but its numbers. Nobody retransmits, resets or drops by PAWS more
    than on connections straight to nginx."""
    hosts = [cluster.client, cluster.fe_host, *cluster.be_hosts]

    def run(address: str) -> dict[str, int]:
        before = counters(hosts)
        done = cluster.client.run("ab", "-q", "-s", "60", "-n", "100000", "-c", "32",
                                  f"http://{address}/1k")
        assert "Complete requests:      100000" in done.stdout
        assert "Failed requests:        0" in done.stdout, done.stdout
        return {k: n - before[k] for k, n in counters(hosts).items()}
    direct = run(cluster.be_hosts[0].address)
    settle(cluster)
    before = fast(cluster)
    ours = run(cluster.VIP)
    settle(cluster)
    assert fast(cluster) >= before + 99_000
    worse = {k: (n, direct[k]) for k, n in ours.items() if n > direct[k] + 20}
    assert not worse, (ours, direct)


def test_server_that_stops_for_a_while(cluster: Cluster) -> None:
    """Its accept queue fills, then it goes on: whoever was let in is served, and whoever was not is
    told so, or served when its request comes again."""
    assert cluster.fe
    server, host = cluster.nginx[0], cluster.be_hosts[0]
    somaxconn = host.sysctl("net.core.somaxconn")
    host.sysctl("net.core.somaxconn", "16")
    cluster.fe.ctl("drain", cluster.be_hosts[1].address)
    try:
        server.stop()
        server.start()
        workers = server.worker_pids()
        wait_for(lambda: cluster.get("/1k", "-o", "/dev/null", "-w", "%{http_code}") == "200",
                 "the back end in use")
        freeze(*workers)
        clients: list[Any] = []
        for _ in range(200):
            s = cluster.client.connect(cluster.VIP)
            s.sendall(REQUEST)
            clients.append(s)
        wait_for(lambda: cluster.be[0].ctl("status")["counters"]["refusals"].get(
            "accept queue full"), "a refusal for the full queue")
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        codes = [int(read_all(s).split()[1]) for s in clients]
        assert codes.count(200) >= 16 and codes.count(200) + codes.count(503) == 200, codes
        for s in clients:
            s.close()
    finally:
        host.sysctl("net.core.somaxconn", somaxconn)
        server.stop()
        server.start()
        cluster.fe.ctl("undrain", cluster.be_hosts[1].address)
    settle(cluster)
