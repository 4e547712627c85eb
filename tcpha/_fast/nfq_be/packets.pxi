# SPDX-License-Identifier: GPL-2.0-or-later
# Packets, in and out: who owns the 4-tuple, and what its numbers are to the other side.

cdef be_flow *_flow_to(be_nfqueue *d, const tcp_view *v) noexcept nogil:
    """The flow of a packet from the client, or NULL: it may not pass."""
    cdef tcpha_flow outside, local
    cdef be_flow *f
    cdef diag_answer a
    cdef bint same
    _flow_between(v.ip + 12, v.tcp, v.ip + 16, v.tcp + 2, &outside)
    _local(d, &outside, &local)
    f = <be_flow *>table_find(&d.flows, &local)
    same = f != NULL and _same(&f.outside, &outside)
    if same and f.state == B_DIRECT and v.flags & TCP_FIN:
        _acknowledge(d, v)
    if not same or f.state != B_LIVE or \
            (v.flags & TCP_SYN and (f.ended_ns or _query(d, &local, &a) < 0 or not a.full)):
        # a SYN is for the socket that it challenges; without one it would meet the listener
        add64(<uint64_t *>&d.n.guarded, 1)
        return NULL
    return f


cdef void _acknowledge(be_nfqueue *d, const tcp_view *v) noexcept nogil:
    """A FIN that comes once more, in the name of the TIME_WAIT socket that had to go: its client
    could not use the port again before it is answered."""
    cdef tcpha_flow back   # from us to the client
    cdef segment g
    memset(&back, 0, sizeof(back))
    memcpy(back.caddr + 12, v.ip + 16, 4)
    memcpy(back.vaddr + 12, v.ip + 12, 4)
    memcpy(&back.cport, v.tcp + 2, 2)
    memcpy(&back.vport, v.tcp, 2)
    memset(&g, 0, sizeof(g))
    g.flow = &back
    g.seq = get32(v.tcp + 8)
    g.ack = get32(v.tcp + 4) + v.data_len + 1
    g.flags = TCP_ACK
    _send_segment(d, &g, NULL)


cdef bint _icmp_inward(be_nfqueue *d, icmp_view *v) noexcept nogil:
    """Rewrite an ICMP error about a segment of an adopted connection for the socket that sent it.
    False: it is about something else."""
    cdef tcpha_flow outside, local
    cdef be_flow *f
    _flow_between(v.inner + 16, v.tcp + 2, v.inner + 12, v.tcp, &outside)
    _local(d, &outside, &local)
    f = <be_flow *>table_find(&d.flows, &local)
    if f == NULL or f.state != B_LIVE or not _same(&f.outside, &outside):
        return False
    icmp_translate(v, &f.outward, &f.inward)
    return True


cdef bint _is_frontend(be_nfqueue *d, uint32_t addr) noexcept nogil:
    cdef uint32_t i
    for i in range(d.nfrontends):
        if d.frontends[i] == addr:
            return True
    add64(<uint64_t *>&d.n.foreign, 1)
    return False


cdef bint _unwrap(be_nfqueue *d, uint8_t *outer, uint32_t outer_src) noexcept nogil:
    """Whether what is behind an outer header may go on by itself."""
    if not _is_frontend(d, outer_src):
        return False
    if not combine_ecn(outer + IP_SIZE, outer[1]):
        add64(<uint64_t *>&d.n.not_ect, 1)
        return False
    add64(<uint64_t *>&d.n.decapsulated, 1)
    return True


cdef bint _is_to_vip(const be_nfqueue *d, const uint8_t *ip) noexcept nogil:
    """Whether the destination in an IPv4 header is one of the VIPs."""
    cdef uint32_t i
    for i in range(d.places.nvips):
        if memcmp(d.places.vips[i] + 12, ip + 16, 4) == 0:
            return True
    return False


cdef inline bint _is_for_vip(const be_nfqueue *d, const uint8_t *ip) noexcept nogil:
    """Whether a header begins a TCP segment for a VIP, or a fragment of one."""
    return ip[0] >> 4 == 4 and ip[9] == 6 and _is_to_vip(d, ip)


