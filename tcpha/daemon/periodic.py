# SPDX-License-Identifier: GPL-2.0-or-later
"""Periodic work: declared as every so many seconds this, and done until we stop.

What fails is logged and counted, keeps nothing else from its turn, and has another one itself.
"""
from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from tcpha.tasks import died

TICK = 0.05  # seconds; nothing comes more often
EACH_TICK = 0.0


class Every(NamedTuple):
    """seconds: may be asked for anew each time. work: a function that does not wait; or a coroutine
    function, whose seconds begin at its end. name: under which failures are counted; else the
    function's."""

    seconds: float | Callable[[], float]
    work: Callable[[], Any]
    name: str = ""

    def pause(self) -> float:
        return self.seconds() if callable(self.seconds) else self.seconds

    def attempt(self) -> None:
        try:
            self.work()
        except Exception as error:  # out of file descriptors or memory; the next time may do better
            died(self.name or self.work.__qualname__, error)

    async def repeat(self) -> None:
        while True:
            await self.work()
            await asyncio.sleep(self.pause())


async def _take_turns(works: list[Every]) -> None:
    loop = asyncio.get_running_loop()
    due = [0.0] * len(works)
    while True:
        await asyncio.sleep(TICK)
        now = loop.time()
        for n, every in enumerate(works):
            if now >= due[n]:
                due[n] = now + every.pause()
                every.attempt()


def keep_doing(works: Iterable[Every], spawn: Callable[[str, Callable[[], Any]], Any]) -> None:
    """Do all of it from now on: functions one after the other as they are listed, a coroutine
    function in a task of its own. spawn: see Service.spawn()."""
    functions = []
    for every in works:
        if inspect.iscoroutinefunction(every.work):
            spawn(every.name or every.work.__qualname__, every.repeat)
        else:
            functions.append(every)
    spawn("tick", partial(_take_turns, functions))
