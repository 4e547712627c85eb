# SPDX-License-Identifier: GPL-2.0-or-later
"""A table of a million flows: how long the control loop lets others wait, and what it takes.

A command is asked for on the control socket every 5 ms, while the periodic looks through the table
are at work, 'tcphactl conns' reads all of it, and somebody reads tcpha_fe_conn. There is no peer
beside which to put that: the same with an empty table is.
"""
from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tcpha.lab.bed import BIN, Cluster, Daemon, wait_for

PAUSE = 0.005
SCANS = 15.0  # seconds: each of them comes at least once
ENOUGH = 5.0  # seconds for which other work is done again and again
FILL = 300.0  # seconds, at most


class Asking:
    """Somebody who asks again and again, and notes how long it took."""

    def __init__(self, fe: Daemon):
        self.path = fe.run_dir / "tcphafe.sock"
        self.ended = threading.Event()
        self.took: list[float] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.path))
            with s.makefile("rb") as answers:
                while not self.ended.wait(PAUSE):
                    began = time.monotonic()
                    s.sendall(b'{"command": "servers"}\n')
                    answers.readline()
                    self.took.append(time.monotonic() - began)

    def close(self) -> None:
        self.ended.set()
        self.thread.join()


def memory(fe: Daemon, what: str) -> int:
    """MB."""
    lines = Path(f"/proc/{fe.process.pid}/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{what}:")) >> 10


def measure(name: str, fe: Daemon, work: Callable[[], object]) -> None:
    Path(f"/proc/{fe.process.pid}/clear_refs").write_text("5")  # VmHWM begins anew
    asking = Asking(fe)
    began = time.monotonic()
    times = 0
    try:
        while time.monotonic() < began + ENOUGH:
            work()
            times += 1
    finally:
        took = (time.monotonic() - began) / times
        asking.close()
    ms = [1000 * x for x in sorted(asking.took)]
    print(f"| {name} | {took:.1f} s | {len(ms)} | {ms[len(ms) // 2]:.1f} | "
          f"{ms[len(ms) * 99 // 100]:.1f} | {ms[-1]:.1f} | {memory(fe, 'VmHWM')} MB |", flush=True)


@contextmanager
def front_end(datapath: str, count: int) -> Iterator[Daemon]:
    c = Cluster(1, datapath=(datapath, datapath), rules=[(0, ".*")], start=False,
                fe_conf=f"maxflows = {max(count * 5 // 4, 1024)}\nidletimeout = 10")
    try:
        host = c.be_hosts[0]
        teller = host.start(sys.executable, "-m", "tcpha.lab.teller", host.address, c.VIP,
                            str(count), stdout=subprocess.PIPE)
        assert teller.stdout and teller.stdout.readline() == "listening\n"
        fe = Daemon(c.fe_host, "fe", c.fe_text())
        wait_for(lambda: fe.ctl("status")["counters"]["restored"] == count, "all flows", FILL)
        yield fe
    finally:
        c.close()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("-n", type=int, default=1_000_000, help="flows (default: %(default)s)")
    args = p.parse_args()
    print("| | took | answers | p50, ms | p99, ms | slowest, ms | most memory |\n"
          "|---|---|---|---|---|---|---|")
    for datapath in ("ebpf", "nfqueue"):
        for count in (0, args.n):
            with front_end(datapath, count) as fe:
                conns = [BIN / "tcphactl", "--run-dir", fe.run_dir, "--json", "fe", "conns"]
                name = f"{datapath}, {count:,} flows"
                print(f"| {name}, as it is | | | | | | {memory(fe, 'VmRSS')} MB |")
                measure(f"{name}: periodic looks", fe, lambda: time.sleep(SCANS))
                measure(f"{name}: tcphactl conns", fe, lambda c=conns: subprocess.run(
                    c, check=True, stdout=subprocess.DEVNULL))
                measure(f"{name}: tcpha_fe_conn", fe, lambda f=fe: subprocess.run(
                    ["cat", f.run_dir / "tcpha_fe_conn"], check=True, stdout=subprocess.DEVNULL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
