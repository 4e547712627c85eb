# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of the packet path's cookies: made here, sent to back ends, changed again and again.

Two are known at a time. A new one replaces the older of them AHEAD seconds before it is used, so
that back ends know it by then; so a cookie is good for PERIOD - AHEAD seconds at least.
"""
from __future__ import annotations

import os
import time

from tcpha._fast.fe_worker import FrontEnd

PERIOD = 60.0  # seconds for which a key makes cookies
AHEAD = 5.0  # seconds before its use, at which it is made


class CookieKeys:
    """core: the front end's; used in the loop's thread only."""

    def __init__(self, core: FrontEnd):
        self.core = core
        self.number = core.key_in_use()  # a killed run's: its clients' cookies stay good
        if not self.number:
            self.number = 1  # 0 and 1 are the first
            for number in (0, 1):
                core.set_key(number, os.urandom(16))
        core.use_key(self.number)
        self.newest = self.number
        self.since = time.monotonic()

    def send(self, link: int) -> None:
        """Tell a back end all keys, over a new control connection."""
        for number in (self.newest - 1, self.newest):
            self.core.send_key(link, number)

    def tick(self, links: list[int]) -> None:
        """Make or take a new key, if it is time. links: to back ends of the packet path."""
        age = time.monotonic() - self.since
        if age >= PERIOD - AHEAD and self.newest == self.number:
            self.newest += 1
            self.core.set_key(self.newest, os.urandom(16))
            for link in links:
                self.core.send_key(link, self.newest)
        elif age >= PERIOD:
            self.number = self.newest
            self.core.use_key(self.number)
            self.since = time.monotonic()
