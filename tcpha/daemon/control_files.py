# SPDX-License-Identifier: GPL-2.0-or-later
"""Control files, for the seed's shell habits: 'echo VALUE >> DIR/ktcphafe/dbglevel'.

Each holds the present value. After a write the last line is taken as the new one, and a fresh file
is put in place. Writes are noticed by inotify, and each of them counts: whoever has opened a file
that is replaced meanwhile writes into the old one, which is watched too.
"""
from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from tcpha.daemon.control_socket import Refused
from tcpha.daemon.rundir import make_directory
from tcpha.owner import by_owner
from tcpha.tasks import died
from tcpha.undoing import each

log = logging.getLogger("tcpha")
IN_CLOSE_WRITE, IN_IGNORED = 8, 0x8000
REPLACED = 16  # old files that are watched, of each name
Setter = Callable[[str], Awaitable[Any]]


class _Version:
    """One of the files that bore a name. fd: of a descriptor for reading."""

    def __init__(self, name: str, fd: int, text: str):
        self.name = name
        self.fd = fd
        self.text = text
        self.left = False  # no longer watched; events from before may wait

    def written(self) -> str | None:
        """The last word written since we looked last, if there is any."""
        text = os.pread(self.fd, 65536, 0).decode(errors="replace")
        fresh = text[len(self.text):] if text.startswith(self.text) else text
        self.text = text
        words = fresh.split()
        return words[-1] if words else None


class ControlFiles:
    """entries: {file name: (what the file shows, what a write does)}."""

    def __init__(self, directory: Path, entries: dict[str, tuple[Callable[[], Any], Setter]]):
        self.directory = directory
        self.entries = entries
        self.tasks: set[asyncio.Task[None]] = set()
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.versions: dict[int, _Version] = {}  # by watch descriptor, oldest first
        try:
            with by_owner():
                make_directory(directory)
            for name in entries:
                self._show(name)
        except BaseException:
            self.close()
            raise
        asyncio.get_running_loop().add_reader(self.fd, self._changed)

    def _show(self, name: str) -> None:
        """Put a file with the present value in place; it is watched before it can be found."""
        text = f"{self.entries[name][0]()}\n"
        with by_owner():
            self._put(name, text)
        same = [w for w, v in self.versions.items() if v.name == name and not v.left]
        for old in same[:-REPLACED - 1]:
            self.versions[old].left = True
            self.libc.inotify_rm_watch(self.fd, old)

    def _put(self, name: str, text: str) -> None:
        scratch = self._scratch(name)
        scratch.unlink(missing_ok=True)
        scratch.write_text(text)
        scratch.chmod(0o600)
        watch = self.libc.inotify_add_watch(self.fd, os.fsencode(scratch), IN_CLOSE_WRITE)
        if watch < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {scratch}")
        self.versions[watch] = _Version(name, os.open(scratch, os.O_RDONLY | os.O_CLOEXEC), text)
        os.replace(scratch, self.directory / name)

    def _scratch(self, name: str) -> Path:
        return self.directory.parent / f".{self.directory.name}.{name}"

    def _changed(self) -> None:
        data = os.read(self.fd, 65536)
        while data:
            watch, mask, _, length = struct.unpack_from("iIII", data)
            data = data[16 + length:]
            version = self.versions.get(watch)
            if version is None:  # IN_Q_OVERFLOW: some events were lost
                for each in list(self.versions.values()):
                    self._look_at(each)
            elif mask & IN_IGNORED:  # behind all events of one that is no longer watched
                os.close(self.versions.pop(watch).fd)
            else:
                self._look_at(version)

    def _look_at(self, version: _Version) -> None:
        value = version.written()
        if value is None:  # emptied, or an earlier event has shown this write already
            self.refresh()
            return
        task = asyncio.get_running_loop().create_task(self._take(version.name, value))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _take(self, name: str, value: str) -> None:
        try:
            await self.entries[name][1](value)
        except Refused as error:
            log.warning("%s: %s", self.directory / name, error)
        except Exception as error:
            died("control file", error)
        self.refresh()

    def refresh(self) -> None:
        """Show present values, after they changed otherwise."""
        for name, (value, _) in self.entries.items():
            newest = [v for v in self.versions.values() if v.name == name][-1]
            if newest.text != f"{value()}\n":
                self._show(name)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)
        for task in self.tasks:
            task.cancel()
        for version in self.versions.values():
            os.close(version.fd)
        with by_owner():
            each(*((file.name, partial(file.unlink, missing_ok=True)) for name in self.entries
                   for file in (self.directory / name, self._scratch(name))))
            try:
                self.directory.rmdir()
            except OSError as error:  # somebody else has files there (editors' swap files)
                log.warning("%s stays: %s", self.directory, error.strerror)
