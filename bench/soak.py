# SPDX-License-Identifier: GPL-2.0-or-later
"""Many connections while something breaks every second, and what is left of it afterwards.

In each half another daemon is spared being killed, and it is asked whether its memory, its file
descriptors and its table are what they were. Exit status: 1 if an answer was damaged, or something
is left.
"""
from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from tcpha.lab.bed import Cluster, Daemon, sh, wait_for

REQUEST = b"GET /1k HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
CLIENTS = 24
LOSS = """table ip lab {
    chain in { type filter hook input priority 0;
        iifname "eth0" numgen random mod 100 < 3 drop
    }
}"""
CUT = """table ip lab {
    chain in { type filter hook input priority 0;
        tcp dport 666 reject with tcp reset
        tcp sport 666 reject with tcp reset
    }
}"""


def one(vip: str, want: bytes) -> str:
    """How a request ended."""
    try:
        with socket.create_connection((vip, 80), timeout=20) as s:
            s.sendall(REQUEST)
            got = b""
            while more := s.recv(65536):
                got += more
    except ConnectionRefusedError:
        return "refused"
    except ConnectionResetError:
        return "reset"
    except OSError as error:
        return "timed out" if isinstance(error, TimeoutError) else str(error.strerror)
    if got.startswith(b"HTTP/1.1 200 "):
        return "served" if got.partition(b"\r\n\r\n")[2] == want else "damaged"
    return got[9:12].decode() if got else "closed"


def client(c: Cluster, want: bytes, left: Synchronized[int], results: object) -> None:
    def run() -> Counter[str]:
        count: Counter[str] = Counter()
        while True:
            with left.get_lock():
                if left.value <= 0:
                    return count
                left.value -= 1
            how = one(c.VIP, want)
            count[how] += 1
            if how != "served":
                time.sleep(0.05)  # somebody who tries again at once would only count refusals
    results.put(c.client.inside(run))  # type: ignore[attr-defined]


def faults(c: Cluster, killed: Callable[[], Daemon]) -> Iterator[Callable[[], None]]:
    """What breaks, in turn; each is mended by itself."""
    port = c.be_hosts[0].port

    def link() -> None:
        sh("ip", "-n", c.bed.switch, "link", "set", port, "down")
        time.sleep(0.3)
        sh("ip", "-n", c.bed.switch, "link", "set", port, "up")

    def rules(host: int, text: str) -> None:
        c.be_hosts[host].nft(text)
        time.sleep(0.3)
        c.be_hosts[host].nft("")

    def stall() -> None:
        c.be[1].process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        c.be[1].process.send_signal(signal.SIGCONT)

    def kill() -> None:
        killed().kill()
        killed().start()

    def server() -> None:
        c.nginx[0].stop()
        c.nginx[0].start()
    return itertools.cycle((link, lambda: rules(0, LOSS), lambda: rules(1, CUT), stall, kill,
                            server))


def descriptors(d: Daemon) -> int:
    """Those that stay: the connection of a question that was just answered does not count."""
    def now() -> set[tuple[str, str]]:
        found = set()
        for entry in Path(f"/proc/{d.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.add((entry.name, os.readlink(entry)))
        return found
    first = now()
    time.sleep(1)
    return len(first & now())


def state(d: Daemon) -> dict[str, int]:
    """Of a daemon: kilobytes of memory, descriptors, live connections, rows of its table."""
    with open(f"/proc/{d.process.pid}/status") as f:
        memory = next(int(line.split()[1]) for line in f if line.startswith("VmRSS:"))
    return {"memory": memory, "descriptors": descriptors(d),
            "live": d.ctl("status")["live"], "rows": len(d.ctl("conns"))}


def settle(c: Cluster) -> None:
    assert c.fe
    c.connected()
    for d in (c.fe, *c.be):
        try:
            wait_for(lambda d=d: d.ctl("status")["live"] == 0, "no live connections", 180)
        except TimeoutError:
            print(f"tcpha{d.role} of {d.host.name} still has: {d.ctl('conns')[:4]}")
            print(d.host.run("ss", "-Htano", "sport = :80").stdout[:2000])
            raise


def half(c: Cluster, want: bytes, count: int, killed: Callable[[], Daemon], break_it: bool
         ) -> tuple[Counter[str], int]:
    """(how requests ended, how many things broke)"""
    left = multiprocessing.Value("l", count)
    results: multiprocessing.Queue[Counter[str]] = multiprocessing.Queue()
    clients = [multiprocessing.Process(target=client, args=(c, want, left, results))
               for _ in range(CLIENTS)]
    for p in clients:
        p.start()
    ended = threading.Event()
    broke = 0

    def breaking() -> None:
        nonlocal broke
        for fault in faults(c, killed):
            if ended.wait(1):
                return
            fault()
            broke += 1
    breaker = threading.Thread(target=breaking)
    if break_it:
        breaker.start()
    total = sum((results.get() for _ in clients), Counter[str]())
    ended.set()
    for p in clients:
        p.join()
    if break_it:
        breaker.join()
    settle(c)
    return total, broke


def soak(datapath: str, count: int) -> bool:
    c = Cluster(2, datapath=(datapath, datapath), rules=[(0, "^/"), (1, "^/")],
                fe_conf="dtcinterval = 1")
    try:
        assert c.fe
        fe = c.fe
        want = c.nginx[0].file("1k", size=1024).read_bytes()
        (c.nginx[1].root / "1k").write_bytes(want)
        clean = True
        for who, killed, spared in (("back end", lambda: c.be[0], fe),
                                    ("front end", lambda: fe, c.be[1])):
            half(c, want, count // 10, killed, False)  # memory that a first use takes
            before = state(spared)
            began = time.monotonic()
            total, broke = half(c, want, count // 2, killed, True)
            took = time.monotonic() - began
            after = state(spared)
            ends = ", ".join(f"{how} {n}" for how, n in total.most_common())
            kept = ", ".join(f"{k} {before[k]} -> {after[k]}" for k in before)
            print(f"{datapath}, {who} killed now and then: {took:.0f} s, {broke} faults; {ends}; "
                  f"tcpha{spared.role}: {kept}", flush=True)
            clean &= not total["damaged"] and not after["rows"] and not after["live"] and \
                after["descriptors"] <= before["descriptors"] and \
                after["memory"] <= before["memory"] + 4096
        return clean
    finally:
        c.close()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("-n", type=int, default=200_000, help="connections (default: %(default)s)")
    p.add_argument("--datapath", choices=("ebpf", "nfqueue"), action="append")
    args = p.parse_args()
    return 0 if all([soak(d, args.n) for d in args.datapath or ("ebpf", "nfqueue")]) else 1


if __name__ == "__main__":
    sys.exit(main())
