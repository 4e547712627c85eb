# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the applications of a back end listen, by the virtual address and its port."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from tcpha._fast.defs cimport TCPHA_MAX_VIPS, tcpha_flow, tcpha_listener
from tcpha._fast.packet cimport address_bytes
from tcpha._fast.sys cimport htons, store32


cdef bint is_vip(const places *p, const uint8_t *addr) noexcept nogil:
    cdef uint32_t i
    for i in range(p.nvips):
        if memcmp(p.vips[i], addr, 16) == 0:
            return True
    return False


cdef tcpha_listener *listener_of(const places *p, const tcpha_flow *flow) noexcept nogil:
    """Of a flow as the client sees it. One that is to none of our addresses is nobody's, and any
    listener does for it."""
    cdef place *at = p.each
    cdef uint32_t i
    for i in range(p.count):
        at = &p.each[i]
        if (at.of.vport == flow.vport or at.of.vport == 0) and \
                memcmp(at.of.vaddr, flow.vaddr, 16) == 0:
            break
    return at.to


cdef tcpha_listener *listener_at(const places *p, const uint8_t *addr,
                                 uint16_t port) noexcept nogil:
    """By its own address and port (network byte order). NULL: there is none."""
    cdef uint32_t i
    for i in range(p.nlisteners):
        if p.listeners[i].port == port and memcmp(p.listeners[i].addr, addr, 16) == 0:
            return &p.listeners[i]
    return NULL


cdef bint is_listened_on(const places *p, uint16_t port) noexcept nogil:
    """Whether a port (network byte order) is that of a listener, at whatever address."""
    cdef uint32_t i
    for i in range(p.nlisteners):
        if p.listeners[i].port == port:
            return True
    return False


cdef class Places:
    """ways: [(VIP, its port, address of the listener, its port), ...]; port 0 of a VIP, which each
    must have: any that is not named."""

    def __cinit__(self, list ways):
        cdef place *at
        self.p.each = <place *>calloc(len(ways), sizeof(place))
        self.p.listeners = <tcpha_listener *>calloc(len(ways), sizeof(tcpha_listener))
        if self.p.each == NULL or self.p.listeners == NULL:
            raise MemoryError
        for vaddr, vport, address, port in sorted(ways, key=lambda way: way[1] == 0):
            at = &self.p.each[self.p.count]
            address_bytes(vaddr, at.of.vaddr)
            at.of.vport = htons(vport)
            at.to = self._enter(address, port)
            self.p.count += 1
            if not is_vip(&self.p, at.of.vaddr):
                if self.p.nvips == TCPHA_MAX_VIPS:
                    raise ValueError("too many virtual addresses")
                memcpy(self.p.vips[self.p.nvips], at.of.vaddr, 16)
                self.p.nvips += 1

    def __dealloc__(self):
        free(self.p.each)
        free(self.p.listeners)

    cdef tcpha_listener *_enter(self, str address, int port) except NULL:
        cdef tcpha_listener *to
        cdef uint8_t addr[16]
        address_bytes(address, addr)
        to = listener_at(&self.p, addr, htons(port))
        if to == NULL:
            to = &self.p.listeners[self.p.nlisteners]
            memcpy(to.addr, addr, 16)
            to.port = htons(port)
            self.p.nlisteners += 1
        return to

    cdef tcpha_listener *bind(self, str address, int port, uint32_t device) except NULL:
        """A listener is bound to a device. The one that it is."""
        cdef uint8_t addr[16]
        cdef tcpha_listener *to
        address_bytes(address, addr)
        to = listener_at(&self.p, addr, htons(port))
        if to == NULL:
            raise ValueError(f"nothing goes to {address}:{port}")
        store32(&to.device, device)
        return to
