# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP packets: where their fields and options are, and changing them in place.

All options are parsed here and nowhere else, with every length checked against the packet.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from tcpha._fast.packet cimport TCP_ACK, TCP_CWR, TCP_SIZE, TCP_SYN
from tcpha._fast.sys cimport htonl, htons, ntohl, ntohs

cdef enum:
    OPT_END = 0
    OPT_NOP = 1
    OPT_MSS = 2
    OPT_WSCALE = 3
    OPT_SACK_OK = 4
    OPT_SACK = 5
    OPT_TIMESTAMP = 8
    ECN_MASK = 3           # RFC 3168
    NOT_ECT = 0
    ECT_1 = 1
    ECT_0 = 2
    CE = 3


cdef int tcp_parse(uint8_t *p, uint32_t length, tcp_view *v) noexcept nogil:
    """Find everything in a packet of 'length' bytes that begins with an IPv4 header. 0, or -1: no
    whole TCP header, or malformed options."""
    return tcp_parse_head(p, length, length, v)


cdef int tcp_parse_head(uint8_t *p, uint32_t have, uint32_t length, tcp_view *v) noexcept nogil:
    """The same where only the first 'have' bytes can be read."""
    cdef uint32_t ihl, doff, at, end, size
    cdef uint8_t *o
    memset(v, 0, sizeof(tcp_view))
    v.wscale = -1
    if have < 20 or p[0] >> 4 != 4 or p[9] != 6:
        return -1
    ihl = (p[0] & 15) * 4u
    if ihl < 20 or have < ihl + TCP_SIZE or (get16(p + 6) & 0x3fff) != 0:  # or a fragment
        return -1
    v.ip = p
    v.tcp = p + ihl
    v.len = length
    v.flags = v.tcp[13]
    doff = (v.tcp[12] >> 4) * 4u
    if doff < TCP_SIZE or ihl + doff > have or have > length:
        return -1
    v.data = v.tcp + doff
    v.data_len = length - ihl - doff
    at = TCP_SIZE
    end = doff
    while at < end:
        o = v.tcp + at
        if o[0] == OPT_END:
            break
        if o[0] == OPT_NOP:
            at += 1
            continue
        if at + 1 >= end:
            return -1
        size = o[1]
        if size < 2 or at + size > end:
            return -1
        if o[0] == OPT_TIMESTAMP and size == 10:
            v.ts = o + 2
        elif o[0] == OPT_SACK and size >= 10 and (size - 2) % 8 == 0:
            v.sack = o + 2
            v.sack_blocks = (size - 2) // 8
        elif v.flags & TCP_SYN:
            if o[0] == OPT_MSS and size == 4:
                v.mss = get16(o + 2)
            elif o[0] == OPT_WSCALE and size == 3:
                v.wscale = min(<int>o[2], 14)  # RFC 7323 section 2.3
            elif o[0] == OPT_SACK_OK and size == 2:
                v.sack_ok = True
        at += size
    return 0


cdef inline uint32_t _words(uint32_t wire, bint odd) noexcept nogil:
    """The two 16-bit words of four bytes, added up as the checksum adds them where they lie."""
    if odd:
        wire = ((wire & 0x00ff00ffu) << 8) | ((wire >> 8) & 0x00ff00ffu)
    return (wire & 0xffff) + (wire >> 16)


cdef inline void _add32(tcp_view *v, uint8_t *p, uint32_t add, uint64_t *diff) noexcept nogil:
    """Add to a 32-bit field at any offset, and note the difference for the checksum."""
    cdef uint32_t old, new
    cdef bint odd = (p - v.tcp) & 1
    memcpy(&old, p, 4)
    new = htonl(ntohl(old) + add)
    memcpy(p, &new, 4)
    diff[0] += _words(~old, odd) + _words(new, odd)


cdef inline uint16_t _fold(uint64_t total) noexcept nogil:
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return <uint16_t>total


cdef inline void _apply(uint8_t *check, uint64_t diff) noexcept nogil:
    """RFC 1624, equation 3."""
    cdef uint16_t sum_
    memcpy(&sum_, check, 2)
    sum_ = ~_fold(<uint64_t><uint16_t>~sum_ + diff)
    memcpy(check, &sum_, 2)


