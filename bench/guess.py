# SPDX-License-Identifier: GPL-2.0-or-later
"""An hour of guessing cookies: what of it is executed.

Somebody beside the client sends first segments with a request and guessed numbers, as fast as one
CPU can, by turns with and without timestamps; each is another guess. An honest client goes on
asking. Exits with 1 if a guessed request was executed, or an honest one was not answered.
"""
from __future__ import annotations

import argparse
import random
import struct
import sys
import time
from collections.abc import Iterator

from bench.flood import ACK, PSH, Sender, total
from tcpha.lab.bed import Cluster

REQUEST = b"GET /guessed HTTP/1.1\r\nHost: a\r\n\r\n"
TIMESTAMPS = b"\1\1\x08\x0a"
PAUSE = 1.0  # seconds between requests of the honest client
INVERSE = bytes(255 - n for n in range(256))


def around(macs: bytes, to: bytes, timed: bool) -> tuple[bytes, bytes]:
    """What is before and behind seq and ack. The one is the other's complement in each frame, so
    that the checksum is the same whatever they are."""
    source = b"\x0a" + random.randbytes(3)
    options = TIMESTAMPS + random.randbytes(8) if timed else b""
    ports = struct.pack("!HH", random.randrange(1024, 65536), 80)
    rest = struct.pack("!BBH", (5 + len(options) // 4) << 4, ACK | PSH, 64240)
    behind = options + REQUEST
    size = 20 + len(behind)
    check = total(source + to + struct.pack("!HH", 6, size) + ports + rest + bytes(4) + behind
                  + bytes(size & 1))
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + size, 0, 0x4000, 64, 6, 0, source, to)
    ip = ip[:10] + struct.pack("!H", total(ip)) + ip[12:]
    return macs + b"\x08\0" + ip + ports, rest + struct.pack("!HH", check, 0) + behind


class Guesses(Sender):
    def frames(self) -> Iterator[bytes]:
        frames = [around(self.macs, self.to, n % 2 == 0) for n in range(1000)]
        for _ in range(20):
            acks = random.randbytes(4 * len(frames))
            seqs = acks.translate(INVERSE)
            for n, (before, behind) in enumerate(frames):
                at = 4 * n
                yield before + seqs[at:at + 4] + acks[at:at + 4] + behind


def main() -> int:
    p = argparse.ArgumentParser(prog="bench.guess", description=__doc__)
    p.add_argument("--seconds", type=float, default=3600.0)
    args = p.parse_args()
    c = Cluster(1, rules=[(0, ".*")], datapath=("ebpf", "ebpf"), fastpath=True, start=False)
    try:
        other = c.bed.host("other", "192.168.1.60")
        c.fe_host.ip("route", "add", "10.0.0.0/8", "via", "192.168.1.60")
        c.nginx[0].file("1k", size=1024)
        c.start()
        assert c.fe
        asked = answered = 0
        end = time.monotonic() + args.seconds
        with Guesses(other, c.fe_host, c.VIP) as guesses:
            while time.monotonic() < end and c.fe.process.poll() is None:
                asked += 1
                answered += c.curl(f"http://{c.VIP}/1k", "-o", "/dev/null", "-w", "%{http_code}"
                                   ).stdout == "200"
                time.sleep(PAUSE)
        packets = c.fe.ctl("status")["packets"]
        executed = c.nginx[0].log.read_text().count("/guessed")
        print(f"{guesses.sent:,} guesses, {guesses.rate:,.0f} a second; {packets['forged']:,} were "
              f"judged; {executed} executed; {answered} of {asked} honest requests answered")
    finally:
        c.close()
    return int(executed > 0 or answered < asked)


if __name__ == "__main__":
    sys.exit(main())
