# SPDX-License-Identifier: GPL-2.0-or-later
"""Forged TCP/IPv4 segments, as frames for a TAP device with a virtio-net header."""
import socket

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset

from tcpha._fast.defs cimport tcpha_flow
from tcpha._fast.snapshot cimport (
    SNAP_ECN, SNAP_SACK, SNAP_TIMESTAMP, SNAP_WSCALE, snapshot)
from tcpha._fast.sys cimport EINTR, errno, htonl, htons, iovec, ntohs, writev


cdef uint16_t ip_checksum(const uint8_t *p, uint32_t length) noexcept nogil:
    """The Internet checksum (RFC 1071) of an even number of bytes, in wire order."""
    cdef uint32_t total = 0, i
    cdef uint16_t word
    for i in range(0, length, 2):
        memcpy(&word, p + i, 2)
        total += word
    total = (total & 0xffff) + (total >> 16)
    total = (total & 0xffff) + (total >> 16)
    return <uint16_t>~total


cdef inline uint8_t *_u16(uint8_t *p, uint16_t v) noexcept nogil:
    v = htons(v)
    memcpy(p, &v, 2)
    return p + 2


cdef inline uint8_t *_u32(uint8_t *p, uint32_t v) noexcept nogil:
    v = htonl(v)
    memcpy(p, &v, 4)
    return p + 4


cdef void ip_header(uint8_t *to, uint32_t length, uint16_t id, uint8_t protocol,
                    const void *source, const void *target, const uint8_t *like) noexcept nogil:
    """An IPv4 header of 20 bytes, for a packet of 'length' bytes. Addresses: 4 bytes. TOS and
    fragment field are those of the header 'like'; without one, 0 and DF."""
    cdef uint16_t check
    memset(to, 0, IP_SIZE)
    to[0] = 0x45
    to[1] = like[1] if like != NULL else 0
    _u16(to + 2, <uint16_t>length)
    _u16(to + 4, id)
    to[6] = like[6] if like != NULL else 0x40
    to[7] = like[7] if like != NULL else 0
    to[8] = 64                # TTL
    to[9] = protocol
    memcpy(to + 12, source, 4)
    memcpy(to + 16, target, 4)
    check = ip_checksum(to, IP_SIZE)
    memcpy(to + 10, &check, 2)


cdef uint32_t _options(uint8_t *to, const segment *s) noexcept nogil:
    """Returns how many bytes there are."""
    if s.options_len:
        memcpy(to, s.options, s.options_len)
        return s.options_len
    if not s.timestamps:
        return 0
    _u32(to, 0x0101080a)      # NOP, NOP, timestamps (RFC 7323 appendix A)
    _u32(to + 4, s.tsval)
    _u32(to + 8, s.tsecr)
    return 12


