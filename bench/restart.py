# SPDX-License-Identifier: GPL-2.0-or-later
"""Downloads in flight while daemons are killed, or stopped, and started again.

For each datapath and each victim: how many downloads were lost or damaged; what somebody who
connects every 50 ms met meanwhile; and how long it was from the end of the victim, and from the
command that started it again, until a new request was served.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import selectors
import socket
import sys
import threading
import time

from tcpha._fast.bpf import open_program, tcx_detach, tcx_programs
from tcpha.lab.bed import Cluster, Daemon

SIZE = 1 << 20
VICTIMS = ("front end killed", "front end stopped", "back end killed", "both killed",
           "front end and its tables lost")
REQUEST = b"GET /%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class Knocking:
    """Somebody who asks for a small file again and again."""

    def __init__(self, c: Cluster):
        self.c = c
        self.ended = False
        self.met: dict[str, int] = {}
        self.served: list[float] = []  # when
        self.thread = threading.Thread(target=lambda: c.client.inside(self._run))
        self.thread.start()

    def _ask(self) -> str:
        try:
            with socket.create_connection((self.c.VIP, 80), timeout=1) as s:
                s.sendall(REQUEST % b"small")
                return "served" if s.recv(65536).startswith(b"HTTP/1.1 200") else "closed"
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "no answer in a second"
        except OSError:
            return "reset"

    def _run(self) -> None:
        while not self.ended:
            began = time.monotonic()
            how = self._ask()
            self.met[how] = self.met.get(how, 0) + 1
            if how == "served":
                self.served.append(began)
            time.sleep(0.05)

    def end(self) -> None:
        self.ended = True
        self.thread.join()


def begin(c: Cluster, count: int) -> list[socket.socket]:
    """Downloads whose readers have not gone beyond the first bytes."""
    out = []
    for _ in range(count):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        s.settimeout(30)
        s.connect((c.VIP, 80))
        s.sendall(REQUEST % b"large")
        if s.recv(1) != b"H":
            raise RuntimeError("no answer")
        out.append(s)
    return out


def finish(sockets: list[socket.socket], want: bytes) -> tuple[int, int]:
    """(lost, damaged)"""
    lost = damaged = 0
    waiting = selectors.DefaultSelector()
    data = {s: bytearray(b"H") for s in sockets}
    for s in sockets:
        s.setblocking(False)
        waiting.register(s, selectors.EVENT_READ)
    while waiting.get_map():
        ready = waiting.select(60)
        if not ready:
            return lost + len(waiting.get_map()), damaged
        for key, _ in ready:
            s = key.fileobj
            assert isinstance(s, socket.socket)
            try:
                got = s.recv(1 << 18)
            except OSError:
                got, data[s] = b"", bytearray()
            data[s] += got
            if not got:
                waiting.unregister(s)
                s.close()
                body = bytes(data.pop(s).partition(b"\r\n\r\n")[2])
                if len(body) < len(want):
                    lost += 1
                elif hashlib.sha256(body).digest() != hashlib.sha256(want).digest():
                    damaged += 1
    return lost, damaged


def lose(c: Cluster, fe: Daemon) -> None:
    """What a killed front end left in the kernel."""
    for file in fe.run_dir.iterdir():
        file.unlink() if file.is_file() else None
    c.fe_host.ip("addr", "del", c.VIP, "dev", "eth0")
    c.fe_host.inside(take_programs)
    c.fe_host.run("tc", "qdisc", "del", "dev", "eth0", "clsact", check=False)


def take_programs() -> None:
    index = socket.if_nametoindex("eth0")
    for number in tcx_programs(index):
        fd = open_program(number)
        tcx_detach(index, fd)
        os.close(fd)


def measure(datapath: str, victim: str, count: int) -> dict[str, object]:
    c = Cluster(1, datapath=(datapath, datapath), rules=[(0, ".*")],
                be_conf=f"maxclients = {count + 100}")
    try:
        assert c.fe
        want = c.nginx[0].file("large", size=SIZE).read_bytes()
        c.nginx[0].file("small", size=100)
        sockets = c.client.inside(lambda: begin(c, count))
        knocking = Knocking(c)
        daemons = [d for d, name in ((c.fe, "front"), (c.be[0], "back"))
                   if name in victim or "both" in victim]
        for d in daemons:
            d.stop() if "stopped" in victim else d.kill()
        gone = time.monotonic()
        if "lost" in victim:
            lose(c, c.fe)
        begun = time.monotonic()
        for d in daemons:
            d.start()
        while not any(t > begun for t in knocking.served):
            time.sleep(0.01)
        lost, damaged = finish(sockets, want)
        knocking.end()
        back = min(t for t in knocking.served if t > begun)
        return {"lost": lost, "damaged": damaged, "met": knocking.met,
                "gone": back - gone, "start": back - begun}
    finally:
        c.close()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("-n", type=int, default=500, help="downloads (default: %(default)s)")
    p.add_argument("--datapath", choices=("ebpf", "nfqueue"), action="append")
    args = p.parse_args()
    print("| datapath | what | downloads | lost | damaged | serves again after | from its start on "
          "| who connected meanwhile was |\n|---|---|---|---|---|---|---|---|")
    for datapath in args.datapath or ("ebpf", "nfqueue"):
        for victim in VICTIMS[:None if datapath == "ebpf" else -1]:
            r = measure(datapath, victim, args.n)
            met = r["met"]
            assert isinstance(met, dict)
            others = ", ".join(f"{k} ({n})" for k, n in met.items() if k != "served") or "served"
            print(f"| {datapath} | {victim} | {args.n} | {r['lost']} | {r['damaged']} | "
                  f"{r['gone']:.2f} s | {r['start']:.2f} s | {others} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
