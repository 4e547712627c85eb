# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory: how much a daemon has, and a kernel that has none for it."""
from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcpha.lab.bed import Daemon

MB = 1024  # /proc counts in KB


def resident(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {what}")


@contextmanager
def modest(daemon: Daemon, most: int = 10 * MB) -> Iterator[None]:
    """A Python object for each flow would take more."""
    pid = daemon.process.pid
    before = resident(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew
    yield
    assert resident(pid, "VmHWM") - before < most


@contextmanager
def no_kernel_memory(d: Daemon, call: str, *where: str, when: str = "1+") -> Iterator[None]:
    """A daemon's system call fails in each thread, as soon as all threads are caught. where, when:
    for strace, and not every such call."""
    pid = d.process.pid
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), *where, "-e", f"trace={call}", "-e",
                               f"inject={call}:error=ENOMEM:when={when}", "-o", "/dev/null"],
                              stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr
        caught = 0
        while caught < threads and (line := tracer.stderr.readline()):
            caught += "attached" in line and (int(line.split(" with ")[1].split()[0])
                                              if " with " in line else 1)
        assert caught >= threads
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()
