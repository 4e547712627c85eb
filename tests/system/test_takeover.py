# SPDX-License-Identifier: GPL-2.0-or-later
"""Two front ends run, and something like keepalived moves the virtual address from one to the
other. Connections go on, whoever handed them over."""
from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, Host, freeze, sh, wait_for
from tests.support.client import KEEP
from tests.support.downloads import COUNT, begin, finish
from tests.support.repair import TCP_REPAIR

pytestmark = pytest.mark.modes("direct", "fast-direct", "nfqueue-tunnel")
ALL = pytest.mark.modes("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct",
                        "nfqueue-tunnel")
UPLOAD = 2 << 20
PATIENT = "keepalive_timeout 1h; send_timeout 1h; client_body_timeout 1h;"


class Two(Cluster):
    """Another front end more. Neither has the virtual address yet."""

    def __init__(self, **kw: Any):
        super().__init__(2, rules=[(1, "jpg"), (0, ".*")], start=False, **kw,
                         fe_conf="announce = off", nginx={"http": PATIENT})
        self.other_host = self.bed.host("fe2", "192.168.1.24")
        self.start()
        assert self.fe
        self.first: Daemon = self.fe
        self.other = Daemon(self.other_host, "fe", self.fe_text().replace(
            self.fe_host.address, self.other_host.address))
        for daemon in (self.other, self.first):
            self.fe = daemon
            self.connected()

    def take(self, host: Host) -> None:
        """As keepalived's MASTER."""
        host.ip("addr", "add", f"{self.VIP}/32", "dev", "eth0")
        self.announce(host)

    def announce(self, host: Host) -> None:
        host.run("arping", "-q", "-U", "-c", "1", "-I", "eth0", self.VIP)

    def drop(self, host: Host) -> None:
        """As keepalived's BACKUP or FAULT."""
        host.ip("addr", "del", f"{self.VIP}/32", "dev", "eth0")

    def cable(self, host: Host, state: str) -> None:
        sh("ip", "-n", self.bed.switch, "link", "set", host.port, state)
        if state == "up":  # what is sent before both kernels have noticed is lost
            host.link_up("eth0")
            wait_for(lambda: "state forwarding" in sh(
                "bridge", "-n", self.bed.switch, "link", "show", "dev", host.port).stdout,
                "the switch")

    def settled(self) -> None:
        """All have forgotten all connections."""
        for daemon in (self.first, self.other):
            wait_for(lambda d=daemon: d.ctl("status")["live"] == 0 and not d.ctl("conns"),
                     f"the end of all on {daemon.host.name}")
        for be in self.be:
            wait_for(lambda b=be: b.ctl("status")["live"] == 0, "no connections on the back ends")


@pytest.fixture
def two(mode: dict[str, Any]) -> Iterator[Two]:
    c = Two(**mode)
    try:
        for n in c.nginx:
            n.file("1k", size=1024)
            n.file("big", size=8 << 20)
        c.take(c.fe_host)
        yield c
        for host in (c.fe_host, c.other_host):  # who stops waits for that
            host.ip("addr", "flush", "to", c.VIP, "dev", "eth0")
    finally:
        c.close()


def idle(c: Cluster) -> socket.socket:
    """A connection that waits for its next request."""
    s = c.client.connect(c.VIP)
    ask(s)
    return s


def ask(s: socket.socket) -> None:
    s.sendall(KEEP)
    answered([s])


