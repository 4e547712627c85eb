# SPDX-License-Identifier: GPL-2.0-or-later
"""What the hot paths' parsers do with any bytes at all, each input in memory of exactly its size:
AddressSanitizer sees the first byte read or written too far. A broken promise raises
AssertionError."""
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.http cimport HTTP_BAD, HTTP_DONE, HTTP_MORE, http_head, http_parse
from tcpha._fast.message cimport (
    MSG_CLOSED, MSG_DOUBT, MSG_FLOW, MSG_HANDOFF, MSG_HANDOFF_FIXED, MSG_HEADER, MSG_HELLO,
    MSG_KEYS, MSG_OWNED, MSG_PLACE, MSG_PONG, MSG_REFUSED, MSG_RETURN, message, message_closed,
    message_decode, message_doubt, message_flow, message_handoff, message_owned, message_place,
    message_refused, message_return, message_short)
from tcpha._fast.rewrite cimport (
    SUM_FULL, SUM_LEAVE, SUM_UPDATE, icmp_parse, icmp_translate, icmp_view, tcp_parse_head,
    tcp_view, translate, translation)


cdef uint8_t *_exact(const uint8_t *p, size_t n) noexcept nogil:
    cdef uint8_t *copy = <uint8_t *>malloc(n)
    memcpy(copy, p, n)
    return copy


def head(bytes data):
    """Parse data as a request head: whole, and byte by byte up to a cut that the data choose. The
    outcome must be the same and every offset must lie inside. Returns True if it is a head."""
    cdef const uint8_t *p = data
    cdef uint32_t n = <uint32_t>len(data), first = 0, step, end
    cdef uint8_t *buf
    cdef http_head h, g
    cdef int rc, again
    if n == 0:
        return False
    memset(&h, 0, sizeof(h))
    buf = _exact(p, n)
    rc = http_parse(&h, buf, n)
    free(buf)
    memset(&g, 0, sizeof(g))
    again = HTTP_MORE
    step = 1 + p[n - 1] % 7
    while again == HTTP_MORE and first < n:
        end = min(n, first + step)
        buf = _exact(p, end)
        again = http_parse(&g, buf, end)
        free(buf)
        first = end
    assert rc == again, "pieces change the outcome"
    if rc == HTTP_BAD:
        assert h.error != NULL and h.error == g.error, "pieces change the reason"
        return False
    if rc == HTTP_MORE:
        assert h.pos == n, "bytes left unread"
        return False
    assert rc == HTTP_DONE and h.pos == g.pos <= n
    assert h.method == g.method and h.method_len == g.method_len
    assert h.target == g.target and h.target_len == g.target_len and h.minor == g.minor
    assert 0 < h.method_len and h.method + h.method_len < h.target
    assert h.origin == g.origin and h.root == g.root and h.target <= h.origin
    assert h.origin <= h.target + h.target_len and (h.root == 0 or h.target < h.origin)
    assert 0 < h.target_len and h.target + h.target_len + 9 <= h.pos
    return True


cdef uint32_t _encode(uint8_t *to, const message *m) noexcept nogil:
    """The message again, or 0 where no encoder takes one apart from its sender's state."""
    if m.type == MSG_HANDOFF:
        return message_handoff(to, m.id, &m.snap)
    if m.type == MSG_REFUSED:
        return message_refused(to, m.id, m.reason)
    if m.type == MSG_CLOSED:
        return message_closed(to, m.id, &m.snap.flow, m.reason)
    if m.type == MSG_RETURN:
        return message_return(to, m.id, &m.snap.flow, m.reason)
    if m.type == MSG_FLOW:
        return message_flow(to, m.id, &m.snap.flow, m.reason)
    if m.type == MSG_OWNED:
        return message_owned(to, m.id, &m.snap.flow)
    if m.type == MSG_DOUBT:
        return message_doubt(to, m.id, &m.snap.flow)
    if m.type == MSG_PLACE:
        return message_place(to, m.id, m.snap.flow.vaddr, m.snap.flow.vport)
    if m.type == MSG_HELLO or m.type == MSG_KEYS or m.type == MSG_PONG:
        return 0
    return message_short(to, m.type, m.id)


