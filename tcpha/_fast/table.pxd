# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from tcpha._fast.defs cimport tcpha_flow


# What a table's memory begins with.
cdef struct table_head:
    uint64_t magic
    uint32_t version       # of the values' layout
    uint32_t capacity
    uint32_t value_size
    uint32_t used
    uint32_t fresh         # cells from this one on were never used
    uint32_t free          # index of the first free cell before it, plus one


# A hash table of values of one size, keyed by flow. Indexes instead of pointers, so that its memory
# may be a file which a later run maps again. Locking is the caller's.
cdef struct flow_table:
    table_head *head
    uint32_t capacity
    uint32_t mask
    uint32_t stride
    uint64_t seed          # clients must not be able to choose flows that share a bucket
    uint32_t *buckets      # index of the first cell, plus one; not in the file
    uint8_t *cells
    size_t size            # of the memory


# The beginning of a cell; the value follows.
cdef struct flow_cell:
    tcpha_flow key
    uint32_t next          # index plus one
    uint32_t used


cdef int table_open(flow_table *t, uint32_t capacity, uint32_t value_size, uint32_t version,
                    path) except -1
cdef void table_close(flow_table *t) noexcept
cdef void *table_find(flow_table *t, const tcpha_flow *key) noexcept nogil
cdef void *table_add(flow_table *t, const tcpha_flow *key) noexcept nogil
cdef bint table_remove(flow_table *t, const tcpha_flow *key) noexcept nogil
cdef flow_cell *table_cell(flow_table *t, uint32_t index) noexcept nogil
