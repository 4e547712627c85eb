# SPDX-License-Identifier: GPL-2.0-or-later
# The socket path: accept a connection, read its request, hand it over.

cdef bint _send_offer(frontend *f, worker *w, conn *k, const uint8_t *data,
                      uint32_t most) noexcept nogil:
    """Queue the HANDOFF on one of the back end's links, with at most so many bytes queued. False:
    none takes it."""
    cdef backend *be = &f.backends[k.req.backend]
    cdef uint8_t head[MSG_HANDOFF_FIXED]
    cdef uint32_t i, n, at = add32(&be.next_link, 1)
    cdef link *l
    for i in range(LINKS_MAX):
        n = load32(&be.link[(at + i) % LINKS_MAX])
        if n >= MAX_LINKS:
            continue
        l = &f.c.links[n]
        if load32(&l.state) != LINK_UP or l.peer != k.req.backend or link_queued(l) > most:
            continue
        set32(&k.link, n)
        set32(&k.link_gen, l.gen)
        n = message_handoff(head, k.req.id, &k.snap)
        if link_put(f.c, w, l, head, n, data, k.snap.len) == 0:
            say_more(f.c, 4, &k.req.flow, b"HANDOFF to %s on control connection %ld", be.name,
                     k.link)
            return True
    return False


