# SPDX-License-Identifier: GPL-2.0-or-later
"""Cookies and tags of the packet path, as tcpha/_bpf/cookie.bpf.h has them."""
from __future__ import annotations

import struct
from dataclasses import dataclass

META, TIMED, TAG = 2**10 - 1, 2 << 10, 1 << 10


def _left(v: int, bits: int) -> int:
    return (v << bits | v >> (64 - bits)) % 2**64


def siphash(key: tuple[int, int], data: bytes) -> int:
    """SipHash-2-4."""
    a, b, c, d = (word ^ key[i & 1] for i, word in enumerate((
        0x736f6d6570736575, 0x646f72616e646f6d, 0x6c7967656e657261, 0x7465646279746573)))

    def rounds(n: int) -> None:
        nonlocal a, b, c, d
        for _ in range(n):
            a, c = (a + b) % 2**64, (c + d) % 2**64
            b, d = _left(b, 13) ^ a, _left(d, 16) ^ c
            a, c = (_left(a, 32) + d) % 2**64, (c + b) % 2**64
            b, d = _left(b, 17) ^ c, _left(d, 21) ^ a
            c = _left(c, 32)
    data += bytes(7 - len(data) % 8) + bytes([len(data) & 0xff])
    for word, in struct.iter_unpack("<Q", data):
        d ^= word
        rounds(2)
        a ^= word
    c ^= 0xff
    rounds(4)
    return a ^ b ^ c ^ d


@dataclass(frozen=True)
class Keys:
    """A front end's."""

    key: tuple[tuple[int, int], tuple[int, int]]

    def hash(self, flow: bytes, isn: int, meta: int, more: int) -> int:
        return siphash(self.key[meta & 1], flow + struct.pack("=II", isn, meta | more) + bytes(3))

    def ours(self, flow: bytes, isn: int, meta: int, timed: bool) -> int:
        """Our initial sequence number."""
        return self.hash(flow, isn, meta, TIMED * timed) & ~META & 0xffffffff | meta

    def tag(self, flow: bytes, isn: int, ack: int) -> tuple[int, int]:
        """(what the segment acknowledges, its urgent pointer), with the tag, or without it."""
        hashed = self.hash(flow, isn, (ack - 1) & META, TAG)
        urgent, = struct.unpack("!H", struct.pack("=H", hashed >> 32 & 0xffff or 1))
        return (((ack - 1) ^ (hashed & ~META)) + 1) % 2**32, urgent
