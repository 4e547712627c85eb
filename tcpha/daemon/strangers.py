# SPDX-License-Identifier: GPL-2.0-or-later
"""Who comes to a port that is meant for our own daemons. That may be anybody, until HELLO has shown
who it is; so strangers get little room, and can fill neither memory nor the log."""
from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from tcpha.daemon.logs import Sparing

MOST = 64      # connections on which HELLO is not over yet
FEW = 8        # of one address


class Strangers:
    """Connections on which HELLO is not over. name: of the tasks; spawn: see Service.spawn()."""

    def __init__(self, name: str, spawn: Callable[..., asyncio.Task[None]]):
        self.name = name
        self.spawn = spawn
        self.waiting: dict[asyncio.Task[Any], str] = {}  # their addresses; who came first is first
        self.refusals = Sparing("connections refused")
        self.noise = Sparing("connections that were not meant for us", logging.DEBUG)

    def meet(self, sock: socket.socket, address: str,
             serve: Callable[[socket.socket, str], Coroutine[Any, Any, None]]) -> None:
        """Run serve(), and close the socket when it ends, unless somebody else has it by then.
        Where there is no room, the one who has waited longest goes: who belongs here says HELLO at
        once. But nobody makes room for more of his own."""
        if list(self.waiting.values()).count(address) >= FEW:
            self.refuse(address, f"{FEW} others of this address have not said HELLO")
            sock.close()
            return
        if len(self.waiting) >= MOST:
            oldest = next(iter(self.waiting))
            self.refuse(self.waiting.pop(oldest), "others want to be heard, too")
            oldest.cancel()
        task = self.spawn(self.name, lambda: serve(sock, address), again=False)
        self.waiting[task] = address
        task.add_done_callback(lambda _: self._ended(task, sock))

    def known(self) -> None:
        """The one that the present task serves has said HELLO, and belongs here."""
        task = asyncio.current_task()
        assert task
        self.waiting.pop(task, None)

    def _ended(self, task: asyncio.Task[Any], sock: socket.socket) -> None:
        self.waiting.pop(task, None)
        sock.close()

    def refuse(self, address: str, why: object, noise: bool = False) -> None:
        """Say why. noise: it need not have been meant for us."""
        (self.noise if noise else self.refusals).say(f"connection from {address} refused: {why}")
