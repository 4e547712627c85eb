# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host knows of another one's CLOCK_MONOTONIC: see peerclock.pyx. Nanoseconds throughout."""
from libc.stdint cimport int64_t, uint64_t


# By how much the peer's clock is ahead of ours: at least 'low', at most 'high'.
cdef struct peer_clock:
    int64_t low
    int64_t high
    uint64_t at            # when that was so, by our clock


cdef void clock_told(peer_clock *p, uint64_t theirs, uint64_t on_the_way,
                     uint64_t now) noexcept nogil
cdef void clock_answered(peer_clock *p, uint64_t asked, uint64_t theirs,
                         uint64_t now) noexcept nogil
cdef int64_t clock_youngest(const peer_clock *p, uint64_t sent, uint64_t now) noexcept nogil
cdef int64_t clock_oldest(const peer_clock *p, uint64_t sent, uint64_t now) noexcept nogil
cdef uint64_t clock_word(const peer_clock *p) noexcept nogil
