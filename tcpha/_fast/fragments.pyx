# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets that came in fragments and are whole again: back to where packets come in. What was cut
in a tunnel, between front end and back end, leaves that here."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from tcpha._fast.defs cimport TCPHA_MARK_FRAGMENT
from tcpha._fast.nfqueue cimport SKB_CSUM_NOT_READY, V_DROP, Queue, packet, queue
from tcpha._fast.packet cimport ETH_SIZE, IP_SIZE, VNET_SIZE, tap_send
from tcpha._fast.rewrite cimport (
    ask_offload, combine_ecn, pseudo_sum, sum_bytes, tcp_parse, tcp_view)
from tcpha._fast.sys cimport add64, load32, load64, rwlock_init, store32

MARK = TCPHA_MARK_FRAGMENT

cdef enum:
    LEAST_MSS = 48         # the kernel refuses GSO packets with less

cdef struct way_in:
    int tap
    uint32_t room          # for IP packets, on the way to the back ends
    uint8_t ether[14]
    uint64_t defragmented


cdef int _on_packet(void *self, queue *q, packet *p) noexcept nogil:
    cdef way_in *d = <way_in *>self
    cdef uint8_t head[VNET_SIZE + ETH_SIZE]
    cdef uint32_t headers, size, total, room = load32(&d.room)
    cdef uint8_t *ip = p.data
    cdef tcp_view v
    if p.len >= 2 * IP_SIZE and ip[0] == 0x45 and ip[9] == 4:  # IPIP
        ip += IP_SIZE
        if not combine_ecn(ip, p.data[1]):
            return V_DROP
    if tcp_parse(ip, p.len - <uint32_t>(ip - p.data), &v) < 0:
        return V_DROP
    size = v.len - <uint32_t>(v.tcp - v.ip)
    if not p.skb_info & SKB_CSUM_NOT_READY:
        # what is wrong must not get a checksum that is right
        total = <uint32_t>pseudo_sum(v.ip, size) + sum_bytes(v.tcp, size)
        if (total & 0xffff) + (total >> 16) != 0xffff:
            return V_DROP
    memset(head, 0, VNET_SIZE)
    memcpy(head + VNET_SIZE, d.ether, ETH_SIZE)
    headers = <uint32_t>(v.data - v.ip)
    if v.len <= room:
        ask_offload(head, &v, 0)
    else:
        ask_offload(head, &v, max(room - headers, <uint32_t>LEAST_MSS))
    if tap_send(d.tap, head, sizeof(head), v.ip, v.len) == 0:
        add64(&d.defragmented, 1)
    return V_DROP


cdef class Defragmented:
    """Takes whole packets from a queue and writes them to a TAP device, as GSO packets where they
    are larger than room (bytes, of an IP packet). mac: the device's own address."""

    cdef way_in *d
    cdef Queue queue

    def __cinit__(self, Queue source, int tap, bytes mac, int room):
        self.d = <way_in *>calloc(1, sizeof(way_in))
        if self.d == NULL:
            raise MemoryError
        self.d.tap = tap
        self.d.room = room
        memcpy(self.d.ether, <const char *>mac, 6)
        self.d.ether[6] = 2      # any unicast address
        self.d.ether[12] = 8     # ETH_P_IP
        self.queue = source
        rwlock_init(&source.own_lock)
        source.set_handler(_on_packet, NULL, self.d, &source.own_lock)

    def __dealloc__(self):
        free(self.d)

    def fit(self, uint32_t room):
        """The way has become another one."""
        store32(&self.d.room, room)

    @property
    def count(self):
        return load64(&self.d.defragmented)
