# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses of this host: whose they are, and those that we add."""
from __future__ import annotations

import socket
from collections.abc import Callable

from pyroute2.netlink.exceptions import NetlinkError

from tcpha.net.journal import LINK, Change, Changes, Kept, one_at_a_time
from tcpha.net.links import Links

RTN_LOCAL = 2
RT_SCOPE_HOST = 254


class Addresses(Links, Changes):
    """IPv4 addresses of all interfaces."""

    def holder(self, address: str) -> int | None:
        """Index of the interface that holds an address."""
        for entry in self.ipr.get_addr(family=socket.AF_INET):
            if entry.get_attr("IFA_LOCAL") == address:
                return int(entry["index"])
        return None

    def takes(self, address: str) -> bool:
        """Whether our stack takes packets for an address, which somebody else may have added, or a
        local route for it (AnyIP)."""
        if self.holder(address) is not None:
            return True
        try:
            return bool(self.ipr.route("get", dst=address)[0]["type"] == RTN_LOCAL)
        except (NetlinkError, IndexError):
            return False

    def address_beside(self, index: int, address: str) -> str | None:
        """Another address of an interface."""
        for entry in self.ipr.get_addr(family=socket.AF_INET, index=index):
            if entry.get_attr("IFA_LOCAL") != address:
                return str(entry.get_attr("IFA_LOCAL"))
        return None

    def add_address(self, address: str, where: Callable[[], int | None]) -> None:
        """Add address/32, unless another interface holds it (the administrator's then, and kept),
        and keep it there. where: finds the interface, which may be another one later, or none."""
        self.keep(("address", address), Kept(
            f"address {address}", LINK,
            lambda: (index := where()) is not None and self._misplaced(address, index),
            lambda: self._place_address(address, where())))
        index = where()
        if index is not None:
            self.inherit(what="address", address=address)
            self._place_address(address, index)

    def _ours(self, address: str) -> str | None:
        """The interface that we added an address to."""
        return next((str(c["interface"]) for c in self.undo
                     if self.identity(c) == ("address", address)), None)

    def _misplaced(self, address: str, index: int) -> bool:
        """Whether nobody holds an address, or an interface where we added it and which is not the
        right one any more."""
        held = self.holder(address)
        return held is None or (held != index and self.interface(held) == self._ours(address))

    def _place_address(self, address: str, index: int | None) -> None:
        if index is None or not self._misplaced(address, index):
            return
        if self.holder(address) is not None:
            self.undo_address({"address": address, "interface": self._ours(address)})
        self.will_undo(what="address", address=address, interface=self.interface(index))
        self.ipr.addr("add", index=index, address=address, prefixlen=32)

    def ensure_loopback(self, index: int) -> None:
        """Give a device of ours an address. It takes that along when it goes."""
        if not any(self.ipr.get_addr(family=socket.AF_INET, index=index)):
            self.ipr.addr("add", index=index, address="127.0.0.1", prefixlen=32,
                          scope=RT_SCOPE_HOST)

    @one_at_a_time
    def withdraw(self) -> None:
        """Take addresses away, before that which would miss their packets."""
        for change in [c for c in self.undo if c["what"] == "address"]:
            self.undo.remove(change)
            self._undo(change)
            self._write_undone()

    def undo_address(self, change: Change) -> None:
        try:
            index = socket.if_nametoindex(change["interface"])
            self.ipr.addr("del", index=index, address=change["address"], prefixlen=32)
        except (OSError, NetlinkError):
            return  # gone already, with its interface or by the administrator
