# SPDX-License-Identifier: GPL-2.0-or-later
"""Control files, which are written to with echo."""
from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from tcpha.daemon.control_files import ControlFiles


def test_a_write_to_a_control_file_that_was_replaced_many_times_since(tmp_path: Path) -> None:
    """Its event waits while the value changes otherwise, again and again: it still counts. What
    was replaced is not kept open for ever."""
    value, taken = 0, []

    async def take(text: str) -> None:
        nonlocal value
        value = int(text)
        taken.append(value)

    async def daemon() -> int:
        nonlocal value
        files = ControlFiles(tmp_path / "control", {"level": (lambda: value, take)})
        present = tmp_path / "control" / "level"
        try:
            with present.open("a") as f:
                f.write("1000\n")
            for value in range(1, 100):
                files.refresh()
                assert present.read_text() == f"{value}\n"
            while present.read_text() != "1000\n":
                await asyncio.sleep(0.01)
            for value in range(100):
                files.refresh()
                assert present.read_text() == f"{value}\n"
                await asyncio.sleep(0)
            return len(os.listdir("/proc/self/fd"))
        finally:
            files.close()
    assert asyncio.run(asyncio.wait_for(daemon(), 30)) < len(os.listdir("/proc/self/fd")) + 40
    assert taken == [1000]
    assert not (tmp_path / "control").exists()


def test_writes_to_control_files_when_the_queue_of_events_is_full(tmp_path: Path) -> None:
    """The kernel keeps 16,384 events by default, and says when some were lost."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = ("a", "b", "c")
    taken: dict[str, list[str]] = {name: [] for name in names}

    async def daemon() -> None:
        def entry(name: str) -> Any:
            async def take(text: str) -> None:
                taken[name].append(text)
            return lambda: len(taken[name]), take
        files = ControlFiles(tmp_path / "control", {name: entry(name) for name in names})
        try:
            for n in range(most + 10):  # of equal events one behind the other, one is kept
                (tmp_path / "control" / names[n % 2]).open("a").close()
            with (tmp_path / "control" / "c").open("a") as f:
                f.write("7\n")
            while not taken["c"]:
                await asyncio.sleep(0.01)
        finally:
            files.close()
    asyncio.run(asyncio.wait_for(daemon(), 60))
    assert taken == {"a": [], "b": [], "c": ["7"]}
