# SPDX-License-Identifier: GPL-2.0-or-later
"""IPv4 and TCP, byte by byte."""
from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

CLIENT, VIP, FE, BE = "192.168.1.50", "192.168.1.36", "192.168.1.23", "192.168.1.33"
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
IPIP = 4
FULL = 0x4000  # DF


@dataclass(frozen=True)
class Packet:
    """An Ethernet frame with an IPv4 TCP segment, or what claims to be one."""

    flags: int = ACK
    seq: int = 1000
    ack: int = 1
    data: bytes = b""
    tcp_options: bytes = b""
    source: str = CLIENT
    destination: str = VIP
    sport: int = 4000
    dport: int = 80
    ethertype: int = 0x0800
    protocol: int = socket.IPPROTO_TCP
    fragment: int = FULL
    options: bytes = b""      # of IP
    ihl: int | None = None
    version: int = 4
    tos: int = 0
    doff: int | None = None
    urgent: int = 0
    cut: int | None = None    # bytes that are there, if not all
    tunnel: tuple[str, str] | None = None  # addresses of an outer header
    outer_fragment: int = 0
    outer_tos: int = 0
    outer_options: bytes = b""
    body: bytes | None = None  # instead of the TCP segment

    def ip(self) -> bytes:
        doff = 5 + len(self.tcp_options) // 4 if self.doff is None else self.doff
        tcp = struct.pack("!HHIIBBHHH", self.sport, self.dport, self.seq, self.ack, doff << 4,
                          self.flags, 1000, 0, self.urgent) + self.tcp_options + self.data
        if self.body is not None:
            tcp = self.body
        ihl = 5 + len(self.options) // 4 if self.ihl is None else self.ihl
        return ip_header(self.version, ihl, len(self.options) + 20 + len(tcp), self.fragment,
                         self.protocol, self.source, self.destination, self.tos) \
            + self.options + tcp

    def frame(self) -> bytes:
        ip = self.ip()
        if self.tunnel:
            more = self.outer_options
            ip = ip_header(4, 5 + len(more) // 4, 20 + len(more + ip), self.outer_fragment, IPIP,
                           *self.tunnel, self.outer_tos) + more + ip
        return (bytes(12) + struct.pack("!H", self.ethertype) + ip)[:self.cut]


def ip_header(version: int, ihl: int, length: int, fragment: int, protocol: int, source: str,
              destination: str, tos: int = 0, number: int = 7) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", version << 4 | ihl, tos, length, number, fragment, 64,
                       protocol, 0, socket.inet_aton(source), socket.inet_aton(destination))
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]


MSS = b"\x02\x04\x05\xb4"
SACK_TS = b"\x04\x02\x08\x0a" + struct.pack("!II", 0x01020304, 0)
WSCALE = b"\x01\x03\x03\x07"


def stamped(tsval: int, tsecr: int) -> bytes:
    return b"\1\1\x08\x0a" + struct.pack("!II", tsval, tsecr % 2**32)


def options(tcp: bytes) -> dict[int, bytes]:
    out, at = {}, 20
    while at < tcp[12] >> 4 << 2:
        if tcp[at] == 1:
            at += 1
            continue
        out[tcp[at]] = tcp[at + 2:at + tcp[at + 1]]
        at += tcp[at + 1]
    return out


def total(data: bytes) -> int:
    data += b"\0" * (len(data) & 1)
    n = sum(struct.unpack(f"!{len(data) // 2}H", data))
    n = (n & 0xFFFF) + (n >> 16)
    return (n & 0xFFFF) + (n >> 16)


def internet_sum(data: bytes) -> int:
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


NOT_ECT, ECT_1, ECT_0, CE = range(4)
# RFC 6040, figure 4: inner and outer field, and what becomes of them; None: dropped
ECN = {(inner, outer): inner for inner in range(4) for outer in range(4)} | {
    (NOT_ECT, CE): None, (ECT_0, ECT_1): ECT_1, (ECT_0, CE): CE, (ECT_1, CE): CE}