cdef bint _await_room(frontend *f, conn *k) noexcept nogil:
    """Where an accept queue was full, offer it again a little later, as TCP does with a SYN that
    finds no room. False: there was none, or it has waited long enough; or half of our slots are in
    use, which requests for other back ends need."""
    cdef uint64_t crowded = 0, waited, now = now_ns()
    cdef uint32_t i
    for i in range(TRIED_WORDS):
        crowded |= k.req.crowded[i]
        k.req.tried[i] &= ~k.req.crowded[i]
        k.req.crowded[i] = 0
    if k.crowded_ns == 0:
        k.crowded_ns = now
    waited = now - k.crowded_ns
    if crowded == 0 or waited > ROOM_NS or load32(&f.pool_len) < f.nconns // 2:
        return False
    say_number(f.c, 3, &k.req.flow, b"an accept queue is full, waiting since %ld ms",
               waited // 1000000)
    _thaw(f, k)                # our stack acknowledges meanwhile, and hears of the client's end
    set64(&k.deadline_ns, now + min(max(waited, ROOM_SOON_NS), ROOM_LATE_NS))
    set32(&k.state, CONN_WAIT)
    _watch_client(f, k)
    return True


cdef inline void _describe(conn *k, const uint8_t *head) noexcept nogil:
    """Its entry, as the flow table gets it."""
    k.entry.start_ns = k.req.began_ns
    k.entry.last_ns = now_ns()
    k.entry.backend = k.req.backend
    k.entry.rule = k.req.rule
    tcpha_hold(&k.entry, k.index)
    k.entry.target_len = k.req.head.target_len
    memcpy(k.entry.target, head + k.req.head.target, min(k.entry.target_len, TCPHA_TARGET_MAX))


cdef void _offer(frontend *f, worker *w, conn *k, uint8_t *buf) noexcept nogil:
    """Freeze and offer the connection to back ends in turn until one has it; or wait, or answer
    503. buf (SCRATCH bytes) holds the head; k.seen bytes of the connection were peeked into it."""
    cdef int rc, one = TCP_RECV_QUEUE
    cdef ssize_t n
    cdef tcpha_entry old
    # a client on this very host: its packets and the answers would never meet
    while not k.local and _choose(f, w, &k.req, buf):
        k.req.id = (add64(&f.next_id, 1) << SLOT_BITS) | k.index
        _say_chosen(f, &k.req)
        if not k.diverted:
            _describe(k, buf)
            rc = f.dp.divert(f.dp.self, w.index, &k.req.flow, &k.entry, &old)
            if rc < 0:
                say_flow(f.c, 1, &k.req.flow, b"the flow table is full")
                add64(&f.n.table_full, 1)
                break
            if rc == 1:        # the client reused its port before CLOSED came
                _count_closed(f, old.backend)
            k.diverted = True
        rc = f.dp.freeze(f.dp.self, w.index, k.fd, &k.snap)
        k.frozen = True
        if rc == DP_GONE:
            say_flow(f.c, 2, &k.req.flow, b"the client has reset the connection")
            add64(&f.n.lost, 1)
            f.dp.give_back(f.dp.self, &k.req.flow, k.index)
            _close(f, k)
            return
        if rc < 0:
            say_flow(f.c, 0, &k.req.flow, b"cannot freeze the connection")
            break
        if k.snap.len != k.seen or k.seen == 0:
            setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
            n = recv(k.fd, buf, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
            if n < <ssize_t>k.snap.len:
                say_flow(f.c, 0, &k.req.flow, b"cannot read the connection's bytes")
                break
            k.seen = <uint32_t>n
            if k.seen > k.snap.len:  # arrived between the two looks
                k.snap.rcv_nxt += k.seen - k.snap.len
                k.snap.len = k.seen
        _offered(f, &k.req, now_ns())
        set32(&k.state, CONN_SENT)
        set64(&k.deadline_ns, k.req.offered_ns + f.offer_ns)
        if _send_offer(f, w, k, buf, LINK_FULL):
            say_more(f.c, 3, &k.req.flow, b"offered to %s, %ld bytes",
                     f.backends[k.req.backend].name, k.snap.len)
            return
        _refused(f, &k.req, REFUSE_LINK)
    else:
        if _await_room(f, k):
            return
    say_flow(f.c, 1, &k.req.flow, b"no back end takes the request: 503")
    _answer(f, k, ANSWER_503, &f.n.answered_503)


cdef inline bint _may_have_it(conn *k, uint32_t reason) noexcept nogil:
    """Whether the back end at hand, and no other one, may have adopted a connection of which it has
    not said so: what it has refused in so many words it has not."""
    return _untried(&k.req) and \
        (reason == REFUSE_TIMEOUT or reason == REFUSE_LINK or reason == REFUSE_STALE)


cdef void _offer_again(frontend *f, worker *w, conn *k, uint32_t reason) noexcept nogil:
    """After a refusal: read the head again (it never left the receive queue) and go on."""
    cdef int one = TCP_RECV_QUEUE
    cdef ssize_t n
    if _may_have_it(k, reason) and f.dp.answered(f.dp.self, k.index, k.snap.snd_nxt):
        # what was lost is the word of the back end that has it, and none other must answer now
        say_more(f.c, 1, &k.req.flow, b"%s has adopted it without a word",
                 f.backends[k.req.backend].name, 0)
        _complete(f, w, k)
        return
    _refused(f, &k.req, reason)
    setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
    n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
    k.seen = <uint32_t>n if n > 0 else 0
    if k.seen < k.req.head.pos:
        _answer(f, k, ANSWER_503, &f.n.answered_503)
        return
    _offer(f, w, k, w.scratch)


cdef void _offer_later(frontend *f, worker *w, conn *k) noexcept nogil:
    """There may be room now."""
    cdef ssize_t n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
    if n < <ssize_t>k.req.head.pos:  # reset
        add64(&f.n.lost, 1)
        _close(f, k)
        return
    k.seen = <uint32_t>n
    _offer(f, w, k, w.scratch)


cdef bint _look_again(conn *k, worker *w, snapshot *now, uint32_t *late) noexcept nogil:
    """As a second freeze() would tell, had not the Local Node's socket taken the place of ours:
    what was received after the snapshot, which w.scratch holds then. Returns whether a FIN was."""
    cdef uint32_t rcv_nxt
    cdef ssize_t n
    now[0] = k.snap
    if repair_received(k.fd, &rcv_nxt) < 0 or rcv_nxt == k.snap.rcv_nxt:
        return False
    n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
    if n > <ssize_t>k.snap.len:
        late[0] = <uint32_t>n - k.snap.len
    now.rcv_nxt = rcv_nxt
    if rcv_nxt - k.snap.rcv_nxt == late[0]:
        return False
    now.flags |= SNAP_FIN
    return True


cdef void _complete(frontend *f, worker *w, conn *k) noexcept nogil:
    """ADOPTED: the back end owns the connection. Let its packets go there, forget our socket. The
    timer tries again if the kernel has no memory; packets are kept meanwhile."""
    cdef snapshot now
    cdef uint32_t late = 0
    cdef int one = TCP_RECV_QUEUE
    cdef ssize_t n
    cdef bint fin
    cdef uint64_t at
    cdef const uint8_t *head = NULL
    now.flow = k.req.flow
    # A packet that another CPU had in its hands when the flow was diverted may have reached our
    # socket after the snapshot: our stack has acknowledged it, so it must be passed on from here.
    if k.req.backend == TCPHA_LOCAL_NODE:
        fin = _look_again(k, w, &now, &late)
    elif f.dp.freeze(f.dp.self, w.index, k.fd, &now) == 0:
        fin = (now.flags & SNAP_FIN) != 0 and not k.snap.flags & SNAP_FIN
        late = now.len - k.snap.len
        if late:
            setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
            n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
            if n < <ssize_t>now.len:
                late = 0
    else:
        fin = False
        now = k.snap
    k.entry.backend = k.req.backend
    k.entry.rule = k.req.rule
    tcpha_forward(&k.entry, k.req.id)
    k.entry.end_seq = now.rcv_nxt
    if now.flags & SNAP_FIN:
        k.entry.flags |= TCPHA_F_FIN
    if f.dp.forward(f.dp.self, w.index, &k.entry, &now, w.scratch + k.snap.len, late, fin) < 0:
        if k.state != CONN_TAKEN:
            say_flow(f.c, 0, &k.req.flow, b"cannot divert the flow, trying again: out of memory")
        set32(&k.state, CONN_TAKEN)
        set64(&k.deadline_ns, now_ns())
        return
    k.diverted = False
    add64(&f.n.late_bytes, late)
    at = now_ns()
    histogram_add(&f.stages[STAGE_OFFER], at - k.req.offered_ns)
    histogram_add(&f.stages[STAGE_TOTAL], at - k.req.began_ns)
    if f.access_fd >= 0:
        setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
        n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
        if n >= <ssize_t>(k.req.head.target + k.req.head.target_len):
            head = w.scratch
        else:
            add64(&f.n.access_lost, 1)
    _handed(f, &k.req, k.entry.target, at - k.req.began_ns, head)
    if k.ended:
        _forget(f, w, &k.req.flow, k.req.id, k.req.backend, k.linger)
    _close(f, k)


# Events

cdef void _read_head(frontend *f, worker *w, conn *k) noexcept nogil:
    cdef uint32_t limit = load32(&f.headlimit)
    cdef ssize_t n
    cdef int rc
    cdef bint ended = False
    while True:
        n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
        if n < 0 and errno == EINTR:
            continue
        if n < 0 and errno == EAGAIN:
            _watch_client(f, k)
            return
        if n <= 0:  # reset, or closed without a word
            add64(&f.n.lost, 1)
            _close(f, k)
            return
        k.seen = <uint32_t>n
        say_number(f.c, 6, &k.req.flow, b"%ld bytes are there", k.seen)
        rc = http_parse(&k.req.head, w.scratch, min(k.seen, limit))
        # a FIN may have come with the last bytes; if so, look once more for what came before it
        if rc != HTTP_MORE or ended or not half_closed(k.fd):
            break
        ended = True
    if rc == HTTP_BAD:
        say_flow(f.c, 1, &k.req.flow, k.req.head.error)
        _answer(f, k, ANSWER_400, &f.n.answered_400)
    elif rc != HTTP_MORE:
        k.method_head = (k.req.head.method_len == 4
                         and memcmp(w.scratch + k.req.head.method, b"HEAD", 4) == 0)
        histogram_add(&f.stages[STAGE_HEAD], now_ns() - k.req.began_ns)
        _offer(f, w, k, w.scratch)
    elif k.seen >= limit:
        say_flow(f.c, 1, &k.req.flow, b"request head over headlimit: 431")
        _answer(f, k, ANSWER_431, &f.n.answered_431)
    elif ended and not http_begun(&k.req.head):
        add64(&f.n.lost, 1)
        _leave_silent(f, k)
    elif ended:
        say_flow(f.c, 1, &k.req.flow, b"the client ended in its request head: 400")
        _answer(f, k, ANSWER_400, &f.n.answered_400)
    else:
        _watch_client(f, k)


cdef void _accept(frontend *f, worker *w, uint32_t number) noexcept nogil:
    cdef service *s = &f.services[number]
    cdef sockaddr_in peer
    cdef socklen_t n
    cdef conn *k
    cdef int fd, _i
    for _i in range(ACCEPT_BATCH):
        k = _take_slot(f)
        if k == NULL:
            return  # the rest waits in the kernel's backlog: maxclients
        pthread_mutex_lock(&k.lock)
        n = sizeof(peer)
        fd = accept4(_listener(s), <sockaddr *>&peer, &n, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EMFILE or errno == ENFILE:
                add64(&f.n.no_descriptors, 1)
            if errno != EAGAIN:
                f.accept_failed = 1  # tried again by the timer: more may wait, and nobody says so
            _free_slot(f, k)
            pthread_mutex_unlock(&k.lock)
            return
        _accepted(f, number, False)
        k.fd = fd
        k.frozen = k.diverted = k.watched = k.method_head = k.ended = False
        k.seen = 0
        memset(&k.req, 0, sizeof(k.req))
        k.req.began_ns = now_ns()
        set64(&k.deadline_ns, k.req.began_ns + load64(&f.headtimeout_ns))
        memset(&k.snap, 0, sizeof(k.snap))
        memset(&k.entry, 0, sizeof(k.entry))
        k.crowded_ns = 0
        k.req.service = number
        _flow_from(&peer, s, &k.req.flow)
        k.snap.flow = k.req.flow
        k.local = memcmp(&peer.sin_addr, s.vaddr + 12, 4) == 0
        set32(&k.state, CONN_READ)
        say_flow(f.c, 6, &k.req.flow, b"accepted")
        _read_head(f, w, k)
        pthread_mutex_unlock(&k.lock)
    # more may wait: let another worker have a share
    _await_clients(f, number, EPOLL_CTL_MOD)
