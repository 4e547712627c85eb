# SPDX-License-Identifier: GPL-2.0-or-later
"""Micro-benchmarks: pytest bench/micro.py. Each beside an alternative that one could pick."""
from __future__ import annotations

import re
from typing import Any

import httptools
import pytest

from tcpha._fast import message
from tcpha._fast.http import parse_head
from tcpha._fast.match import Matcher
from tcpha._fast.rewrite import translate_many

HEAD = (b"GET /images/2026/11/photo-1234.jpg?size=large HTTP/1.1\r\nHost: www.example.org\r\n"
        b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/140.0\r\n"
        b"Accept: image/avif,image/webp,*/*\r\nAccept-Language: en\r\nConnection: keep-alive\r\n"
        b"Cookie: session=0123456789abcdef0123456789abcdef\r\n\r\n")


@pytest.mark.benchmark(group="head")
def test_head_ours(benchmark: Any) -> None:
    assert benchmark(parse_head, HEAD)[1].startswith(b"/images")


@pytest.mark.benchmark(group="head")
def test_head_httptools(benchmark: Any) -> None:
    class Sink:
        def on_url(self, url: bytes) -> None:
            self.url = url

    def parse() -> bytes:
        sink = Sink()
        httptools.HttpRequestParser(sink).feed_data(HEAD)
        return sink.url
    assert benchmark(parse).startswith(b"/images")


@pytest.mark.benchmark(group="match")
@pytest.mark.parametrize("count", [10, 1000, 10000])
def test_match_hyperscan(benchmark: Any, count: int) -> None:
    matcher = Matcher([*(f"^/site{n}/.*[.]jpg$" for n in range(count - 1)), ".*"])
    assert benchmark(matcher.matches, b"/site7/2026/11/photo-1234.jpg")


@pytest.mark.benchmark(group="match")
@pytest.mark.parametrize("count", [10, 1000, 10000])
def test_match_re_one_by_one(benchmark: Any, count: int) -> None:
    rules = [re.compile(rb"^/site%d/.*[.]jpg$" % n) for n in range(count - 1)]
    target = b"/site%d/2026/11/photo-1234.jpg" % (count - 2)  # the last: the first would be unfair
    assert benchmark(lambda: next(n for n, r in enumerate(rules) if r.search(target)))


FIELDS = {"flow": b"x" * 36, "snd_nxt": 1, "rcv_nxt": 2, "snd_wnd": 3, "rcv_wnd": 4, "tsval": 5,
          "ts_recent": 6, "srtt_us": 7, "mss": 1460, "snd_wscale": 7, "rcv_wscale": 7, "flags": 1}


@pytest.mark.benchmark(group="message")
def test_message_encode(benchmark: Any) -> None:
    benchmark(message.encode, message.HANDOFF, 1, FIELDS, HEAD)


@pytest.mark.benchmark(group="message")
def test_message_decode(benchmark: Any) -> None:
    raw = message.encode(message.HANDOFF, 1, FIELDS, HEAD)
    assert benchmark(message.decode, raw)["data"] == HEAD


# A segment of 1448 bytes with timestamps, as a back end's worker rewrites it. The alternative
# takes 100 of them in plain Python, checksum by difference too.
PACKET = bytes.fromhex(
    "450005dc0001400040060000c0a80124c0a80132"
    "0050c3500000000100000002801001f50000000001"
    "01080a0000000100000002") + b"x" * 1448
TIMES = 100


@pytest.mark.benchmark(group="rewrite, 100 packets")
def test_rewrite_ours(benchmark: Any) -> None:
    benchmark(translate_many, PACKET, TIMES)


@pytest.mark.benchmark(group="rewrite, 100 packets")
def test_rewrite_python(benchmark: Any) -> None:
    packet = bytearray(PACKET)

    def rewrite() -> None:
        for _ in range(TIMES):
            total = 0
            for offset, add in ((24, 12345), (28, 12345), (44, 77)):
                old = int.from_bytes(packet[offset:offset + 4], "big")
                new = (old + add) & 0xFFFFFFFF
                packet[offset:offset + 4] = new.to_bytes(4, "big")
                total += (~old >> 16 & 0xFFFF) + (~old & 0xFFFF) + (new >> 16) + (new & 0xFFFF)
            check = (~int.from_bytes(packet[36:38], "big") & 0xFFFF) + total
            while check >> 16:
                check = (check & 0xFFFF) + (check >> 16)
            packet[36:38] = (~check & 0xFFFF).to_bytes(2, "big")
    benchmark(rewrite)
