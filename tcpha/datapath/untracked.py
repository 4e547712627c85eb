# SPDX-License-Identifier: GPL-2.0-or-later
"""Back ends with ebpf: conntrack is kept away from the virtual addresses.

It has not seen the handshake of what is adopted by BPF. Where there are NAT rules, as docker and
firewalld make them, the kernel takes the port of such a connection for one that was changed, and
takes the packet away from its new socket (nf_nat_ipv4_local_in()).
"""
from __future__ import annotations

import logging
import socket
from collections.abc import Iterable

from tcpha.net import rules
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.rules import Rule

log = logging.getLogger("tcpha")


def leave_untracked(host: Host, name: str, vaddrs: Iterable[str]) -> None:
    """name: of the table."""
    try:
        rules.keep(host, name, [rule for vaddr in vaddrs for rule in (
            Rule("prerouting", destination=vaddr, untracked=True),
            Rule("prerouting", protocol=socket.IPPROTO_ICMP, destination=vaddr,
                 untracked=True),  # errors about what nobody tracks would be 'invalid'
            Rule("output", source=vaddr, untracked=True))])
    except (HostError, OSError) as error:
        log.warning("connections may be reset if this host has NAT rules: %s", error)
