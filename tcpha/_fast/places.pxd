# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from tcpha._fast.defs cimport TCPHA_MAX_VIPS, tcpha_flow, tcpha_listener, tcpha_place


cdef struct place:
    tcpha_place of
    tcpha_listener *to


# Where connections go, by the address and port that the client sees. Nothing but the devices of
# listeners changes.
cdef struct places:
    uint8_t vips[TCPHA_MAX_VIPS][16]
    uint32_t nvips
    place *each            # those for any port come last
    uint32_t count
    tcpha_listener *listeners  # each one once, though several places may lead there
    uint32_t nlisteners


cdef bint is_vip(const places *p, const uint8_t *addr) noexcept nogil
cdef tcpha_listener *listener_of(const places *p, const tcpha_flow *flow) noexcept nogil
cdef tcpha_listener *listener_at(const places *p, const uint8_t *addr,
                                 uint16_t port) noexcept nogil
cdef bint is_listened_on(const places *p, uint16_t port) noexcept nogil


cdef class Places:
    cdef places p
    cdef tcpha_listener *_enter(self, str address, int port) except NULL
    cdef tcpha_listener *bind(self, str address, int port, uint32_t device) except NULL
