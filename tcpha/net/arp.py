# SPDX-License-Identifier: GPL-2.0-or-later
"""ARP: who holds an address, said and asked, and what neighbours may not learn."""
from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.expressions import genex, verdict

from tcpha.net.journal import NFT, Changes, HostError, Kept
from tcpha.net.nft import (
    NETWORK,
    NF_DROP,
    NFPROTO_ARP,
    as_data,
    chain_use,
    compare,
    drop_table,
    in_thread,
    new_chain,
    new_rule,
    payload,
    put_table,
)

ETH_P_ARP = 0x0806
PROBES, PROBE_WAIT = 2, 0.15  # seconds; neighbours answer within one
NF_ARP_OUT = 1
ARP_OPERATION, ARP_SENDER, ARP_TARGET = 6, 14, 24  # offsets, for Ethernet and IPv4


def announce(interface: str, mac: bytes, address: str) -> None:
    """Gratuitous ARP (RFC 5227 section 3): neighbours learn who holds an address now."""
    ip = socket.inet_aton(address)
    frame = b"\xff" * 6 + mac + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1) \
        + mac + ip + b"\0" * 6 + ip
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind((interface, ETH_P_ARP))
        s.send(frame)


def holder_on_link(interface: str, mac: bytes, address: str) -> str | None:
    """Who answers for an address on an interface's segment, as a MAC address; None: nobody. mac:
    the interface's. Asked as RFC 5227 section 2.1.1 does, without claiming an address."""
    ip = socket.inet_aton(address)
    probe = b"\xff" * 6 + mac + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1) \
        + mac + b"\0" * 10 + ip
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as s:
        s.bind((interface, ETH_P_ARP))
        for _ in range(PROBES):
            s.send(probe)
            end = time.monotonic() + PROBE_WAIT
            while (left := end - time.monotonic()) > 0:
                s.settimeout(left)
                try:
                    frame = s.recv(64)
                except TimeoutError:
                    break
                if frame[20:22] == b"\0\2" and frame[28:32] == ip and frame[22:28] != mac:
                    return frame[22:28].hex(":")
    return None


def _hiding(address: str, instead: str) -> list[Any]:
    """The rules for one address."""
    hidden, shown = socket.inet_aton(address), socket.inet_aton(instead)
    sender = compare(payload(NETWORK, ARP_SENDER, 4), hidden)
    return [
        [sender, compare(payload(NETWORK, ARP_OPERATION, 2), b"\0\2"), verdict(NF_DROP)],
        [sender, compare(payload(NETWORK, ARP_TARGET, 4), hidden), verdict(NF_DROP)],
        [sender, [genex("immediate", {"dreg": 1, "data": as_data(shown)}),
                  genex("payload", {"sreg": 1, "base": NETWORK, "offset": ARP_SENDER,
                                    "len": 4, "csum_type": 0, "csum_offset": 0})]]]


def hide(host: Changes, name: str, addresses: Iterable[str], instead: str) -> None:
    """In ARP that this host sends: replies for any of these, and announcements of it, are dropped;
    requests by it (RFC 826: ar$spa) show another. Raises HostError if the kernel has no nft for
    ARP."""
    rules = [rule for address in addresses for rule in _hiding(address, instead)]

    def work() -> None:
        chain = new_chain(NFPROTO_ARP, name, "output", "filter", NF_ARP_OUT, 0)
        in_thread(partial(put_table, NFPROTO_ARP, name, [
            chain, *(new_rule(NFPROTO_ARP, name, "output", r) for r in rules)]))
    if host.inherit(what="arp", name=name):
        host.restore_to(len(host.undo) - 1)
    host.will_undo(what="arp", name=name)
    try:
        work()
    except NetlinkError as error:
        raise HostError(f"the kernel cannot filter ARP by nft: {error}") from None
    host.keep(("arp", name), Kept(f"nft table {name} (ARP)", NFT,
                                  lambda: chain_use(NFPROTO_ARP, name, "output") != len(rules),
                                  work))


def show(name: str) -> None:
    """Undo hide()."""
    with contextlib.suppress(NetlinkError):
        in_thread(partial(drop_table, name), NFPROTO_ARP)