cdef uint32_t forge(uint8_t *to, const segment *s) noexcept nogil:
    """Write virtio-net, Ethernet, IPv4 and TCP headers. Returns their size (at most FRAME_HEAD).

    The TCP checksum field holds the pseudo-header's sum and the virtio-net header says so
    (VIRTIO_NET_HDR_F_NEEDS_CSUM): the packet never leaves memory unless a device completes it.
    """
    cdef uint8_t *ip = to + VNET_SIZE + ETH_SIZE
    cdef uint8_t *tcp = ip + IP_SIZE
    cdef uint32_t header = TCP_SIZE + _options(tcp + TCP_SIZE, s)
    cdef uint32_t pseudo = htons(6) + htons(<uint16_t>(header + s.len)), i
    cdef uint16_t word
    memset(to, 0, VNET_SIZE + ETH_SIZE)
    to[0] = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM; the fields below are little-endian on these machines
    word = ETH_SIZE + IP_SIZE
    memcpy(to + 6, &word, 2)  # csum_start
    word = 16
    memcpy(to + 8, &word, 2)  # csum_offset
    to[VNET_SIZE] = 2         # destination: any unicast address
    to[VNET_SIZE + 6] = 2
    _u16(to + VNET_SIZE + 12, 0x0800)
    ip_header(ip, IP_SIZE + header + s.len, s.ip_id, 6, s.flow.caddr + 12, s.flow.vaddr + 12, NULL)
    for i in range(0, 8, 2):
        memcpy(&word, ip + 12 + i, 2)
        pseudo += word
    pseudo = (pseudo & 0xffff) + (pseudo >> 16)
    memcpy(tcp, &s.flow.cport, 2)
    memcpy(tcp + 2, &s.flow.vport, 2)
    _u32(tcp + 4, s.seq)
    _u32(tcp + 8, s.ack)
    tcp[12] = <uint8_t>((header // 4) << 4)
    tcp[13] = s.flags
    _u16(tcp + 14, s.window)
    word = <uint16_t>((pseudo & 0xffff) + (pseudo >> 16))
    memcpy(tcp + 16, &word, 2)
    _u16(tcp + 18, 0)
    return VNET_SIZE + ETH_SIZE + IP_SIZE + header


cdef void segment_from(segment *g, const snapshot *s) noexcept nogil:
    """A segment of the client's, as it would send it at the time of a snapshot. Without seq, flags
    and length."""
    memset(g, 0, sizeof(segment))
    g.flow = &s.flow
    g.ack = s.snd_nxt
    g.window = <uint16_t>min(s.snd_wnd >> s.snd_wscale, <uint32_t>0xffff)
    g.timestamps = (s.flags & SNAP_TIMESTAMP) != 0
    g.tsval = s.ts_recent
    g.tsecr = s.tsval


cdef void syn_from(segment *g, const snapshot *s) noexcept nogil:
    """The client's SYN once more, with the options that were agreed on. Without seq."""
    cdef uint8_t *o = g.options
    memset(g, 0, sizeof(segment))
    g.flow = &s.flow
    g.flags = TCP_SYN | (TCP_ECE | TCP_CWR if s.flags & SNAP_ECN else 0)
    g.window = <uint16_t>min(s.snd_wnd, <uint32_t>0xffff)
    _u16(o, 0x0204)
    o = _u16(o + 2, s.mss)
    o = _u16(o, 0x0402 if s.flags & SNAP_SACK else 0x0101)
    if s.flags & SNAP_TIMESTAMP:
        o = _u16(o, 0x080a)
        o = _u32(o, s.ts_recent)
        o = _u32(o, 0)
    else:
        o = _u16(o, 0x0101)
    if s.flags & SNAP_WSCALE:
        o = _u16(o, 0x0103)
        o[0] = 3
        o[1] = s.snd_wscale
        o += 2
    g.options_len = <uint32_t>(o - g.options)


cdef int tap_send(int fd, const uint8_t *head, uint32_t head_len, const uint8_t *data,
                  uint32_t data_len) noexcept nogil:
    """Write one frame. The kernel has received it, programs and stack included, when this returns.
    0, or an errno."""
    cdef iovec iov[2]
    iov[0].iov_base = <void *>head
    iov[0].iov_len = head_len
    iov[1].iov_base = <void *>data
    iov[1].iov_len = data_len
    while writev(fd, iov, 2 if data_len else 1) < 0:
        if errno != EINTR:
            return errno
    return 0


cdef int flow_text(const tcpha_flow *flow, char *to, int size) noexcept nogil:
    """'client:port' for messages."""
    cdef const uint8_t *a = flow.caddr + 12
    return snprintf(to, size, b"%u.%u.%u.%u:%u", a[0], a[1], a[2], a[3],
                    <unsigned int>ntohs(flow.cport))


cdef object address_text(const uint8_t *addr):
    """16 bytes to the usual text; v4-mapped as IPv4."""
    cdef bytes raw = addr[:16]
    if raw[:12] == b"\0" * 10 + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


cdef int address_bytes(str text, uint8_t *to) except -1:
    """An IPv4 address in text to 16 bytes, v4-mapped. Raises OSError."""
    cdef bytes raw = b"\0" * 10 + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)
    memcpy(to, <const char *>raw, 16)
    return 0


def forge_segment(str client, int cport, str vip, int vport, dict fields, bytes data=b""):
    """A frame as forge() makes it, data appended; for tests. fields: seq, ack, window, ip_id,
    flags, and tsval, tsecr for timestamps."""
    cdef uint8_t head[FRAME_HEAD]
    cdef tcpha_flow flow
    cdef segment s
    memset(&s, 0, sizeof(s))
    address_bytes(client, flow.caddr)
    address_bytes(vip, flow.vaddr)
    flow.cport = htons(cport)
    flow.vport = htons(vport)
    s.flow = &flow
    s.seq = fields["seq"]
    s.ack = fields["ack"]
    s.window = fields.get("window", 0)
    s.ip_id = fields.get("ip_id", 0)
    s.flags = fields["flags"]
    s.timestamps = "tsval" in fields
    s.tsval = fields.get("tsval", 0)
    s.tsecr = fields.get("tsecr", 0)
    s.len = <uint32_t>len(data)
    return head[:forge(head, &s)] + data
