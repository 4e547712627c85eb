# SPDX-License-Identifier: GPL-2.0-or-later
# The front end's flows: diverted, handed over, forgotten. What comes meanwhile is kept.

# A packet that is kept while its flow is handed over.
cdef struct kept:
    kept *next
    uint32_t len
    uint8_t data[1]


# The kept packets of one connection slot.
cdef struct holder:
    bint active
    uint32_t count         # that have come since the flow was diverted
    tcpha_flow flow
    kept *first
    kept *last


cdef struct fe_ebpf:
    int tap
    tcpha_state *state
    int flows              # map
    int backends           # map
    bint tunnel
    tcpha_op *ops
    pthread_mutex_t lock   # the TAP's read side and the holders
    uint8_t *room          # for a frame, of SCRATCH bytes
    uint32_t nholders
    holder *holders
    ledger book
    int fast_fd[FAST_QUEUES]
    tcpha_offer *offers
    int verdicts           # maps
    int shaken
    pthread_rwlock_t silent_lock  # a silent client gets a socket, and no request of it is decided


cdef int _find(void *self, const tcpha_flow *flow, tcpha_entry *entry) noexcept nogil:
    return bpf_map_lookup_elem((<fe_ebpf *>self).flows, flow, entry)


cdef int _put(void *self, const tcpha_flow *flow, const tcpha_entry *entry, int how) noexcept nogil:
    cdef tcpha_entry e = entry[0]
    e.tag = tcpha_tag(flow)
    return bpf_map_update_elem((<fe_ebpf *>self).flows, flow, &e,
                               BPF_NOEXIST if how == PUT_NEW else BPF_ANY)


cdef int _remove(void *self, const tcpha_flow *flow) noexcept nogil:
    return bpf_map_delete_elem((<fe_ebpf *>self).flows, flow)


cdef int _change(fe_ebpf *d, uint32_t worker, const tcpha_flow *flow, uint64_t id, uint32_t backend,
                 bint keep, uint32_t what) noexcept nogil:
    d.ops[worker].id = id
    d.ops[worker].backend = backend
    d.ops[worker].keep = keep
    return _operate(d.tap, d.ops, worker, flow, what) == 0 and d.ops[worker].result == TCPHA_R_OK


cdef int _end(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, uint32_t backend,
              bint keep) noexcept nogil:
    return _change(<fe_ebpf *>self, worker, flow, id, backend, keep, TCPHA_OP_END)


cdef int _drop(void *self, uint32_t worker, const tcpha_flow *flow,
               const tcpha_entry *found) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    op.phase = found.phase
    return _change(d, worker, flow, found.id, found.backend, False, TCPHA_OP_DROP)


cdef int _divert(void *self, uint32_t worker, const tcpha_flow *flow, tcpha_entry *entry,
                 tcpha_entry *old) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef holder *h = &d.holders[entry.slot]
    cdef int rc
    pthread_mutex_lock(&d.lock)
    h.active = True
    h.count = entry.held = 0
    h.flow = flow[0]
    pthread_mutex_unlock(&d.lock)
    rc = ledger_divert(&d.book, worker, flow, entry, old)
    if rc < 0:
        pthread_mutex_lock(&d.lock)
        h.active = False
        pthread_mutex_unlock(&d.lock)
    return rc


cdef int _freeze(void *self, uint32_t worker, int fd, snapshot *s) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    cdef int one = 1
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &one, sizeof(one)) < 0:
        # EPERM stands for both: no CAP_NET_ADMIN, and a socket that is no longer open
        if _query(d.tap, d.ops, worker, &s.flow) == 0 and op.result != TCPHA_R_LIVE:
            return DP_GONE
        return -1
    if _query(d.tap, d.ops, worker, &s.flow) < 0:
        return -1
    if op.result != TCPHA_R_LIVE or \
            (op.state != TCP_ESTABLISHED and op.state != TCP_CLOSE_WAIT):
        return DP_GONE
    s.snd_nxt = op.snd_nxt
    s.rcv_nxt = op.rcv_nxt
    s.snd_wnd = op.snd_wnd
    s.rcv_wnd = op.rcv_wnd
    s.tsval = op.tsval
    s.ts_recent = op.ts_recent
    s.srtt_us = op.srtt_us
    s.mss = saved_syn_mss(fd, op.mss, NULL) if d.tunnel else op.mss
    s.snd_wscale = op.snd_wscale
    s.rcv_wscale = op.rcv_wscale
    s.flags = ((SNAP_TIMESTAMP if op.tstamp_ok else 0) | (SNAP_SACK if op.sack_ok else 0) |
               (SNAP_WSCALE if op.wscale_ok else 0) | (SNAP_ECN if op.ecn_ok else 0) |
               (SNAP_USEC_TS if op.usec_ts_ok else 0) |
               (SNAP_FIN if op.state == TCP_CLOSE_WAIT else 0))
    s.len = op.rcv_nxt - op.copied_seq - (1 if op.state == TCP_CLOSE_WAIT else 0)
    return 0


