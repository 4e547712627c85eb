# SPDX-License-Identifier: GPL-2.0-or-later
"""What conntrack remembers outlives the rule that said it: a connection keeps the destination that
NAT gave to its first packet."""
from __future__ import annotations

import socket
import struct

from tcpha.net.netlink import attributes, dump

NETLINK_NETFILTER, NLM_F_REQUEST = 12, 1
IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 0x101, 0x102  # of the subsystem NFNL_SUBSYS_CTNETLINK
CTA_TUPLE_ORIG, CTA_STATUS, CTA_ID, CTA_ZONE, CTA_STATUS_MASK = 1, 3, 12, 18, 26
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_DST, CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 2, 1, 3
IPS_ASSURED, IPS_DST_NAT = 1 << 2, 1 << 5
NFGENMSG = struct.pack("BBH", socket.AF_INET, 0, 0)


def forget_translated(ends: list[tuple[str, int]]) -> None:
    """Of TCP connections to these addresses and ports: those that NAT has sent elsewhere, and that
    are not established. Raises OSError."""
    wanted = [[socket.inet_aton(address), bytes([socket.IPPROTO_TCP]), struct.pack("!H", port)]
              for address, port in ends]
    # kernels before 5.15 do not choose, and tell all
    request = NFGENMSG + struct.pack("=HH", 8, CTA_STATUS) + struct.pack("!I", IPS_DST_NAT) \
        + struct.pack("=HH", 8, CTA_STATUS_MASK) + struct.pack("!I", IPS_DST_NAT | IPS_ASSURED)
    found = []
    for _, data, at, end in dump(NETLINK_NETFILTER, IPCTNL_MSG_CT_GET, request):
        parts = {kind: data[begin:stop] for kind, begin, stop in attributes(data, at + 4, end)}
        status = int.from_bytes(parts[CTA_STATUS], "big")
        if status & (IPS_DST_NAT | IPS_ASSURED) == IPS_DST_NAT and \
                _destination(parts[CTA_TUPLE_ORIG]) in wanted:
            found.append(b"".join(_attribute(kind, parts[kind]) for kind in
                                  (CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE) if kind in parts))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                       NETLINK_NETFILTER) as s:
        for entry in found:
            s.send(struct.pack("=IHHII", 20 + len(entry), IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST, 0, 0)
                   + NFGENMSG + entry)


def _destination(entry: bytes) -> list[bytes]:
    """Address, protocol and port of a tuple."""
    outer = {kind: entry[begin:stop] for kind, begin, stop in attributes(entry, 0, len(entry))}
    values = []
    for part, kinds in ((CTA_TUPLE_IP, (CTA_IP_V4_DST,)),
                        (CTA_TUPLE_PROTO, (CTA_PROTO_NUM, CTA_PROTO_DST_PORT))):
        inner = outer.get(part, b"")
        found = {kind: inner[begin:stop] for kind, begin, stop in attributes(inner, 0, len(inner))}
        values += [found.get(kind, b"") for kind in kinds]
    return values


def _attribute(kind: int, value: bytes) -> bytes:
    nested = 0x8000 if kind == CTA_TUPLE_ORIG else 0  # NLA_F_NESTED
    return struct.pack("=HH", 4 + len(value), nested | kind) + value + b"\0" * (-len(value) % 4)
