# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon does all the time goes on. A task or a thread that fails where nobody expected it
is logged and counted, and begins again; so does whatever else of the loop fails."""
from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("tcpha")
PAUSE_FIRST, PAUSE_MOST = 0.05, 1.0  # seconds before it begins again; doubled while it fails
QUIET = 60.0  # seconds between two lines about the same failure
Work = Callable[[], Coroutine[Any, Any, None]]

_deaths: Counter[str] = Counter()
_said: dict[tuple[str, str], float] = {}  # by name and kind of failure


def deaths() -> dict[str, int]:
    """How often each has failed."""
    return dict(_deaths)


def died(name: str, error: BaseException) -> None:
    """Log and count a failure. Any thread may call it."""
    _deaths[name] += 1
    kind, now = (name, type(error).__name__), time.monotonic()
    if now < _said.get(kind, float("-inf")) + QUIET:
        return
    _said[kind] = now
    log.error("internal error: %s failed: %r", name, error, exc_info=error)


class _Pauses:
    """Between one beginning and the next."""

    def __init__(self) -> None:
        self.pause = PAUSE_FIRST
        self.began = time.monotonic()

    def next(self) -> float:
        if time.monotonic() > self.began + 2 * PAUSE_MOST:  # it went well for a while
            self.pause = PAUSE_FIRST
        pause, self.pause = self.pause, min(2 * self.pause, PAUSE_MOST)
        self.began = time.monotonic() + pause
        return pause


async def persist(name: str, work: Work, again: bool = True) -> None:
    """Do something to its end. again: it is begun anew when it fails."""
    _deaths[name] += 0  # what is counted from nothing shows when it grows
    pauses = _Pauses()
    while True:
        try:
            await work()
            return
        except Exception as error:
            died(name, error)
        if not again:
            return
        await asyncio.sleep(pauses.next())


def persistent_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """The same in a thread, which is started."""
    def run() -> None:
        pauses = _Pauses()
        while True:
            try:
                work()
                return
            except Exception as error:
                died(name, error)
            time.sleep(pauses.next())
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def watch(loop: asyncio.AbstractEventLoop) -> None:
    """Hear of what fails outside of persist(): callbacks of the loop, and other threads."""
    def of_loop(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        died("callback", context.get("exception") or RuntimeError(context["message"]))

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            died(args.thread.name.partition("-")[0] if args.thread else "thread", args.exc_value)
    loop.set_exception_handler(of_loop)
    threading.excepthook = of_thread
