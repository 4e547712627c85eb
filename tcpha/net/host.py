# SPDX-License-Identifier: GPL-2.0-or-later
"""This host as its daemon uses it: one network namespace, with all that may be changed there."""
from __future__ import annotations

from pathlib import Path

from tcpha.net import arp, rules
from tcpha.net.addresses import Addresses
from tcpha.net.filters import Filters
from tcpha.net.journal import Kind
from tcpha.net.sysctl import Sysctls
from tcpha.undoing import each


class Host(Sysctls, Addresses, Filters):
    """Several threads may use it."""

    def __init__(self, journal: Path):
        super().__init__(journal, {
            "sysctl": Kind(("name",), self.undo_sysctl),
            "address": Kind(("address",), self.undo_address),
            "filter": Kind(("interface", "priority", "handle"), self.undo_filter),
            "rules": Kind(("name",), lambda change: rules.remove(change["name"])),
            "arp": Kind(("name",), lambda change: arp.show(change["name"]))})

    def restore(self) -> None:
        """Put everything back, latest change first."""
        each(("addresses", self.withdraw), ("changes", lambda: self.restore_to(0)),
             ("tcx", self.tcx.end), ("journal", self.remove_journal))
