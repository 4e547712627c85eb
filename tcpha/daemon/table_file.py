# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that shows a table as it is when somebody reads it, for the seed's
'cat /proc/net/tcpha_fe_conn'. It is a FIFO; each reader gets one of its own, and may take its time
(a pager)."""
from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from tcpha.owner import by_owner
from tcpha.tasks import persistent_thread


class TableFile:
    """render: what stands in it, piece by piece, asked for in a thread of ours each time that the
    file is opened."""

    def __init__(self, path: Path, render: Callable[[], Iterable[bytes]]):
        self.path = path
        self.render = render
        self.lock = threading.Lock()  # of what follows
        self.stopping = False
        self.fifo = -1  # that is in place (O_PATH): its name may become another file's
        self.stop = os.eventfd(0, os.EFD_CLOEXEC)
        self.readers: set[threading.Thread] = set()
        self._renew()
        self.thread = persistent_thread("table file", self._run)

    def _renew(self) -> None:
        """Put a fresh FIFO in place, so that no later reader meets an earlier one."""
        scratch = self.path.with_suffix(".new")
        with by_owner():
            scratch.unlink(missing_ok=True)
            os.mkfifo(scratch, 0o600)
            fifo = os.open(scratch, os.O_PATH | os.O_CLOEXEC)
            os.replace(scratch, self.path)
        old, self.fifo = self.fifo, fifo
        if old >= 0:
            os.close(old)

    def _open(self, flags: int) -> int:
        """The FIFO that is in place."""
        with by_owner():
            return os.open(f"/proc/self/fd/{self.fifo}", flags | os.O_CLOEXEC)

    def _run(self) -> None:
        while True:
            with self.lock:
                if self.stopping:
                    return
            writer = self._open(os.O_WRONLY)  # waits for a reader; only we renew it
            try:
                with self.lock:
                    self._meet(writer)
            except BaseException:
                os.close(writer)
                raise

    def _meet(self, writer: int) -> None:
        if self.stopping:
            os.close(writer)
            return
        self._renew()
        reader = threading.Thread(target=self._serve, args=(writer,), name="table", daemon=True)
        reader.start()
        self.readers = {r for r in self.readers if r.is_alive()} | {reader}

    def _serve(self, writer: int) -> None:
        """As fast as it is read, until we stop."""
        with open(writer, "wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
            os.set_blocking(writer, False)
            poll = select.poll()
            poll.register(writer, select.POLLOUT)
            poll.register(self.stop, select.POLLIN)
            for piece in self.render():
                data = memoryview(piece)
                while data:
                    if any(ready == self.stop for ready, _ in poll.poll()):
                        return
                    data = data[os.write(file.fileno(), data):]

    def close(self) -> None:
        with self.lock:
            self.stopping = True
            os.eventfd_write(self.stop, 1)
            held = self._open(os.O_RDONLY | os.O_NONBLOCK)  # the thread goes on
        for thread in (self.thread, *self.readers):
            thread.join()
        for fd in (held, self.fifo, self.stop):
            os.close(fd)
        with by_owner():
            self.path.unlink(missing_ok=True)
