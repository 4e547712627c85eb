# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose tunnelled packets the back end accepts: those of front ends that said so and are there, or
that had their program killed and whose kernel goes on with what they handed over."""
from __future__ import annotations

import logging
from collections.abc import Callable

from tcpha.datapath import Backend

log = logging.getLogger("tcpha")
AWAY = 5.0  # seconds without a control connection: it does not come back at once


class Tunnels:
    """now: of a monotonic clock, as for all calls."""

    def __init__(self, datapath: Backend, now: float):
        self.datapath = datapath
        self.seen = dict.fromkeys(datapath.allowed(), now)  # when each was there last

    def meet(self, address: str, tunnels: bool, now: float) -> None:
        """A front end has connected, and says how it forwards."""
        if tunnels:
            self.datapath.allow(address, True)
            self.seen[address] = now
        else:
            self.forget(address)

    def forget(self, address: str) -> None:
        """Accept nothing more of a front end."""
        if self.seen.pop(address, None) is not None:
            self.datapath.allow(address, False)

    def look(self, present: set[str], owns: Callable[[str], bool], now: float) -> None:
        """present: who has control connections. owns: whether one has connections here."""
        for address, since in list(self.seen.items()):
            if address in present:
                self.seen[address] = now
            elif now - since > AWAY and not owns(address):
                self.forget(address)
                log.info("front end %s: is gone, and so is its tunnel", address)
