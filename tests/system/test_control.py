# SPDX-License-Identifier: GPL-2.0-or-later
"""Control connections under a secret: nobody reads, changes or joins them."""
from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tcpha._fast.tls import Channel
from tcpha.lab.bed import Cluster, Daemon, Host, wait_for
from tests.support.client import REQUEST, body, read_all, upload_many
from tests.support.daemons import logged, secret_file
from tests.support.state import settle

pytestmark = pytest.mark.modes("direct", "nfqueue-direct")  # how packets travel is not the point


@contextmanager
def overheard(host: Host, port: int) -> Iterator[bytearray]:
    """What passes a host's interface to and from a TCP port."""
    s = host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)))
    s.bind(("eth0", 0x0003))
    s.settimeout(0.05)
    heard = bytearray()
    ended = threading.Event()

    def listen() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                frame = s.recv(262144)
                if frame[23] == socket.IPPROTO_TCP and \
                        port.to_bytes(2, "big") in (frame[34:36], frame[36:38]):
                    heard.extend(frame)
    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield heard
    finally:
        ended.set()
        thread.join()
        s.close()


@pytest.fixture(params=[True, False], ids=["secret", "open"])
def pair(mode: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster with and without a secret."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False, be_conf="maxclients = 512")
    try:
        if request.param:
            line = f"\nsecret = {secret_file(c, 'secret')}"
            c.fe_conf += line
            c.be_conf += line
        c.nginx[0].file("1k", size=1024)
        c.start()
        yield c
    finally:
        c.close()


def encrypted(c: Cluster) -> bool:
    return "secret" in c.fe_conf


def test_what_is_said(pair: Cluster) -> None:
    """A request travels in HANDOFF. Without a secret it can be read, and both daemons have said so
    when they started."""
    assert pair.fe
    with overheard(pair.fe_host, 666) as heard:
        for _ in range(5):
            with pair.client.connect(pair.VIP) as s:
                s.sendall(REQUEST.replace(b"/1k", b"/1k?overheard"))
                assert len(body(read_all(s))) == 1024
        assert wait_for(lambda: len(heard) > 2000, "what was said")
    assert (b"overheard" in heard) != encrypted(pair)
    for daemon in (pair.fe, *pair.be):
        assert logged(daemon, "neither authenticated nor encrypted")() != encrypted(pair)


def test_much_to_say(pair: Cluster) -> None:
    """Messages longer than a TLS record, and many of them."""
    upload_many(pair, 40, 1 << 20, "-H", "Expect:")
    done = pair.client.run("ab", "-q", "-s", "60", "-n", "4000", "-c", "64",
                           f"http://{pair.VIP}/1k")
    assert pair.fe
    left = [d.ctl("status")["counters"] for d in (pair.fe, *pair.be)]
    assert "Complete requests:      4000" in done.stdout
    assert "Failed requests:        0" in done.stdout, (done.stdout, left)
    settle(pair)


def test_strangers(pair: Cluster) -> None:
    """Whatever comes to the control port, those who belong there go on."""
    assert pair.fe
    other = Channel(b"another secret of ours", False)
    other.shake_hands()
    hello = other.to_send()
    for data in (b"", b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), hello, hello[:100],
                 b"\x16\x03\x01\xff\xff" + os.urandom(3000),
                 b"TC\x03\x01\xff\xff\xff\xff" + bytes(8)):
        with pair.fe_host.connect(pair.be_hosts[0].address, 666, timeout=5) as s:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while s.recv(65536):
                    pass
    assert len(body(read_all(_ask(pair)))) == 1024
    assert pair.fe.ctl("servers")[0]["connperbe"] == 2
    assert pair.be[0].process.poll() is None


def _ask(c: Cluster) -> socket.socket:
    s = c.client.connect(c.VIP)
    s.sendall(REQUEST)
    return s