cdef int _tunnelled(be_nfqueue *d, packet *p) noexcept nogil:
    """What is wrapped up, for us by a front end, or so it says; see be_tunnel.bpf.h. V_CHANGED:
    what is in it may go on by itself."""
    cdef uint32_t outer_src, size = (p.data[0] & 15) * 4u
    cdef uint16_t fragment = get16(p.data + 6) & 0x3fff
    cdef uint8_t *inner = p.data + size
    cdef tcp_view v
    cdef icmp_view error
    cdef bint whole
    if fragment & 0x1fff:
        return V_ACCEPT    # the first one is judged
    if p.len < size + IP_SIZE:
        return V_DROP if fragment else V_ACCEPT
    memcpy(&outer_src, p.data + 12, 4)
    if not _is_for_vip(d, inner):
        if fragment or size != IP_SIZE or icmp_parse(inner, p.len - size, &error) < 0 or \
                not _is_to_vip(d, inner):
            return V_ACCEPT
        return V_CHANGED if _unwrap(d, p.data, outer_src) else V_DROP
    whole = size == IP_SIZE and tcp_parse(inner, p.len - size, &v) == 0
    if not fragment:
        return V_CHANGED if whole and _unwrap(d, p.data, outer_src) else V_DROP
    if not _is_frontend(d, outer_src) or not whole:
        return V_DROP
    p.mark = TCPHA_MARK_FRAGMENT
    return V_NUMBERS


cdef int _inward(be_nfqueue *d, packet *p) noexcept nogil:
    """From the network: tunnelled by a front end, or to a VIP."""
    cdef uint8_t *inner = p.data
    cdef uint32_t length = p.len
    cdef uint16_t word
    cdef int verdict
    cdef bint tunnelled = length >= IP_SIZE and inner[9] == 4  # IPIP
    cdef be_flow *f
    cdef tcp_view v
    cdef icmp_view error
    if tunnelled:
        verdict = _tunnelled(d, p)
        if verdict != V_CHANGED:
            return verdict
        inner += IP_SIZE
        length -= IP_SIZE
    if icmp_parse(inner, length, &error) == 0 and _is_to_vip(d, inner):
        if not _icmp_inward(d, &error):
            return V_DROP if tunnelled else V_ACCEPT
        if tunnelled and error.icmp - error.ip > IP_SIZE:
            return V_DROP  # as below, and rare: a router's errors have no IP options
        p.data = inner
        p.len = length
        return V_CHANGED
    if length < IP_SIZE or not _is_for_vip(d, inner):
        return V_ACCEPT    # none of ours
    if tcp_parse(inner, length, &v) < 0:
        add64(<uint64_t *>&d.n.guarded, 1)
        return V_DROP      # our stack would put fragments together, and front ends send none
    if tunnelled and v.tcp - v.ip > IP_SIZE:
        # The kernel has noted where the outer packet's payload begins. So the inner header must
        # have the same size: its options, which nobody reads here, go.
        inner = v.tcp - IP_SIZE
        length -= <uint32_t>(inner - v.ip)
        memmove(inner, v.ip, IP_SIZE)
        inner[0] = 0x45
        word = htons(<uint16_t>length)
        memcpy(inner + 2, &word, 2)
        memset(inner + 10, 0, 2)
        word = ip_checksum(inner, IP_SIZE)
        memcpy(inner + 10, &word, 2)
        tcp_parse(inner, length, &v)
    f = _flow_to(d, &v)
    if f == NULL:
        return V_DROP
    p.data = inner
    p.len = length
    # our stack checks it, whatever the device had checked: the kernel takes it for unchecked now
    translate(&v, &f.inward,
              SUM_FULL if p.skb_info & (SKB_GSO | SKB_CSUM_NOT_READY) else SUM_UPDATE)
    return V_CHANGED


