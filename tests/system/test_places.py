# SPDX-License-Identifier: GPL-2.0-or-later
"""Several virtual addresses and ports: a back end has each port's connections go to the application
that serves it."""
from __future__ import annotations

import asyncio
import copy
import itertools
import json
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tcpha._fast.message import HEADER_SIZE, PLACE, decode
from tcpha.control.hello import Hello, call, new_instance
from tcpha.lab.bed import Cluster, Daemon, Nginx, program, wait_for
from tests.support.client import REQUEST, ask, body, connect_from, digest, read_all
from tests.support.servers import fill, listener
from tests.support.wire import arp_sent_by

pytestmark = pytest.mark.modes("direct", "fast-direct", "fast-tunnel", "nfqueue-direct",
                               "nfqueue-tunnel", "ebpf-nfqueue", "nfqueue-ebpf")
OTHER = "192.168.1.37"
LAST = itertools.count(77)  # of addresses that nobody has


class Served(Cluster):
    """Two front ends: one has port 80 of an address, the other port 8080 of another one. The back
    end has both addresses, an application for port 8080 ('second') and one for what else there
    is."""

    def __init__(self, service: str, inherits: Callable[[], socket.socket] | None = None,
                 at: int | str = 9080, more: str = "", **kw: Any):
        super().__init__(1, rules=[(0, ".*")], start=False, **kw, be_conf=f"vaddr = {OTHER}\n"
                         f"service = {service}\nmaxclients = 512\n{more}")
        beside = copy.copy(self.be_hosts[0])
        beside.name, beside.dir = "second", self.bed.dir / "second"
        beside.dir.mkdir()
        self.nginx.append(Nginx(beside, (at,), inherits=inherits))
        for server in self.nginx:
            fill(server)
        self.other_host = self.bed.host("fe2", "192.168.1.24")
        self.first = self.serve(self.fe_host, self.VIP, 80)
        self.other = self.serve(self.other_host, OTHER, 8080)

    def serve(self, host: Any, vaddr: str, port: int) -> Daemon:
        """A front end, and the back end if it is not there yet."""
        if not self.be:
            self.be = [Daemon(h, "be", self.be_text(h)) for h in self.be_hosts]
        text = self.fe_text().replace(self.fe_host.address, host.address)
        self.fe = Daemon(host, "fe", f"{text.replace(self.VIP, vaddr)}port = {port}\n")
        self.connected()
        return self.fe

    def ask(self, where: str, path: str = "/") -> str:
        return self.curl(f"http://{where}{path}").stdout

    def places(self) -> dict[tuple[str, int], bool]:
        """Whether the application of each is there."""
        return {(place["vaddr"], place["vport"]): place["listening"]
                for place in self.be[0].ctl("status")["places"]}

    def settled(self) -> None:
        for daemon in (self.first, self.other):
            wait_for(lambda d=daemon: d.ctl("status")["live"] == 0 and not d.ctl("conns"),
                     f"no live flows on {daemon.host.name}")
        wait_for(lambda: self.be[0].ctl("status")["live"] == 0, "no connections on the back end")


def at_vip() -> dict[str, Any]:
    return {"service": "8080 9080"}


def at_home() -> dict[str, Any]:
    return {"service": "8080 127.0.0.1:9080", "at": "127.0.0.1:9080"}


def bound() -> dict[str, Any]:
    return {"service": "8080 9080", "inherits": listener(9080, "eth0")}


@pytest.fixture(scope="module", params=[at_vip, at_home, bound], ids=lambda how: how.__name__)
def served(mode: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Served]:
    c = Served(**mode, **request.param())
    try:
        yield c
    finally:
        c.close()


FIRST, SECOND = f"{Cluster.VIP}", f"{OTHER}:8080"


def exchange(c: Served, where: str, server: Nginx) -> None:
    """Small and large, and both ways."""
    out, source = c.bed.dir / "big", server.root / "big"
    for _ in range(10):
        assert c.ask(where) == f"{server.host.name}\n"
    c.curl(f"http://{where}/big", "-o", str(out))
    assert digest(out) == digest(source)
    c.curl("-f", "-H", "Expect:", "-T", str(source), f"http://{where}/up/big")
    assert digest(server.root / "up" / "big") == digest(source)
    (server.root / "up" / "big").unlink()


