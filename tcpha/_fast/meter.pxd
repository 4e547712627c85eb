# SPDX-License-Identifier: GPL-2.0-or-later
"""What workers measure: how long things take, and which took longest."""
from libc.stdint cimport uint32_t, uint64_t

from tcpha._fast.defs cimport TCPHA_TARGET_MAX, tcpha_flow
from tcpha._fast.sys cimport pthread_mutex_t

cdef enum:
    BUCKETS = 24           # 2^i microseconds and less; the last one: all that took longer
    SLOWEST = 16           # handoffs that are remembered


# Counts of durations, added to by many threads.
cdef struct histogram:
    uint64_t count[BUCKETS]
    uint64_t sum_ns


cdef struct slow_one:
    uint64_t at_ns         # CLOCK_MONOTONIC; 0: none
    uint64_t took_ns
    tcpha_flow flow
    uint32_t backend
    uint32_t rule
    uint32_t target_len
    char target[TCPHA_TARGET_MAX]


# The slowest handoffs of late. Who is faster than 'floor_ns' takes no lock.
cdef struct slow_ones:
    pthread_mutex_t lock
    uint64_t floor_ns
    slow_one row[SLOWEST]


cdef void histogram_add(histogram *h, uint64_t ns) noexcept nogil
cdef dict histogram_read(histogram *h)
cdef void slow_open(slow_ones *s) noexcept
cdef void slow_close(slow_ones *s) noexcept
cdef void slow_note(slow_ones *s, uint64_t took_ns, const tcpha_flow *flow, uint32_t backend,
                    uint32_t rule, const char *target, uint32_t target_len) noexcept nogil
cdef list slow_read(slow_ones *s, double seconds)
