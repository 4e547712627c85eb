# SPDX-License-Identifier: GPL-2.0-or-later
"""Micro-benchmarks: pytest bench/micro.py. Each beside an alternative that one could pick."""
from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httptools
import pytest
import re2
import scapy.layers.inet as inet

from tcpha._fast import message
from tcpha._fast.http import parse_head
from tcpha._fast.match import Matcher
from tcpha._fast.repair import freeze
from tcpha._fast.rewrite import checksum_many, translate_many

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


@pytest.mark.benchmark(group="match")
@pytest.mark.parametrize("count", [10, 1000, 10000])
def test_match_re2_set(benchmark: Any, count: int) -> None:
    options = re2.Options()
    options.max_mem = 1 << 30
    options.never_capture = True
    patterns = re2.Set.SearchSet(options)
    for pattern in (*(f"^/site{n}/.*[.]jpg$" for n in range(count - 1)), ".*"):
        patterns.Add(pattern)
    patterns.Compile()
    assert benchmark(patterns.Match, b"/site7/2026/11/photo-1234.jpg")


FIELDS = {"flow": b"x" * 36, "snd_nxt": 1, "rcv_nxt": 2, "snd_wnd": 3, "rcv_wnd": 4, "tsval": 5,
          "ts_recent": 6, "srtt_us": 7, "mss": 1460, "snd_wscale": 7, "rcv_wscale": 7, "flags": 1}


@pytest.mark.benchmark(group="message")
def test_message_encode(benchmark: Any) -> None:
    benchmark(message.encode, message.HANDOFF, 1, FIELDS, HEAD)


@pytest.mark.benchmark(group="message")
def test_message_decode(benchmark: Any) -> None:
    raw = message.encode(message.HANDOFF, 1, FIELDS, HEAD)
    assert benchmark(message.decode, raw)["data"] == HEAD


# The same message by the standard library.
WIRE = struct.Struct("!HBBIQQ36s7IHBBH")


@pytest.mark.benchmark(group="message")
def test_message_encode_struct(benchmark: Any) -> None:
    def encode() -> bytes:
        return WIRE.pack(0x5443, 4, message.HANDOFF, WIRE.size + len(HEAD), 1, time.monotonic_ns(),
                         *FIELDS.values()) + HEAD
    made = message.decode(benchmark(encode))
    assert made["data"] == HEAD and made["srtt_us"] == FIELDS["srtt_us"]


@pytest.mark.benchmark(group="message")
def test_message_decode_struct(benchmark: Any) -> None:
    raw = message.encode(message.HANDOFF, 1, FIELDS, HEAD)

    def decode() -> dict[str, Any]:
        magic, version, kind, length, number, sent, *fields = WIRE.unpack_from(raw)
        assert (magic, version, length) == (0x5443, 4, len(raw))
        return {"type": kind, "id": number, "sent_ns": sent, "data": raw[WIRE.size:],
                **dict(zip(FIELDS, fields, strict=True))}
    made = benchmark(decode)
    assert made["data"] == HEAD and made["flags"] == FIELDS["flags"]


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


@pytest.mark.benchmark(group="rewrite, 100 packets")
def test_rewrite_scapy(benchmark: Any) -> None:
    def rewrite() -> None:
        for _ in range(TIMES):
            packet = inet.IP(PACKET)
            tcp = packet[inet.TCP]
            tcp.seq = (tcp.seq + 12345) % 2**32
            tcp.ack = (tcp.ack + 12345) % 2**32
            tcp.options = [(k, (v[0] + 77, v[1])) if k == "Timestamp" else (k, v)
                           for k, v in tcp.options]
            del tcp.chksum
            bytes(packet)
    benchmark(rewrite)


# The TCP checksum of that segment, from nothing.

@pytest.mark.benchmark(group="checksum, 100 packets")
def test_checksum_ours(benchmark: Any) -> None:
    benchmark(checksum_many, PACKET, TIMES)


@pytest.mark.benchmark(group="checksum, 100 packets")
def test_checksum_scapy(benchmark: Any) -> None:
    from scapy.utils import checksum
    segment = PACKET[20:]
    benchmark(lambda: [checksum(segment) for _ in range(TIMES)])


@pytest.mark.benchmark(group="checksum, 100 packets")
def test_checksum_python(benchmark: Any) -> None:
    words = struct.Struct(f"!{len(PACKET[20:]) // 2}H")

    def checksum() -> int:
        total = 0
        for _ in range(TIMES):
            total = sum(words.unpack(PACKET[20:]))
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
        return total
    benchmark(checksum)


# What the socket path needs of a connection that it hands over: socket options, read from a frozen
# socket. The alternative reads most of them from Python.

@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, \
            socket.create_connection(server.getsockname()):
        accepted, _ = server.accept()
        with accepted:
            yield accepted


@pytest.mark.benchmark(group="snapshot")
def test_snapshot_ours(benchmark: Any, connection: socket.socket) -> None:
    assert benchmark(freeze, connection.fileno())["mss"]


@pytest.mark.benchmark(group="snapshot")
def test_snapshot_python(benchmark: Any, connection: socket.socket) -> None:
    repair, queue, queue_seq, window, info, timestamp = 19, 20, 21, 29, 11, 24

    def read() -> int:
        def get(option: int, size: int = 4) -> bytes:
            return connection.getsockopt(socket.IPPROTO_TCP, option, size)
        connection.setsockopt(socket.IPPROTO_TCP, repair, 1)
        for which in (1, 2):
            connection.setsockopt(socket.IPPROTO_TCP, queue, which)
            get(queue_seq)
        get(window, 20)
        get(timestamp)
        length = len(get(info, 256))
        connection.setsockopt(socket.IPPROTO_TCP, repair, -1)
        return length
    assert benchmark(read)
