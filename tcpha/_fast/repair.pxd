# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint16_t, uint32_t

from tcpha._fast.snapshot cimport snapshot

cdef int repair_freeze(int fd, snapshot *s) noexcept nogil
cdef int repair_received(int fd, uint32_t *rcv_nxt) noexcept nogil
cdef uint16_t saved_syn_mss(int fd, uint16_t fallback, uint32_t *tsval) noexcept nogil
