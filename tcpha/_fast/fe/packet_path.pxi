# SPDX-License-Identifier: GPL-2.0-or-later
# The packet path: a request in one segment, that has no socket.

cdef int _nothing_to_take_back(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                               uint32_t backend, tcpha_entry *entry) noexcept nogil:
    return 0


cdef void _take_path(frontend *f, packet_path *path) noexcept nogil:
    """Work with the datapath's packet path; NULL: it has none, and nothing ever comes by it."""
    f.dp.fast = path if path != NULL else &f.no_path
    f.loads = f.dp.fast.loads
    f.rule_hits = f.dp.fast.rule_hits


cdef bint _open_no_path(frontend *f) noexcept nogil:
    """False: out of memory."""
    f.no_path.keys = &f.no_keys
    f.no_path.cache = &f.no_cache
    f.no_path.take_back = _nothing_to_take_back
    f.no_path.loads = <tcpha_load *>calloc(TCPHA_MAX_BACKENDS, sizeof(tcpha_load))
    f.no_path.rule_hits = <uint64_t *>calloc(TCPHA_MAX_RULES, sizeof(uint64_t))
    f.no_path.service_hits = f.no_hits
    _take_path(f, NULL)
    return f.loads != NULL and f.rule_hits != NULL


cdef inline bint _has_key(frontend *f, uint32_t b) noexcept nogil:
    """Whether a back end takes the cookies that we make. Else its requests take the socket path."""
    return load64(&f.backends[b].keyed) >= load64(&f.key)


cdef bint _takes_fast(frontend *f, uint32_t b) noexcept nogil:
    """Whether a back end is there, too."""
    cdef tcpha_member *m = &f.backends[b].may
    return load32(&m.used) and load32(&m.links) and _has_key(f, b)


cdef bint _make_verdict(frontend *f, fe_worker *fw, tcpha_verdict *t) noexcept nogil:
    """Who may take a request by the rules that matched. False: no verdict can say so."""
    cdef int n = _candidates(f, fw.rules, fw.bits, fw.req.service, fw.req.tried, False,
                             TCPHA_CHOICES, t.choice, <uint64_t *>&t.until_ns)
    cdef int i
    t.count = max(n, 0)
    for i in range(n):
        if not _has_key(f, t.choice[i].backend):
            return False
    return n > 0


cdef bint _sighted(frontend *f, uint64_t key) noexcept nogil:
    """Whether it was there lately. What comes once is not worth a place in the kernel."""
    cdef uint64_t *p = &f.sighted[key % SIGHTED]
    if load64(p) == key:
        return True
    store64(p, key)
    return False


cdef void _keep_verdict(frontend *f, fe_worker *fw, const tcp_view *v,
                        uint64_t generation) noexcept nogil:
    """Have the program decide requests like this one, from the second on: see cache.bpf.h."""
    cdef tcpha_cache *c = f.dp.fast.cache
    cdef request *r = &fw.req
    cdef uint32_t line = r.head.target + r.head.target_len
    cdef uint32_t limit = load32(&f.headlimit)
    cdef uint64_t target, rest
    cdef tcpha_verdict t
    if not load32(&c.on) or r.head.pos != v.data_len or \
            v.data_len > TCPHA_HEAD_MAX or line >= TCPHA_LINE_MAX:
        return
    # the program stores the halves of heads, and any two may meet: each must fit half the limit
    if limit < TCPHA_HEAD_MAX and max(line, v.data_len - line) > limit // 2:
        return
    if not _untried(r):
        return
    target = tcpha_siphash(v.data, line, c.key[0], c.key[1]) ^ tcpha_service_word(&r.flow)
    rest = tcpha_siphash(v.data + line, v.data_len - line, c.key[0], ~c.key[1])
    memset(&t, 0, sizeof(t))
    t.generation = generation
    if _sighted(f, rest):
        f.dp.fast.keep_verdict(f.dp.self, rest, &t)
    if _sighted(f, target) and _make_verdict(f, fw, &t):
        f.dp.fast.keep_verdict(f.dp.self, target, &t)


cdef inline void _flow_of(const tcp_view *v, tcpha_flow *flow) noexcept nogil:
    """Of a client's packet."""
    memset(flow, 0, sizeof(tcpha_flow))
    flow.caddr[10] = flow.caddr[11] = flow.vaddr[10] = flow.vaddr[11] = 0xff
    memcpy(flow.caddr + 12, v.ip + 12, 4)
    memcpy(flow.vaddr + 12, v.ip + 16, 4)
    memcpy(&flow.cport, v.tcp, 2)
    memcpy(&flow.vport, v.tcp + 2, 2)


cdef void _recall(frontend *f, request *r, uint64_t id) noexcept nogil:
    """A request of the packet path, with what is remembered of it."""
    cdef returned *back = &f.back[id % RETURNED]
    memset(r, 0, sizeof(request))
    r.id = id
    if load32(&f.returns) == 0:
        return
    pthread_mutex_lock(&f.return_lock)
    if back.id == id:
        memcpy(r.tried, back.tried, sizeof(r.tried))
    pthread_mutex_unlock(&f.return_lock)


cdef void _remember(frontend *f, uint64_t id, uint32_t b) noexcept nogil:
    """Who has refused a request, for when the client sends it again."""
    cdef returned *back = &f.back[id % RETURNED]
    pthread_mutex_lock(&f.return_lock)
    if back.id != id:
        back.id = id
        memset(back.tried, 0, sizeof(back.tried))
    back.tried[b >> 6] |= <uint64_t>1 << (b & 63)
    pthread_mutex_unlock(&f.return_lock)
    add32(&f.returns, 1)


