# SPDX-License-Identifier: GPL-2.0-or-later
"""The first message on a control connection, both ways: who is there, and does it fit.

HELLO's body is JSON, so that versions that differ can still tell each other why they part:
role, version (of the messages), instance (a random number for each start), vaddr, clock
(CLOCK_MONOTONIC, nanoseconds), server, and on refusal error.
"""
from __future__ import annotations

import asyncio
import json
import secrets
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

from tcpha._fast.message import HEADER_SIZE, HELLO, VERSION, encode_hello

LIMIT = 65536
PATIENCE = 3.0  # seconds for the whole exchange


class HelloError(Exception):
    """The peer is none of ours, or does not fit; the message says why."""


@dataclass
class Hello:
    role: str
    vaddr: str
    port: int = 0
    forward: str = ""
    datapath: str = ""
    version: int = VERSION
    instance: str = ""
    clock: int = 0
    server: int = 0  # of a back end: as in message SERVER
    error: str = ""

    def pack(self) -> bytes:
        self.clock = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return bytes(encode_hello(json.dumps(asdict(self)).encode()))


def new_instance() -> str:
    return secrets.token_hex(8)


async def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    loop = asyncio.get_running_loop()
    while len(data) < count:
        more = await loop.sock_recv(sock, count - len(data))
        if not more:
            raise HelloError("the peer closed the connection during HELLO")
        data += more
    return bytes(data)


async def receive(sock: socket.socket) -> tuple[Hello, int]:
    """(the peer's HELLO, our clock less the peer's in ns). Reads not a byte beyond it."""
    head = await _exactly(sock, HEADER_SIZE)
    magic, version, kind, length, _ = struct.unpack("!HBBIQ", head)
    if magic != 0x5443 or kind != HELLO or not HEADER_SIZE <= length <= LIMIT:
        raise HelloError("the peer does not speak TCPHA's control protocol")
    body = await _exactly(sock, length - HEADER_SIZE)
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    try:
        values: dict[str, Any] = json.loads(body)
        hello = Hello(**{k: v for k, v in values.items() if k in Hello.__dataclass_fields__})
        delta = now - int(hello.clock)
    except (ValueError, TypeError, AttributeError) as error:
        raise HelloError(f"the peer's HELLO is malformed: {error}") from None
    if hello.error:
        raise HelloError(f"the peer refuses: {hello.error}")
    if version != VERSION or hello.version != VERSION:
        raise HelloError(f"the peer speaks protocol version {hello.version}, we speak {VERSION}; "
                         "install the same release on both")
    return hello, delta


def check(hello: Hello, role: str, vaddr: str) -> None:
    """Raise HelloError if the peer is not the role that we expect, for our VIP."""
    if hello.role != role:
        raise HelloError(f"the peer is a '{hello.role}', not a '{role}'; check address and port")
    if hello.vaddr != vaddr:
        raise HelloError(f"the peer serves vaddr {hello.vaddr}, we serve {vaddr}; "
                         "make both configurations agree")