cdef int local_inward(be_nfqueue *d, packet *p) noexcept nogil:
    """Rewrite a packet of a client for the local server. Returns its verdict."""
    cdef tcp_view v
    cdef be_flow *f
    if tcp_parse(p.data, p.len, &v) < 0:
        return V_DROP
    pthread_rwlock_rdlock(&d.lock)
    f = _flow_to(d, &v)
    if f != NULL:
        translate(&v, &f.inward,
                  SUM_FULL if p.skb_info & (SKB_GSO | SKB_CSUM_NOT_READY) else SUM_UPDATE)
    pthread_rwlock_unlock(&d.lock)
    return V_DROP if f == NULL else V_CHANGED


cdef int local_icmp(be_nfqueue *d, icmp_view *v) noexcept nogil:
    """Rewrite an ICMP error for the local server. Returns its verdict."""
    cdef bint ours
    pthread_rwlock_rdlock(&d.lock)
    ours = _icmp_inward(d, v)
    pthread_rwlock_unlock(&d.lock)
    return V_CHANGED if ours else V_ACCEPT


cdef bint local_inject(be_nfqueue *d, tcp_view *v) noexcept nogil:
    """Rewrite a packet that was kept, or forged, and send it to our own stack. False: it was not
    sent."""
    cdef be_flow *f
    pthread_rwlock_rdlock(&d.lock)
    f = _flow_to(d, v)
    if f != NULL:
        translate(v, &f.inward, SUM_LEAVE)
    pthread_rwlock_unlock(&d.lock)
    return f != NULL and _inject(d, v.ip, v.len) == 0


cdef bint _number(const be_flow *f, const tcp_view *v, packet *p) noexcept nogil:
    """Rewrite without the packet: the new sequence number (as mark) and TSval (as priority), as
    they stand in memory, for rules to store; zero stores nothing. False: more must change, or the
    packet's own mark or priority would be lost."""
    cdef uint32_t seq
    if p.mark or p.priority or f.outward.addr or f.outward.window_left != f.outward.window_right:
        return False
    seq = get32(v.tcp + 4) + f.outward.seq
    p.mark = htonl(seq)
    if v.ts != NULL and f.outward.tsval:
        p.priority = htonl(get32(v.ts) + f.outward.tsval)
        if p.priority == 0:
            return False
    return seq != 0


cdef int _outward(be_nfqueue *d, queue *q, packet *p) noexcept nogil:
    """From a local server."""
    cdef tcpha_flow local
    cdef be_flow *f
    cdef tcp_view v
    if tcp_parse_head(p.data, p.have, p.len, &v) < 0:
        return V_ACCEPT if d.shared else V_DROP
    _flow_between(v.ip + 16, v.tcp + 2, v.ip + 12, v.tcp, &local)
    f = <be_flow *>table_find(&d.flows, &local)
    if f == NULL or (f.state == B_DIRECT and not _comes_next(f, &v)):
        if _is_shared(d, &local):
            return V_ACCEPT
        add64(&d.unknown, 1)
        return V_DROP
    if f.state == B_DIRECT and not load64(&f.sent) and v.flags & TCP_RST:
        return V_DROP      # it answers the ACK of an adoption that was called off
    if f.state != B_LIVE and f.state != B_DIRECT:
        if v.flags & TCP_RST and f.state == B_SYN:
            f.state = B_REFUSED
            _tell(d)
        elif f.after_direct and not v.flags & (TCP_SYN | TCP_RST):
            return V_ACCEPT
        return V_DROP
    if not _is_of(f, &v):
        if f.after_direct:
            return V_ACCEPT
        add64(&d.unknown, 1)
        return V_DROP
    add64(&f.sent, 1)
    if q.whole:
        return V_NUMBERS if _number(f, &v, p) else V_WHOLE
    translate(&v, &f.outward, SUM_LEAVE if p.skb_info & SKB_GSO else
              SUM_FULL if p.skb_info & SKB_CSUM_NOT_READY else SUM_UPDATE)
    return V_CHANGED


cdef int _on_packet(void *self, queue *q, packet *p) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    if p.hook != HOOK_PREROUTING:
        return _outward(d, q, p)
    return V_WHOLE if q.whole else _inward(d, p)
