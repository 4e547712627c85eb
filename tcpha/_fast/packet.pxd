# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from tcpha._fast.defs cimport tcpha_flow, tcpha_frame
from tcpha._fast.snapshot cimport snapshot

cdef enum:
    VNET_SIZE = 10         # struct virtio_net_hdr
    ETH_SIZE = 14
    IP_SIZE = 20
    TCP_SIZE = 20
    OPTIONS_MOST = 20      # bytes of TCP options that we make
    FRAME_HEAD = 10 + 14 + 20 + 20 + 20   # room that forge() may need
    TCP_FIN = 1
    TCP_SYN = 2
    TCP_RST = 4
    TCP_PSH = 8
    TCP_ACK = 16
    TCP_URG = 32
    TCP_ECE = 64
    TCP_CWR = 128


# A TCP segment to be forged. Host byte order but for the flow.
cdef struct segment:
    const tcpha_flow *flow   # from the client to the VIP
    uint32_t seq
    uint32_t ack
    uint16_t window        # as on the wire, unscaled
    uint16_t ip_id
    uint8_t flags
    bint timestamps
    uint32_t tsval
    uint32_t tsecr
    uint8_t options[OPTIONS_MOST]  # in place of timestamps only
    uint32_t options_len   # a multiple of 4
    uint32_t len           # payload bytes that follow the headers


cdef inline tcpha_frame *frame_of(uint8_t *bytes) noexcept nogil:
    """What a frame of a TAP device says that it is: see frame.h."""
    return <tcpha_frame *>(bytes + VNET_SIZE)


cdef uint16_t ip_checksum(const uint8_t *p, uint32_t length) noexcept nogil
cdef void ip_header(uint8_t *to, uint32_t length, uint16_t id, uint8_t protocol,
                    const void *source, const void *target, const uint8_t *like) noexcept nogil
cdef void syn_from(segment *g, const snapshot *s) noexcept nogil
cdef uint32_t forge(uint8_t *to, const segment *s) noexcept nogil
cdef void segment_from(segment *g, const snapshot *s) noexcept nogil
cdef int tap_send(int fd, const uint8_t *head, uint32_t head_len, const uint8_t *data,
                  uint32_t data_len) noexcept nogil
cdef int flow_text(const tcpha_flow *flow, char *to, int size) noexcept nogil
cdef object address_text(const uint8_t *addr)
cdef int address_bytes(str text, uint8_t *to) except -1