def messages(bytes data):
    """Decode one message after another, as both ends of a control connection do. What was decoded
    must encode to the bytes it was decoded from. Returns how many messages there were."""
    cdef const uint8_t *p = data
    cdef uint32_t n = <uint32_t>len(data), at = 0, size, total = 0, i
    cdef uint8_t *buf
    cdef uint8_t[MSG_HANDOFF_FIXED] back
    cdef message m
    cdef int count = 0, used
    while at < n:
        buf = _exact(p + at, n - at)
        memset(&m, 0, sizeof(m))
        used = message_decode(buf, n - at, &m)
        try:
            if used <= 0:
                break
            assert MSG_HEADER <= <uint32_t>used <= n - at and m.length == <uint32_t>used
            if m.data != NULL:
                assert m.data + m.data_len == buf + used, "data run over the message"
                for i in range(m.data_len):
                    total += m.data[i]  # AddressSanitizer looks at each
            size = _encode(back, &m)
            if m.type == MSG_HANDOFF:
                assert size + m.data_len == <uint32_t>used
                # sent_ns is the sender's clock
                assert memcmp(back, buf, MSG_HEADER) == 0
                assert memcmp(back + MSG_HEADER + 8, buf + MSG_HEADER + 8,
                              size - MSG_HEADER - 8) == 0
            elif size:
                assert size == <uint32_t>used and memcmp(back, buf, size) == 0
        finally:
            free(buf)
        at += used
        count += 1
    return count


def proof(bytes data):
    """Look one byte behind a copy of data."""
    cdef uint8_t *buf = _exact(data, len(data))
    cdef uint8_t last = buf[len(data)]
    free(buf)
    return last


cdef bint _inside(const uint8_t *p, size_t n, const uint8_t *buf, size_t size) noexcept nogil:
    return buf <= p and p + n <= buf + size


def packet(bytes data):
    """Parse and rewrite a packet as the datapath would: 26 bytes choose the translation and how
    much of the packet can be read, the rest is the packet. Rewriting there and back must restore
    it. Returns True if it is a TCP segment or an ICMP error about one."""
    cdef const uint8_t *p = data
    cdef uint32_t n = <uint32_t>len(data), have
    cdef uint8_t *buf
    cdef tcp_view v
    cdef icmp_view e
    cdef translation t, back
    cdef int mode
    if n <= 26:
        return False
    memset(&t, 0, sizeof(t))
    memcpy(&t.seq, p, 4)
    memcpy(&t.ack, p + 4, 4)
    memcpy(&t.tsval, p + 8, 4)
    memcpy(&t.tsecr, p + 12, 4)
    t.window_left = p[16] % 15
    t.window_right = p[17] % 15
    memcpy(&t.addr, p + 18, 4)
    memcpy(&t.port, p + 22, 2)
    t.source = p[24] & 1
    mode = (SUM_UPDATE, SUM_FULL, SUM_LEAVE)[(p[24] >> 1) % 3]
    p += 26
    n -= 26
    have = n - min(n, <uint32_t>data[25] & 0x7f) if data[25] & 0x80 else n
    if have < n and mode == SUM_FULL:
        mode = SUM_UPDATE  # as the datapath: who reads the head alone never sums up the rest
    buf = _exact(p, have)
    try:
        if tcp_parse_head(buf, have, n, &v) == 0:
            assert _inside(v.tcp, 20, buf, have) and v.data + v.data_len == buf + n
            assert v.ts == NULL or _inside(v.ts, 8, buf, have)
            assert v.sack == NULL or _inside(v.sack, 8 * v.sack_blocks, buf, have)
            assert -1 <= v.wscale <= 14
            translate(&v, &t, mode)
            if mode == SUM_LEAVE and not t.addr:  # nothing here says that the checksum was right
                memset(&back, 0, sizeof(back))
                back.seq = -t.seq
                back.ack = -t.ack
                back.tsval = -t.tsval
                back.tsecr = -t.tsecr
                t.window_left = t.window_right = 0
                memcpy(v.tcp + 14, p + (v.tcp - buf) + 14, 2)  # windows lose bits
                translate(&v, &back, mode)
                assert memcmp(buf, p, have) == 0, "there and back is another packet"
            return True
        if have == n and icmp_parse(buf, n, &e) == 0:
            assert _inside(e.icmp, 8, buf, n) and _inside(e.inner, 20, buf, n)
            assert _inside(e.tcp, 8, buf, n)
            memset(&back, 0, sizeof(back))
            back.addr = t.addr
            back.port = t.port
            icmp_translate(&e, &t, &back)
            return True
        return False
    finally:
        free(buf)
