# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines of the log of which there may be many."""
from __future__ import annotations

import asyncio
import logging

import pytest

from tcpha.daemon import logs


def test_what_was_left_out_of_the_log_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MINUTE", 0.0)
    written: list[str] = []
    monkeypatch.setattr(logging.getLogger("tcpha"), "log",
                        lambda level, text, *args: written.append(text % args))

    async def say() -> None:
        lines = logs.Sparing("lines", most=7)
        for _ in range(6):
            lines.say("one")
        for n in range(6):
            lines.say(f"{n}")
        while len(written) < 8:
            await asyncio.sleep(0)
        lines.say("one")
    asyncio.run(say())
    assert written == ["one"] * 5 + ["0", "1", "lines: 5 more lines in the last minute", "one"]
