# SPDX-License-Identifier: GPL-2.0-or-later
"""The first messages on a control connection, both ways: who is there, and does it fit.

HELLO's body is JSON, so that versions that differ can still tell each other why they part:
role, version (of the messages), instance (a random number for each start), vaddrs, clock
(CLOCK_MONOTONIC, nanoseconds), and on refusal error. A front end says its ports, a back end places
and server, and one that registers says rule. What a peer does not know it passes over.

With a shared secret, the connection is TLS 1.3 with that as its pre-shared key, see _fast/tls.pyx:
each side knows that the other has the secret, and nobody else reads or changes what is said.
"""
from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tcpha._fast.message import HEADER_SIZE, HELLO, VERSION, clock, encode_hello
from tcpha._fast.tls import Channel, TlsError

log = logging.getLogger("tcpha")
LIMIT = 65536
MOST_HELLO = LIMIT - HEADER_SIZE - 32  # bytes of a body; its clock may have more digits later
MAGIC = 0x5443
PLAIN, HANDSHAKE = b"T", b"\x16"  # what a connection begins with: a message, or a TLS record
STRANGER = "the peer does not speak TCPHA's control protocol"
NO_SECRET = "one side has a shared secret and the other has none; set 'secret' on both"
WRONG_SECRET = "the shared secrets differ; install the same file on both"
PATIENCE = 3.0  # seconds for the whole exchange
TEXT = 256  # characters, in what is no rule
# what its numbers may be, if it is less than 64 bits hold
BELOW = {"port": 1 << 16, "version": 1 << 8, "clock": 1 << 62, "mtu": 1 << 32}
KEEPALIVE = 5, 2, 3  # seconds of silence, between probes, and how many of those
TCP_USER_TIMEOUT = 18


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
    server: int = 0  # of a back end: as in message SERVER, of its first place
    mtu: int = 0  # of a back end: where packets for it arrive
    rule: list[str] = field(default_factory=list)
    error: str = ""
    vaddrs: list[str] = field(default_factory=list)  # all; of an older peer none, and vaddr counts
    # of a front end: those of its services; an older one says none, and knows no message PLACE
    ports: list[int] = field(default_factory=list)
    # of a back end, for each application: [vaddr, vport, as in message PLACE]
    places: list[list[Any]] = field(default_factory=list)

    def body(self) -> bytes:
        self.clock = clock()
        return json.dumps(asdict(self)).encode()


def registration(vaddrs: Sequence[str], port: int, rules: list[str], instance: str) -> Hello:
    """What a back end says that joins. rules: each as Rule.text."""
    return Hello("be", vaddrs[0], port, instance=instance, rule=rules, vaddrs=list(vaddrs))


def new_instance() -> str:
    return secrets.token_hex(8)