def upload(c: Cluster, name: str) -> socket.socket:
    """The first half of one."""
    s = c.client.connect(c.VIP)
    s.sendall(f"PUT /up/{name} HTTP/1.1\r\nHost: lab\r\nContent-Length: {UPLOAD}\r\n\r\n".encode())
    s.sendall(b"x" * (UPLOAD // 2))
    return s


def mute(host: Host) -> None:
    """Back ends hear nothing of it, until nft("")."""
    host.nft("""table ip lab {
        chain out { type filter hook output priority 0; tcp dport 666 drop; }
    }""")


def ask_in_vain(host: Host, idle: list[socket.socket]) -> None:
    """Send requests to a front end that does not know their connections."""
    before = host.counter("rx_packets")
    for s in idle:
        s.sendall(KEEP)
    wait_for(lambda: host.counter("rx_packets") > before + 4 * len(idle), "repeated requests")


def answered(idle: list[socket.socket]) -> None:
    for s in idle:
        got = b""
        while len(got.partition(b"\r\n\r\n")[2]) < 1024:
            piece = s.recv(65536)
            assert piece, "the connection has ended"
            got += piece
        assert got.startswith(b"HTTP/1.1 200 ")


class Load:
    """Connections of each kind, begun and not ended."""

    def __init__(self, c: Two, count: int):
        self.c = c
        self.want = (c.nginx[0].root / "big").read_bytes()
        self.downloads = [begin(c) for _ in range(count)]
        self.uploads = [upload(c, str(n)) for n in range(count // 4)]
        self.idle = [idle(c) for _ in range(count)]

    def all(self) -> list[socket.socket]:
        return self.downloads + self.uploads + self.idle

    def go_on(self) -> None:
        """The idle ones are used, and go on waiting."""
        for s in self.idle:
            ask(s)

    def end(self) -> None:
        for s in self.downloads:
            finish(s, self.want)
        for s in self.uploads:
            s.sendall(b"x" * (UPLOAD - UPLOAD // 2))
            assert s.recv(65536).startswith(b"HTTP/1.1 20")
            s.close()
        for s in self.idle:
            ask(s)
            s.close()


@ALL
def test_the_master_is_cut_off_and_comes_back(two: Two) -> None:
    load = Load(two, COUNT)
    wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "all handed over")
    two.cable(two.fe_host, "down")
    two.drop(two.fe_host)
    two.take(two.other_host)
    load.go_on()
    early, late = Load(two, 4), Load(two, 4)
    early.end()
    wait_for(lambda: two.other.ctl("status")["in_hand"] == 0, "all handed over")
    two.cable(two.fe_host, "up")
    two.drop(two.other_host)
    two.take(two.fe_host)
    load.end()
    late.end()
    two.settled()
    wait_for(lambda: "connections of another front end go on" in two.first.log.read_text(),
             "a word of it")


@ALL
def test_the_address_moves_while_both_live(two: Two) -> None:
    """Again and again: whoever has it knows all connections, and each end is heard of by both."""
    loads = []
    for here, there in ((two.fe_host, two.other_host), (two.other_host, two.fe_host)) * 2:
        loads.append(Load(two, 4))
        for daemon in (two.first, two.other):
            wait_for(lambda d=daemon: d.ctl("status")["in_hand"] == 0, "all handed over")
        two.drop(here)
        two.take(there)
        for load in loads:
            load.go_on()
    for load in loads:
        load.end()
    two.settled()


@ALL
def test_packets_wait_for_what_back_ends_say(two: Two) -> None:
    """The front end that takes the address cannot ask at once; nobody hears a RST meanwhile."""
    load = Load(two, 4)
    wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "all handed over")
    mute(two.other_host)
    two.cable(two.fe_host, "down")
    two.drop(two.fe_host)
    two.take(two.other_host)
    ask_in_vain(two.other_host, load.idle)
    assert two.other.ctl("status")["awaiting"]
    two.other_host.nft("")
    answered(load.idle)
    load.end()
    two.cable(two.fe_host, "up")
    two.settled()


def test_who_stops_lets_the_address_go_first(two: Two) -> None:
    """keepalived finds that tcphafe answers no more, and moves the address; until then, the packets
    of its connections go on."""
    load = Load(two, 4)
    wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "all handed over")
    two.first.process.terminate()
    wait_for(lambda: "stopping" in two.first.log.read_text(), "its end to begin")
    load.go_on()
    assert two.first.process.poll() is None
    two.drop(two.fe_host)
    two.take(two.other_host)
    assert two.first.process.wait(20) == 0
    load.go_on()
    load.end()


def stranger(c: Cluster) -> socket.socket:
    """The client's end of a connection that nobody else knows."""
    def inside() -> socket.socket:
        s = socket.socket()
        s.settimeout(30)
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        s.connect((c.VIP, 80))  # without a packet
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, -1)
        s.sendall(b"x")
        return s
    return c.client.inside(inside)


def test_what_nobody_has_is_refused_once_all_have_answered(two: Two) -> None:
    two.drop(two.fe_host)
    two.take(two.other_host)
    wait_for(lambda: not two.other.ctl("status")["awaiting"], "all answers")
    assert two.first.ctl("status")["awaiting"]
    with stranger(two) as s, pytest.raises(ConnectionResetError):
        s.recv(1)


def test_a_front_end_that_kept_the_address(two: Two) -> None:
    """It was cut off with it, and is back: what began meanwhile began at the other one."""
    load = Load(two, 4)
    wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "all handed over")
    two.cable(two.fe_host, "down")
    two.take(two.other_host)
    load.go_on()
    late = Load(two, 4)
    wait_for(lambda: two.other.ctl("status")["in_hand"] == 0, "all handed over")
    wait_for(lambda: [s["connperbe"] for s in two.first.ctl("servers")] == [0, 0], "detection")
    mute(two.fe_host)
    two.drop(two.other_host)
    two.cable(two.fe_host, "up")
    two.announce(two.fe_host)
    ask_in_vain(two.fe_host, late.idle)
    two.fe_host.nft("")
    answered(late.idle)
    load.end()
    late.end()
    two.settled()


@pytest.mark.modes("fast-direct", "nfqueue-tunnel")
@pytest.mark.parametrize("how", ["cut off", "stopped"])
def test_back_ends_notice_a_front_end_that_is_silent(two: Two, how: str) -> None:
    def connections() -> list[int]:
        return [f["connections"] for be in two.be for f in be.ctl("status")["frontends"]
                if f["address"] == two.fe_host.address]
    assert connections() == [2, 2]
    if how == "cut off":
        two.cable(two.fe_host, "down")
    else:
        freeze(two.first.process.pid)
    wait_for(lambda: connections() == [0, 0], "what back ends find")
    assert all(f"front end {two.fe_host.address}: control connections lost" in be.log.read_text()
               for be in two.be)
    assert all(f["connections"] == 2 for be in two.be for f in be.ctl("status")["frontends"]
               if f["address"] == two.other_host.address)


@pytest.mark.modes("direct", "tunnel", "nfqueue-direct", "nfqueue-tunnel")
def test_an_offer_that_comes_after_the_address_has_moved(two: Two) -> None:
    """The front end that has the address now has asked already: it is told of this one, too. Who
    offers waits for three seconds; a machine that is too busy for that is given another chance."""
    known = idle(two)
    wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "all handed over")
    for _ in range(20):
        mute(two.fe_host)
        s = two.client.connect(two.VIP)
        s.sendall(KEEP.replace(b"/1k", b"/big"))
        wait_for(lambda: two.first.ctl("status")["in_hand"] == 1, "the offer")
        two.drop(two.fe_host)
        two.take(two.other_host)
        ask(known)  # which is so, as the back end has answered
        two.fe_host.nft("")
        wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "an outcome")
        if two.first.ctl("status")["counters"]["handed"] == 2:
            break
        s.close()
        two.drop(two.other_host)
        two.take(two.fe_host)
    finish(s, (two.nginx[0].root / "big").read_bytes())
    known.close()
    two.settled()


