# SPDX-License-Identifier: GPL-2.0-or-later
"""Worker threads within start/min/max spare limits, for both roles."""
from __future__ import annotations

import threading
from collections import deque

from tcpha._fast.core import Core

SAMPLES = 20  # a worker counts as busy if so many were, at one of the last ticks


class Supervisor:
    """Preforks workers and keeps the idle ones between minspare and maxspare.

    tick() is called about twenty times a second.
    """

    def __init__(self, core: Core, start: int, minspare: int, maxspare: int, most: int):
        self.core = core
        self.start = start
        self.limits(minspare, maxspare)
        self.most = max(most, start)
        self.samples: deque[int] = deque(maxlen=SAMPLES)
        self.serial = 0
        self.threads: list[threading.Thread] = []

    def limits(self, minspare: int, maxspare: int) -> None:
        self.minspare = minspare
        self.maxspare = maxspare

    def begin(self) -> None:
        for _ in range(self.start):
            self._spawn()

    def _spawn(self) -> None:
        self.serial += 1
        thread = threading.Thread(target=self.core.run_worker, name=f"worker-{self.serial}",
                                  daemon=True)
        thread.start()
        self.threads.append(thread)

    def tick(self) -> None:
        self.threads = [t for t in self.threads if t.is_alive()]
        total = len(self.threads)
        self.samples.append(self.core.workers()[1])
        idle = total - max(self.samples)
        if idle < self.minspare and total < self.most:
            for _ in range(min(self.minspare - idle, self.most - total)):
                self._spawn()
            self.samples.clear()
        elif idle > self.maxspare and len(self.samples) == SAMPLES:
            self.core.retire_worker()
            self.samples.clear()

    def stats(self) -> dict[str, int]:
        total = len([t for t in self.threads if t.is_alive()])
        busy = self.core.workers()[1]
        return {"total": total, "busy": busy, "idle": total - busy}

    def finish(self) -> None:
        """Stop all workers and wait for them."""
        self.core.stop_workers()
        for thread in self.threads:
            thread.join()