cdef uint16_t pseudo_sum(const uint8_t *ip, uint32_t tcp_len) noexcept nogil:
    """The sum of the pseudo-header (RFC 9293 section 3.1), folded, in wire order."""
    cdef uint32_t src, dst
    memcpy(&src, ip + 12, 4)
    memcpy(&dst, ip + 16, 4)
    return _fold(<uint64_t>_words(src, False) + _words(dst, False) + htons(6)
                 + htons(<uint16_t>tcp_len) + htons(<uint16_t>(tcp_len >> 16)))


cdef uint32_t sum_bytes(const uint8_t *p, uint32_t n) noexcept nogil:
    """The Internet sum (RFC 1071) of n bytes, folded to 16 bits, in wire order."""
    cdef uint64_t total = 0
    cdef uint32_t i = 0, word
    while i + 4 <= n:
        memcpy(&word, p + i, 4)
        total += word
        i += 4
    if i < n:
        word = 0
        memcpy(&word, p + i, n - i)
        total += word
    return _fold((total & 0xffffffffu) + (total >> 32))


cdef bint is_sound(const tcp_view *v) noexcept nogil:
    """Whether the TCP checksum is that of the packet."""
    cdef uint32_t n = v.len - <uint32_t>(v.tcp - v.ip)
    return _fold(<uint64_t>pseudo_sum(v.ip, n) + sum_bytes(v.tcp, n)) == 0xffff


cdef void checksum_full(tcp_view *v) noexcept nogil:
    """Compute the TCP checksum of the packet as it stands."""
    cdef uint32_t n = v.len - <uint32_t>(v.tcp - v.ip)
    cdef uint16_t sum_
    memset(v.tcp + 16, 0, 2)
    sum_ = ~_fold(<uint64_t>pseudo_sum(v.ip, n) + sum_bytes(v.tcp, n))
    memcpy(v.tcp + 16, &sum_, 2)


cdef void ask_offload(uint8_t *vnet, tcp_view *v, uint32_t mss) noexcept nogil:
    """Have the device or the kernel complete the checksum, and cut the packet into segments that
    carry 'mss' bytes each, if that is not 0. vnet: struct virtio_net_hdr, all zero, before an
    Ethernet header; the fields are little-endian on these machines."""
    cdef uint16_t word
    vnet[0] = 1            # VIRTIO_NET_HDR_F_NEEDS_CSUM
    word = <uint16_t>(14 + (v.tcp - v.ip))
    memcpy(vnet + 6, &word, 2)   # csum_start
    word = 16
    memcpy(vnet + 8, &word, 2)   # csum_offset
    word = pseudo_sum(v.ip, v.len - <uint32_t>(v.tcp - v.ip))
    memcpy(v.tcp + 16, &word, 2)
    if mss:
        vnet[1] = 1 | (0x80 if v.flags & TCP_CWR else 0)  # VIRTIO_NET_HDR_GSO_TCPV4, _ECN
        word = <uint16_t>(14 + (v.data - v.ip))
        memcpy(vnet + 2, &word, 2)   # hdr_len
        word = <uint16_t>mss
        memcpy(vnet + 4, &word, 2)   # gso_size


cdef void _replace_address(tcp_view *v, const translation *t, uint64_t *diff) noexcept nogil:
    cdef uint8_t *ip = v.ip + (12 if t.source else 16)
    cdef uint8_t *port = v.tcp + (0 if t.source else 2)
    cdef uint32_t old
    cdef uint16_t old_port
    cdef uint64_t ip_diff
    memcpy(&old, ip, 4)
    memcpy(ip, &t.addr, 4)
    ip_diff = _words(~old, False) + _words(t.addr, False)
    _apply(v.ip + 10, ip_diff)
    memcpy(&old_port, port, 2)
    memcpy(port, &t.port, 2)
    diff[0] += ip_diff + <uint16_t>~old_port + t.port