cdef bint _is_of(const holder *h, uint8_t *ip, uint32_t length) noexcept nogil:
    """Whether a packet is the flow's that a slot holds now. One that was on its way when the slot
    changed hands may be of any other connection, of the same client, too."""
    cdef uint32_t ihl = (ip[0] & 15) * 4u
    # what is behind the ports may be anything: who judged it by more could send it round for ever
    return h.active and length >= ihl + 4 and memcmp(&h.flow.caddr[12], ip + 12, 4) == 0 and \
        memcmp(&h.flow.cport, ip + ihl, 2) == 0


cdef bint _drain(fe_ebpf *d) noexcept nogil:
    """Take packets off the TAP. d.lock is held. True: there may be more."""
    cdef uint8_t *scratch = d.room
    cdef ssize_t n
    cdef uint32_t slot
    cdef kept *p
    cdef holder *h
    cdef int _i
    for _i in range(TURN):
        n = read(d.tap, scratch, SCRATCH)
        if n < 0:
            if errno == EINTR:
                continue
            return False
        if n < VNET_SIZE + ETH_SIZE + 40 or frame_of(scratch).mark != htons(TCPHA_MAC_MARK):
            continue  # something the kernel itself sent out of the device
        slot = frame_of(scratch).slot
        h = &d.holders[slot] if slot < d.nholders else NULL
        if h == NULL or not _is_of(h, scratch + VNET_SIZE + ETH_SIZE,
                                   <uint32_t>n - VNET_SIZE - ETH_SIZE):
            tap_send(d.tap, scratch, <uint32_t>n, NULL, 0)  # decided meanwhile: look again
            continue
        h.count += 1
        p = <kept *>malloc(sizeof(kept) + <size_t>n)
        if p == NULL:
            continue  # the client sends it again
        p.next = NULL
        p.len = <uint32_t>n
        memcpy(p.data, scratch, <size_t>n)
        frame_of(p.data).mark = htons(TCPHA_MAC_KEPT)
        if h.last != NULL:
            h.last.next = p
        else:
            h.first = p
        h.last = p
    return True


cdef void _release(fe_ebpf *d, holder *h) noexcept nogil:
    """Send a slot's kept packets, whose entry says by now where to. d.lock is held."""
    cdef kept *p = h.first
    cdef kept *following
    h.first = h.last = NULL
    while p != NULL:
        following = p.next
        tap_send(d.tap, p.data, p.len, NULL, 0)
        free(p)
        p = following


cdef uint32_t _most(fe_ebpf *d, uint32_t backend, const snapshot *now) noexcept nogil:
    """Bytes of payload that a forged segment may have, beside timestamps: what the client's MSS
    allows, and the way to the back end has room for now."""
    cdef uint32_t mss = now.mss if now.mss > 100 else MSS_MIN
    cdef tcpha_backend b
    if bpf_map_lookup_elem(d.backends, &backend, &b) == 0 and b.mtu > MSS_MIN:
        mss = min(mss, b.mtu - HEADERS - <uint32_t>(IP_SIZE if b.mode == TCPHA_TUNNEL else 0))
    return mss - TIMESTAMPS


cdef void _send_late(fe_ebpf *d, uint32_t most, const snapshot *now, const uint8_t *extra,
                     uint32_t extra_len, bint extra_fin) noexcept nogil:
    cdef uint8_t head[FRAME_HEAD]
    cdef uint32_t at = 0, chunk, length
    cdef segment s
    segment_from(&s, now)
    while at < extra_len or extra_fin:
        chunk = min(extra_len - at, most)
        s.seq = now.rcv_nxt - (1 if now.flags & SNAP_FIN else 0) - extra_len + at
        s.len = chunk
        s.flags = TCP_ACK | TCP_PSH
        if extra_fin and at + chunk == extra_len:
            s.flags |= TCP_FIN
            extra_fin = False
        length = forge(head, &s)
        frame_of(head).mark = htons(TCPHA_MAC_KEPT)
        tap_send(d.tap, head, length, extra + at, chunk)
        at += chunk


