# SPDX-License-Identifier: GPL-2.0-or-later
"""Gratuitous ARP. A frame may be lost, a neighbour may not listen yet, and until it asks anew,
which takes minutes on many routers, it sends to who had the address before. A client may never ask:
that responses arrive tells its kernel that its way to us is good, and they come by another one.
"""
from __future__ import annotations

import logging
from collections.abc import Callable

from tcpha.net import arp
from tcpha.net.host import Host
from tcpha.net.journal import HostError

log = logging.getLogger("tcpha")
REPEATED = (1.0, 5.0)  # seconds after something has changed; a switch's port may need some
REFRESH = 60.0         # seconds between announcements when nothing changes


Place = tuple[int, bytes]  # an interface and its MAC address


class Announcer:
    """Belongs to the loop's thread but for look()."""

    def __init__(self, host: Host, address: str, where: Callable[[], int | None]):
        self.host = host
        self.address = address
        self.where = where
        self.place: Place | None = None
        self.due: list[float] = []

    def look(self) -> Place | None:
        """Where the address is now, if neighbours can hear of it. Asks netlink."""
        index = self.where()
        if index is None or self.host.holder(self.address) != index:
            return None
        try:
            mac = self.host.running_mac(index)
        except HostError:  # gone since
            return None
        return (index, mac) if mac else None

    def take(self, place: Place | None, now: float) -> None:
        """Announce at once, and again, if it has come, or its link or MAC address has changed."""
        if place != self.place:
            self.place = place
            self.due = [now, *(now + t for t in REPEATED)]
        self.tick(now)

    def tick(self, now: float) -> None:
        """To be called every second."""
        if self.place is None or now < self.due[0]:
            return
        self.due = self.due[1:] or [now + REFRESH]
        try:
            index, mac = self.place
            arp.announce(self.host.interface(index), mac, self.address)
        except OSError as error:  # the next time, then
            log.debug("announcing %s: %s", self.address, error)
