# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint32_t

from tcpha._fast.be_worker cimport BackEnd, adopted
from tcpha._fast.scan cimport Scan


# Texts that rows name by number.
cdef class Texts:
    cdef list kept
    cdef uint32_t count
    cdef const char **text
    cdef int *length
    cdef int longest


cdef class Rows:
    cdef char *room        # for the rows of a piece
    cdef size_t size
    cdef int _allow(self, int longest) except -1


cdef class FlowRows(Rows):
    cdef Scan scan
    cdef Texts rules
    cdef Texts servers
    cdef bint aligned
    cdef bytes head        # not given out yet
    cdef size_t _fill(self) noexcept nogil


cdef class AdoptedRows(Rows):
    cdef BackEnd core
    cdef Texts frontends
    cdef adopted *copies
    cdef uint32_t capacity
    cdef uint32_t count    # of the copies
    cdef uint32_t done     # how many of them are rows by now
    cdef uint32_t bucket   # to go on with
    cdef bint failed       # there was no memory for copies
    cdef bint _copy(self) noexcept nogil
    cdef void _copy_chain(self, const adopted *a) noexcept nogil
    cdef size_t _fill(self) noexcept nogil