@pytest.mark.modes("direct", "nfqueue-tunnel")
def test_an_offer_that_is_repeated_after_the_address_has_moved(two: Two) -> None:
    """The answer to it was lost, and since then the connection is another front end's. It must not
    be adopted a second time. Who offers waits for three seconds; a machine that is too busy for
    that is given another chance."""
    be, workers = two.be[0], two.nginx[0].worker_pids()
    two.first.ctl("set", "dbglevel", "1")
    for n in range(1, 21):
        freeze(*workers)  # until there is something to acknowledge
        two.fe_host.nft("""table ip lab {
            chain in { type filter hook input priority 0; tcp sport 666 drop; }
        }""")
        s = two.client.connect(two.VIP)
        s.sendall(KEEP.replace(b"/1k", b"/big"))
        wait_for(lambda n=n: be.ctl("status")["counters"]["adopted"] >= n, "the adoption")
        two.other_host.ip("addr", "add", f"{two.VIP}/32", "dev", "eth0")
        wait_for(lambda: two.other.ctl("conns"), "an answer")
        two.fe_host.run("sh", "-c", "ss -K dport = 666; nft delete table ip lab")
        wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "an outcome")
        two.drop(two.fe_host)
        two.announce(two.other_host)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        if two.first.ctl("status")["counters"]["handed"]:
            break
        s.close()
        two.drop(two.other_host)
        two.take(two.fe_host)
    assert f"asked {be.host.address} again" in two.first.log.read_text()
    finish(s, (two.nginx[0].root / "big").read_bytes())
    assert be.ctl("status")["counters"]["adopted"] == n
    two.settled()


def test_a_port_that_was_used_again_at_the_other_front_end(two: Two) -> None:
    """The entry of the older connection must not stand in the way of what back ends say."""
    def dial(port: int, path: bytes) -> socket.socket:
        def inside() -> socket.socket:
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.settimeout(30)
            s.bind(("", port))
            s.connect((two.VIP, 80))
            return s
        s = two.client.inside(inside)
        s.sendall(KEEP.replace(b"/1k", path))
        assert s.recv(1) == b"H"
        return s
    (two.nginx[1].root / "1k.jpg").write_bytes((two.nginx[1].root / "1k").read_bytes())
    old = dial(0, b"/1k")
    port = old.getsockname()[1]
    wait_for(lambda: two.first.ctl("status")["in_hand"] == 0, "all handed over")
    two.cable(two.fe_host, "down")
    two.drop(two.fe_host)
    two.take(two.other_host)
    old.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    old.close()  # with a RST
    s = dial(port, b"/1k.jpg")
    wait_for(lambda: two.other.ctl("status")["in_hand"] == 0, "all handed over")
    two.cable(two.fe_host, "up")
    two.drop(two.other_host)
    two.take(two.fe_host)
    while len(s.recv(65536)) == 65536:
        pass
    s.sendall(KEEP.replace(b"/1k", b"/1k.jpg").replace(b"keep-alive", b"close"))
    assert s.recv(65536).startswith(b"HTTP/1.1 200 ")
    s.close()
    two.settled()
