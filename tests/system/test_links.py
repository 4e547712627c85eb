# SPDX-License-Identifier: GPL-2.0-or-later
"""Control connections whose peers say much, or listen little."""
from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tcpha._fast.message import PING, PONG, encode, encode_hello
from tcpha.control.hello import Hello, answer, new_instance
from tcpha.lab.bed import Cluster, wait_for
from tests.support.client import REQUEST, body, read_all

pytestmark = pytest.mark.modes("direct")  # whatever the datapath, the event loop is the same
PINGS = 1 << 16
CHUNK = encode(PING, 0) * PINGS
LINKS = 2
FEW = 200  # chunks: what a daemon is slow with comes after thousands


@pytest.fixture(scope="module")
def pair(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Two back ends, of which rules name the first one."""
    c = Cluster(2, **mode, rules=[(0, ".*")], fe_conf=f"connperbe = {LINKS}")
    try:
        for n in c.nginx:
            n.file("1k", size=1024)
        yield c
    finally:
        c.close()


def receive(s: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = s.recv(count - len(got))
        assert more
        got += more
    return got


def message(s: socket.socket) -> bytes:
    head = receive(s, 16)
    return head + receive(s, int.from_bytes(head[4:8]) - 16)


def pongs(s: socket.socket) -> Iterator[int]:
    """How many have come, again and again."""
    data, heard = b"", 0
    while more := s.recv(1 << 20):
        data, at = data + more, 0
        while (left := len(data) - at) >= 16 and (
                size := int.from_bytes(data[at + 4:at + 8])) <= left:
            heard += data[at + 3] == PONG
            at += size
        data = data[at:]
        yield heard


def as_front_end(c: Cluster) -> socket.socket:
    """A control connection to the first back end, from where front ends may come."""
    s = c.fe_host.connect(c.be_hosts[0].address, 666)
    s.sendall(encode_hello(Hello("fe", c.VIP, 80, "direct", instance=new_instance()).body()))
    assert b"error" in message(s)
    return s


async def welcome(_: Hello) -> None:
    """Whoever it is."""


def served(c: Cluster) -> bool:
    with c.client.connect(c.VIP) as s:
        s.sendall(REQUEST)
        return len(body(read_all(s))) == 1024


@contextmanager
def flood(*sockets: socket.socket) -> Iterator[list[int]]:
    """PINGs on each as fast as they are taken. What comes back is read. How many times PINGS each
    has sent."""
    over = threading.Event()
    sent = [0] * len(sockets)

    def say(n: int) -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                sockets[n].sendall(CHUNK)
                sent[n] += 1

    def listen(s: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while s.recv(1 << 20):
                pass
    threads = [threading.Thread(target=say, args=(n,)) for n in range(len(sockets))] + \
        [threading.Thread(target=listen, args=(s,)) for s in sockets]
    for t in threads:
        t.start()
    try:
        wait_for(lambda: min(sent) > 5, "a flood")
        yield sent
        assert all(t.is_alive() for t in threads)
    finally:
        over.set()
        for s in sockets:
            s.shutdown(socket.SHUT_RDWR)
        for t in threads:
            t.join()


def test_who_listens_late_hears_all(pair: Cluster) -> None:
    """Nothing is left out for want of room, and nobody fills our memory: who does not read what he
    gets is not read either."""
    with as_front_end(pair) as s:
        sent = 0
        s.setblocking(False)
        while sent < 64 * len(CHUNK) and select.select([], [s], [], 1)[1]:
            sent += s.send(CHUNK[sent % len(CHUNK):])
        assert sent < 64 * len(CHUNK)
        s.settimeout(30)
        rest = threading.Thread(target=s.sendall, args=(CHUNK[sent % len(CHUNK):],))
        rest.start()  # of the message that was cut, at least
        heard = 0
        for heard in pongs(s):
            if heard == (sent // len(CHUNK) + 1) * PINGS:
                break
        assert heard == (sent // len(CHUNK) + 1) * PINGS
        rest.join()


def test_a_back_end_goes_on_beside_a_flood(pair: Cluster) -> None:
    """Control connections that break are closed, though a worker always has something to do."""
    with as_front_end(pair) as s, flood(s) as sent:
        begun = sent[0]
        for _ in range(5):
            as_front_end(pair).close()
            assert pair.be[0].ctl("status")["counters"]
        assert sent[0] - begun < FEW
        assert served(pair)


def test_a_front_end_goes_on_beside_a_flood(pair: Cluster) -> None:
    """Rules are put in force though workers always have something to do."""
    assert pair.fe
    fe, host = pair.fe, pair.be_hosts[1]
    pair.be[1].stop()
    listener = host.inside(lambda: socket.create_server((host.address, 666)))
    listener.settimeout(30)
    links = []
    for _ in range(LINKS):
        s = listener.accept()[0]
        s.setblocking(False)
        asyncio.run(answer(s, Hello("be", pair.VIP, instance="played"), None, welcome))
        s.setblocking(True)
        links.append(s)
    try:
        with flood(*links) as sent:
            begun = sent[0]
            for _ in range(3):
                fe.ctl("reload")
            assert sent[0] - begun < FEW
            assert served(pair)
    finally:
        listener.close()
        pair.be[1].start()
    wait_for(lambda: [s["state"] for s in fe.ctl("servers")] == ["up"] * 2, "both back ends up")
