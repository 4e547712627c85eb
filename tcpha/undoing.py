# SPDX-License-Identifier: GPL-2.0-or-later
"""Undoing, each step on its own: what one of them raises is logged, and the others are done."""
from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("tcpha")
Step = tuple[str, Callable[[], Any]]  # what it is about, and what to do


def _failed(what: str, error: Exception) -> None:
    log.error("while stopping: %s: %r; the rest is done all the same", what, error, exc_info=error)


def each(*steps: Step) -> None:
    for what, work in steps:
        try:
            work()
        except Exception as error:
            _failed(what, error)


class Undoing:
    """What is to be done in the end, the latest first."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def push(self, what: str, work: Callable[[], Any]) -> None:
        """work: a function or a coroutine function."""
        self.steps.append((what, work))

    async def undo(self) -> None:
        while self.steps:
            what, work = self.steps.pop()
            try:
                done = work()
                if inspect.isawaitable(done):
                    await done
            except Exception as error:
                _failed(what, error)