class Relay:
    """In the way of the control connections: passes everything on, and when told spoils a byte, or
    loses what the back end says behind an offer."""

    def __init__(self, host: Host):
        self.host = host
        self.spoil = 0
        self.spoilt = 0
        self.lose = False
        self.victim: tuple[socket.socket, socket.socket] | None = None
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = host.inside(lambda: socket.create_server((host.address, 667)))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                left, _ = self.listener.accept()
                try:
                    right = self.host.connect(self.host.address, 666)
                except OSError:
                    left.close()
                    continue
                self.pairs.append((left, right))
                for a, b in ((left, right), (right, left)):
                    threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def cut(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self.pairs.remove(pair)
        for s in pair:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def _pass(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(a.recv(65536)):
                if self.spoil and len(data) > 30:
                    self.spoil -= 1
                    self.spoilt += 1
                    data[len(data) // 2] ^= 0x20
                if self.lose and len(data) > 100:
                    self.lose = False
                    self.victim = a, b
                if self.victim != (b, a):
                    b.sendall(data)
        for s in (a, b):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


def test_what_was_changed_is_not_believed(mode: dict[str, Any]) -> None:
    """It ends the connection that it came by, and a new one follows."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    relay = Relay(c.be_hosts[0])
    try:
        line = f"\nsecret = {secret_file(c, 'secret')}"
        c.be_conf += line
        c.be = [Daemon(c.be_hosts[0], "be", c.be_text(c.be_hosts[0]))]
        c.fe = Daemon(c.fe_host, "fe", c.fe_text().replace(" 666", " 667") + line + "\n")
        c.connected()
        c.nginx[0].file("1k", size=1024)
        for n in range(4):
            relay.spoil = 1
            wait_for(lambda n=n: relay.spoilt == n + 1, "a spoilt message")
            wait_for(lambda n=n: sum(d.log.read_text().count("tampered with")
                                     for d in (c.fe, c.be[0]) if d) == n + 1, "the end of it")
            c.connected()
            assert len(body(read_all(_ask(c)))) == 1024
            settle(c)
        assert c.fe.ctl("status")["counters"]["handed"] == 4
    finally:
        relay.listener.close()
        c.close()


@pytest.mark.parametrize("left", [1, 0])
def test_an_answer_that_is_lost(mode: dict[str, Any], left: int) -> None:
    """A back end adopted a connection, and the control connection broke before it could say so. No
    other one may get the connection, and nobody serves its request again: the answer comes by
    another control connection, or by the next one, if all break."""
    c = Cluster(2, **mode, rules=[(0, "^/"), (1, ".*")], start=False)
    relay = Relay(c.be_hosts[0])
    try:
        c.be = [Daemon(h, "be", c.be_text(h)) for h in c.be_hosts]
        c.fe = Daemon(c.fe_host, "fe", c.fe_text().replace("33 666", "33 667"))
        c.connected()
        relay.lose = True
        with c.client.connect(c.VIP) as s:
            s.sendall(b"PUT /up/x HTTP/1.1\r\nHost: lab\r\nContent-Length: 10\r\n"
                      b"Connection: close\r\n\r\n" + b"x" * 5)
            wait_for(lambda: relay.victim, "the offer")
            wait_for(lambda: c.be[0].ctl("status")["counters"]["adopted"] == 1, "the adoption")
            assert c.fe.ctl("status")["counters"]["handed"] == 0
            for pair in list(relay.pairs)[left:] if left == 0 else [relay.victim]:
                relay.cut(pair)  # type: ignore[arg-type]
            s.sendall(b"x" * 5)
            assert b" 201 Created" in read_all(s)
        wait_for(lambda: c.fe.ctl("status")["counters"]["closed"] == 1,  # type: ignore[union-attr]
                 "the end")
        assert c.fe.ctl("status")["counters"]["handed"] == 1
        assert [b.ctl("status")["counters"]["adopted"] for b in c.be] == [1, 0]
        assert [r["request"] for r in c.nginx[0].seen()] == ["PUT /up/x HTTP/1.1"]
        assert c.nginx[1].seen() == []
    finally:
        relay.listener.close()
        c.close()