def test_each_port_has_its_application(served: Served) -> None:
    for where, server in ((FIRST, served.nginx[0]), (SECOND, served.nginx[1])):
        exchange(served, where, server)
    with served.client.connect(OTHER, 8080) as s:  # a head of two segments, so a socket there
        s.sendall(REQUEST[:20])
        s.sendall(REQUEST[20:])
        assert len(body(read_all(s))) == 1024
    served.settled()
    assert served.places() == {(vaddr, vport): True for vaddr in (served.VIP, OTHER)
                               for vport in (0, 8080)}
    for server in served.nginx:
        seen = server.seen()
        assert {row["client"] for row in seen} == {served.client.address}
        assert {row["status"] for row in seen} <= {"200", "201", "204"}
        assert len(seen) >= 12


def test_a_port_of_before(served: Served) -> None:
    """The server has closed first: its TIME_WAIT socket yields. One client's port may be used for
    both applications at one time."""
    for _ in range(3):
        for s in connect_from(served, 40323), connect_from(served, 40323, 8080, OTHER):
            with s:
                s.sendall(REQUEST)
                assert len(body(read_all(s))) == 1024
    served.settled()


def test_after_a_kill(served: Served) -> None:
    """Connections to both applications go on, and their end is heard of."""
    be = served.be[0]
    begun = []
    for vaddr, port, server in ((served.VIP, 80, served.nginx[0]), (OTHER, 8080, served.nginx[1])):
        s = served.client.connect(vaddr, port)
        s.sendall(REQUEST.replace(b"1k", b"big"))
        begun.append((s, s.recv(1 << 16), server))
    wait_for(lambda: be.ctl("status")["live"] == 2, "the downloads")
    be.kill()
    be.start()
    for daemon in (served.first, served.other):
        served.fe = daemon
        served.connected()
    wait_for(lambda: be.ctl("status")["live"] == 2, "the downloads of before")
    for s, got, server in begun:
        with s:
            assert body(got + read_all(s)) == (server.root / "big").read_bytes()
    served.settled()


def test_one_that_stops(served: Served) -> None:
    """Its place is dead, and nobody is led to the other one instead; that one goes on."""
    be, server = served.be[0], served.nginx[1]
    server.stop()
    dead = {(served.VIP, 8080): False, (OTHER, 8080): False}
    wait_for(lambda: served.places() == {(served.VIP, 0): True, (OTHER, 0): True} | dead,
             "the end of its listener")
    status = be.ctl("status")
    assert status["application"] == "listening" and status["trouble"] == ""
    assert len([p for p in status["places"] if ":9080" in p["trouble"]]) == 2
    for _ in range(5):
        assert served.ask(FIRST) == "be1\n"
        assert served.curl("-o", "/dev/null", "-w", "%{http_code}",
                           f"http://{SECOND}/").stdout == "503"
    done = be.host.run(program("tcphactl"), "--run-dir", str(be.run_dir), "--json", "doctor", "-c",
                       str(be.config), check=False)
    faults = [row["finding"] for row in json.loads(done.stdout) if row["state"] == "fault"]
    assert faults and all(":9080" in fault for fault in faults)
    server.start()
    wait_for(lambda: all(served.places().values()), "its return")
    wait_for(lambda: served.ask(SECOND) == "second\n", "a request to be served")
    served.settled()


def test_every_port_of_every_address(served: Served) -> None:
    """The port says which application it is, whatever the address."""
    for daemon in (served.first, served.other):
        assert daemon.stop() == 0
    served.first = served.serve(served.fe_host, served.VIP, 8080)
    served.other = served.serve(served.other_host, OTHER, 80)
    try:
        exchange(served, f"{served.VIP}:8080", served.nginx[1])
        exchange(served, OTHER, served.nginx[0])
        served.settled()
    finally:
        for daemon in (served.first, served.other):
            assert daemon.stop() == 0
        served.first = served.serve(served.fe_host, served.VIP, 80)
        served.other = served.serve(served.other_host, OTHER, 8080)


@pytest.fixture
def alike(mode: dict[str, Any]) -> Iterator[Served]:
    """One application for both."""
    c = Served(**mode, **at_home(), more="redirectaddr = 127.0.0.1\nredirectport = 9080")
    try:
        yield c
    finally:
        c.close()


