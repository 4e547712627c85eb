# SPDX-License-Identifier: GPL-2.0-or-later
"""Goes through a front end's table of flows: nothing is made of an entry in Python, and the control
loop has the GIL meanwhile."""
import os

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from tcpha._fast.datapath cimport TABLE_PIECE, FeDatapath
from tcpha._fast.defs cimport (
    TCPHA_F_ANSWERED, TCPHA_F_FAST, TCPHA_F_RST, tcpha_entry, tcpha_flow, tcpha_live)
from tcpha._fast.sys cimport now_ns


cdef class Scan:
    def __cinit__(self, FeDatapath datapath):
        self.datapath = datapath
        self.keys = <tcpha_flow *>malloc(TABLE_PIECE * sizeof(tcpha_flow))
        self.entries = <tcpha_entry *>malloc(TABLE_PIECE * sizeof(tcpha_entry))
        if self.keys == NULL or self.entries == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.keys)
        free(self.entries)

    cdef bint next(self) noexcept nogil:
        """Go to the next entry. False: that was all, or it cannot be read, see check()."""
        if self.at == self.count:
            self.at = 0
            self.count = self.datapath.table.next_entries(
                self.datapath.table.self, &self.place, self.keys, self.entries)
            if self.count <= 0:
                self.at = self.count
                return False
        self.key = &self.keys[self.at]
        self.entry = &self.entries[self.at]
        self.at += 1
        return True

    cdef int check(self) except -1:
        """Raises OSError if it was not all."""
        if self.count < 0:
            raise OSError(-self.count, f"cannot read the flow table: {os.strerror(-self.count)}")
        return 0


cdef bint is_doubtful(const tcpha_entry *e) noexcept nogil:
    """Of the packet path: its client has acknowledged nothing, so nothing shows that the back end
    has it."""
    return e.flags & (TCPHA_F_FAST | TCPHA_F_ANSWERED) == TCPHA_F_FAST


cdef class Questions:
    """Flows about which back ends are to be asked, ASKED at a time, for FrontEnd.ask(): those that
    have been silent for so many seconds. doubtful: only those of the packet path of which nothing
    shows that the back end has them, or has them still: its client, which may be gone, has
    acknowledged nothing, or reset it. backend: instead, all of one that was started anew."""

    def __cinit__(self, FeDatapath datapath, double seconds=0, bint doubtful=False,
                  int backend=-1):
        self.scan = Scan(datapath)
        self.before = now_ns() - min(<uint64_t>(seconds * 1e9), now_ns())
        self.backend = backend
        self.doubtful = doubtful or backend >= 0

    cdef bint _is_asked(self, const tcpha_entry *e) noexcept nogil:
        if self.backend >= 0:
            return e.backend == <uint32_t>self.backend
        return e.last_ns <= self.before and (
            not self.doubtful or e.flags & TCPHA_F_FAST and e.flags & TCPHA_F_RST or is_doubtful(e))

    def find(self):
        """How many there are now; 0: there are no more. Raises OSError."""
        cdef const tcpha_entry *e
        cdef question *q
        cdef uint64_t id
        self.count = 0
        with nogil:
            while self.count < ASKED and self.scan.next():
                e = self.scan.entry
                id = tcpha_live(e)
                if not id or not self._is_asked(e):
                    continue
                q = &self.list[self.count]
                self.count += 1
                q.flow = self.scan.key[0]
                q.id = id
                q.backend = e.backend
                q.doubtful = self.doubtful and is_doubtful(e)
        self.scan.check()
        return self.count
