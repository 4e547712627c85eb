# SPDX-License-Identifier: GPL-2.0-or-later
"""Who does not belong here, at the ports where our daemons meet each other: what strangers say, how
many they are, and how often they come."""
from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha._fast import message
from tcpha.daemon import logs
from tcpha.lab.bed import Cluster, Daemon, Host, wait_for
from tests.support.client import read_all
from tests.support.daemons import front, joined, logged, start_back, start_front

CONTROL, CLIENTS = 666, 80  # where front ends come, and where back ends register
FORGED = "\n2026-01-01 tcphabe: forged\x1b[2J\u202e\x85"
DEEP = b"[" * 40000
ROOM = 64  # for strangers


@pytest.fixture
def plain() -> Iterator[Cluster]:
    """Both daemons take peers without a secret. Neither runs yet."""
    c = Cluster(2, start=False, rules=[(0, "^/one")])
    try:
        yield c
    finally:
        c.close()


def said(peer: str, c: Cluster, **fields: Any) -> bytes:
    known = {"role": peer, "vaddr": c.VIP, "version": message.VERSION, "port": 666, "clock": 1,
             "instance": "x", "rule": ["x"]}
    return bytes(message.encode_hello(json.dumps(known | fields).encode()))


def tell(host: Host, address: str, port: int, data: bytes, source: str = "") -> bytes:
    """Say something, and hear the answer up to the end of the connection, if that comes."""
    def dial() -> socket.socket:
        return socket.create_connection((address, port), 30, (source or host.address, 0))
    with host.inside(dial) as s, contextlib.suppress(ConnectionResetError):
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        return read_all(s)
    return b""


def more_addresses(host: Host, count: int) -> list[str]:
    found = [f"192.168.1.{100 + n}" for n in range(count)]
    host.run("ip", "-b", "-", input="".join(f"addr add {a}/24 dev eth0\n" for a in found))
    return found


def meeting_place(c: Cluster, role: str) -> tuple[Daemon, str, int, str]:
    """A daemon of a role that waits for peers, where it does, and as what they come."""
    if role == "be":
        return start_back(c, 0), c.be_hosts[0].address, CONTROL, "fe"
    start_front(c, "registration = open")
    return front(c), c.fe_host.address, CLIENTS, "be"


@pytest.mark.parametrize("role", ["be", "fe"])
def test_what_strangers_say(plain: Cluster, role: str) -> None:
    """No line of the log is theirs, nothing reaches a terminal, and nothing they say is an error of
    ours."""
    daemon, address, port, peer = meeting_place(plain, role)
    for data in (said(peer, plain, role=FORGED), said(peer, plain, vaddr=FORGED),
                 said(peer, plain, error=FORGED), said(peer, plain, error="x" * 5000),
                 said(peer, plain, instance=FORGED), said(peer, plain, rule=[FORGED]),
                 said(peer, plain, rule=["\ud800"]), said(peer, plain, clock=1 << 63),
                 said(peer, plain, clock=1 << 80), said(peer, plain, clock=-1),
                 said(peer, plain, mtu=1 << 40), said(peer, plain, server=1 << 64),
                 said(peer, plain, version=1 << 4000), said(peer, plain, vaddr="9" * 60000),
                 bytes(message.encode_hello(DEEP)), b"TC" + FORGED.encode() * 9):
        tell(plain.client, address, port, data)
    text = daemon.log.read_text()
    assert "internal error" not in text and "Traceback" not in text
    assert all("forged" not in line or "refused" in line for line in text.split("\n"))
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert max(map(len, text.split("\n"))) < 500
    assert "out of range" in text
    assert daemon.process.poll() is None


