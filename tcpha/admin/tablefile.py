# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that shows a table as it is when somebody reads it, for the seed's
'cat /proc/net/tcpha_fe_conn'. It is a FIFO; each reader gets one of its own."""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path


class TableFile:
    """render: the lines, asked for in a thread of ours each time that the file is opened."""

    def __init__(self, path: Path, render: Callable[[], Iterable[str]]):
        self.path = path
        self.render = render
        self.stopping = False
        self._renew()
        self.thread = threading.Thread(target=self._run, name=path.name, daemon=True)
        self.thread.start()

    def _renew(self) -> None:
        """Put a fresh FIFO in place, so that no later reader meets an earlier one."""
        scratch = self.path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        os.mkfifo(scratch, 0o600)
        os.replace(scratch, self.path)

    def _run(self) -> None:
        while True:
            with open(self.path, "wb", buffering=0) as file:  # waits for a reader
                if self.stopping:
                    return
                self._renew()
                try:
                    data = memoryview("".join(f"{line}\n" for line in self.render()).encode())
                    while data:
                        data = data[os.write(file.fileno(), data):]
                except BrokenPipeError:
                    pass  # it has read enough

    def close(self) -> None:
        self.stopping = True
        os.close(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK))  # the thread goes on
        self.thread.join()
        self.path.unlink(missing_ok=True)