class _Wire:
    """A connection before the workers have it: a socket, and what encrypts it if something does."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.channel: Channel | None = None
        self.ahead = b""  # received, and not looked at yet

    async def _more(self, count: int) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.sock, count)
        if not data:
            raise HelloError("the peer closed the connection during HELLO")
        self.ahead += data

    async def _write(self, data: bytes) -> None:
        if data:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def _exactly(self, count: int) -> bytes:
        """So many bytes. What the peer says next stays in the channel, or else in the socket."""
        if self.channel is None:
            while len(self.ahead) < count:
                await self._more(count - len(self.ahead))
            out, self.ahead = self.ahead[:count], self.ahead[count:]
            return out
        out = b""
        while len(out) < count:
            piece = self.channel.read(count - len(out))
            if not piece:
                await self._more(LIMIT)
                self.channel.received(self.ahead)
                self.ahead = b""
            out += piece
        return out

    async def send(self, body: bytes) -> None:
        data = bytes(encode_hello(body))
        if self.channel is not None:
            self.channel.write(data)
            data = self.channel.to_send()
        await self._write(data)

    async def receive(self) -> tuple[bytes, int]:
        """(the body of a HELLO, its version)."""
        head = await self._exactly(HEADER_SIZE)
        magic, version, kind, length, _ = struct.unpack("!HBBIQ", head)
        if magic != MAGIC or kind != HELLO or not HEADER_SIZE <= length <= LIMIT:
            raise HelloError(STRANGER)
        return await self._exactly(length - HEADER_SIZE), version

    async def encrypt(self, secret: bytes, server: bool) -> None:
        """Agree on keys. Returns without any if the peer has no secret and says HELLO instead."""
        channel = Channel(secret, server)
        try:
            while not channel.established:
                channel.received(self.ahead)
                self.ahead = b""
                channel.shake_hands()
                await self._write(channel.to_send())
                if not channel.established:
                    await self._more(LIMIT)
                    if self.ahead[:1] == PLAIN:
                        return
        except TlsError:
            with contextlib.suppress(OSError):
                await self._write(channel.to_send())
            raise HelloError(STRANGER if server and not channel.claimed else WRONG_SECRET) from None
        self.channel = channel

    async def peek(self) -> bytes:
        """The first byte of what the peer says first."""
        await self._more(LIMIT)
        return self.ahead[:1]


def _check_text(text: object, name: str, most: int) -> None:
    """What a peer says is shown to people, and must not pass for anything else there."""
    if not isinstance(text, str) or not text.isprintable() or len(text) > most:
        raise ValueError(f"{name} is no line of text, or too long")


def _check_number(number: object, name: str, least: int, below: int) -> None:
    if type(number) is not int or not least <= number < below:
        raise ValueError(f"{name} is out of range")


def _check_address(address: object) -> None:
    """Addresses are compared as text. Which families we serve is not the question here."""
    if not isinstance(address, str) or "%" in address or \
            str(ipaddress.ip_address(address)) != address:
        raise ValueError("a virtual address is none")


def _check_fields(hello: Hello) -> None:
    for name, default in asdict(Hello("", "")).items():
        value = getattr(hello, name)
        if type(value) is not type(default):
            raise TypeError(f"{name} is no {type(default).__name__}")
        if type(value) is int:
            _check_number(value, name, 0, BELOW.get(name, 1 << 64))
        if type(value) is str:
            _check_text(value, name, TEXT)
    for rule in hello.rule:
        _check_text(rule, "a rule", LIMIT)
    for vaddr in hello.vaddrs:
        _check_address(vaddr)
    for port in hello.ports:
        _check_number(port, "a port", 1, 1 << 16)
    for place in hello.places:
        if type(place) is not list or len(place) != 3:
            raise ValueError("a place is no list of three")
        vaddr, vport, said = place
        _check_address(vaddr)
        _check_number(vport, "the port of a place", 0, 1 << 16)
        _check_number(said, "what a place says", 0, 1 << 64)


def _read(body: bytes, version: int) -> Hello:
    try:
        values: dict[str, Any] = json.loads(body)
        hello = Hello(**{k: v for k, v in values.items() if k in Hello.__dataclass_fields__})
        _check_fields(hello)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise HelloError(f"the peer's HELLO is malformed: {error}") from None
    if hello.error:
        raise HelloError(f"the peer refuses: {hello.error}")
    if version != VERSION or hello.version != VERSION:
        raise HelloError(f"the peer speaks protocol version {hello.version}, we speak {VERSION}; "
                         "install the same release on both")
    return hello


async def call(sock: socket.socket, mine: Hello,
               secret: bytes | None) -> tuple[Hello, Channel | None]:
    """Begin the exchange on a connection of ours. (the peer's HELLO, what encrypts the
    connection)."""
    wire = _Wire(sock)
    if secret:
        await wire.encrypt(secret, False)
    if not secret or wire.channel:
        await wire.send(mine.body())
    hello = _read(*await wire.receive())
    if secret and not wire.channel:
        raise HelloError(NO_SECRET)
    return hello, wire.channel


async def answer(sock: socket.socket, mine: Hello, secret: bytes | None,
                 judge: Callable[[Hello], Awaitable[None]]) -> tuple[Hello, Channel | None]:
    """Answer a peer that has connected. judge: raises HelloError if it does not fit, which the peer
    is told."""
    wire = _Wire(sock)
    first = await wire.peek()
    try:
        if first not in (PLAIN, HANDSHAKE):
            raise HelloError(STRANGER)
        if (first == HANDSHAKE) != bool(secret):
            raise HelloError(NO_SECRET)
    except HelloError as error:
        mine.error = str(error)
        await wire.send(mine.body())
        raise
    if secret:
        await wire.encrypt(secret, True)
    try:
        hello = _read(*await wire.receive())
        await judge(hello)
    except HelloError as error:
        mine.error = str(error)
        await wire.send(mine.body())
        raise
    await wire.send(mine.body())
    return hello, wire.channel


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
        await asyncio.sleep(0)  # where more of them wait, nothing else has its turn before that


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice that the peer's host has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip((socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT),
                             KEEPALIVE, strict=True):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def give_up_after(sock: socket.socket, seconds: float) -> None:
    """Let the kernel break a connection on which what we said was not acknowledged for so long. A
    host that has vanished says no goodbye, and the retransmissions alone go on for a quarter of an
    hour."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(seconds * 1000))


async def until_closed(sock: socket.socket) -> None:
    """Wait for the end of a connection on which the peer says nothing more."""
    while await asyncio.get_running_loop().sock_recv(sock, 4096):
        pass


def check(hello: Hello, role: str, vaddrs: Sequence[str]) -> None:
    """Raise HelloError if the peer is not the role that we expect, or has no virtual address in
    common with us. Where the back end lacks some, the front end gives it none of their requests."""
    if hello.role != role:
        raise HelloError(f"the peer is a '{hello.role}', not a '{role}'; check address and port")
    theirs = hello.vaddrs or [hello.vaddr]
    if not set(theirs) & set(vaddrs):
        raise HelloError(f"the peer serves vaddr {', '.join(theirs)}, we serve "
                         f"{', '.join(vaddrs)}; make both configurations agree")
