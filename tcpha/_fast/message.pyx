# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between FE and BE. Big-endian throughout.

Header, 16 bytes: magic (16 bits), version (8), type (8), length of the whole message (32), id (64).
HANDOFF body: sent_ns (64), flow (36 bytes, as struct tcpha_flow), snd_nxt, rcv_nxt, snd_wnd,
rcv_wnd, tsval, ts_recent, srtt_us (32 each), mss (16), snd_wscale, rcv_wscale (8 each), flags (16),
then the request bytes. CLOSED body: flow, ending (32). OWNED, DOUBT body: flow. REFUSED body:
reason (32). RETURN body: flow, reason (32). FLOW body: flow, rcv_nxt (32). KEYS body: 16 bytes of
key; its id is the key's number (56 bits; the lowest one says which of two it replaces), then the
window scale that goes with its cookies (8).
PONG body: sent_ns (64). PLACE body: vaddr (16 bytes), vport (16; 0: any that has no place of its
own), 6 zero bytes. ADOPTED, PING, SERVER, KEYED, ASK, TOLD and MISSED have none.
HELLO body: JSON.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from tcpha._fast.defs cimport tcpha_flow
from tcpha._fast.snapshot cimport SNAP_ALL, snapshot
from tcpha._fast.sys cimport be64toh, htobe64, htonl, htons, now_ns, ntohl, ntohs


# A cursor over bytes. Readers check the bounds in one place and remember a failure.
cdef struct cursor:
    const uint8_t *p
    uint32_t left
    bint bad


cdef inline const uint8_t *_take(cursor *c, uint32_t n) noexcept nogil:
    cdef const uint8_t *p = c.p
    if c.bad or n > c.left:
        c.bad = True
        return NULL
    c.p += n
    c.left -= n
    return p


cdef inline uint8_t _get8(cursor *c) noexcept nogil:
    cdef const uint8_t *p = _take(c, 1)
    return p[0] if p != NULL else 0


cdef inline uint16_t _get16(cursor *c) noexcept nogil:
    cdef uint16_t v = 0
    cdef const uint8_t *p = _take(c, 2)
    if p != NULL:
        memcpy(&v, p, 2)
    return ntohs(v)


cdef inline uint32_t _get32(cursor *c) noexcept nogil:
    cdef uint32_t v = 0
    cdef const uint8_t *p = _take(c, 4)
    if p != NULL:
        memcpy(&v, p, 4)
    return ntohl(v)


cdef inline uint64_t _get64(cursor *c) noexcept nogil:
    cdef uint64_t v = 0
    cdef const uint8_t *p = _take(c, 8)
    if p != NULL:
        memcpy(&v, p, 8)
    return be64toh(v)


cdef inline uint8_t *_put8(uint8_t *p, uint8_t v) noexcept nogil:
    p[0] = v
    return p + 1


cdef inline uint8_t *_put16(uint8_t *p, uint16_t v) noexcept nogil:
    v = htons(v)
    memcpy(p, &v, 2)
    return p + 2


cdef inline uint8_t *_put32(uint8_t *p, uint32_t v) noexcept nogil:
    v = htonl(v)
    memcpy(p, &v, 4)
    return p + 4


cdef inline uint8_t *_put64(uint8_t *p, uint64_t v) noexcept nogil:
    v = htobe64(v)
    memcpy(p, &v, 8)
    return p + 8


cdef uint8_t *_header(uint8_t *p, uint8_t kind, uint32_t length, uint64_t id) noexcept nogil:
    p = _put16(p, MSG_MAGIC)
    p = _put8(p, MSG_VERSION)
    p = _put8(p, kind)
    p = _put32(p, length)
    return _put64(p, id)


cdef uint32_t message_handoff(uint8_t *to, uint64_t id, const snapshot *s) noexcept nogil:
    """Write the fixed part of a HANDOFF, stamped with the time; s.len request bytes must follow it.
    Returns the size of the fixed part."""
    cdef uint8_t *p = _header(to, MSG_HANDOFF, MSG_HANDOFF_FIXED + s.len, id)
    p = _put64(p, now_ns())
    memcpy(p, &s.flow, sizeof(tcpha_flow))
    p += sizeof(tcpha_flow)
    p = _put32(p, s.snd_nxt)
    p = _put32(p, s.rcv_nxt)
    p = _put32(p, s.snd_wnd)
    p = _put32(p, s.rcv_wnd)
    p = _put32(p, s.tsval)
    p = _put32(p, s.ts_recent)
    p = _put32(p, s.srtt_us)
    p = _put16(p, s.mss)
    p = _put8(p, s.snd_wscale)
    p = _put8(p, s.rcv_wscale)
    p = _put16(p, s.flags)
    return <uint32_t>(p - to)


