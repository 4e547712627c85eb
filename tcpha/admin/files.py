# SPDX-License-Identifier: GPL-2.0-or-later
"""Control files, for the seed's shell habits: 'echo VALUE >> DIR/ktcphafe/dbglevel'.

Each holds the present value. After a write the last line is taken as the new one, and the file is
rewritten. Changes are noticed by inotify.
"""
from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tcpha.admin.server import Refused

log = logging.getLogger("tcpha")
IN_CLOSE_WRITE = 8
Setter = Callable[[str], Awaitable[Any]]


class ControlFiles:
    """entries: {file name: (what the file shows, what a write does)}."""

    def __init__(self, directory: Path, entries: dict[str, tuple[Callable[[], Any], Setter]]):
        self.directory = directory
        self.entries = entries
        self.tasks: set[asyncio.Task[None]] = set()
        directory.mkdir(exist_ok=True)
        for name in entries:
            self._show(name)
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(directory),
                                                 IN_CLOSE_WRITE) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {directory}")
        asyncio.get_running_loop().add_reader(self.fd, self._changed)

    def _show(self, name: str) -> None:
        # written beside and renamed, so that our own writing is no event
        scratch = self.directory.parent / f".{self.directory.name}.{name}"
        scratch.write_text(f"{self.entries[name][0]()}\n")
        scratch.chmod(0o600)
        os.replace(scratch, self.directory / name)

    def _changed(self) -> None:
        data = os.read(self.fd, 65536)
        names = set()
        while data:
            length = struct.unpack_from("iIII", data)[3]
            names.add(data[16:16 + length].rstrip(b"\0").decode(errors="replace"))
            data = data[16 + length:]
        for name in names & self.entries.keys():
            task = asyncio.get_running_loop().create_task(self._take(name))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _take(self, name: str) -> None:
        path = self.directory / name
        try:
            lines = path.read_text().split()
            if lines:
                await self.entries[name][1](lines[-1])
        except (OSError, UnicodeDecodeError, Refused) as error:
            log.warning("%s: %s", path, error)
        self._show(name)

    def refresh(self) -> None:
        """Show present values, after they changed otherwise."""
        for name in self.entries:
            self._show(name)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)
        for name in self.entries:
            (self.directory / name).unlink(missing_ok=True)
        self.directory.rmdir()
