# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs where interfaces receive packets: at tcx, or as filters of tc."""
from __future__ import annotations

import contextlib
import logging
import os
import socket
import zlib
from pathlib import Path
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.bpf import maps_of, open_program, program_id, tc_attach, tc_attached
from tcpha.net.journal import (
    PROGRAM,
    Change,
    Changes,
    HostError,
    Kept,
    Kind,
    changes_in,
    one_at_a_time,
)
from tcpha.net.links import TAP_PREFIXES, Links
from tcpha.net.tcx import Tcx

log = logging.getLogger("tcpha")
CLSACT_INGRESS, CLSACT_EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
PRIORITIES, LAST_PRIORITY = 3, 201  # of our filters at tc: how many, and the greatest
ETH_P_ALL = 0x0003


def _programs(changes: list[Change]) -> set[int]:
    """Ids of programs at tcx."""
    return {change["program"] for change in changes if change.get("program")}


class Filters(Links, Changes):
    """Of one daemon, and what it has to know of the others' on this host."""

    def __init__(self, journal: Path, kinds: dict[str, Kind]):
        super().__init__(journal, kinds)
        # of a killed predecessor's programs that are still attached, by priority:
        # {name: (descriptor, size of a key, of a value)}
        self.maps: dict[int, dict[str, tuple[int, int, int]]] = {}
        # names (none: all), program and priority of what is attached to the network's interfaces
        self.everywhere: tuple[list[str], int, int] | None = None
        # distinguishes the programs of instances with other run directories
        self.handle = zlib.crc32(str(journal.resolve()).encode()) % 0xFFFE + 1
        self.tcx = Tcx(self.handle)

    def recover(self) -> None:
        super().recover()
        self.tcx.recover(_programs(self.inherited))
        self._claim_maps()

    def settle(self) -> None:
        super().settle()
        self.tcx.settle()
        for fd, _, _ in (m for maps in self.maps.values() for m in maps.values()):
            os.close(fd)
        self.maps.clear()

    def _know_others(self) -> None:
        """Other daemons of TCPHA may have come after us; nobody without CAP_SYS_ADMIN could tell
        by their programs."""
        for path in self.journal.parent.glob(f"*{self.journal.suffix}"):
            if path != self.journal:
                with contextlib.suppress(OSError, ValueError):
                    self.tcx.others |= _programs(changes_in(path))

    def _claim_maps(self) -> None:
        """Nobody without CAP_SYS_ADMIN can get at them later."""
        for change in self.inherited:
            if change["what"] == "filter" and not self.maps.get(change["priority"]):
                with contextlib.suppress(OSError):
                    self.maps[change["priority"]] = self._maps_of(change)

    def _maps_of(self, change: Change) -> dict[str, tuple[int, int, int]]:
        if number := change.get("program"):
            return self.tcx.maps(number)
        index = socket.if_nametoindex(change["interface"])
        number = tc_attached(index, change.get("at") or change["priority"], self.handle)
        if not number:
            return {}
        fd = open_program(number)
        try:
            return maps_of(fd)
        finally:
            os.close(fd)

    def attach(self, index: int, program_fd: int, priority: int) -> None:
        """Put a BPF program where it sees what an interface receives before others do, who see what
        it lets pass, and keep it there as long as there is this interface. In the order of their
        priorities, if there are several of ours."""
        name = self.interface(index)
        key = "filter", name, priority, self.handle
        self._attach(index, program_fd, priority)
        self.keep(key, Kept(
            f"BPF program on {name}", PROGRAM,
            lambda: self._detached(index, program_fd, key),
            lambda: self._attach(index, program_fd, priority)))

    def attach_everywhere(self, names: list[str], program_fd: int, priority: int) -> None:
        """The same for the named interfaces, or all Ethernet ones; and see late()."""
        for index in self.ethernet(names):
            self.attach(index, program_fd, priority)
        self.everywhere = names, program_fd, priority

    def late(self) -> list[int]:
        """Interfaces that have come since, and are to have the same."""
        if self.everywhere is None:
            return []
        names, _, priority = self.everywhere
        return [index for index in self._present(names)
                if ("filter", self.interface(index), priority, self.handle) not in self.kept]

    def join(self, index: int) -> None:
        """Attach to one of these what the others have."""
        assert self.everywhere is not None
        _, program_fd, priority = self.everywhere
        self.attach(index, program_fd, priority)
        log.info("interface %s: in use from now on", self.interface(index))

    def _present(self, names: list[str]) -> list[int]:
        """As ethernet(), of what there is."""
        there = [name for name in names if (Path("/sys/class/net") / name).exists()]
        try:
            return self.ethernet(there) if there or not names else []
        except HostError:
            return []

    def _attachment(self, key: tuple[Any, ...]) -> Change:
        """How the journal has a program that was attached: with its id, if it is at tcx."""
        return next((c for c in self.undo
                     if self.identity(c) == key and c not in self.inherited), {})

    def _detached(self, index: int, program_fd: int, key: tuple[Any, ...]) -> bool:
        """Whether a program is not where it was attached. Nothing is missing, and nothing to be
        undone, if the interface is gone, or has another name, under which it comes again."""
        try:
            gone = self.interface(index) != key[1]
        except OSError:
            gone = True
            with self.lock:
                self.tcx.gone(index)
        if gone:
            self.forget(*key)
            return False
        change = self._attachment(key)
        if number := change.get("program"):
            return not self.tcx.attached(index, number)
        at = change.get("at", key[2])
        return tc_attached(index, at, self.handle) != program_id(program_fd)

    @one_at_a_time
    def _attach(self, index: int, program_fd: int, priority: int) -> None:
        """At tcx, or by a filter of tc where the kernel has none."""
        place = {"interface": self.interface(index), "priority": priority, "handle": self.handle}
        self._know_others()
        if number := self.tcx.attach(index, program_fd, priority):
            self.will_undo(what="filter", **place, qdisc=False, program=number)
        else:
            self._attach_filter(index, program_fd, place)
        self._forget([c for c in self.inherited
                      if self.identity(c) == ("filter", *place.values())])

    def _attach_filter(self, index: int, program_fd: int, place: Change) -> None:
        # the new program takes the old one's place
        if old := self.inherit(what="filter", **place, program=None):
            tc_attach(index, program_fd, old.get("at", place["priority"]), self.handle)
            return
        # the qdisc goes with the last of our instances, if one of them made it
        ours = not self._has_clsact(index) or (bool(self._filters(index)) and all(
            f["handle"] >> 16 == 0 and self._is_ours(f) for f in self._filters(index)))
        # or if we did, and somebody has taken only the filter away since
        ours = ours or any(c["what"] == "filter" and c["interface"] == place["interface"] and
                           c["qdisc"] for c in self.undo)
        at = self._best_priority(index, place["priority"])
        self.will_undo(what="filter", **place, qdisc=ours, at=at)
        tc_attach(index, program_fd, at, self.handle)

    def _best_priority(self, index: int, wanted: int) -> int:
        """Before the filters of others, if there is room before the first one; else as wanted. No
        lower than it takes, since whoever wants a priority that is in use is refused."""
        first = min((f["info"] >> 16 for f in self._ingress_filters(index)
                     if f["info"] >> 16 and not self._is_bpf_of_ours(f)), default=LAST_PRIORITY + 1)
        lower = min(wanted, wanted - (LAST_PRIORITY + 1 - first))
        return lower if first > PRIORITIES else wanted

    def in_front(self) -> dict[str, list[str]]:
        """By interface, what sees packets before our programs do, and may keep them to itself."""
        found = {}
        self._know_others()
        for key in list(self.kept):
            if key[0] != "filter" or key[1].startswith(TAP_PREFIXES):
                continue
            try:
                index = socket.if_nametoindex(key[1])
                found[key[1]] = self._before(index, self._attachment(key))
            except (OSError, HostError):  # gone since; see _detached()
                continue
        return found

    def _before(self, index: int, change: Change) -> list[str]:
        found = []
        xdp = self.link(index).get_attr("IFLA_XDP")
        if xdp and xdp.get_attr("IFLA_XDP_ATTACHED"):
            found.append("an XDP program")
        number = change.get("program", 0)
        if count := self.tcx.in_front(index, number):
            found.append(f"{count} tcx program{'s' * (count > 1)}")
        if not number:
            found += [f"a {f.get_attr('TCA_KIND')} filter of priority {f['info'] >> 16}"
                      for f in self._ingress_filters(index)
                      if 0 < f["info"] >> 16 < change.get("at", 0) and not self._is_bpf_of_ours(f)]
        return list(dict.fromkeys(found))

    def _is_bpf_of_ours(self, filter_: Any) -> bool:
        return filter_.get_attr("TCA_KIND") == "bpf" and self._is_ours(filter_)

    @staticmethod
    def _is_ours(filter_: Any) -> bool:
        options = filter_.get_attr("TCA_OPTIONS")
        name = options.get_attr("TCA_BPF_NAME") if options else None
        return options is None or str(name).startswith(("fe_", "be_"))

    def _has_clsact(self, index: int) -> bool:
        return any(q.get_attr("TCA_KIND") == "clsact" for q in self.ipr.get_qdiscs(index=index))

    def undo_filter(self, change: Change) -> None:
        try:
            index = socket.if_nametoindex(change["interface"])
        except OSError:
            return
        if number := change.get("program"):
            self.tcx.detach(index, number)
            return
        try:
            self.ipr.tc("del-filter", "bpf", index, change["handle"], parent=CLSACT_INGRESS,
                        prio=change.get("at", change["priority"]), protocol=ETH_P_ALL)
        except NetlinkError as error:
            log.debug("filter on %s: %s", change["interface"], error)
        if change["qdisc"] and self._has_clsact(index) and not self._filters(index):
            self.ipr.tc("del", "clsact", index)

    def _ingress_filters(self, index: int) -> list[Any]:
        return list(self.ipr.get_filters(index=index, parent=CLSACT_INGRESS))

    def _filters(self, index: int) -> list[Any]:
        return [*self._ingress_filters(index),
                *self.ipr.get_filters(index=index, parent=CLSACT_EGRESS)]
