# SPDX-License-Identifier: GPL-2.0-or-later
"""Each step of stopping is done, whatever became of the others."""
from __future__ import annotations

import asyncio

import pytest

from tcpha.undoing import Step, Undoing, each


def test_each_step_is_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def step(name: str) -> Step:
        def work() -> None:
            done.append(name)
            raise OSError(name)

        async def later() -> None:
            work()
        return name, later if name == "c" else work
    each(step("a"), step("b"))
    undoing = Undoing()
    for name in "cde":
        undoing.push(*step(name))
    asyncio.run(undoing.undo())
    assert done == ["a", "b", "e", "d", "c"]
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == done