cdef void translate(tcp_view *v, const translation *t, int mode) noexcept nogil:
    """Change the packet as t says and put its checksum right as mode (checksum_mode) says."""
    cdef uint64_t diff = 0
    cdef uint32_t i, window
    cdef uint16_t old, new
    if t.seq:
        _add32(v, v.tcp + 4, t.seq, &diff)
    if t.ack and v.flags & TCP_ACK:
        _add32(v, v.tcp + 8, t.ack, &diff)
    if t.ack and v.sack != NULL:
        for i in range(v.sack_blocks * 2):
            _add32(v, v.sack + i * 4, t.ack, &diff)
    if v.ts != NULL:
        if t.tsval:
            _add32(v, v.ts, t.tsval, &diff)
        if t.tsecr and v.flags & TCP_ACK:  # without ACK it means nothing (RFC 7323 section 3.2)
            _add32(v, v.ts + 4, t.tsecr, &diff)
    if t.window_left != t.window_right and not v.flags & TCP_SYN:
        memcpy(&old, v.tcp + 14, 2)
        # rounded up, as Linux rounds its own: what a scale cannot express must not become nothing
        window = ((<uint32_t>ntohs(old) << t.window_left) + (1u << t.window_right) - 1) \
            >> t.window_right
        new = htons(<uint16_t>min(window, <uint32_t>0xffff))
        memcpy(v.tcp + 14, &new, 2)
        diff += <uint16_t>~old + new
    if t.addr:
        _replace_address(v, t, &diff)
    if mode == SUM_FULL:
        checksum_full(v)
    elif mode == SUM_UPDATE:
        _apply(v.tcp + 16, diff)


cdef int icmp_parse(uint8_t *p, uint32_t length, icmp_view *v) noexcept nogil:
    """Find the quoted TCP segment in an ICMP error: destination unreachable, time exceeded or
    parameter problem. 0, or -1: the packet, of 'length' bytes from its IPv4 header on, is something
    else."""
    cdef uint32_t ihl, room
    if length < 20 or p[0] >> 4 != 4 or p[9] != 1:
        return -1
    ihl = (p[0] & 15) * 4u
    if ihl < 20 or length < ihl + 8 + 20 or get16(p + 2) != length or \
            (get16(p + 6) & 0x3fff) != 0:
        return -1
    v.ip = p
    v.len = length
    v.icmp = p + ihl
    if v.icmp[0] != 3 and v.icmp[0] != 11 and v.icmp[0] != 12:
        return -1
    v.inner = v.icmp + 8
    room = length - ihl - 8
    ihl = (v.inner[0] & 15) * 4u
    if v.inner[0] >> 4 != 4 or ihl < 20 or room < ihl + 8 or v.inner[9] != 6 or \
            (get16(v.inner + 6) & 0x1fff) != 0:
        return -1
    v.tcp = v.inner + ihl
    return 0


cdef void icmp_translate(icmp_view *v, const translation *outward,
                         const translation *inward) noexcept nogil:
    """Make the quoted segment what it was before 'outward' changed it, and the packet's destination
    what 'inward' says."""
    cdef uint64_t ip_diff
    cdef uint32_t old, seq = htonl(get32(v.tcp + 4) - outward.seq)
    cdef uint16_t sum_
    memcpy(v.tcp + 4, &seq, 4)
    if inward.addr:
        memcpy(&old, v.ip + 16, 4)
        ip_diff = _words(~old, False) + _words(inward.addr, False)
        memcpy(v.ip + 16, &inward.addr, 4)
        _apply(v.ip + 10, ip_diff)
        memcpy(v.inner + 12, &inward.addr, 4)
        _apply(v.inner + 10, ip_diff)
        memcpy(v.tcp, &inward.port, 2)
    memset(v.icmp + 2, 0, 2)
    sum_ = ~<uint16_t>sum_bytes(v.icmp, v.len - <uint32_t>(v.icmp - v.ip))
    memcpy(v.icmp + 2, &sum_, 2)


cdef bint combine_ecn(uint8_t *ip, uint8_t outer_tos) noexcept nogil:
    """What routers have written into the ECN field around a packet goes into its own (RFC 6040
    section 4.2). False: it would have been dropped instead of marked."""
    cdef uint8_t outer = outer_tos & ECN_MASK, inner = ip[1] & ECN_MASK
    cdef uint16_t old, new
    if outer == CE and inner == NOT_ECT:
        return False
    if outer == CE or (outer == ECT_1 and inner == ECT_0):
        memcpy(&old, ip, 2)
        ip[1] = (ip[1] & ~<uint8_t>ECN_MASK) | outer
        memcpy(&new, ip, 2)
        _apply(ip + 10, <uint64_t><uint16_t>~old + new)
    return True


