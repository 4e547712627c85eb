# SPDX-License-Identifier: GPL-2.0-or-later
# The back end's half: a snapshot, or a segment with a cookie, becomes a socket.

cdef struct be_ebpf:
    int tap
    tcpha_gate *gate
    int forged             # the program that runs where a listener is bound to a device
    tcpha_op *ops
    const places *places
    uint64_t killed        # older sockets on the same 4-tuple
    int adoptions          # map
    diag *sockets          # of the Local Node, where the front end's socket has the same 4-tuple
    uint64_t *consumed     # the events' ring buffer: where we are, and where the program is
    uint64_t *produced
    uint8_t *ring


cdef inline uint32_t _device_of(be_ebpf *d, const tcpha_flow *flow) noexcept nogil:
    """That the listener of a flow is bound to; 0: to none."""
    return load32(&listener_of(d.places, flow).device)


cdef int _look(be_ebpf *d, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    """Look a flow's socket up; at its listener's device, if that is bound to one: what is made on
    the TAP device does not find it. The answer is in ops[worker]."""
    cdef uint8_t frame[ETH_SIZE + 46]
    cdef uint16_t kind = htons(TCPHA_ETH_OP)
    cdef uint32_t device = _device_of(d, flow)
    cdef tcpha_op *op = &d.ops[worker]
    cdef bpf_test_run_opts run
    cdef __sk_buff skb
    if device == 0:
        return _query(d.tap, d.ops, worker, flow)
    memset(frame, 0, sizeof(frame))
    memcpy(frame + 12, &kind, 2)
    memcpy(frame + ETH_SIZE, &worker, 4)
    memset(&skb, 0, sizeof(skb))
    skb.ifindex = device
    skb.mark = TCPHA_MARK_FORGED
    memset(&run, 0, sizeof(run))
    run.sz = sizeof(run)
    run.data_in = frame
    run.data_size_in = sizeof(frame)
    run.ctx_in = &skb
    run.ctx_size_in = sizeof(skb)
    op.flow = flow[0]
    op.kind = TCPHA_OP_QUERY
    op.result = TCPHA_R_NONE
    return 0 if bpf_prog_test_run_opts(d.forged, &run) == 0 and op.result != TCPHA_R_NONE else -1


cdef bint _await(be_ebpf *d, tcpha_op *op) noexcept nogil:
    """Whether the program has seen the packet that op is about. A packet that passes on to the
    listener's device may do so when write() has returned."""
    cdef uint64_t begin = now_ns()
    while not load32(&op.done):
        if (_device_of(d, &op.flow) == 0 or now_ns() - begin > DETOUR_NS) and \
                xchg32(&op.kind, 0) == TCPHA_OP_ADOPT:
            return False   # nobody has it, and nobody will: it would be adopted behind our back
        usleep(100)
    return True


cdef int _verify(be_ebpf *d, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    """Whether what the program has adopted became a socket, in ops[worker]: the kernel is silent if
    the accept queue was full. Behind a detour, it may take a moment. 0 or a refusal."""
    cdef uint64_t begin = now_ns()
    while True:
        if _look(d, worker, flow) < 0:
            return REFUSE_ERROR
        if d.ops[worker].result != TCPHA_R_NO_SOCKET:
            return 0
        if _device_of(d, flow) == 0 or now_ns() - begin > DETOUR_NS:
            return REFUSE_BACKLOG
        usleep(100)


cdef int _send_plain(be_ebpf *d, const segment *g, const uint8_t *data) noexcept nogil:
    """To the socket that is there. 0, or an errno."""
    cdef uint8_t head[FRAME_HEAD]
    cdef uint32_t length = forge(head, g)
    frame_of(head).mark = htons(TCPHA_MAC_PLAIN)
    return tap_send(d.tap, head, length, data, g.len)


cdef int _attach(be_ebpf *d, uint32_t worker, const snapshot *s, const uint8_t *data, segment *g,
                 uint32_t tick) noexcept nogil:
    """Make the first segment a socket. 0 or a refusal; the socket is looked up in ops[worker]."""
    cdef tcpha_op *op = &d.ops[worker]
    cdef uint8_t head[FRAME_HEAD]
    cdef uint32_t length
    cdef int _tries
    for _tries in range(4):
        op.kind = TCPHA_OP_ADOPT
        op.flow = s.flow
        op.mss = s.mss
        op.snd_wscale = s.snd_wscale
        op.rcv_wscale = s.rcv_wscale
        op.wscale_ok = (s.flags & SNAP_WSCALE) != 0
        op.sack_ok = (s.flags & SNAP_SACK) != 0
        op.tstamp_ok = (s.flags & SNAP_TIMESTAMP) != 0
        op.usec_ts_ok = (s.flags & SNAP_USEC_TS) != 0
        op.ecn_ok = (s.flags & SNAP_ECN) != 0
        op.tsval = tick
        op.ts_recent = s.ts_recent
        op.result = TCPHA_R_NONE
        op.done = 0
        op.error = 0
        g.seq = s.rcv_nxt - (1 if s.flags & SNAP_FIN else 0) - s.len
        g.flags = TCP_ACK | TCP_PSH
        g.len = min(s.len, <uint32_t>CHUNK)
        length = forge(head, g)
        frame_of(head).mark = htons(TCPHA_MAC_ADOPT)
        frame_of(head).slot = worker
        if tap_send(d.tap, head, length, data, g.len) != 0 or not _await(d, op):
            return REFUSE_ERROR
        if op.result != TCPHA_R_TIME_WAIT and op.result != TCPHA_R_LIVE:
            break
        if d.sockets == NULL and op.result == TCPHA_R_LIVE and op.rcv_nxt - g.seq < NEAR and \
                op.snd_nxt - s.snd_nxt < NEAR:
            return 0       # this very connection: a run of ours that was killed has adopted it
        # A socket of an earlier connection owns the 4-tuple; the client has given that one up, or
        # the front end could not have accepted this one. Or it is the front end's, if we are the
        # Local Node. A RST with exactly the sequence number that it expects ends it without a
        # packet leaving the host (RFC 5961 section 3.2).
        add64(&d.killed, 1)
        g.seq = op.rcv_nxt
        g.flags = TCP_RST
        g.len = 0
        g.timestamps = False
        _send_plain(d, g, NULL)
        g.timestamps = (s.flags & SNAP_TIMESTAMP) != 0
    if op.result == TCPHA_R_NO_LISTENER:
        return REFUSE_LISTENER
    if op.result == TCPHA_R_ASSIGN:
        return REFUSE_UNSUPPORTED
    if op.result != TCPHA_R_OK:
        return REFUSE_ERROR
    return _verify(d, worker, &s.flow)


cdef int _adopt(void *self, uint32_t worker, const snapshot *s,
                const uint8_t *data) noexcept nogil:
    """Forge the client's ACK and request. The first segment becomes the socket, the rest is
    received by it like any other."""
    cdef be_ebpf *d = <be_ebpf *>self
    cdef const tcpha_listener *to = listener_of(d.places, &s.flow)
    cdef uint32_t tick, rtt
    cdef segment g
    cdef int rc
    cdef uint64_t begin = now_ns()
    if s.mss < MSS_MIN:
        return REFUSE_UNSUPPORTED
    if d.sockets != NULL:  # while the front end could still go on with its socket
        rc = diag_refusal(d.sockets, to.addr, to.port, load32(&to.device))
        if rc != 0:
            return rc
    segment_from(&g, s)
    # Our clock goes on one tick after the snapshot: the front end may have sent at that very tick.
    # The echo lies one RTT before, since the kernel takes its first RTT sample from the difference.
    tick = s.tsval + (1000 if s.flags & SNAP_USEC_TS else 1)
    rtt = s.srtt_us if s.flags & SNAP_USEC_TS else s.srtt_us // 1000
    g.tsecr = tick - max(rtt, <uint32_t>1)
    rc = _attach(d, worker, s, data, &g, tick)
    # somebody else's connection took the last place in the accept queue since we looked
    while d.sockets != NULL and (rc == REFUSE_BACKLOG or rc == REFUSE_LISTENER) and \
            now_ns() - begin < PATIENCE_NS:
        usleep(1000)
        rc = _attach(d, worker, s, data, &g, tick)
    return rc if rc != 0 else _feed_from(d, worker, s, data, &g)


cdef int _feed_from(be_ebpf *d, uint32_t worker, const snapshot *s, const uint8_t *data,
                    segment *g) noexcept nogil:
    """Inject what the socket has not received, by the look-up in ops[worker]. The front end has
    acknowledged these bytes: the client will never send them again."""
    cdef tcpha_op *op = &d.ops[worker]
    cdef uint32_t fin = 1 if s.flags & SNAP_FIN else 0
    cdef uint32_t start = s.rcv_nxt - fin - s.len, have
    while op.result == TCPHA_R_LIVE:
        have = op.rcv_nxt - start
        if have >= s.len + fin:
            return 0
        g.seq = op.rcv_nxt
        g.len = min(s.len - have, <uint32_t>CHUNK)
        g.flags = TCP_ACK | TCP_PSH
        if have + g.len == s.len and fin:
            g.flags |= TCP_FIN
        if _send_plain(d, g, data + have) != 0 or \
                _look(d, worker, &s.flow) < 0 or op.rcv_nxt - start == have:
            return DP_MORE
    return 0


cdef int _feed(void *self, uint32_t worker, const snapshot *s, const uint8_t *data) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    cdef segment g
    if _look(d, worker, &s.flow) < 0:
        return DP_MORE
    segment_from(&g, s)
    return _feed_from(d, worker, s, data, &g)


cdef int _alive(void *self, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    if _look(d, worker, flow) < 0:
        return DP_ALIVE
    if op.result == TCPHA_R_LIVE:
        return DP_ALIVE if op.state == TCP_ESTABLISHED or op.state == TCP_CLOSE_WAIT else DP_CLOSING
    return DP_TIME_WAIT if op.result == TCPHA_R_TIME_WAIT else 0


cdef bint _admit(void *self, uint8_t *scratch, bint refuse) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    cdef ssize_t n
    cdef int _i
    for _i in range(ADMIT):
        n = read(d.tap, scratch, SCRATCH)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return False
        if n >= VNET_SIZE + ETH_SIZE and frame_of(scratch).mark == htons(TCPHA_MAC_ROOM):
            frame_of(scratch).full = refuse
            tap_send(d.tap, scratch, <uint32_t>n, NULL, 0)
    return True


cdef void _give_up(void *self, const tcpha_flow *flow, uint32_t isn) noexcept nogil:
    cdef tcpha_adoption a
    a.at_ns = now_ns()
    a.isn = isn
    a.state = TCPHA_GIVEN_UP
    bpf_map_update_elem((<be_ebpf *>self).adoptions, flow, &a, BPF_ANY)


cdef bint _position(void *self, uint32_t worker, const tcpha_flow *flow,
                    uint32_t *rcv_nxt) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    if _look(d, worker, flow) < 0 or d.ops[worker].result != TCPHA_R_LIVE:
        return False
    rcv_nxt[0] = d.ops[worker].rcv_nxt
    return True


cdef bint _next_event(void *self, tcpha_event *event) noexcept nogil:
    """Take one record off the ring buffer (kernel: kernel/bpf/ringbuf.c)."""
    cdef be_ebpf *d = <be_ebpf *>self
    cdef uint64_t at = d.consumed[0]
    cdef uint32_t head
    while at < load64(d.produced):
        head = load32(<uint32_t *>(d.ring + (at & (RING - 1))))
        if head & RING_BUSY:
            return False
        if not head & RING_DISCARD:
            memcpy(event, d.ring + (at & (RING - 1)) + RING_HEAD, sizeof(tcpha_event))
        at += ((head & ~(RING_BUSY | RING_DISCARD)) + RING_HEAD + 7) & ~<uint64_t>7
        store64(d.consumed, at)
        if not head & RING_DISCARD:
            return True
    return False


cdef bint _outside(void *self, tcpha_flow *flow) noexcept nogil:
    return is_vip((<be_ebpf *>self).places, flow.vaddr)


cdef void _ended(void *self, const tcpha_flow *flow) noexcept nogil:
    pass


cdef void _nothing(void *self, uint64_t now) noexcept nogil:
    pass
