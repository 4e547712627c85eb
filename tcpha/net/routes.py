# SPDX-License-Identifier: GPL-2.0-or-later
"""What MSS routes want clients to be told (ip-route(8): advmss, mtu), for the packet path, whose
SYN-ACKs our kernel does not make. Its look-up says by which interface an answer leaves, and no
more than that; so each interface has a table of its own.
"""
from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tcpha.net.host import Host
from tcpha.net.netlink import attributes, dump

NETLINK_ROUTE = 0
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_F_CLONED = 0x200
RTN_UNICAST = 1
RTA_DST, RTA_OIF, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE = 1, 4, 8, 9, 15
RTAX_MTU, RTAX_ADVMSS = 2, 8
HEADERS = 40
SLOW = 0.5  # seconds; a look that takes longer is followed by a pause, so many times as long
PAUSES = 20.0

Prefix = tuple[int, int]      # length, address
Place = tuple[int, int, int]  # interface, length, address


@dataclass(frozen=True)
class Line:
    """A unicast route. mss: 0: it does not say."""

    table: int
    prefix: Prefix
    interfaces: tuple[int, ...]
    mss: int


def _hops(data: bytes, at: int, end: int) -> Iterator[int]:
    """Interfaces of a multipath route: struct rtnexthop."""
    while at + 8 <= end:
        size, _, _, index = struct.unpack_from("=HBBi", data, at)
        if size < 8:
            return
        yield index
        at += size + -size % 4


def _line(data: bytes, at: int, end: int, least: int) -> Line | None:
    """Of a message; None: the route is no business of ours."""
    _, length, _, tos, table, _, _, kind, flags = struct.unpack_from("=8BI", data, at)
    if kind != RTN_UNICAST or tos or flags & RTM_F_CLONED:
        return None
    address = mss = 0
    interfaces: tuple[int, ...] = ()
    for what, begin, stop in attributes(data, at + 12, end):
        if what == RTA_DST:
            address = int.from_bytes(data[begin:stop], "big")
        elif what == RTA_OIF:
            interfaces = struct.unpack_from("=i", data, begin)
        elif what == RTA_TABLE:
            table, = struct.unpack_from("=I", data, begin)
        elif what == RTA_MULTIPATH:
            interfaces = tuple(_hops(data, begin, stop))
        elif what == RTA_METRICS:
            mss = _mss(data, begin, stop, least)
    return Line(table, (length, address), interfaces, mss)


def _mss(data: bytes, at: int, end: int, least: int) -> int:
    """As ipv4_default_advmss() of the kernel has it."""
    metric = {kind: int(struct.unpack_from("=I", data, begin)[0])
              for kind, begin, _ in attributes(data, at, end)}
    if advmss := metric.get(RTAX_ADVMSS, 0):
        return advmss
    mtu = metric.get(RTAX_MTU, 0)
    return max(mtu - HEADERS, least) if mtu else 0


def read(least: int) -> Iterator[Line]:
    """All IPv4 routes, what the kernel prefers first. least: net.ipv4.route.min_adv_mss. Raises
    OSError."""
    request = struct.pack("=B11x", socket.AF_INET)
    for kind, data, at, end in dump(NETLINK_ROUTE, RTM_GETROUTE, request):
        if kind == RTM_NEWROUTE and (line := _line(data, at, end, least)):
            yield line


def _covering(prefix: Prefix) -> Iterator[Prefix]:
    """The prefix and those around it, the longest first."""
    length, address = prefix
    for n in range(length, -1, -1):
        yield n, address >> 32 - n << 32 - n


def told(lines: Iterable[Line], most: int) -> dict[Place, int]:
    """What MSS clients are told by each interface; 0: what it has room for, though a route around
    says otherwise. Which table the kernel takes is not known here: the smallest of all holds, since
    a small MSS does no harm. So it does for an interface, if there are more places than 'most'."""
    tables: dict[int, dict[int, dict[Prefix, int]]] = {}
    for line in lines:
        for index in line.interfaces:
            tables.setdefault(index, {}).setdefault(line.table, {}).setdefault(
                line.prefix, line.mss)
    found = {index: _told(list(by_table.values())) for index, by_table in tables.items()
             if any(mss for table in by_table.values() for mss in table.values())}
    if sum(len(places) for places in found.values()) > most:
        found = {index: {(0, 0): min(mss for mss in places.values() if mss)}
                 for index, places in found.items()}
    return {(index, *prefix): mss for index, places in found.items()
            for prefix, mss in places.items()}


def _told(tables: list[dict[Prefix, int]]) -> dict[Prefix, int]:
    """Of one interface."""
    out: dict[Prefix, int] = {}
    for prefix in sorted({p for table in tables for p in table}):
        says = (next((table[p] for p in _covering(prefix) if p in table), 0) for table in tables)
        mss = min((m for m in says if m), default=0)
        if mss != next((out[p] for p in _covering(prefix) if p in out), 0):
            out[prefix] = mss
    return out


class Routes:
    """Sees to it that a map says what the routes say. Belongs to the keeper's thread: a route that
    changes while we look has it look again. put: stores the MSS for a place; None: it is gone."""

    def __init__(self, host: Host, most: int, put: Callable[[Place, int | None], None]):
        self.host = host
        self.most = most
        self.put = put
        self.now: dict[Place, int] = {}
        self.not_before = 0.0

    def look(self) -> None:
        """Raises OSError."""
        begin = time.monotonic()
        if begin < self.not_before:
            return
        wanted = self._wanted()
        for place in self.now.keys() - wanted.keys():
            self.put(place, None)
            del self.now[place]
        for place, mss in wanted.items():
            if self.now.get(place) != mss:
                self.put(place, mss)
                self.now[place] = mss
        end = time.monotonic()
        self.not_before = end + PAUSES * (end - begin) if end - begin > SLOW else 0.0

    def _wanted(self) -> dict[Place, int]:
        least = int(self.host.read_sysctl("net/ipv4/route/min_adv_mss") or 0)
        # that none says anything is the usual case, in which nothing need be kept
        if not any(line.mss for line in read(least)):
            return {}
        return told(read(least), self.most)
