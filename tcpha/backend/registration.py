# SPDX-License-Identifier: GPL-2.0-or-later
"""Dynamic registration, the back end's half: it joins a running front end and stays as long as the
connection does."""
from __future__ import annotations

import asyncio
import logging
import os
import socket

from tcpha.config import Config
from tcpha.control.hello import (
    PATIENCE,
    HelloError,
    call,
    check,
    keep_alive,
    registration,
    until_closed,
)

log = logging.getLogger("tcpha")
BACKOFF_FIRST = 0.05  # seconds before the second attempt; doubles up to BACKOFF_MOST
BACKOFF_MOST = 1.0
ANSWER = 60.0  # seconds: the front end compiles our rules first, behind those of others


class Registration:
    """Registers, and again whenever the front end is back, while run() runs."""

    def __init__(self, config: Config, secret: bytes | None, instance: str):
        self.config = config
        self.secret = secret
        self.instance = instance
        self.registered = False

    async def run(self) -> None:
        config, told, delay = self.config, "", BACKOFF_FIRST
        front = f"{config.feaddr}:{config.feport}"
        while True:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                await self._register(sock)
                log.info("registered at the front end %s, %d rules", front, len(config.rule))
                self.registered, delay, told = True, BACKOFF_FIRST, ""
                await until_closed(sock)
                log.warning("the front end %s has ended the registration", front)
            except (TimeoutError, OSError, HelloError) as error:
                why = _reason(error)
                if why != told:
                    log.warning("cannot register at the front end %s: %s", front, why)
                told = why
            finally:
                self.registered = False
                sock.close()
            await asyncio.sleep(delay)
            delay = min(delay * 2, BACKOFF_MOST)

    async def _register(self, sock: socket.socket) -> None:
        config = self.config
        sock.setblocking(False)
        keep_alive(sock)
        sock.bind((config.raddr, 0))
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_connect(sock, (config.feaddr, config.feport))
        async with asyncio.timeout(ANSWER):
            mine = registration(config.vaddrs, config.port, [r.text for r in config.rule],
                                self.instance)
            hello, _ = await call(sock, mine, self.secret)
        check(hello, "fe", config.vaddrs)
        if not hello.ports and any(rule.conditions for rule in config.rule):
            log.warning("the front end %s is of an older release, and takes conditions of rules "
                        "for their patterns; install ours there", config.feaddr)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return ("connection refused; it does not run, or takes no registrations (it needs "
                "'secret', as we do, or 'registration = open')")
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or "no answer"