cdef uint32_t message_short(uint8_t *to, uint8_t kind, uint64_t id) noexcept nogil:
    """ADOPTED, PING, SERVER, KEYED, ASK, TOLD or MISSED."""
    _header(to, kind, MSG_HEADER, id)
    return MSG_HEADER


cdef uint32_t message_pong(uint8_t *to, uint64_t id) noexcept nogil:
    """The answer to a PING, stamped with the time."""
    _put64(_header(to, MSG_PONG, MSG_PONG_SIZE, id), now_ns())
    return MSG_PONG_SIZE


cdef uint32_t message_refused(uint8_t *to, uint64_t id, uint32_t reason) noexcept nogil:
    _put32(_header(to, MSG_REFUSED, MSG_REFUSED_SIZE, id), reason)
    return MSG_REFUSED_SIZE


cdef uint32_t _end(uint8_t *to, uint8_t kind, uint64_t id, const tcpha_flow *flow,
                   uint32_t reason) noexcept nogil:
    cdef uint8_t *p = _header(to, kind, MSG_CLOSED_SIZE, id)
    memcpy(p, flow, sizeof(tcpha_flow))
    _put32(p + sizeof(tcpha_flow), reason)
    return MSG_CLOSED_SIZE


cdef uint32_t message_closed(uint8_t *to, uint64_t id, const tcpha_flow *flow,
                             uint32_t reason) noexcept nogil:
    return _end(to, MSG_CLOSED, id, flow, reason)


cdef uint32_t message_return(uint8_t *to, uint64_t id, const tcpha_flow *flow,
                             uint32_t reason) noexcept nogil:
    return _end(to, MSG_RETURN, id, flow, reason)


cdef uint32_t message_flow(uint8_t *to, uint64_t id, const tcpha_flow *flow,
                           uint32_t rcv_nxt) noexcept nogil:
    return _end(to, MSG_FLOW, id, flow, rcv_nxt)


cdef uint32_t message_keys(uint8_t *to, uint64_t id, const uint64_t *key) noexcept nogil:
    memcpy(_header(to, MSG_KEYS, MSG_KEYS_SIZE, id), key, 16)
    return MSG_KEYS_SIZE


cdef uint64_t fast_id(uint32_t isn, uint32_t ours) noexcept nogil:
    """The id of a handoff that no message announced: both sides know it from the handshake's
    sequence numbers, the client's and ours."""
    return <uint64_t>1 << 63 | <uint64_t>isn << 31 | ours >> 1


cdef uint32_t fast_isn(uint64_t id) noexcept nogil:
    """The client's initial sequence number, or 0: it is no such id."""
    return <uint32_t>(id >> 31) if id >> 63 else 0


cdef uint32_t message_owned(uint8_t *to, uint64_t id, const tcpha_flow *flow) noexcept nogil:
    memcpy(_header(to, MSG_OWNED, MSG_OWNED_SIZE, id), flow, sizeof(tcpha_flow))
    return MSG_OWNED_SIZE


cdef uint32_t message_doubt(uint8_t *to, uint64_t id, const tcpha_flow *flow) noexcept nogil:
    memcpy(_header(to, MSG_DOUBT, MSG_OWNED_SIZE, id), flow, sizeof(tcpha_flow))
    return MSG_OWNED_SIZE


cdef uint32_t message_place(uint8_t *to, uint64_t said, const uint8_t *vaddr,
                            uint16_t vport) noexcept nogil:
    """What SERVER says, of the place for vport (in network byte order) of that address."""
    cdef uint8_t *p = _header(to, MSG_PLACE, MSG_PLACE_SIZE, said)
    memcpy(p, vaddr, 16)
    memcpy(p + 16, &vport, 2)
    memset(p + 18, 0, 6)
    return MSG_PLACE_SIZE


REFUSALS = (b"?", b"full", b"accept queue full", b"no listener", b"too late",
            b"options not supported", b"error", b"no answer", b"control connection lost",
            b"it did not arrive")
