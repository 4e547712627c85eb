# SPDX-License-Identifier: GPL-2.0-or-later
# The packet path: what the programs have adopted.

cdef bint _no_event(void *self, tcpha_event *event) noexcept nogil:
    return False


cdef void _give_nothing_up(void *self, const tcpha_flow *flow, uint32_t isn) noexcept nogil:
    pass


cdef void _take_path(backend_state *b, cookie_adoption *path) noexcept nogil:
    """Work with the datapath's packet path; NULL: it has none, and no program adopts anything."""
    b.no_path.gate = &b.no_gate
    b.no_path.keys = b.no_keys
    b.no_path.event_fd = -1
    b.no_path.next_event = _no_event
    b.no_path.give_up = _give_nothing_up
    b.dp.fast = path if path != NULL else &b.no_path


cdef inline bint _has_path(backend_state *b) noexcept nogil:
    return b.dp.fast != &b.no_path


cdef void _took(backend_state *b, worker *w, const tcpha_event *e) noexcept nogil:
    """The program has adopted a connection."""
    cdef uint64_t id = fast_id(e.isn, e.ours)
    cdef bint reused = e.reused != 0
    cdef adopted *a
    pthread_mutex_lock(&b.lock)
    a = _find(b, &e.flow)
    if a != NULL and a.found and a.id != id:
        # claim() found the socket before we read its event: now its id is known
        a.found = False
        a.id = id
        a.fast = True
        a.peer = e.frontend
    if a != NULL and a.id != id:
        reused = _replace(b, w, &e.flow)
        a = NULL
    if a == NULL:
        a = _insert_any(b, &e.flow)
        if a == NULL:          # full of connections whose end we have not heard of yet
            pthread_mutex_unlock(&b.lock)
            _check_all(b, w)
            pthread_mutex_lock(&b.lock)
            a = _insert_any(b, &e.flow)
        if a != NULL:
            a.fast = True
            a.reused = reused
            a.id = id
            a.since_ns = e.at_ns
            a.link = a.link_gen = 0  # any: no link has generation 0
            a.peer = e.frontend
            _share(b, w, a)
            add64(&b.n.adopted, 1)
            add64(&b.n.fast, 1)
            say_flow(b.c, 2, &e.flow, b"adopted")
        else:
            say_flow(b.c, 0, &e.flow, b"no room in the table: its end will not be noticed")
    pthread_mutex_unlock(&b.lock)
    add32(&b.dp.fast.gate.coming, -1)


cdef inline uint32_t _reason(uint32_t result) noexcept nogil:
    """What a front end is told of TCPHA_R_*."""
    if result == TCPHA_R_BACKLOG:
        return REFUSE_BACKLOG
    if result == TCPHA_R_NO_LISTENER:
        return REFUSE_LISTENER
    return REFUSE_UNSUPPORTED if result == TCPHA_R_ASSIGN else REFUSE_FULL


cdef void _return_it(backend_state *b, worker *w, const tcpha_event *e) noexcept nogil:
    """The program has refused a connection: the front end has it again."""
    cdef uint32_t reason = _reason(e.result)
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef link *l
    cdef int i
    add64(&b.n.refused[reason], 1)
    say_more(b.c, 1, &e.flow, b"refused: %s", refusal_text(reason), 0)
    for i in range(MAX_LINKS):
        l = &b.c.links[i]
        if load32(&l.state) == LINK_UP and l.peer == e.frontend and link_put(
                b.c, w, l, buf, message_return(buf, fast_id(e.isn, e.ours), &e.flow, reason),
                NULL, 0) == 0:
            return


cdef void _take_event(backend_state *b, worker *w, const tcpha_event *e) noexcept nogil:
    if e.result == TCPHA_R_OK:
        _took(b, w, e)
        return
    if e.result == TCPHA_R_FULL and not b.unloading:
        _reap(b, w, e.at_ns, False)
        if not _is_full(b):
            return             # the client's next attempt finds room
    _return_it(b, w, e)


cdef void _on_ring(backend_state *b, worker *w) noexcept nogil:
    """Take note of all that the packet path had said when this began."""
    cdef tcpha_event e
    cdef int left = RING_TURN
    pthread_mutex_lock(&b.ring_lock)
    while left and b.dp.fast.next_event(b.dp.self, &e):
        _take_event(b, w, &e)
        left -= 1
    pthread_mutex_unlock(&b.ring_lock)
    if left == 0:
        rearm(b.c, b.dp.fast.event_fd, EV_RING, 0)


cdef void _sweep(backend_state *b, worker *w, uint64_t now) noexcept nogil:
    """Look through a part of the table. The packet path's program is not told whether the kernel
    made a socket of what it adopted."""
    cdef adopted *a
    cdef adopted *following
    cdef int owner
    cdef uint32_t _i
    if not _has_path(b) or load32(&b.live) == 0:
        return
    pthread_mutex_lock(&b.lock)
    for _i in range(SWEEP):
        b.swept = (b.swept + 1) & b.mask
        a = b.buckets[b.swept]
        while a != NULL:
            following = a.next
            if not a.adopting and not a.over and now > a.since_ns + SETTLED_NS:
                owner = b.dp.alive(b.dp.self, w.index, &a.flow)
                if not _living(owner):
                    _ended(b, w, a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
            a = following
    pthread_mutex_unlock(&b.lock)
