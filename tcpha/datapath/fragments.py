# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients' segments that arrive in IPv4 fragments.

Neither datapath could tell whose the later fragments are. So our own kernel puts them together;
what becomes of them bears the mark of the first one, is taken from the stack by a rule, and comes
in once more through a TAP device, in one piece.
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

log = logging.getLogger("tcpha")
FIRST_QUEUE = 25900
OUTER_IP = 20


class Fragments:
    """rule: to be put in force before start(). index: of the TAP device. Raises OSError if the
    kernel has no netfilter queues, or no TAP devices."""

    def __init__(self, config: Config, host: Host):
        self.fd, self.index, name = open_tap(host, "tcphafr")
        try:
            self.queue, = open_queues(1, FIRST_QUEUE)
        except BaseException:
            os.close(self.fd)
            raise
        accept_any_source(host, name, self.index)
        self.outer = OUTER_IP if config.forward == "tunnel" else 0
        room = min(host.mtu(i) for i in host.ethernet(config.interface))
        self.whole = Defragmented(self.queue, self.fd, host.mac(self.index), room - self.outer)
        self.rule = Rule("input", mark=MARK, destination=config.vaddr, queue=(self.queue.num, 1))

    def start(self) -> None:
        self.queue.start()

    def fit(self, mtu: int) -> None:
        """What leaves for the back ends is to be no larger than this."""
        self.whole.fit(mtu - self.outer)

    def counters(self) -> dict[str, int]:
        return {"defragmented": self.whole.count}

    def close(self) -> None:
        self.queue.close()
        os.close(self.fd)


def open_fragments(config: Config, host: Host) -> Fragments | None:
    """None, and a warning, where the kernel lacks what they need."""
    try:
        return Fragments(config, host)
    except OSError as error:
        log.warning("segments in IP fragments are refused, as the kernel has no netfilter queues "
                    "or TAP devices: %s", error)
        return None
