# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint32_t, uint64_t

from tcpha._fast.datapath cimport FeDatapath, table_place
from tcpha._fast.defs cimport tcpha_entry, tcpha_flow

cdef enum:
    ASKED = 1000           # flows about which back ends are asked at one time


# Goes through a front end's table of flows, which may be large: piece by piece, without the GIL.
cdef class Scan:
    cdef FeDatapath datapath
    cdef table_place place
    cdef int count         # entries of the piece at hand
    cdef int at            # how many of them were seen
    cdef tcpha_flow *keys
    cdef tcpha_entry *entries
    cdef const tcpha_flow *key      # the entry at hand
    cdef const tcpha_entry *entry
    cdef bint next(self) noexcept nogil
    cdef int check(self) except -1


# A flow that its back end is to be asked about.
cdef struct question:
    tcpha_flow flow
    uint64_t id
    uint32_t backend
    bint doubtful          # nothing shows that the request has arrived


cdef class Questions:
    cdef Scan scan
    cdef uint64_t before
    cdef int backend       # -1: any
    cdef bint doubtful
    cdef question list[ASKED]
    cdef uint32_t count
    cdef bint _is_asked(self, const tcpha_entry *e) noexcept nogil


cdef bint is_doubtful(const tcpha_entry *e) noexcept nogil
