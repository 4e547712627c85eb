# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiling the patterns of rules, beside the loop."""
from __future__ import annotations

import asyncio

from tcpha._fast.match import Matcher, PatternError
from tcpha.beside import beside


class Compiling:
    """One list at a time, which cannot be stopped: who asked for it may be gone by the end, and the
    next one waits for that all the same. The latest result is kept for who comes again."""

    def __init__(self) -> None:
        self.patterns: list[str] = []
        self.work: asyncio.Task[Matcher] | None = None

    async def matcher(self, patterns: list[str]) -> Matcher:
        """Raises PatternError."""
        while self.work and not self.work.done() and self.patterns != patterns:
            await asyncio.wait([self.work])
        if self.work is None or self.patterns != patterns:
            self.patterns = patterns
            self.work = asyncio.create_task(beside(lambda: Matcher(patterns)))
            self.work.add_done_callback(self._ended)
        return await asyncio.shield(self.work)

    def _ended(self, work: asyncio.Task[Matcher]) -> None:
        """Who had it done may not look. What else than a pattern is to blame may be over soon."""
        if work.cancelled() or not isinstance(work.exception(), PatternError | None):
            self.work = None