def test_what_passes_for_a_back_end_says(plain: Cluster) -> None:
    """The front end connects to it, shows what it says, and tries again."""
    answers = [said("be", plain, error=FORGED), said("be", plain, vaddr=FORGED),
               said("be", plain, server=1 << 70), said("be", plain, mtu=-1),
               bytes(message.encode_hello(DEEP))]
    left = list(answers)
    host = plain.be_hosts[0]
    listener = host.inside(lambda: socket.create_server((host.address, CONTROL)))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                s, _ = listener.accept()
                with s:
                    s.recv(65536)
                    s.sendall(left.pop(0) if left else answers[0])
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        start_front(plain)
        wait_for(lambda: not left, "all that it says")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
    start_back(plain, 0)
    wait_for(lambda: front(plain).ctl("servers")[0]["connperbe"] == 2, "the true back end")
    text = front(plain).log.read_text()
    assert "internal error" not in text
    assert all("forged" not in line or "back end" in line for line in text.split("\n"))
    assert not {c for c in text if not c.isprintable()} - {"\n"}


@pytest.mark.parametrize("role", ["be", "fe"])
def test_strangers_leave_room(plain: Cluster, role: str) -> None:
    """However many come and say nothing, and however often: peers are heard, and the log stays
    short. One address gets less than all the room."""
    daemon, address, port, _ = meeting_place(plain, role)
    sources = more_addresses(plain.client, 12)

    def come(sources: list[str]) -> list[socket.socket]:
        return [socket.create_connection((address, port), 30, (source, 0)) for source in sources]
    held = plain.client.inside(lambda: come([a for a in sources for _ in range(8)]))
    many = plain.client.inside(lambda: come(sources[-1:] * 8))
    for s in many:
        assert s.recv(1) == b""
    assert logged(daemon, "others of this address have not said HELLO")()
    assert logged(daemon, "others want to be heard, too")()
    assert sum(_ended(s) for s in held) >= len(held) - ROOM
    for _ in range(100):
        tell(plain.client, address, port, said("x", plain, role="x"))
    for n in range(60):
        tell(plain.client, address, port, said("x", plain, role=f"x{n}"))
    if role == "be":
        start_front(plain)
        wait_for(lambda: front(plain).ctl("servers")[0]["connperbe"] == 2, "the front end")
    else:
        start_back(plain, 1, "dregister = 1", f"feaddr = {address}", "rule = jpg$")
        wait_for(lambda: joined(plain) == [plain.be_hosts[1].address], "the registration")
    text = daemon.log.read_text()
    # of those who are refused, and of those who say nothing until they are given up
    assert text.count("refused:") <= 2 * logs.LINES * (1 + text.count("more lines in the last"))
    for s in (*held, *many):
        s.close()


def _ended(s: socket.socket) -> bool:
    s.setblocking(False)
    try:
        return s.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.mark.modes("fast-direct", "fast-tunnel")
def test_front_ends_come_and_go(mode: dict[str, Any]) -> None:
    """The packet path has places for eight. One that has connections here keeps its place while it
    is away; the others' are free when they are gone, for the next one, whoever it is."""
    c = Cluster(1, **mode, start=False)
    try:
        c.nginx[0].file("big", size=8 << 20)
        c.start()
        be, fe = c.be[0], front(c)

        def places() -> list[str]:
            return [f["address"] for f in be.ctl("status")["frontends"]]
        with c.client.connect(c.VIP) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(b"GET /big HTTP/1.0\r\n\r\n")
            wait_for(lambda: fe.ctl("status")["live"] == 1, "the handoff")
            fe.kill()
            for address in more_addresses(c.client, 9):
                tell(c.client, c.be_hosts[0].address, CONTROL, said("fe", c, instance=address),
                     address)
            wait_for(lambda: not any(f["connections"] for f in be.ctl("status")["frontends"]),
                     "the end of them")
            assert len(places()) == 8 and places()[0] == c.fe_host.address
            c.fe_host.address = "192.168.1.24"
            c.fe_host.ip("addr", "add", "192.168.1.24/24", "dev", "eth0")
            fe.config.write_text(fe.config.read_text().replace("1.23", "1.24"))
            fe.start()
            c.connected()
            assert len(places()) == 8 and "192.168.1.24" in places()
    finally:
        c.close()
