# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from tcpha._fast.sys cimport ntohl, ntohs

cdef enum checksum_mode:
    SUM_UPDATE = 0         # the checksum is complete: change it by the difference (RFC 1624)
    SUM_FULL = 1           # compute it anew
    SUM_LEAVE = 2          # the kernel computes it when it cuts a GSO packet into segments


# Where things are in an IPv4 TCP packet. Pointers go into the packet.
cdef struct tcp_view:
    uint8_t *ip
    uint8_t *tcp
    uint8_t *data
    uint32_t len           # of the packet, from the IP header on
    uint32_t data_len
    uint8_t flags          # of TCP
    uint8_t *ts            # TSval, TSecr (RFC 7323), or NULL
    uint8_t *sack          # first SACK block (RFC 2018), or NULL
    uint32_t sack_blocks
    uint16_t mss           # of a SYN; 0: not there
    int wscale             # of a SYN; -1: not there
    bint sack_ok           # of a SYN


# What changes in one direction of a flow. Numbers are added modulo 2^32.
cdef struct translation:
    uint32_t seq
    uint32_t ack           # to SACK blocks too
    uint32_t tsval
    uint32_t tsecr
    uint8_t window_left    # the window field is shifted left, then right
    uint8_t window_right
    bint source            # addr and port replace the source; else the destination
    uint32_t addr          # network byte order; 0: nothing is replaced
    uint16_t port          # network byte order


# An ICMP error (RFC 792) about a TCP segment that it quotes.
cdef struct icmp_view:
    uint8_t *ip
    uint8_t *icmp
    uint8_t *inner         # the segment's IP header
    uint8_t *tcp           # the first 8 bytes of its TCP header, at least
    uint32_t len           # of the packet


cdef int icmp_parse(uint8_t *p, uint32_t length, icmp_view *v) noexcept nogil
cdef void icmp_translate(icmp_view *v, const translation *outward,
                         const translation *inward) noexcept nogil
cdef bint combine_ecn(uint8_t *ip, uint8_t outer_tos) noexcept nogil
cdef int tcp_parse(uint8_t *p, uint32_t length, tcp_view *v) noexcept nogil
cdef int tcp_parse_head(uint8_t *p, uint32_t have, uint32_t length, tcp_view *v) noexcept nogil
cdef void translate(tcp_view *v, const translation *t, int mode) noexcept nogil
cdef bint is_sound(const tcp_view *v) noexcept nogil
cdef void checksum_full(tcp_view *v) noexcept nogil
cdef void ask_offload(uint8_t *vnet, tcp_view *v, uint32_t mss) noexcept nogil
cdef uint16_t pseudo_sum(const uint8_t *ip, uint32_t tcp_len) noexcept nogil
cdef uint32_t sum_bytes(const uint8_t *p, uint32_t n) noexcept nogil


cdef inline uint32_t get32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return ntohl(v)


cdef inline uint16_t get16(const uint8_t *p) noexcept nogil:
    cdef uint16_t v
    memcpy(&v, p, 2)
    return ntohs(v)


cdef inline bint acks_beyond(const tcp_view *v, uint32_t snd_nxt) noexcept nogil:
    """Whether a segment acknowledges what comes behind snd_nxt, of a connection with that."""
    return v.flags & 0x16 == 0x10 and get32(v.tcp + 8) - snd_nxt - 1 < 1u << 24