def test_one_application_for_two_services(alike: Served) -> None:
    """Where handshakes are forged, one port of a client can be used for one of them at a time: the
    other one is refused, and the first one goes on."""
    assert len(alike.be[0].ctl("status")["places"]) == 4
    for where in (FIRST, SECOND):
        exchange(alike, where, alike.nginx[1])
    rewritten = alike.datapath[1] == "nfqueue"
    first = connect_from(alike, 40324)
    ask(first)
    with connect_from(alike, 40324, 8080, OTHER) as s:
        s.sendall(REQUEST)
        answer = read_all(s)
        assert answer.startswith(b"HTTP/1.1 503") if rewritten else len(body(answer)) == 1024
    ask(first)
    first.close()
    alike.settled()
    with connect_from(alike, 40324, 8080, OTHER) as s:
        ask(s)
    alike.settled()


def shown(served: Served, vaddr: str) -> bool:
    """Whether uaddr stands in what the back end asks by an address, and the address nowhere. By the
    sysctls, the kernel would show another one; but the daemon sets them again."""
    be, asked = served.be_hosts[0], f"192.168.1.{next(LAST)}"
    with arp_sent_by(be) as seen:
        for name in ("arp_ignore", "arp_announce"):
            be.sysctl(f"net.ipv4.conf.all.{name}", "0")
        with be.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
            s.bind((vaddr, 0))
            s.sendto(b"?", (asked, 9))
        served.client.run("arping", "-c", "1", "-w", "1", "-I", "eth0", vaddr)
    assert vaddr not in {sender for _, sender, _ in seen}
    return (1, "192.168.1.39", asked) in seen


@pytest.mark.modes("direct", "nfqueue-direct")
def test_addresses_are_hidden(served: Served) -> None:
    """All of them, from neighbours, while the back end runs; they are gone when it has stopped."""
    be = served.be[0]
    assert all(vaddr in be.host.ip("addr", "show", "lo") for vaddr in (served.VIP, OTHER))
    for vaddr in (served.VIP, OTHER):
        wait_for(lambda vaddr=vaddr: shown(served, vaddr), "an ARP request with uaddr")
    assert be.stop() == 0
    assert "192.168" not in be.host.ip("addr", "show", "lo")
    be.start()
    for daemon in (served.first, served.other):
        served.fe = daemon
        served.connected()


def told(s: socket.socket, count: int) -> list[tuple[bytes, int, int]]:
    """So many of PLACE: vaddr, vport, and whether somebody listens."""
    found: list[tuple[bytes, int, int]] = []
    data = b""
    while len(found) < count:
        got = s.recv(65536)
        assert got, "the back end has closed the connection"
        data += got
        while len(data) >= HEADER_SIZE:
            kind, length = struct.unpack_from("!BI", data, 3)
            if len(data) < length:
                break
            if kind == PLACE:
                message = decode(data[:length])
                assert message
                found.append((message["vaddr"][12:], message["vport"], message["id"] & 1))
            data = data[length:]
    return found


@pytest.mark.modes("direct", "nfqueue-direct")
def test_front_ends_are_told(served: Served) -> None:
    """Of each place: in HELLO, and as it changes. One that names no ports is an older one, and
    hears of no place."""
    links = []
    for ports in ([80, 8080], []):
        s = served.fe_host.connect(served.be_hosts[0].address, 666)
        s.setblocking(False)
        mine = Hello("fe", served.VIP, 80, instance=new_instance(), ports=ports)
        hello, _ = asyncio.run(call(s, mine, None))
        assert hello.vaddrs == [served.VIP, OTHER]
        assert {(vaddr, vport): said & 1 for vaddr, vport, said in hello.places} == \
            dict.fromkeys(served.places(), 1)
        assert hello.server == hello.places[0][2]
        s.settimeout(10)
        links.append(s)
    server = served.nginx[1]
    server.stop()
    try:
        addresses = {socket.inet_aton(vaddr) for vaddr in (served.VIP, OTHER)}
        assert set(told(links[0], 2)) == {(address, 8080, 0) for address in addresses}
    finally:
        server.start()
    assert set(told(links[0], 2)) == {(address, 8080, 1) for address in addresses}
    for s in links:
        s.close()
