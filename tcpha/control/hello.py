# SPDX-License-Identifier: GPL-2.0-or-later
"""The first messages on a control connection, both ways: who is there, and does it fit.

HELLO's body is JSON, so that versions that differ can still tell each other why they part:
role, version (of the messages), instance (a random number for each start), vaddr, clock
(CLOCK_MONOTONIC, nanoseconds), server, and on refusal error. A back end that registers says rule.

With a shared secret each HELLO has a nonce, and both sides prove that they know the secret before
anything else is said: HMAC-SHA256 (RFC 2104) of the prover's place and both HELLOs, first the one
that connected. This tells who connects; it does not protect what is said afterwards.
"""
from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from tcpha._fast.message import HEADER_SIZE, HELLO, VERSION, encode_hello

log = logging.getLogger("tcpha")
LIMIT = 65536
CLIENT, SERVER = b"client", b"server"
STRANGER = "the peer does not speak TCPHA's control protocol"
NO_SECRET = "one side has a shared secret and the other has none; set 'secret' on both"
WRONG_SECRET = "the shared secrets differ; install the same file on both"
PATIENCE = 3.0  # seconds for the whole exchange
KEEPALIVE = 5, 2, 3  # seconds of silence, between probes, and how many of those


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
    fastpath: bool = False  # of a back end: it adopts by cookie
    server: int = 0  # of a back end: as in message SERVER
    nonce: str = ""
    rule: list[str] = field(default_factory=list)
    error: str = ""

    def body(self) -> bytes:
        self.clock = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return json.dumps(asdict(self)).encode()


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


async def _send(sock: socket.socket, body: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, bytes(encode_hello(body)))


async def _receive(sock: socket.socket) -> tuple[bytes, int]:
    """(the body of one message of HELLO's kind, its version). Reads not a byte beyond it."""
    head = await _exactly(sock, HEADER_SIZE)
    magic, version, kind, length, _ = struct.unpack("!HBBIQ", head)
    if magic != 0x5443 or kind != HELLO or not HEADER_SIZE <= length <= LIMIT:
        raise HelloError(STRANGER)
    return await _exactly(sock, length - HEADER_SIZE), version


def _read(body: bytes, version: int) -> tuple[Hello, int]:
    """(the HELLO, our clock less the peer's in ns)."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    try:
        values: dict[str, Any] = json.loads(body)
        hello = Hello(**{k: v for k, v in values.items() if k in Hello.__dataclass_fields__})
        for name, default in asdict(Hello("", "")).items():
            if type(getattr(hello, name)) is not type(default):
                raise TypeError(f"{name} is no {type(default).__name__}")
        if not all(isinstance(rule, str) for rule in hello.rule):
            raise TypeError("a rule is no text")
        delta = now - hello.clock
    except (ValueError, TypeError, AttributeError) as error:
        raise HelloError(f"the peer's HELLO is malformed: {error}") from None
    if hello.error:
        raise HelloError(f"the peer refuses: {hello.error}")
    if version != VERSION or hello.version != VERSION:
        raise HelloError(f"the peer speaks protocol version {hello.version}, we speak {VERSION}; "
                         "install the same release on both")
    return hello, delta


def _proof(secret: bytes, place: bytes, said: list[bytes]) -> bytes:
    digests = b"".join(hashlib.sha256(body).digest() for body in said)
    return hmac.digest(secret, place + digests, "sha256")


async def _prove(sock: socket.socket, secret: bytes, place: bytes, said: list[bytes]) -> None:
    await _send(sock, _proof(secret, place, said))


async def _verify(sock: socket.socket, secret: bytes, place: bytes, said: list[bytes]) -> None:
    body, _ = await _receive(sock)
    if not hmac.compare_digest(body, _proof(secret, place, said)):
        raise HelloError(WRONG_SECRET)


async def call(sock: socket.socket, mine: Hello, secret: bytes | None) -> tuple[Hello, int]:
    """Begin the exchange on a connection of ours. (the peer's HELLO, our clock less its in ns)."""
    mine.nonce = secrets.token_hex(16) if secret else ""
    ours = mine.body()
    await _send(sock, ours)
    theirs, version = await _receive(sock)
    hello, delta = _read(theirs, version)
    if bool(hello.nonce) != bool(secret):
        raise HelloError(NO_SECRET)
    if secret:
        said = [ours, theirs]
        await _prove(sock, secret, CLIENT, said)
        try:
            await _verify(sock, secret, SERVER, said)
        except HelloError:
            raise HelloError(WRONG_SECRET) from None  # it has closed, since our proof was wrong
    return hello, delta


async def answer(sock: socket.socket, mine: Hello, secret: bytes | None,
                 judge: Callable[[Hello], None]) -> tuple[Hello, int]:
    """Answer a peer that has connected. judge: raises HelloError if it does not fit, which the peer
    is told."""
    mine.nonce = secrets.token_hex(16) if secret else ""
    try:
        theirs, version = await _receive(sock)
        hello, delta = _read(theirs, version)
        if bool(hello.nonce) != bool(secret):
            raise HelloError(NO_SECRET)
        judge(hello)
    except HelloError as error:
        mine.error = str(error)
        await _send(sock, mine.body())
        raise
    ours = mine.body()
    await _send(sock, ours)
    if secret:
        said = [theirs, ours]
        await _verify(sock, secret, CLIENT, said)
        await _prove(sock, secret, SERVER, said)
    return hello, delta


async def accept_each(listener: socket.socket,
                      serve: Callable[[socket.socket, str], None]) -> None:
    """Call serve(socket, address) for each connection, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, peer = await loop.sock_accept(listener)
        except OSError as error:
            log.warning("cannot accept a control connection: %s", error.strerror)
            await asyncio.sleep(1)  # out of descriptors: others must go first
            continue
        serve(sock, peer[0])


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice that the peer's host has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip((socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT),
                             KEEPALIVE, strict=True):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def until_closed(sock: socket.socket) -> None:
    """Wait for the end of a connection on which the peer says nothing more."""
    while await asyncio.get_running_loop().sock_recv(sock, 4096):
        pass


def check(hello: Hello, role: str, vaddr: str) -> None:
    """Raise HelloError if the peer is not the role that we expect, for our VIP."""
    if hello.role != role:
        raise HelloError(f"the peer is a '{hello.role}', not a '{role}'; check address and port")
    if hello.vaddr != vaddr:
        raise HelloError(f"the peer serves vaddr {hello.vaddr}, we serve {vaddr}; "
                         "make both configurations agree")