cdef bint _choose_fast(frontend *f, worker *w, request *r, const tcp_view *v) noexcept nogil:
    """Whether the request is plain and somebody takes it by a cookie of ours; chooses who."""
    # of urgent data, a server reads other bytes than there are in the segment: so does our socket
    return not v.tcp[13] & TCP_URG and \
        http_parse(&r.head, v.data, min(v.data_len, load32(&f.headlimit))) == HTTP_DONE and \
        _choose(f, w, r, v.data) and \
        _has_key(f, r.backend)  # never the Local Node


cdef void _dispatch(frontend *f, worker *w, uint32_t queue, uint8_t *frame, uint32_t length,
                    const tcp_view *v) noexcept nogil:
    """A request in one segment: to a back end. Whatever is not plain becomes a socket of ours, from
    this very segment, and is accepted."""
    cdef fe_worker *fw = _of_worker(w)
    cdef tcpha_offer *o = &f.dp.fast.offers[w.index]
    cdef request *r
    cdef uint64_t generation, took
    if fw == NULL:
        return                 # out of memory: the client sends it again
    # before we look at anything that it stands for
    generation = load64(&f.dp.fast.cache.generation)
    r = &fw.req
    _recall(f, r, fast_id(get32(v.tcp + 4) - 1, get32(v.tcp + 8) - 1))
    _flow_of(v, &r.flow)
    r.service = _service_of(f, &r.flow)
    say_number(f.c, 6, &r.flow, b"a first segment of %ld bytes", v.data_len)
    o.id = r.id
    o.old = o.result = 0
    if r.service == NO_SERVICE or not _choose_fast(f, w, r, v):
        say_flow(f.c, 5, &r.flow, b"to a socket")
        f.dp.fast.to_socket(f.dp.self, queue, w.index, frame, length, &r.flow)
        if o.old:
            _count_closed(f, o.old - 1)
        return
    add64(&f.next_id, 1)       # equal loads take turns
    _say_chosen(f, r)
    o.backend = r.backend
    o.rule = r.rule
    o.alone = r.head.pos == v.data_len and v.data[0] in (b'G', b'H')  # GET, HEAD
    o.target_len = r.head.target_len
    memcpy(o.target, v.data + r.head.target, min(r.head.target_len, TCPHA_TARGET_MAX))
    say_more(f.c, 3, &r.flow, b"offered to %s, %ld bytes", f.backends[r.backend].name,
             v.data_len)
    _offered(f, r, 0)
    f.dp.fast.send(f.dp.self, queue, w.index, frame, length)
    if o.old:
        _count_closed(f, o.old - 1)
    if o.result != 1:          # a copy of a segment, or its flow is over
        _call_off(f, r)
        return
    r.began_ns = o.start_ns
    took = now_ns() - o.start_ns
    _accepted(f, r.service, True)
    histogram_add(&f.stages[STAGE_FAST], took)
    _handed(f, r, o.target, took, v.data if f.access_fd >= 0 else NULL)
    _keep_verdict(f, fw, v, generation)


cdef void _on_requests(frontend *f, worker *w, uint32_t queue) noexcept nogil:
    """What a queue holds, or as much as one turn is for. One reader at a time keeps the segments of
    a flow in order; who comes second makes the first look again."""
    cdef tcp_view v
    cdef tcpha_flow flow
    cdef uint32_t length
    cdef int kind
    cdef int turns = 0
    if add32(&f.fast_readers[queue], 1) != 1:
        return
    while True:
        store32(&f.fast_readers[queue], 1)
        while turns < TURN:
            turns += 1
            kind = f.dp.fast.next(f.dp.self, queue, w.scratch, &length, &v)
            if kind == 0:
                break
            if kind == TCPHA_FAST_FIRST:
                _dispatch(f, w, queue, w.scratch, length, &v)
            elif kind == TCPHA_FAST_EARLY:
                _flow_of(&v, &flow)
                say_flow(f.c, 6, &flow, b"a later segment has come first: to a socket")
                f.dp.fast.early(f.dp.self, queue, w.index, w.scratch, length, &flow)
            else:
                f.dp.fast.later(f.dp.self, queue, w.index, w.scratch, length)
        if turns == TURN:
            store32(&f.fast_readers[queue], 0)
            rearm(f.c, f.dp.fast.fd[queue], EV_FAST, queue)
            return
        if add32(&f.fast_readers[queue], -1) == 0:
            return


cdef void _on_return(frontend *f, worker *w, uint32_t b, message *m) noexcept nogil:
    """A request of the packet path that the back end did not take: the client sends it again, and
    then it is dispatched anew."""
    cdef backend *be = &f.backends[b]
    cdef tcpha_entry entry
    cdef request r
    say_more(f.c, 4, &m.snap.flow, b"RETURN from %s", be.name, 0)
    if f.dp.fast.take_back(f.dp.self, w.index, &m.snap.flow, m.id, b, &entry) != 1:
        return
    if m.reason != REFUSE_LOST:
        _remember(f, m.id, b)  # at once: the client may send it again at any moment
    memset(&r, 0, sizeof(r))
    r.flow = m.snap.flow
    r.backend = b
    if m.reason == REFUSE_UNSUPPORTED:
        store64(&be.keyed, 0)  # of the connections that our cookies make
        _void_verdicts(f)
    _returned(f, &r, m.reason)
