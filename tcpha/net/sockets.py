# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets of this network namespace that the kernel lists."""
from __future__ import annotations

import logging
import socket

from pyroute2 import DiagSocket
from pyroute2.netlink.exceptions import NetlinkError

log = logging.getLogger("tcpha")
TCP_SYN_RECV = 3


def handshakes(where: set[tuple[str, int]]) -> int:
    """How many SYNs to some addresses and ports of ours are answered, and the answer not yet
    acknowledged; 0 if the kernel does not say. May be called from another thread."""
    try:
        with DiagSocket() as diag:
            diag.bind()
            return sum((s["idiag_src"], s["idiag_sport"]) in where for s in
                       diag.get_sock_stats(family=socket.AF_INET, states=1 << TCP_SYN_RECV))
    except (OSError, NetlinkError) as error:
        log.debug("half-open connections: %s", error)
        return 0