cdef const char *_texts[REFUSE_LOST + 1]
for _n, _text in enumerate(REFUSALS):  # by number: enum refusal
    _texts[<int>_n] = _text


cdef const char *refusal_text(uint32_t reason) noexcept nogil:
    return _texts[reason if reason <= REFUSE_LOST else 0]


cdef int message_decode(const uint8_t *buf, uint32_t length, message *m) noexcept nogil:
    """Decode the message at buf. Returns its length, 0 if it is incomplete, -1 if it is malformed
    (the connection must then be closed: there is no way to find the next message)."""
    cdef cursor c
    cdef snapshot *s = &m.snap
    cdef const uint8_t *p
    if length < MSG_HEADER:
        return 0
    c.p = buf
    c.left = length
    c.bad = False
    if _get16(&c) != MSG_MAGIC or _get8(&c) != MSG_VERSION:
        return -1
    m.type = _get8(&c)
    m.length = _get32(&c)
    m.id = _get64(&c)
    m.data = NULL
    m.data_len = 0
    if m.length < MSG_HEADER or m.length > MSG_MAX:
        return -1
    if m.length > length:
        return 0
    c.left = m.length - MSG_HEADER
    if m.type == MSG_HANDOFF:
        m.sent_ns = _get64(&c)
        p = _take(&c, sizeof(tcpha_flow))
        if p != NULL:
            memcpy(&s.flow, p, sizeof(tcpha_flow))
        s.snd_nxt = _get32(&c)
        s.rcv_nxt = _get32(&c)
        s.snd_wnd = _get32(&c)
        s.rcv_wnd = _get32(&c)
        s.tsval = _get32(&c)
        s.ts_recent = _get32(&c)
        s.srtt_us = _get32(&c)
        s.mss = _get16(&c)
        s.snd_wscale = _get8(&c)
        s.rcv_wscale = _get8(&c)
        s.flags = _get16(&c)
        if c.bad or s.snd_wscale > 14 or s.rcv_wscale > 14 or s.flags & ~SNAP_ALL:
            return -1
        m.data = c.p
        m.data_len = s.len = c.left
        if s.len == 0 or s.len > MSG_MAX_DATA:
            return -1
    elif m.type == MSG_HELLO:
        m.data = c.p
        m.data_len = c.left
    elif m.type == MSG_REFUSED:
        m.reason = _get32(&c)
    elif m.type == MSG_PONG:
        m.sent_ns = _get64(&c)
    elif m.type == MSG_KEYS:
        m.data = _take(&c, 16)
        m.data_len = 16
        if m.data == NULL or m.id & 0xff > 14:
            return -1
    elif m.type == MSG_PLACE:
        p = _take(&c, 16)
        if p != NULL:
            memcpy(s.flow.vaddr, p, 16)
        s.flow.vport = htons(_get16(&c))
        if _get32(&c) or _get16(&c):
            return -1
    elif m.type == MSG_CLOSED or m.type == MSG_OWNED or m.type == MSG_RETURN or \
            m.type == MSG_FLOW or m.type == MSG_DOUBT:
        p = _take(&c, sizeof(tcpha_flow))
        if p != NULL:
            memcpy(&s.flow, p, sizeof(tcpha_flow))
        if m.type != MSG_OWNED and m.type != MSG_DOUBT:
            m.reason = _get32(&c)
    elif m.type != MSG_ADOPTED and m.type != MSG_PING and m.type != MSG_SERVER and \
            m.type != MSG_KEYED and m.type != MSG_ASK and m.type != MSG_TOLD and \
            m.type != MSG_MISSED:
        return -1
    if c.bad or ((m.data == NULL or m.type == MSG_KEYS) and c.left):
        return -1
    return <int>m.length


# The same for Python: HELLO, tests and fuzzing.

HEADER_SIZE = MSG_HEADER
HELLO = MSG_HELLO
HANDOFF = MSG_HANDOFF
ADOPTED = MSG_ADOPTED
REFUSED = MSG_REFUSED
CLOSED = MSG_CLOSED
PING = MSG_PING
PONG = MSG_PONG
OWNED = MSG_OWNED
PLACE = MSG_PLACE
VERSION = MSG_VERSION


