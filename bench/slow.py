# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests beside thousands of connections that send a byte of their heads now and then, or none.

Slowloris, that is. With the packet path and without, beside HAProxy: how many requests of others
were served in a second, and how long the slowest took.
"""
from __future__ import annotations

import argparse
import resource
import socket
import sys
import threading
import time

from tcpha.lab.bed import Cluster, Host

REQUEST = b"GET /1k HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
HAPROXY = """
global
    maxconn 9900
defaults
    mode http
    timeout client 15s
    timeout server 30s
    timeout connect 5s
    timeout http-request 15s
frontend f
    bind 192.168.1.23:8000
    default_backend b
backend b
    server s {address}:80
"""


class Slow:
    """The attacker: so many connections, each with the beginning of a head, and a byte more now
    and then."""

    def __init__(self, host: Host, address: tuple[str, int], count: int, what: bytes):
        self.ended = threading.Event()
        self.sockets = host.inside(lambda: self._dial(address, count, what))
        self.thread = threading.Thread(target=self._trickle if what else self.ended.wait)
        self.thread.start()

    def _dial(self, address: tuple[str, int], count: int, what: bytes) -> list[socket.socket]:
        out = []
        for _ in range(count):
            s = socket.socket()
            s.settimeout(20)
            try:
                s.connect(address)
                s.sendall(what)
            except OSError:
                s.close()
                continue
            s.setblocking(False)
            out.append(s)
        return out

    def _trickle(self) -> None:
        while not self.ended.is_set():
            for s in self.sockets:
                try:
                    s.send(b"a")
                except OSError:
                    continue
                if self.ended.wait(0.001):
                    return

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        for s in self.sockets:
            s.close()


def asking(address: tuple[str, int], seconds: float) -> tuple[list[float], int]:
    """(seconds that each served request took, how many failed), one after the other."""
    took, failed = [], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        try:
            with socket.create_connection(address, timeout=20) as s:
                s.sendall(REQUEST)
                got = s.recv(65536)
                while more := s.recv(65536):
                    got += more
        except OSError:
            failed += 1
            continue
        if got.startswith(b"HTTP/1.1 200 "):
            took.append(time.monotonic() - began)
        else:
            failed += 1
    return took, failed


def measure(name: str, c: Cluster, address: tuple[str, int], count: int, what: bytes) -> None:
    alone, _ = c.client.inside(lambda: asking(address, 3))
    attack = Slow(c.client, address, count, what)
    try:
        took, failed = c.client.inside(lambda: asking(address, 10))
    finally:
        attack.close()
    rate = len(took) / 10, len(alone) / 3
    print(f"| {name} | {len(attack.sockets)} | {rate[1]:.0f} | {rate[0]:.0f} | {failed} | "
          f"{1000 * max(took, default=0):.0f} ms |", flush=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("-n", type=int, default=10_000, help="connections (default: %(default)s)")
    args = p.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("| | slow connections | requests/s alone | beside them | failed | slowest |\n"
          "|---|---|---|---|---|---|")
    for what, text in ((b"GET / HTTP/1.1\r\nX: ", "a byte now and then"), (b"", "nothing")):
        for fastpath in (True, False):
            c = Cluster(1, datapath=("ebpf", "ebpf"), fastpath=fastpath, rules=[(0, ".*")],
                        fe_conf="maxclients = 20000")
            try:
                c.nginx[0].file("1k", size=1024)
                path = "packet path" if fastpath else "socket path"
                measure(f"{path}, {text}", c, (c.VIP, 80), args.n, what)
            finally:
                c.close()
        c = Cluster(1, datapath=("ebpf", "ebpf"), rules=[(0, ".*")])
        try:
            c.nginx[0].file("1k", size=1024)
            conf = c.fe_host.dir / "haproxy.cfg"
            conf.write_text(HAPROXY.format(address=c.be_hosts[0].address))
            c.fe_host.start("haproxy", "-f", str(conf))
            measure(f"HAProxy, {text}", c, (c.fe_host.address, 8000), args.n, what)
        finally:
            c.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
