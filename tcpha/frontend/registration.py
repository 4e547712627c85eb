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

from tcpha.config import Server, registered_rule
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
from tcpha.daemon.control_socket import Refused
from tcpha.daemon.logs import MEMBERS, Sparing
from tcpha.daemon.strangers import Strangers
from tcpha.frontend.registry import Registry
from tcpha.tasks import died

log = logging.getLogger("tcpha")


class Registrar:
    """listener: bound to our real address. spawn: see Service.spawn()."""

    def __init__(self, listener: socket.socket, registry: Registry, secret: bytes | None,
                 spawn: Callable[..., Any]):
        self.listener = listener
        self.registry = registry
        self.secret = secret
        self.strangers = Strangers("registration", spawn)
        self.members = Sparing("registrations", logging.INFO, MEMBERS)
        self.joining: set[str] = set()  # addresses whose rules are being compiled, or wait for that

    async def run(self) -> None:
        await accept_each(self.listener, self._meet)

    def _meet(self, sock: socket.socket, address: str) -> None:
        self.strangers.meet(sock, address, self._serve)

    async def _serve(self, sock: socket.socket, address: str) -> None:
        """The registration lasts as long as this, however it ends."""
        try:
            if await self._greet(sock, address):
                await until_closed(sock)
        except OSError as error:
            log.debug("back end %s: %s", address, error)
        except Exception as error:
            died("registration", error)
        sock.close()
        if await self.registry.unregister(address, sock):
            self.members.say(f"back end {address}: its registration has ended")

    def _see(self, hello: Hello, address: str) -> None:
        """Raise HelloError if a registration is refused whatever its patterns are."""
        check(hello, "be", self.registry.config.vaddrs)
        if address == self.listener.getsockname()[0]:
            raise HelloError("a back end cannot be on the front end's host; its server can be "
                             "the Local Node")
        if not 0 < hello.port < 65536 or not hello.rule:
            raise HelloError("a registration names a port and at least one rule")
        if address in self.joining:
            raise HelloError("the rules of an earlier registration are still being compiled")

    async def _join(self, hello: Hello, sock: socket.socket, address: str) -> None:
        """Compiling takes what time it takes, one after the other, and one for each address."""
        self.joining.add(address)
        try:
            await self.registry.register(Server(address, hello.port),
                                         [registered_rule(address, text) for text in hello.rule],
                                         sock)
        except (Refused, ValueError) as error:
            raise HelloError(str(error)) from None
        finally:
            self.joining.remove(address)
        self.strangers.known()
        self.members.say(f"back end {address}: registered, {len(hello.rule)} rules")

    async def _greet(self, sock: socket.socket, address: str) -> bool:
        """Returns whether it has registered, and knows it."""
        async def judge(hello: Hello) -> None:
            self._see(hello, address)
            if self.secret:  # it has shown that it knows that
                self.strangers.known()
            patience.reschedule(None)
            await self._join(hello, sock, address)
            patience.reschedule(asyncio.get_running_loop().time() + PATIENCE)

        sock.setblocking(False)
        keep_alive(sock)
        config = self.registry.config
        mine = Hello("fe", config.vaddr, config.port, instance=self.registry.instance,
                     vaddrs=list(config.vaddrs), ports=list(config.ports))
        try:
            async with asyncio.timeout(PATIENCE) as patience:
                await answer(sock, mine, self.secret, judge)
            return True
        except (TimeoutError, OSError) as error:
            self.strangers.refuse(address, str(error) or "no HELLO", noise=True)
        except HelloError as error:
            # this is a port that clients find, too
            self.strangers.refuse(address, error, noise=str(error) == STRANGER)
        return False