def clock():
    """CLOCK_MONOTONIC in nanoseconds, as it stands in messages."""
    return now_ns()


def encode_hello(bytes body):
    """A HELLO message with the given body."""
    cdef uint8_t head[MSG_HEADER]
    _header(head, MSG_HELLO, MSG_HEADER + <uint32_t>len(body), MSG_VERSION)
    return head[:MSG_HEADER] + body


def encode(int kind, uint64_t id, dict fields=None, bytes data=b""):
    """Any message; fields: reason, flow (36 bytes), vaddr (16 bytes), vport, and the numbers of a
    snapshot by name."""
    cdef uint8_t buf[MSG_HANDOFF_FIXED]
    cdef snapshot s
    cdef uint32_t n
    cdef bytes flow, vaddr
    fields = fields or {}
    if kind == MSG_HANDOFF or kind == MSG_CLOSED or kind == MSG_OWNED:
        flow = fields["flow"]
        if len(flow) != sizeof(tcpha_flow):
            raise ValueError("flow is not 36 bytes")
        memcpy(&s.flow, <const char *>flow, sizeof(tcpha_flow))
    if kind == MSG_HANDOFF:
        s.snd_nxt = fields["snd_nxt"]
        s.rcv_nxt = fields["rcv_nxt"]
        s.snd_wnd = fields["snd_wnd"]
        s.rcv_wnd = fields["rcv_wnd"]
        s.tsval = fields["tsval"]
        s.ts_recent = fields["ts_recent"]
        s.srtt_us = fields["srtt_us"]
        s.mss = fields["mss"]
        s.snd_wscale = fields["snd_wscale"]
        s.rcv_wscale = fields["rcv_wscale"]
        s.flags = fields["flags"]
        s.len = <uint32_t>len(data)
        n = message_handoff(buf, id, &s)
        return buf[:n] + data
    if kind == MSG_REFUSED:
        n = message_refused(buf, id, fields["reason"])
    elif kind == MSG_OWNED:
        n = message_owned(buf, id, &s.flow)
    elif kind == MSG_CLOSED:
        n = message_closed(buf, id, &s.flow, fields["reason"])
    elif kind == MSG_PONG:
        n = message_pong(buf, id)
    elif kind == MSG_PLACE:
        vaddr = fields["vaddr"]
        if len(vaddr) != 16:
            raise ValueError("vaddr is not 16 bytes")
        n = message_place(buf, id, vaddr, htons(fields["vport"]))
    else:
        n = message_short(buf, <uint8_t>kind, id)
    return buf[:n]


def decode(bytes data):
    """Decode one message: None if incomplete, else a dict. Raises ValueError if malformed."""
    cdef message m
    cdef const uint8_t *p = data
    cdef int n
    memset(&m, 0, sizeof(m))
    n = message_decode(p, <uint32_t>len(data), &m)
    if n < 0:
        raise ValueError("malformed message")
    if n == 0:
        return None
    out = {"type": m.type, "length": m.length, "id": m.id}
    if m.data != NULL:
        out["data"] = m.data[:m.data_len]
    if m.type == MSG_REFUSED or m.type == MSG_CLOSED or m.type == MSG_RETURN:
        out["reason"] = m.reason
    if m.type == MSG_HANDOFF or m.type == MSG_CLOSED or m.type == MSG_OWNED or \
            m.type == MSG_RETURN:
        out["flow"] = (<uint8_t *>&m.snap.flow)[:sizeof(tcpha_flow)]
    if m.type == MSG_PLACE:
        out["vaddr"] = (<uint8_t *>m.snap.flow.vaddr)[:16]
        out["vport"] = ntohs(m.snap.flow.vport)
    if m.type == MSG_PONG:
        out["sent_ns"] = m.sent_ns
    if m.type == MSG_HANDOFF:
        out.update(sent_ns=m.sent_ns, snd_nxt=m.snap.snd_nxt, rcv_nxt=m.snap.rcv_nxt,
                   snd_wnd=m.snap.snd_wnd, rcv_wnd=m.snap.rcv_wnd, tsval=m.snap.tsval,
                   ts_recent=m.snap.ts_recent, srtt_us=m.snap.srtt_us, mss=m.snap.mss,
                   snd_wscale=m.snap.snd_wscale, rcv_wscale=m.snap.rcv_wscale,
                   flags=m.snap.flags)
    return out
