# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done all the time goes on, whatever fails."""
from __future__ import annotations

import asyncio
import threading

import pytest

from tcpha import tasks
from tcpha.daemon import periodic


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


def test_periodic_work_has_its_turn_whatever_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Be it another one's failure, or its own."""
    before = tasks.deaths()

    async def work() -> None:
        done = {name: asyncio.Event() for name in ("function", "coroutine", "late")}

        class Work:
            def __init__(self, name: str, times: int):
                self.name, self.fails = name, Fails(times)

            def function(self) -> None:
                self.fails()
                done[self.name].set()

            async def coroutine(self) -> None:
                self.function()
        periodic.keep_doing([
            periodic.Every(periodic.EACH_TICK, Work("function", 3).function, "a function"),
            periodic.Every(lambda: 3600.0, Work("coroutine", 2).coroutine, "a coroutine"),
            periodic.Every(3600.0, Work("late", 1).function),
            periodic.Every(periodic.EACH_TICK, Fails(1 << 30), "one that always fails")], spawn)
        for name in "function", "coroutine":
            await done[name].wait()
        assert not done["late"].is_set()  # its turn is in an hour
        for task in running:
            task.cancel()
        await asyncio.wait(running)
    running: list[asyncio.Task[None]] = []

    def spawn(name: str, work: tasks.Work) -> None:
        running.append(asyncio.get_running_loop().create_task(tasks.persist(name, work)))
    asyncio.run(work())
    after = tasks.deaths()
    for name, count in ("a function", 3), ("a coroutine", 2):
        assert after[name] - before.get(name, 0) == count and said(caplog, name) == 1
    assert after["tick"] == before.get("tick", 0)