def parse_packet(bytes packet, have=None):
    """What tcp_parse() finds, or tcp_parse_head() in 'have' bytes, as a dict, or None; for
    tests."""
    cdef bytearray copy = bytearray(packet)
    cdef tcp_view v
    del copy[len(packet) if have is None else have:]
    if tcp_parse_head(copy, <uint32_t>len(copy), <uint32_t>len(packet), &v) < 0:
        return None
    return {"flags": v.flags, "data": packet[len(packet) - v.data_len:],
            "ts": (get32(v.ts), get32(v.ts + 4)) if v.ts != NULL else None,
            "sack": [(get32(v.sack + 8 * i), get32(v.sack + 8 * i + 4))
                     for i in range(v.sack_blocks)],
            "mss": v.mss, "wscale": v.wscale if v.wscale >= 0 else None, "sack_ok": v.sack_ok}


cdef translation _translation(dict changes):
    cdef translation t
    memset(&t, 0, sizeof(t))
    t.seq = changes.get("seq", 0)
    t.ack = changes.get("ack", 0)
    t.tsval = changes.get("tsval", 0)
    t.tsecr = changes.get("tsecr", 0)
    t.window_left = changes.get("window_left", 0)
    t.window_right = changes.get("window_right", 0)
    t.source = changes.get("source", False)
    addr = changes.get("addr")
    if addr is not None:
        memcpy(&t.addr, <const char *>(<bytes>addr), 4)
        t.port = htons(changes["port"])
    return t


def translate_packet(bytes packet, dict changes, int mode=SUM_UPDATE):
    """translate() on a copy, for tests and benchmarks. changes: the fields of struct translation;
    'addr' as 4 bytes, 'port' as a number. Raises ValueError if the packet cannot be parsed."""
    cdef bytearray copy = bytearray(packet)
    cdef tcp_view v
    cdef translation t = _translation(changes)
    if tcp_parse(copy, <uint32_t>len(copy), &v) < 0:
        raise ValueError("no TCP packet")
    translate(&v, &t, mode)
    return bytes(copy)


def translate_error(bytes packet, dict outward, dict inward):
    """icmp_translate() on a copy, or None: the packet is no such error; for tests."""
    cdef bytearray copy = bytearray(packet)
    cdef icmp_view v
    cdef translation out = _translation(outward), back = _translation(inward)
    if icmp_parse(copy, <uint32_t>len(copy), &v) < 0:
        return None
    icmp_translate(&v, &out, &back)
    return bytes(copy)


def combined_ecn(bytes packet, uint8_t outer_tos):
    """combine_ecn() on a copy, or None: it is to be dropped; for tests."""
    cdef bytearray copy = bytearray(packet)
    return bytes(copy) if combine_ecn(copy, outer_tos) else None


def translate_many(bytes packet, uint32_t times):
    """Translate one packet in place over and over, as a worker does, options and checksum
    included; for benchmarks."""
    cdef bytearray copy = bytearray(packet)
    cdef uint8_t *p = copy
    cdef uint32_t length = <uint32_t>len(copy), _i
    cdef tcp_view v
    cdef translation t
    memset(&t, 0, sizeof(t))
    t.seq = t.ack = 12345
    t.tsval = 77
    t.window_left = 7
    t.window_right = 5
    with nogil:
        for _i in range(times):
            if tcp_parse(p, length, &v) == 0:
                translate(&v, &t, SUM_UPDATE)


def checksum_many(bytes packet, uint32_t times):
    """Compute the TCP checksum of a packet over and over; for benchmarks."""
    cdef bytearray copy = bytearray(packet)
    cdef uint8_t *p = copy
    cdef uint32_t length = <uint32_t>len(copy), _i
    cdef tcp_view v
    with nogil:
        for _i in range(times):
            if tcp_parse(p, length, &v) == 0:
                checksum_full(&v)
