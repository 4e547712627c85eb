# SPDX-License-Identifier: GPL-2.0-or-later
"""The first request of a client that is far away: RTT and congestion window of what was adopted."""
from __future__ import annotations

import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tcpha.lab.bed import Host, sh

RTTS = (20, 80)  # milliseconds
ROUNDS = 5

QUEUED = ("OUTPUT", "-p", "tcp", "-j", "NFQUEUE", "--queue-num", "1")

# What leaves the client waits in a queue for one RTT.
DELAY = """
import collections, os, select, sys, time
from netfilterqueue import NetfilterQueue
rtt = float(sys.argv[1]) / 1000
waiting = collections.deque()
def keep(packet):
    packet.retain()
    waiting.append((time.monotonic() + rtt, packet))
queue = NetfilterQueue()
queue.bind(1, keep, max_len=100000)
print("ready", flush=True)
while True:
    left = waiting[0][0] - time.monotonic() if waiting else 1
    if left > 0:
        select.select([queue.get_fd()], [], [], left)
    queue.run(block=False)
    while waiting and waiting[0][0] <= time.monotonic():
        waiting.popleft()[1].accept()
"""


@contextmanager
def far(client: Host, rtt: int) -> Iterator[None]:
    process = client.start(sys.executable, "-c", DELAY, str(rtt), stdout=-1)
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        client.run("iptables", "-A", *QUEUED)
        yield
    finally:
        client.run("iptables", "-D", *QUEUED, check=False)
        process.kill()
        process.wait()


def _ask(host: Host, base: str, path: str) -> tuple[float, float]:
    """Milliseconds from connect() to the first byte, and to the last."""
    address, _, port = base.removeprefix("http://").partition(":")

    def work() -> tuple[float, float]:
        start = time.monotonic()
        with socket.create_connection((address, int(port or 80)), timeout=60) as s:
            s.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            s.recv(1)
            first = time.monotonic() - start
            while s.recv(1 << 20):
                pass
        return first * 1000, (time.monotonic() - start) * 1000
    return host.inside(work)


def measure(ways: dict[str, tuple[Any, str]]) -> dict[str, dict[str, list[float]]]:
    """{way: {RTT: [first byte of 1 KB, last byte of 100 KB], milliseconds}}, medians of interleaved
    rounds. ways: {name: (bench, base)}"""
    samples: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for bench in {id(b): b for b, _ in ways.values()}.values():
        for server in bench.cluster.nginx:
            server.file("100k", size=100 << 10)
    for rtt in RTTS:
        for _ in range(ROUNDS):
            for way, (bench, base) in ways.items():
                client = bench.cluster.client
                with far(client, rtt):
                    # a client that was here before remembers the way (RFC 9040), a new one does not
                    sh("ip", "-n", client.ns, "tcp_metrics", "flush", "all")
                    first = _ask(client, base, "/1k")[0]
                    last = _ask(client, base, "/100k")[1]
                samples.setdefault(way, {}).setdefault(str(rtt), []).append((first, last))
    return {way: {rtt: [statistics.median(column) for column in zip(*found, strict=True)]
                  for rtt, found in by.items()} for way, by in samples.items()}


def rows(found: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    return [["first request, far away", *(f"RTT {r} ms: 1 KB, first byte; 100 KB" for r in RTTS)],
            *[[way, *(f"{by[str(r)][0]:.0f} ms; {by[str(r)][1]:.0f} ms" for r in RTTS)]
              for way, by in found.items()]]
