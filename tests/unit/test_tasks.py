# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done all the time goes on, whatever fails."""
from __future__ import annotations

import asyncio
import threading

import pytest

from tcpha import tasks


class Fails:
    """The first times."""

    def __init__(self, times: int):
        self.left = times

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise ValueError(f"{self.left} left")

    async def task(self) -> None:
        self()


def said(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(f"{name} failed" in r.getMessage() for r in caplog.records)


def test_tasks_and_threads_begin_again(caplog: pytest.LogCaptureFixture) -> None:
    """Each failure counts, and one line tells of those of a minute."""
    before = tasks.deaths()
    asyncio.run(tasks.persist("a task", Fails(3).task))
    asyncio.run(tasks.persist("a task of its own", Fails(3).task, again=False))
    tasks.persistent_thread("a thread", Fails(2)).join()
    after = tasks.deaths()
    for name, count in ("a task", 3), ("a task of its own", 1), ("a thread", 2):
        assert after[name] - before.get(name, 0) == count and said(caplog, name) == 1


def test_callbacks_and_other_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = tasks.deaths()

    async def fail() -> None:
        loop = asyncio.get_running_loop()
        tasks.watch(loop)
        loop.call_soon(Fails(1))
        thread = threading.Thread(target=Fails(1), name="worker-1")
        thread.start()
        await asyncio.to_thread(thread.join)
    asyncio.run(fail())
    for name in ("callback", "worker"):
        assert tasks.deaths()[name] == before.get(name, 0) + 1