cdef int _stop_holding(fe_ebpf *d, uint32_t worker, const tcpha_flow *flow, holder *h,
                       uint32_t what) noexcept nogil:
    """Packets must not overtake each other: first what was kept goes where the entry says, then
    'what' ends the keeping, if no more has come meanwhile. d.lock is held. 0, or -1."""
    cdef tcpha_op *op = &d.ops[worker]
    cdef uint64_t begin = now_ns()
    cdef int rc
    while True:
        _drain(d)
        _release(d, h)
        # one that was counted and does not come was lost on its way
        op.held = h.count if now_ns() - begin < ARRIVAL_NS else TCPHA_FLOWING
        rc = _operate(d.tap, d.ops, worker, flow, what)
        if rc < 0 or op.result != TCPHA_R_BACKLOG:
            return rc


cdef int _forward(void *self, uint32_t worker, tcpha_entry *entry, const snapshot *now,
                  const uint8_t *extra, uint32_t extra_len, bint extra_fin) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    cdef holder *h = &d.holders[entry.slot]
    cdef int rc = -1
    op.id = entry.id
    op.backend = entry.backend
    op.rule = entry.rule
    op.flags = entry.flags
    op.end_seq = entry.end_seq
    pthread_mutex_lock(&d.lock)
    if _operate(d.tap, d.ops, worker, &now.flow, TCPHA_OP_HAND_OVER) == 0 and \
            op.result == TCPHA_R_OK:
        _send_late(d, _most(d, entry.backend, now), now, extra, extra_len, extra_fin)
        rc = _stop_holding(d, worker, &now.flow, h, TCPHA_OP_LET_FLOW)
        h.active = rc < 0
    pthread_mutex_unlock(&d.lock)
    return rc


cdef bint _answered(void *self, uint32_t slot, uint32_t snd_nxt) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef kept *p
    cdef tcp_view v
    cdef bint found = False
    pthread_mutex_lock(&d.lock)
    p = d.holders[slot].first
    while p != NULL and not found:
        found = tcp_parse_head(p.data + VNET_SIZE + ETH_SIZE, p.len - VNET_SIZE - ETH_SIZE,
                               p.len - VNET_SIZE - ETH_SIZE, &v) == 0 and \
            acks_beyond(&v, snd_nxt)
        p = p.next
    pthread_mutex_unlock(&d.lock)
    return found


cdef int _give_back(void *self, const tcpha_flow *flow, uint32_t slot) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef int rc
    pthread_mutex_lock(&d.lock)
    d.ops[TCPHA_LOCKED_OP].slot = slot
    rc = _stop_holding(d, TCPHA_LOCKED_OP, flow, &d.holders[slot], TCPHA_OP_GIVE_BACK)
    d.holders[slot].active = False
    pthread_mutex_unlock(&d.lock)
    if rc < 0:
        ledger_remove(&d.book, flow)
    return 0


cdef int _forget(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, uint32_t backend,
                 bint linger, tcpha_entry *entry) noexcept nogil:
    return ledger_forget(&(<fe_ebpf *>self).book, worker, flow, id, backend, linger, entry)


cdef int _restore(void *self, uint32_t worker, const tcpha_flow *flow, const tcpha_entry *entry,
                  uint64_t asked, tcpha_entry *old) noexcept nogil:
    return ledger_restore(&(<fe_ebpf *>self).book, worker, flow, entry, asked, old)


cdef void _drop_unknown(void *self, bint drop) noexcept nogil:
    (<fe_ebpf *>self).state.drop_unknown = drop


cdef void _sweep(void *self, uint32_t worker, uint64_t now) noexcept nogil:
    ledger_sweep(&(<fe_ebpf *>self).book, worker, now)


cdef bint _on_packets(void *self) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef bint more
    pthread_mutex_lock(&d.lock)
    more = _drain(d)
    pthread_mutex_unlock(&d.lock)
    return more
