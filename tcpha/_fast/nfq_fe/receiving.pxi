# SPDX-License-Identifier: GPL-2.0-or-later
# Receiving: whose a packet is, and what becomes of it.

cdef inline uint32_t _place(const tcpha_flow *flow) noexcept nogil:
    cdef uint32_t h
    memcpy(&h, flow.caddr + 12, 4)
    h = (h ^ (<uint32_t>flow.cport << 16) ^ flow.cport) * 0x9e3779b1u
    return (h >> 8) & (RECENT - 1)


cdef inline recent *_recent(fe_nfqueue *d, const tcpha_flow *flow, uint64_t *who) noexcept nogil:
    """The first of the WAYS places in which a flow may be found, and what it is found by."""
    cdef uint32_t addr
    memcpy(&addr, flow.caddr + 12, 4)
    who[0] = (<uint64_t>addr << 32) | (<uint32_t>flow.cport << 16) | flow.vport
    return &d.seen[_place(flow) * WAYS]


cdef inline bint _follows(uint32_t seq, uint64_t value) noexcept nogil:
    return seq - <uint32_t>(value >> 32) < REACH


cdef void _note(fe_nfqueue *d, const tcpha_flow *flow, const tcp_view *v) noexcept nogil:
    """Remember the TSval of a packet to our stack. One whose seq does not follow is left out:
    anybody can forge such, and with a TSval of his the client would be out of time for ever."""
    cdef uint64_t who
    cdef recent *r = _recent(d, flow, &who)
    cdef uint32_t i, seq = get32(v.tcp + 4), tsval = get32(v.ts)
    cdef uint64_t new = (<uint64_t>seq << 32) | tsval, old
    cdef bint opens = (v.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN
    for i in range(WAYS):
        if r[i].who == who or (opens and r[i].who == 0):
            break
    else:
        if not opens:
            return
        i = seq % WAYS
    if opens:
        store64(&r[i].value, new)
        store64(&r[i].who, who)
        return
    old = load64(&r[i].value)
    if _follows(seq, old) and <int>(tsval - <uint32_t>old) >= 0:
        store64(&r[i].value, new)


cdef void _recall(fe_nfqueue *d, snapshot *s) noexcept nogil:
    """Set ts_recent, if what was noted fits rcv_nxt."""
    cdef uint64_t who, value
    cdef recent *r = _recent(d, &s.flow, &who)
    cdef uint32_t i
    for i in range(WAYS):
        if load64(&r[i].who) == who:
            value = load64(&r[i].value)
            if _follows(s.rcv_nxt, value):
                s.ts_recent = <uint32_t>value
            return


cdef bint _classify(fe_nfqueue *d, tcpha_entry *e, const tcp_view *v) noexcept nogil:
    """True: the packet belongs to the flow that was handed over. See flow.h."""
    cdef int where = tcpha_classify(e, v.flags, get32(v.tcp + 4), v.data_len, now_ns())
    if where == TCPHA_TO_LIVE:
        add64(<uint64_t *>&d.n.live_syn, 1)
    return where != TCPHA_TO_STACK


cdef bint _keep(fe_nfqueue *d, uint32_t slot, queue *q, const packet *p) noexcept nogil:
    cdef holder *h
    cdef kept *k
    if slot >= d.nholders:
        return False
    k = <kept *>malloc(sizeof(kept) + p.len)
    if k == NULL:
        return False
    k.next = NULL
    k.q = q
    k.id = p.id
    k.skb_info = p.skb_info
    k.len = p.len
    memcpy(k.data, p.data, p.len)
    pthread_mutex_lock(&d.hold_lock)
    h = &d.holders[slot]
    if h.last != NULL:
        h.last.next = k
    else:
        h.first = k
    h.last = k
    pthread_mutex_unlock(&d.hold_lock)
    return True


cdef inline bint _is_plain_ack(const tcp_view *v) noexcept nogil:
    """Nothing but an ACK, with no option but timestamps."""
    return v.flags == TCP_ACK and v.data_len == 0 and \
        v.data - v.tcp == (TCP_SIZE + 12 if v.ts != NULL else TCP_SIZE)


cdef inline bint _supersedes(const tcp_view *new, const waiting_ack *w) noexcept nogil:
    """A later plain ACK acknowledges more, and says all else that this one says. Duplicates, which
    have a meaning of their own (RFC 5681), and window updates are kept."""
    return w.stands_for < STRETCH and <int>(get32(new.tcp + 8) - get32(w.v.tcp + 8)) > 0 and \
        memcmp(new.tcp + 4, w.v.tcp + 4, 4) == 0 and new.ip[1] == w.v.ip[1] and \
        (new.ts == NULL) == (w.v.ts == NULL)


cdef inline void _send_waiting(fe_nfqueue *d, waiting_ack *w) noexcept nogil:
    if w.e != NULL:
        _to_backend(d, w.e, &w.v, w.skb_info)
        w.e = NULL


cdef void _forward_packet(fe_nfqueue *d, queue *q, const tcpha_flow *flow, tcpha_entry *e,
                          tcp_view *v, uint32_t skb_info) noexcept nogil:
    """Send a packet on. Of the ACKs in one batch those that a later one contains are left out: each
    would cost a pass through another host's queue, and say nothing."""
    cdef waiting_ack *w = &d.waiting[q.num - d.first_queue][_place(flow) & (ACKS - 1)]
    cdef bint plain = _is_plain_ack(v)
    if plain and w.e is e and _supersedes(v, w):
        w.stands_for += 1
        add64(&d.thinned, 1)
    else:
        _send_waiting(d, w)
        w.stands_for = 1
    if not plain:
        _to_backend(d, e, v, skb_info)
        return
    w.e = e
    w.v = v[0]
    w.skb_info = skb_info


cdef void _on_batch(void *self, queue *q) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int i
    for i in range(ACKS):
        _send_waiting(d, &d.waiting[q.num - d.first_queue][i])


cdef bint _is_unknown(fe_nfqueue *d, const tcpha_flow *flow, const tcp_view *v) noexcept nogil:
    """Whether our stack has no connection for a packet, and would answer with a RST."""
    cdef diag_answer a
    return not v.flags & TCP_SYN and diag_query(d.sockets, flow, 0, &a) == 0 and a.state == 0


cdef int _on_error(fe_nfqueue *d, packet *p, icmp_view *error) noexcept nogil:
    """An ICMP error about a segment that a back end sent in the name of the VIP belongs to that
    back end: it has the connection. Path MTU discovery needs this (RFC 1191)."""
    cdef tcpha_flow flow
    cdef tcpha_entry *e
    cdef path *way
    cdef tcp_view v
    cdef bint ok
    memset(&flow, 0, sizeof(flow))
    flow.caddr[10] = flow.caddr[11] = flow.vaddr[10] = flow.vaddr[11] = 0xff
    memcpy(flow.caddr + 12, error.inner + 16, 4)
    memcpy(flow.vaddr + 12, error.inner + 12, 4)
    memcpy(&flow.vport, error.tcp, 2)
    memcpy(&flow.cport, error.tcp + 2, 2)
    e = <tcpha_entry *>table_find(&d.flows, &flow)
    if e == NULL or not tcpha_is_forwarded(tcpha_state_of(e)):
        return V_ACCEPT
    if e.backend == TCPHA_LOCAL_NODE:
        return local_icmp(d.local, error) if d.local != NULL else V_ACCEPT
    way = &d.paths[e.backend]
    memset(&v, 0, sizeof(v))
    v.ip = error.ip
    v.tcp = v.data = error.icmp
    v.len = error.len
    v.data_len = error.len - <uint32_t>(error.icmp - error.ip)
    if way.ifindex == 0 or v.len + (IP_SIZE if way.tunnel else 0) > way.mtu:
        return V_DROP
    if way.tunnel:
        ok = _send_tunnel(d, way, &v, 0, 0)
    else:
        ok = _send_direct(d, way, &v, 0, 0)
    if ok:
        add64(<uint64_t *>&d.n.icmp, 1)
    return V_DROP


cdef int _on_packet(void *self, queue *q, packet *p) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef tcpha_flow flow
    cdef tcpha_entry *e
    cdef tcp_view v
    cdef icmp_view error
    cdef bint handed
    if icmp_parse(p.data, p.len, &error) == 0:
        return _on_error(d, p, &error)
    if tcp_parse(p.data, p.len, &v) < 0:
        if p.len >= IP_SIZE and get16(p.data + 6) & 0x3fff == 0x2000:  # a first fragment
            p.mark = TCPHA_MARK_FRAGMENT
            return V_NUMBERS
        return V_ACCEPT    # our stack knows what to do with it
    memset(&flow, 0, sizeof(flow))
    flow.caddr[10] = flow.caddr[11] = flow.vaddr[10] = flow.vaddr[11] = 0xff
    memcpy(flow.caddr + 12, v.ip + 12, 4)
    memcpy(flow.vaddr + 12, v.ip + 16, 4)
    memcpy(&flow.cport, v.tcp, 2)
    memcpy(&flow.vport, v.tcp + 2, 2)
    e = <tcpha_entry *>table_find(&d.flows, &flow)
    if e == NULL or not _classify(d, e, &v):
        if load32(&d.drop_unknown) and _is_unknown(d, &flow, &v):
            return V_DROP
        if v.ts != NULL:
            _note(d, &flow, &v)
        return V_ACCEPT
    handed = tcpha_is_forwarded(tcpha_state_of(e))
    if handed and e.backend == TCPHA_LOCAL_NODE and d.local != NULL:
        e.packets += 1
        e.bytes += v.len
        return local_inward(d.local, p)
    if handed:
        _forward_packet(d, q, &flow, e, &v, p.skb_info)
        return V_DROP
    add64(<uint64_t *>&d.n.held, 1)
    return V_KEEP if _keep(d, e.slot, q, p) else V_DROP  # out of memory: the client sends it again
