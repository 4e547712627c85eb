# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose word counts, when a connection is said to be over."""
from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha._fast.message import CLOSED, PING, PONG, encode
from tcpha.control.hello import Hello, answer
from tcpha.lab.bed import Cluster, wait_for
from tests.support.client import ask
from tests.support.daemons import front
from tests.support.wire import handshake_ack

pytestmark = pytest.mark.modes("fast-direct")  # where a request keeps its id at the next back end


@pytest.fixture
def pair(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Two back ends, of which rules name the first one. Of the second, we have the port."""
    c = Cluster(2, **mode, rules=[(0, ".*")], fe_conf="dtcinterval = 0")
    try:
        c.nginx[0].file("1k", size=1024)
        yield c
    finally:
        c.close()


async def welcome(_: Hello) -> None:
    """Whoever it is."""


def as_back_end(c: Cluster) -> list[socket.socket]:
    """The front end's control connections to the second back end, in whose place we are."""
    host, links = c.be_hosts[1], []
    c.be[1].stop()
    with host.inside(lambda: socket.create_server((host.address, 666))) as listener:
        listener.settimeout(30)
        for _ in range(2):
            s = listener.accept()[0]
            s.setblocking(False)
            asyncio.run(answer(s, Hello("be", c.VIP, instance="played"), None, welcome))
            s.settimeout(30)
            links.append(s)
    return links


def test_another_back_end_ends_nothing(pair: Cluster) -> None:
    """A back end that was cut off when it was offered a request, which another one got then, says
    later that its own connection has ended."""
    fe = front(pair)
    other, second = as_back_end(pair)
    with other, second:
        with handshake_ack(pair.client) as frames:
            s = pair.client.connect(pair.VIP)
        with s:
            ask(s)
            wait_for(lambda: fe.ctl("conns"), "the flow")
            address, port = s.getsockname()
            seq, ack = struct.unpack_from("!II", frames[0], 38)
            flow = b"".join(b"\0" * 10 + b"\xff\xff" + socket.inet_aton(a)
                            for a in (address, pair.VIP)) + struct.pack("!HH", port, 80)
            id = 1 << 63 | (seq - 1) % 2**32 << 31 | (ack - 1) % 2**32 >> 1
            other.sendall(encode(CLOSED, id, {"flow": flow, "reason": 0}) + encode(PING, 7))
            heard = b""
            while encode(PONG, 7)[:4] not in heard:
                heard += other.recv(65536)
            row, = fe.ctl("conns")
            assert row["state"] == "forward"
            ask(s)
        wait_for(lambda: not fe.ctl("conns"), "the end that counts")
