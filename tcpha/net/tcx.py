# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs at the tcx ingress of interfaces (Linux 6.6), which come before all filters of tc.

They stay when their daemon is killed, and nothing names them but an id. Whose a program is, only
those with CAP_SYS_ADMIN can find out; so it is asked once, at start.
"""
from __future__ import annotations

import errno
import logging
import os
import socket

from tcpha._fast.bpf import (
    instance_of,
    maps_of,
    open_program,
    program_id,
    program_name,
    tcx_attach,
    tcx_detach,
    tcx_programs,
)

log = logging.getLogger("tcpha")


class Tcx:
    """Of one network namespace. instance: tells our programs from those of other daemons of TCPHA,
    and is the same for a predecessor's."""

    def __init__(self, instance: int):
        self.instance = instance
        self.others: set[int] = set()  # ids of what other daemons of TCPHA have there
        # id of ours, by interface and name of the program; descriptors and priorities, by id
        self.ours: dict[tuple[int, str], int] = {}
        self.descriptors: dict[int, int] = {}
        self.priorities: dict[int, int] = {}

    def recover(self, left: set[int]) -> None:
        """Learn what there is. A predecessor's programs are ours from now on, and so are those that
        it left word of, with whatever instance."""
        hidden = False
        for index, _ in socket.if_nameindex():
            for number in tcx_programs(index):
                try:
                    self._recognise(index, number, left)
                except OSError as error:  # it is gone, or we may not ask
                    hidden |= error.errno == errno.EPERM
        if hidden:
            log.warning("without CAP_SYS_ADMIN nobody can see whose programs at tcx are: if a "
                        "killed run left some there, they stay")

    def _recognise(self, index: int, number: int, left: set[int]) -> None:
        fd = self.descriptors.get(number) or open_program(number)
        self.descriptors[number] = fd
        whose = instance_of(fd)
        if whose is not None and (whose == self.instance or number in left):
            self.ours[index, program_name(fd)] = number
        elif whose is not None:
            self.others.add(number)
        self._release(number)

    def maps(self, number: int) -> dict[str, tuple[int, int, int]]:
        """As maps_of(), of a predecessor's program."""
        fd = self.descriptors.get(number)
        return {} if fd is None else maps_of(fd)

    def attach(self, index: int, program_fd: int, priority: int) -> int:
        """Attach a program before all others, but for those of TCPHA: ours are in the order of
        their priorities. One of the same name, of ours, leaves. Returns its id; 0: the kernel has
        no tcx, or no room there."""
        number, place = program_id(program_fd), (index, program_name(program_fd))
        if not self.attached(index, number) and not self._put(index, program_fd, priority):
            return 0
        if number not in self.descriptors:
            self.descriptors[number] = os.dup(program_fd)
        self.priorities[number] = priority
        old, self.ours[place] = self.ours.get(place), number
        if old not in (None, number):
            self._take_away(index, old)
        return number

    def _put(self, index: int, program_fd: int, priority: int) -> bool:
        for behind in (self._behind(index, priority), 0):  # that one may be gone by now
            try:
                tcx_attach(index, program_fd, behind)
                return True
            except OSError as error:
                why = error
        if why.errno != errno.EINVAL:  # which an older kernel says
            log.warning("%s; a tc filter does it, which comes later", why)
        return False

    def _behind(self, index: int, priority: int) -> int:
        """Id of the program that one is to stand right behind; 0: of none. Those of other daemons
        are not for the same packets, and whoever is there first stays before us: it would take us
        for somebody who keeps packets from it."""
        last = 0
        for number in tcx_programs(index):
            if number not in self.others and self.priorities.get(number, priority) >= priority:
                break
            last = number
        return last

    def attached(self, index: int, number: int) -> bool:
        return number in tcx_programs(index)

    def in_front(self, index: int, number: int) -> int:
        """How many programs of somebody else stand before one of ours, or at all if ours is not
        there."""
        there = tcx_programs(index)
        before = there[:there.index(number)] if number in there else there
        return sum(n not in self.others and n not in self.descriptors for n in before)

    def detach(self, index: int, number: int) -> None:
        """Take one of ours away, if it is there."""
        self._leave([p for p, n in self.ours.items() if p[0] == index and n == number])

    def settle(self) -> None:
        """What of a predecessor's programs nothing has taken the place of has to go."""
        self._leave([place for place, number in self.ours.items() if number not in self.priorities])

    def end(self) -> None:
        """Nothing of ours stays, not even on an interface whose name has changed."""
        self._leave(list(self.ours))

    def _leave(self, places: list[tuple[int, str]]) -> None:
        for place in places:
            self._take_away(place[0], self.ours.pop(place))

    def gone(self, index: int) -> None:
        """There is no such interface any more."""
        for place in [p for p in self.ours if p[0] == index]:
            self._release(self.ours.pop(place))

    def _take_away(self, index: int, number: int) -> None:
        try:
            tcx_detach(index, self.descriptors[number])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # somebody was faster
                log.warning("%s", error)
        self._release(number)

    def _release(self, number: int) -> None:
        """Of what is nowhere any more nothing is to stay in memory, least of all its maps."""
        if number not in self.ours.values():
            self.priorities.pop(number, None)
            os.close(self.descriptors.pop(number))
