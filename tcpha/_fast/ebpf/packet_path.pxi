# SPDX-License-Identifier: GPL-2.0-or-later
# The packet path: requests that come to a worker, and go on.

cdef inline ssize_t _without_padding(const uint8_t *ip, ssize_t n) noexcept nogil:
    """The size of a packet in n bytes: a short Ethernet frame has some behind it. 0: it is cut off.
    A total length of 0 stands for what has no room in 16 bits (BIG TCP)."""
    cdef ssize_t total = get16(ip + 2) if n >= 20 else 0
    if total == 0:
        return n
    return total if total <= n else 0


cdef int _fast_next(void *self, uint32_t queue, uint8_t *frame, uint32_t *length,
                    tcp_view *v) noexcept nogil:
    """A request that was damaged on the way must not decide anything: it is as good as lost."""
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef uint8_t *ip
    cdef ssize_t n
    while True:
        n = read(d.fast_fd[queue], frame, SCRATCH)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return 0
        if n < VNET_SIZE + ETH_SIZE or frame_of(frame).mark != htons(TCPHA_MAC_FAST):
            continue  # something the kernel itself sent out of the device
        length[0] = <uint32_t>n
        ip = frame + VNET_SIZE + ETH_SIZE
        n = _without_padding(ip, n - VNET_SIZE - ETH_SIZE)
        if tcp_parse_head(ip, <uint32_t>n, <uint32_t>n, v) == 0 and \
                (frame_of(frame).kind != TCPHA_FAST_FIRST or frame[0] & CHECKED or is_sound(v)):
            return frame_of(frame).kind


cdef void _fast_socket(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                       const tcpha_flow *flow) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    _fast_pass(<fe_ebpf *>self, queue, worker, frame, length, TCPHA_FAST_SOCKET)
    if d.offers[worker].result == 1:  # the socket is there; until now, what followed came here
        ledger_drop_pending(&d.book, worker, flow, 0)


cdef void _write_fast(fe_ebpf *d, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                      int kind) noexcept nogil:
    frame_of(frame).kind = <uint8_t>kind
    frame_of(frame).worker = <uint16_t>worker
    tap_send(d.fast_fd[queue], frame, length, NULL, 0)


cdef void _fast_pass(fe_ebpf *d, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                     int kind) noexcept nogil:
    pthread_rwlock_rdlock(&d.silent_lock)
    _write_fast(d, queue, worker, frame, length, kind)
    pthread_rwlock_unlock(&d.silent_lock)


cdef void _passed(fe_ebpf *d, uint32_t queue, uint32_t worker, uint8_t *frame,
                  uint32_t length) noexcept nogil:
    """A packet is on its way. Later ones of its flow may be, too, if it was the last one here."""
    memset(frame, 0, VNET_SIZE)
    _write_fast(d, queue, worker, frame, min(length, <uint32_t>HEAD_MOST), TCPHA_FAST_PASSED)


cdef void _fast_send(void *self, uint32_t queue, uint32_t worker, uint8_t *frame,
                     uint32_t length) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    _fast_pass(d, queue, worker, frame, length, TCPHA_FAST_SEND)
    if d.offers[worker].result == 1 and not d.offers[worker].alone:
        _passed(d, queue, worker, frame, length)


cdef void _fast_later(void *self, uint32_t queue, uint32_t worker, uint8_t *frame,
                      uint32_t length) noexcept nogil:
    _fast_pass(<fe_ebpf *>self, queue, worker, frame, length, TCPHA_FAST_LATER)
    _passed(<fe_ebpf *>self, queue, worker, frame, length)


cdef bint _wake(fe_ebpf *d, uint32_t queue, uint32_t worker, const tcpha_flow *flow,
                uint64_t before) noexcept nogil:
    """A socket of ours for a client that has said nothing since its handshake at a time 'before'
    or earlier: its ACK is forged once more. False: it has one, or has said something, or there is
    no room for it at present."""
    cdef uint8_t frame[FRAME_HEAD]
    cdef tcpha_shaken shaken
    cdef tcpha_shaken *r = &shaken
    cdef segment g
    cdef bint over = False
    pthread_rwlock_wrlock(&d.silent_lock)
    if bpf_map_lookup_elem(d.shaken, flow, r) == 0 and r.since_ns <= before:
        memset(&g, 0, sizeof(g))
        g.flow = flow
        g.seq = r.isn + 1
        g.ack = r.ours + 1
        g.flags = TCP_ACK
        g.window = r.window
        g.timestamps = r.timestamps
        g.tsval = r.tsval
        g.tsecr = r.tsecr
        d.offers[worker].rtt_ms = r.rtt_ms
        d.offers[worker].result = 0
        _write_fast(d, queue, worker, frame, forge(frame, &g), TCPHA_FAST_SOCKET)
        over = d.offers[worker].result != 0
        if over:  # only now that there is a socket: until then it tells who may be early
            bpf_map_delete_elem(d.shaken, flow)
    pthread_rwlock_unlock(&d.silent_lock)
    return over


cdef void _fast_early(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                      const tcpha_flow *flow) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    _wake(d, queue, worker, flow, now_ns())
    _fast_pass(<fe_ebpf *>self, queue, worker, frame, length, TCPHA_FAST_EARLY)


cdef int _take_back(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                    uint32_t backend, tcpha_entry *entry) noexcept nogil:
    """The entry stays, so that what the client still sends is not mistaken for an unknown flow's. A
    request has one id, and the word of who had it before may come when another one has it."""
    cdef fe_ebpf *d = <fe_ebpf *>self
    return id and _find(d, flow, entry) == 0 and tcpha_live(entry) == id and \
        _change(d, worker, flow, id, backend, True, TCPHA_OP_TAKE_BACK)


cdef void _keep_verdict(void *self, uint64_t key, const tcpha_verdict *verdict) noexcept nogil:
    cdef tcpha_verdict v = verdict[0]
    v.key = key
    bpf_map_update_elem((<fe_ebpf *>self).verdicts, &key, &v, BPF_ANY)


cdef uint32_t _drop_pending(void *self, uint32_t worker, const tcpha_flow *flow,
                            uint64_t idle) noexcept nogil:
    return ledger_drop_pending(&(<fe_ebpf *>self).book, worker, flow, idle)
