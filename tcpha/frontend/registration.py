# SPDX-License-Identifier: GPL-2.0-or-later
"""Dynamic registration, the front end's half: back ends that are in no file join and leave.

A registration lasts as long as the connection that brought it. It comes to our own port, at our
real address.
"""
from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from tcpha._fast.match import PatternError, check_patterns
from tcpha.admin.logs import MEMBERS, Sparing
from tcpha.admin.server import Refused
from tcpha.beside import beside
from tcpha.config import Config, Rule, Server
from tcpha.control.hello import (
    PATIENCE,
    STRANGER,
    Hello,
    HelloError,
    accept_each,
    answer,
    check,
    keep_alive,
    until_closed,
)
from tcpha.control.strangers import Strangers
from tcpha.frontend.registry import Registry
from tcpha.tasks import died

log = logging.getLogger("tcpha")


class Registrar:
    """listener: bound to our real address. spawn: see Service.spawn()."""

    def __init__(self, listener: socket.socket, registry: Registry, config: Config,
                 secret: bytes | None, spawn: Callable[..., Any]):
        self.listener = listener
        self.registry = registry
        self.config = config
        self.secret = secret
        self.strangers = Strangers("registration", spawn)
        self.members = Sparing("registrations", logging.INFO, MEMBERS)

    async def run(self) -> None:
        await accept_each(self.listener, self._meet)

    def _meet(self, sock: socket.socket, address: str) -> None:
        self.strangers.meet(sock, address, self._serve)

    async def _serve(self, sock: socket.socket, address: str) -> None:
        hello = await self._greet(sock, address)
        if hello is not None:
            self.strangers.known()
            await self._keep(sock, address, hello)

    async def _keep(self, sock: socket.socket, address: str, hello: Hello) -> None:
        """The registration lasts as long as this, however it ends."""
        try:
            await self.registry.register(Server(address, hello.port),
                                         [Rule(address, p) for p in hello.rule], sock)
            self.members.say(f"back end {address}: registered, {len(hello.rule)} rules")
            await until_closed(sock)
        except Refused as error:
            self.strangers.refuse(address, error)
        except OSError as error:
            log.debug("back end %s: %s", address, error)
        except Exception as error:
            died("registration", error)
        sock.close()
        if await self.registry.unregister(address, sock):
            self.members.say(f"back end {address}: its registration has ended")

    async def _greet(self, sock: socket.socket, address: str) -> Hello | None:
        async def judge(hello: Hello) -> None:
            check(hello, "be", self.config.vaddr)
            if address == self.listener.getsockname()[0]:
                raise HelloError("a back end cannot be on the front end's host; its server can be "
                                 "the Local Node")
            if not 0 < hello.port < 65536 or not hello.rule:
                raise HelloError("a registration names a port and at least one rule")
            try:
                await beside(lambda: check_patterns(hello.rule))
            except PatternError as error:
                raise HelloError(f"a pattern does not compile: {error}") from None
            try:
                self.registry.room_for(address)
            except Refused as error:
                raise HelloError(str(error)) from None

        sock.setblocking(False)
        keep_alive(sock)
        mine = Hello("fe", self.config.vaddr, self.config.port, instance=self.registry.instance)
        try:
            async with asyncio.timeout(PATIENCE):
                return (await answer(sock, mine, self.secret, judge))[0]
        except (TimeoutError, OSError) as error:
            self.strangers.refuse(address, error or "no HELLO", noise=True)
        except HelloError as error:
            # this is a port that clients find, too
            self.strangers.refuse(address, error, noise=str(error) == STRANGER)
        return None
