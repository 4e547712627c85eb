# SPDX-License-Identifier: GPL-2.0-or-later
# Adoption: a forged handshake with the server, and what the client has sent already.

cdef int _inject(be_nfqueue *d, uint8_t *ip, uint32_t length) noexcept nogil:
    """Send an IP packet to our own stack, its TCP checksum completed. 0 or an errno."""
    cdef sockaddr_in to
    cdef tcp_view v
    if tcp_parse(ip, length, &v) < 0:
        return -1
    checksum_full(&v)
    memset(&to, 0, sizeof(to))
    to.sin_family = AF_INET
    memcpy(&to.sin_addr, ip + 16, 4)
    while sendto(d.raw_fd, ip, length, 0, <sockaddr *>&to, sizeof(to)) < 0:
        if errno != EINTR:
            return errno
    return 0


cdef int _send_segment(be_nfqueue *d, segment *g, const uint8_t *data) noexcept nogil:
    cdef uint8_t buf[FRAME_HEAD + CHUNK]
    cdef uint32_t n = forge(buf, g)
    if g.len:
        memcpy(buf + n, data, g.len)
    return _inject(d, buf + VNET_SIZE + ETH_SIZE, n - VNET_SIZE - ETH_SIZE + g.len)


cdef int _send_syn(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """The client's SYN once more; its sequence number lies just before the request."""
    cdef segment g
    syn_from(&g, s)
    g.flow = local
    g.seq = _start(s) - 1
    return _send_segment(d, &g, NULL)


cdef int _await_answer(be_nfqueue *d, const tcpha_flow *local, const snapshot *s,
                       be_flow *copy) noexcept nogil:
    """Send the SYN and wait for the local server's SYN-ACK or RST. 0 or a refusal."""
    cdef uint64_t begin = now_ns(), asked = 0, now
    cdef uint32_t before
    cdef int rc
    cdef be_flow *f
    cdef diag_answer a
    while True:
        before = load32(&d.answers)
        pthread_rwlock_rdlock(&d.lock)
        f = _being_adopted(d, local, s)
        if f != NULL:
            copy[0] = f[0]
        pthread_rwlock_unlock(&d.lock)
        if f == NULL:
            return REFUSE_UNSUPPORTED
        if copy.state != B_SYN:
            return 0
        if not asked:      # not before it is known that the client has not been faster
            if _send_syn(d, local, s) != 0:
                return REFUSE_ERROR
            asked = begin
        pthread_mutex_lock(&d.wait_lock)
        if d.answers == before:
            cond_wait_ms(&d.answered, &d.wait_lock, 5)
        pthread_mutex_unlock(&d.wait_lock)
        now = now_ns()
        if now - begin > HANDSHAKE_NS:
            return REFUSE_BACKLOG
        if now - asked > SILENT_NS and _query(d, local, &a) == 0 and a.state == 0:
            # dropped, for want of room in the accept queue; or our stack is late: ask again
            rc = _refusal(d, local)
            if rc != 0:
                return rc
            if _send_syn(d, local, s) != 0:
                return REFUSE_ERROR
            asked = now


cdef void _plan(be_flow *f, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """How packets are rewritten from now on."""
    # The clock goes on one tick after the snapshot: the front end may have sent at that very tick.
    cdef uint32_t tick = s.tsval + (1000 if s.flags & SNAP_USEC_TS else 1)
    cdef bint scaled = f.wscale >= 0
    memset(&f.inward, 0, sizeof(translation))
    memset(&f.outward, 0, sizeof(translation))
    f.outward.seq = s.snd_nxt - (f.isn + 1)
    f.inward.ack = -f.outward.seq
    if s.flags & SNAP_TIMESTAMP:
        f.outward.tsval = tick - f.tsval
        f.inward.tsecr = -f.outward.tsval
    f.outward.window_left = f.wscale if scaled else 0
    f.outward.window_right = s.rcv_wscale if s.flags & SNAP_WSCALE else 0
    if s.flags & SNAP_WSCALE and not scaled:
        f.inward.window_left = s.snd_wscale
    if not _same(local, &s.flow):
        f.outward.source = True
        memcpy(&f.outward.addr, s.flow.vaddr + 12, 4)
        f.outward.port = s.flow.vport
        memcpy(&f.inward.addr, local.vaddr + 12, 4)
        f.inward.port = local.vport


cdef int _settle(be_nfqueue *d, const tcpha_flow *local, const snapshot *s,
                 diag_answer *a) noexcept nogil:
    """After the ACK: wait until there is a socket. 0, or a refusal: the accept queue is full, or
    the 4-tuple is another connection's by now."""
    cdef uint64_t begin = now_ns()
    cdef be_flow *f
    cdef uint64_t sent
    while True:
        if _query(d, local, a) < 0:
            return REFUSE_ERROR
        pthread_rwlock_rdlock(&d.lock)
        f = _being_adopted(d, local, s)
        sent = load64(&f.sent) if f != NULL else 0
        pthread_rwlock_unlock(&d.lock)
        if f == NULL:
            return REFUSE_UNSUPPORTED
        if a.state != 0 and a.state != TCP_NEW_SYN_RECV and a.state != TCP_SYN_RECV:
            return 0
        if a.state == 0 and sent:
            return 0       # it has answered, and is over already
        if now_ns() - begin > SETTLE_NS:
            return REFUSE_BACKLOG
        pthread_mutex_lock(&d.wait_lock)
        cond_wait_ms(&d.answered, &d.wait_lock, 1)
        pthread_mutex_unlock(&d.wait_lock)


cdef int _adopt(void *self, uint32_t worker, const snapshot *s,
                const uint8_t *data) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef be_flow copy
    cdef be_flow *f
    cdef diag_answer a
    cdef segment g
    cdef uint64_t begin
    cdef int rc
    if not is_vip(d.places, s.flow.vaddr):
        return REFUSE_LISTENER
    _local(d, &s.flow, &local)
    rc = _room(d, &local, s)
    if rc != 0:
        return rc
    rc = _await_answer(d, &local, s, &copy)
    if rc == 0 and copy.state == B_REFUSED:
        rc = REFUSE_LISTENER
    if rc == 0 and ((s.flags & SNAP_TIMESTAMP and not copy.ts_ok) or
                    (s.flags & SNAP_ECN and not copy.ecn_ok)):
        rc = REFUSE_UNSUPPORTED
    if rc != 0:
        _drop_flow(d, &local, s)
        return rc
    pthread_rwlock_wrlock(&d.lock)
    f = _being_adopted(d, &local, s)
    if f != NULL:
        _plan(f, &local, s)
        f.volume = 1
        f.state = B_LIVE   # before the request: it may be answered at once
    pthread_rwlock_unlock(&d.lock)
    if f == NULL:
        return REFUSE_UNSUPPORTED
    _segment(&g, s, &local, &copy)
    g.seq = _start(s)
    g.flags = TCP_ACK | TCP_PSH
    g.len = min(s.len, load32(&d.chunk))
    # Nothing after SETTLE_NS: the accept queue is full; or it was, or our stack is late, and then a
    # client would send again.
    begin = now_ns()
    while True:
        rc = REFUSE_ERROR if _send_segment(d, &g, data) != 0 else _settle(d, &local, s, &a)
        if rc != REFUSE_BACKLOG or now_ns() - begin > HANDSHAKE_NS:
            break
        rc = _refusal(d, &local)
        if rc != 0:
            break
    if rc != 0:
        _drop_flow(d, &local, s)
        return rc
    return _feed_from(d, s, data, &g, &a)


cdef void _segment(segment *g, const snapshot *s, const tcpha_flow *local,
                   const be_flow *f) noexcept nogil:
    """A segment of the client's as the local socket must see it."""
    segment_from(g, s)
    g.flow = local
    g.ack = f.isn + 1
    g.tsecr = f.tsval
    if f.wscale < 0:
        g.window = <uint16_t>min(s.snd_wnd, <uint32_t>0xffff)


cdef int _feed_from(be_nfqueue *d, const snapshot *s, const uint8_t *data, segment *g,
                    diag_answer *a) noexcept nogil:
    """Inject what the socket has not received. The front end has acknowledged these bytes: the
    client will never send them again."""
    cdef uint32_t fin = 1 if s.flags & SNAP_FIN else 0
    cdef uint32_t start = _start(s), have
    while a.full:
        have = <uint32_t>a.received
        if have >= s.len + fin:
            return 0
        g.seq = start + have
        g.len = min(s.len - have, load32(&d.chunk))
        g.flags = TCP_ACK | TCP_PSH
        if have + g.len == s.len and fin:
            g.flags |= TCP_FIN
        if _send_segment(d, g, data + have) != 0 or _query(d, g.flow, a) < 0 or \
                (a.full and <uint32_t>a.received == have):
            return DP_MORE
    return 0


cdef int _feed(void *self, uint32_t worker, const snapshot *s, const uint8_t *data) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef be_flow copy
    cdef be_flow *f
    cdef diag_answer a
    cdef segment g
    _local(d, &s.flow, &local)
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    if f != NULL:
        copy = f[0]
    pthread_rwlock_unlock(&d.lock)
    if f == NULL:
        return 0
    if _query(d, &local, &a) < 0:
        return DP_MORE
    _segment(&g, s, &local, &copy)
    return _feed_from(d, s, data, &g, &a)
