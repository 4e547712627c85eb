# SPDX-License-Identifier: GPL-2.0-or-later
"""The ARP filter: a back end has the VIPs, and no neighbour may learn that."""
from __future__ import annotations

import logging

from tcpha.config import Config
from tcpha.net import arp
from tcpha.net.host import Host
from tcpha.net.journal import HostError

log = logging.getLogger("tcpha")


def set_up(config: Config, host: Host) -> None:
    """Before the VIPs are added. Raises HostError if uaddr belongs to somebody."""
    if host.holder(config.uaddr) is not None:
        raise HostError(f"uaddr {config.uaddr} is an address of this host; name one that nobody "
                        "uses")
    device = host.holder(config.raddr)
    if device is not None and host.is_ethernet(device):
        name = host.interface(device)
        owner = arp.holder_on_link(name, host.mac(device), config.uaddr)
        if owner:
            raise HostError(f"uaddr {config.uaddr} is in use by {owner} on {name}; name an address "
                            "that nobody uses")
    # A host that neither answers nor announces ARP for addresses of other interfaces: a VIP
    # on lo is not seen (Documentation/networking/ip-sysctl, arp_ignore and arp_announce).
    host.sysctl("net/ipv4/conf/all/arp_ignore", "1")
    host.sysctl("net/ipv4/conf/all/arp_announce", "2")
    # and if somebody changes these back, it shows uaddr
    try:
        arp.hide(host, f"tcphabe_{host.handle:04x}", config.vaddrs, config.uaddr)
    except HostError as error:
        log.warning("%s; the sysctls arp_ignore and arp_announce must stay as they are now", error)
