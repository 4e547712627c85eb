# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'nfqueue': NAT rules of others do not move what is handed over.

A port that is published for a container (docker) has a rule that sends new connections elsewhere,
and the handshake that we forge looks like one. The kernel asks rules for NAT until one of them
decides: ours comes first, and decides for the address that the packet has. What came between the
others' rules and ours is forgotten by conntrack, and the next packet of its handshake is met anew.
"""
from __future__ import annotations

import contextlib
import logging

from tcpha.net import conntrack, rules
from tcpha.net.host import Host
from tcpha.net.journal import NFT, HostError, Kept
from tcpha.net.rules import Rule

log = logging.getLogger("tcpha")


class Pinned:
    """Of what is injected, by its mark, for the addresses of listeners; and of what arrives for
    those that are 'outside', as conntrack may have lost a connection. In force as soon as others
    have NAT rules, since the kernel tracks all connections of a host that has any. name: of the
    table."""

    def __init__(self, host: Host, name: str, listeners: list[tuple[str, int]],
                 outside: list[tuple[str, int]], mark: int):
        self.host, self.name, self.listeners = host, name, listeners
        self.rules = [Rule("pin_out", mark=mark, destination=address, pin=True)
                      for address in dict.fromkeys(address for address, _ in listeners)]
        self.rules += [Rule("pin_in", destination=address, dport=port, pin=True)
                       for address, port in outside]
        if self._wanted():
            try:
                self._put()
            except HostError as error:
                log.warning("what is handed over may go where NAT rules send it: %s", error)
        host.keep(("pinned", name), Kept(f"table {name} (NAT)", NFT, self._wanted, self._put,
                                         late=True))

    def _wanted(self) -> bool:
        return ("rules", self.name) not in self.host.kept and rules.others_translate()

    def _put(self) -> None:
        rules.keep(self.host, self.name, self.rules, then=self._forget)

    def _forget(self) -> None:
        with contextlib.suppress(OSError):  # a kernel whose conntrack cannot be asked
            conntrack.forget_translated(self.listeners)

    def close(self) -> None:
        self.host.kept.pop(("pinned", self.name), None)
        rules.remove(self.name)
