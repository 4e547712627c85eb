# SPDX-License-Identifier: GPL-2.0-or-later
"""Floods from forged addresses against the VIP, while an honest client goes on asking.

For each kind of flood: how many packets per second were sent, and how many requests per second the
honest client got answered, next to the same flood sent to an address that the front end's kernel
ignores. The generator takes a CPU of its own in both cases, so the ratio is what the flood costs.
"""
from __future__ import annotations

import argparse
import random
import re
import socket
import statistics
import struct
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

from tcpha.lab.bed import Cluster, Host

SYN, ACK, PSH = 2, 16, 8
REQUEST = b"GET /1k HTTP/1.1\r\nHost: a\r\n\r\n"
OPTIONS = b"\x02\x04\x05\xb4\x04\x02\x08\x0a" + bytes(8) + b"\x01\x03\x03\x07"
KINDS = {"SYN": (SYN, b"", OPTIONS), "ACK": (ACK, b"", b""),
         "request with a guessed cookie": (ACK | PSH, REQUEST, b"")}


def total(data: bytes) -> int:
    n = sum(struct.unpack(f"!{len(data) // 2}H", data))
    n = (n & 0xFFFF) + (n >> 16)
    return ~((n & 0xFFFF) + (n >> 16)) & 0xFFFF


def frame(macs: bytes, to: bytes, kind: str) -> bytes:
    flags, data, options = KINDS[kind]
    source = b"\x0a" + random.randbytes(3)
    tcp = struct.pack("!HHIIBBHHH", random.randrange(1024, 65536), 80, random.getrandbits(32),
                      random.getrandbits(32) if flags & ACK else 0, (5 + len(options) // 4) << 4,
                      flags, 64240, 0, 0) + options + data
    if len(tcp) & 1:
        tcp += b"\0"
    check = total(source + to + struct.pack("!HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", check) + tcp[18:]
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0, source, to)
    ip = ip[:10] + struct.pack("!H", total(ip)) + ip[12:]
    return macs + b"\x08\0" + ip + tcp


class Sender(ABC):
    """Sends frames as fast as it can, from a host beside the client."""

    def __init__(self, host: Host, fe: Host, to: str):
        self.macs = bytes.fromhex((fe.mac() + host.mac()).replace(":", ""))
        self.to = socket.inet_aton(to)
        self.socket = host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self.socket.bind(("eth0", 0))
        self.socket.setsockopt(263, 20, 1)  # SOL_PACKET, PACKET_QDISC_BYPASS
        self.sent = 0
        self.ended = False
        self.thread = threading.Thread(target=self._run)

    @abstractmethod
    def frames(self) -> Iterator[bytes]:
        """The next ones, some thousands at most."""

    def _run(self) -> None:
        send = self.socket.send
        while not self.ended:
            for frame in self.frames():
                try:
                    send(frame)
                except OSError:
                    continue
                self.sent += 1

    def __enter__(self) -> Self:
        self.begin = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.thread.join()
        self.rate = self.sent / (time.monotonic() - self.begin)
        self.socket.close()


class Flood(Sender):
    def __init__(self, host: Host, fe: Host, to: str, kind: str):
        super().__init__(host, fe, to)
        self.ready = [frame(self.macs, self.to, kind) for _ in range(20000)]

    def frames(self) -> Iterator[bytes]:
        self.ready = self.ready[1000:] + self.ready[:1000]
        return iter(self.ready[:1000])


def honest(c: Cluster, seconds: float) -> float:
    """Requests per second, each on a connection of its own, eight at a time."""
    out = c.client.run("wrk", "-t1", "-c8", f"-d{round(seconds)}s", "-H", "Connection: close",
                       f"http://{c.VIP}/1k").stdout
    errors = re.search(r"Socket errors.*|Non-2xx.*", out)
    if errors:
        print(f"  {errors.group()}", file=sys.stderr)
    found = re.search(r"Requests/sec:\s+([\d.]+)", out)
    return float(found.group(1)) if found else 0.0


def main() -> int:
    p = argparse.ArgumentParser(prog="bench.flood", description=__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=2.0)
    args = p.parse_args()
    ways: dict[str, tuple[Cluster, Host]] = {}
    got: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    try:
        for way, fast in (("packet path", True), ("socket path", False)):
            c = Cluster(1, rules=[(0, ".*")], datapath=("ebpf", "ebpf"), fastpath=fast,
                        fe_conf="maxclients = 4096", be_conf="maxclients = 20000",
                        nginx={"log": False}, start=False)
            ways[way] = c, c.bed.host("other", "192.168.1.60")
            c.fe_host.ip("route", "add", "10.0.0.0/8", "via", "192.168.1.60")
            c.nginx[0].file("1k", size=1024)
            c.start()
        for _ in range(args.rounds):
            for way, (c, other) in ways.items():
                for kind in KINDS:
                    for where, to in (("elsewhere", "192.168.1.99"), ("VIP", c.VIP)):
                        with Flood(other, c.fe_host, to, kind) as flood:
                            rate = honest(c, args.seconds)
                        got.setdefault((way, kind, where), []).append((rate, flood.rate))
        report(got)
    finally:
        for c, _ in ways.values():
            c.close()
    return 0


def report(got: dict[tuple[str, str, str], list[tuple[float, float]]]) -> None:
    def median(key: tuple[str, str, str], n: int) -> float:
        return statistics.median(v[n] for v in got[key])

    print(f"{'way':12} {'flood':30} {'packets/s':>10} {'answered/s':>10} {'elsewhere':>10} ratio")
    for way, kind, where in got:
        if where == "VIP":
            ours, other = median((way, kind, "VIP"), 0), median((way, kind, "elsewhere"), 0)
            print(f"{way:12} {kind:30} {median((way, kind, where), 1):10.0f} {ours:10.0f} "
                  f"{other:10.0f} {ours / other:.2f}")


if __name__ == "__main__":
    sys.exit(main())
