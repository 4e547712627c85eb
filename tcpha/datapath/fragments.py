# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients' segments that arrive in IPv4 fragments: at the front end, or, where a router has cut
what was around them, at a back end.

Neither datapath could tell whose the later fragments are. So our own kernel puts them together;
what becomes of them bears the mark of the first one, is taken from the stack by a rule, and comes
in once more through a TAP device, in one piece, and without the outer header.
"""
from __future__ import annotations

import logging
import os

from tcpha._fast.fragments import MARK, Defragmented
from tcpha._fast.nfqueue import open_queues
from tcpha.config import Config
from tcpha.net.host import Host
from tcpha.net.rules import Rule
from tcpha.net.tap import accept_any_source, open_tap
from tcpha.undoing import each

log = logging.getLogger("tcpha")
FIRST_QUEUE = 25900
OUTER_IP = 20
ANY_SIZE = 65535  # bytes of an IP packet that goes no further than to our own stack


class Fragments:
    """index: of the TAP device. Raises OSError if the kernel has no netfilter queues, or no TAP
    devices."""

    def __init__(self, config: Config, host: Host, role: str):
        self.fd, self.index, name = open_tap(host, "tcphafr")
        try:
            self.queue, = open_queues(1, FIRST_QUEUE)
        except BaseException:
            os.close(self.fd)
            raise
        accept_any_source(host, name, self.index)
        room, self.outer = ANY_SIZE, 0
        if role == "fe":
            room = min(host.mtu(i) for i in host.ethernet(config.interface))
            self.outer = OUTER_IP if config.forward == "tunnel" else 0
        self.whole = Defragmented(self.queue, self.fd, host.mac(self.index), room - self.outer)

    def rule(self, destination: str) -> Rule:
        """For packets to an address of ours; to be put in force before start()."""
        return Rule("input", mark=MARK, destination=destination, queue=(self.queue.num, 1))

    def start(self) -> None:
        self.queue.start()

    def fit(self, mtu: int) -> None:
        """What leaves for the back ends is to be no larger than this."""
        self.whole.fit(mtu - self.outer)

    def counters(self) -> dict[str, int]:
        return {"defragmented": self.whole.count}

    def close(self) -> None:
        each(("queue", self.queue.close), ("TAP device", lambda: os.close(self.fd)))


REFUSED = {"fe": "segments in IP fragments are refused",
           "be": "what routers cut on its way from a front end is refused"}


def open_fragments(config: Config, host: Host, role: str) -> Fragments | None:
    """None, and a warning, where the kernel lacks what they need."""
    try:
        return Fragments(config, host, role)
    except OSError as error:
        log.warning("%s, as the kernel has no netfilter queues or TAP devices: %s", REFUSED[role],
                    error)
        return None
