# SPDX-License-Identifier: GPL-2.0-or-later
# What wakes a worker: a client, a message, a deadline. Each goes to the part that it concerns.

cdef void _on_event(core *c, worker *w, int kind, uint32_t index, uint32_t gen,
                    uint32_t events) noexcept nogil:
    cdef frontend *f = <frontend *>c.role
    cdef conn *k
    if kind == EV_LISTENER:
        _accept(f, w, index)
    elif kind == EV_FAST:
        _on_requests(f, w, index)
    elif kind == EV_TAP:
        if f.dp.on_packets(f.dp.self):
            rearm(c, f.dp.event_fd, EV_TAP, 0)
    elif kind == EV_CLIENT:
        k = &f.conns[index]
        pthread_mutex_lock(&k.lock)
        if (k.gen & 0xffffff) == gen:
            if k.state == CONN_READ:
                _read_head(f, w, k)
            elif k.state == CONN_LINGER:
                if not _discard(k):
                    _close(f, k)
            elif k.state == CONN_WAIT and events & EPOLLHUP:  # reset
                add64(&f.n.lost, 1)
                _close(f, k)
        pthread_mutex_unlock(&k.lock)


cdef void _on_closed(frontend *f, worker *w, uint32_t b, const message *m) noexcept nogil:
    cdef uint32_t slot = <uint32_t>(m.id & ((1 << SLOT_BITS) - 1))
    cdef bint linger = m.reason == END_TIME_WAIT
    cdef conn *k
    if _forget(f, w, &m.snap.flow, m.id, b, linger) or slot >= f.nconns:
        return
    k = &f.conns[slot]
    pthread_mutex_lock(&k.lock)
    if k.state == CONN_TAKEN and k.req.id == m.id and k.req.backend == b:
        k.ended = True
        k.linger = linger
    pthread_mutex_unlock(&k.lock)
    # again: it may have been completed between our first look and the lock
    _forget(f, w, &m.snap.flow, m.id, b, linger)


cdef bint _note_place(frontend *f, backend *be, const message *m) noexcept nogil:
    """What a back end says of one of its places. Several connections bring it. False: that is not
    new, or of one more place than there can be services."""
    cdef bint new = False
    cdef place_said *p
    cdef uint32_t i
    pthread_mutex_lock(&f.place_lock)
    for i in range(TCPHA_MAX_SERVICES):
        p = &be.places[i]
        if i == be.nplaces:
            memset(p, 0, sizeof(place_said))
            memcpy(p.vaddr, m.snap.flow.vaddr, 16)
            p.vport = m.snap.flow.vport
            be.nplaces += 1
        if p.vport == m.snap.flow.vport and memcmp(p.vaddr, m.snap.flow.vaddr, 16) == 0:
            new = p.said < m.id
            p.said = max(p.said, m.id)
            break
    pthread_mutex_unlock(&f.place_lock)
    return new


cdef int _on_message(core *c, worker *w, link *l, message *m) noexcept nogil:
    cdef frontend *f = <frontend *>c.role
    cdef conn *k
    cdef uint32_t slot
    if m.type == MSG_PONG:
        return 0
    if m.type == MSG_SERVER:
        if raise64(&f.backends[l.peer].server_said, m.id):  # several connections bring it
            notice(c)
        return 0
    if m.type == MSG_PLACE:
        if _note_place(f, &f.backends[l.peer], m):
            notice(c)
        return 0
    if m.type == MSG_CLOSED:
        say_more(c, 4, &m.snap.flow, b"CLOSED from %s", f.backends[l.peer].name, 0)
        _on_closed(f, w, l.peer, m)
        return 0
    if m.type == MSG_KEYED:
        if m.id == 0 or m.id >> 8 > f.backends[l.peer].keyed:  # several connections bring it
            store64(&f.backends[l.peer].keyed, m.id >> 8)
            _void_verdicts(f)
        return 0
    if m.type == MSG_MISSED:
        store32(&f.backends[l.peer].missed, 1)
        notice(c)
        return 0
    if m.type == MSG_RETURN:
        _on_return(f, w, l.peer, m)
        return 0
    if m.type == MSG_FLOW:
        _restore(f, w, l.peer, m)
        return 0
    if m.type == MSG_TOLD:
        store32(&f.backends[l.peer].told, <uint32_t>m.id)
        notice(c)
        return 0
    if m.type != MSG_ADOPTED and m.type != MSG_REFUSED:
        return -1
    slot = <uint32_t>(m.id & ((1 << SLOT_BITS) - 1))
    if slot >= f.nconns:
        return -1
    k = &f.conns[slot]
    pthread_mutex_lock(&k.lock)
    if k.state == CONN_SENT and k.req.id == m.id and k.req.backend == l.peer:
        say_more(c, 4, &k.req.flow, b"ADOPTED from %s" if m.type == MSG_ADOPTED else
                 b"REFUSED from %s", f.backends[l.peer].name, 0)
        if m.type == MSG_ADOPTED:
            _complete(f, w, k)
        else:
            _offer_again(f, w, k, m.reason)
    pthread_mutex_unlock(&k.lock)
    return 0


cdef void _on_timer(core *c, worker *w, uint64_t now) noexcept nogil:
    cdef frontend *f = <frontend *>c.role
    cdef conn *k
    cdef uint32_t i
    if xchg32(&f.accept_failed, 0):
        _await_all(f)
    f.dp.sweep(f.dp.self, w.index, now)
    for i in range(f.nconns):
        k = &f.conns[i]
        if load32(&k.state) == CONN_FREE or load64(&k.deadline_ns) > now:
            continue
        if pthread_mutex_trylock(&k.lock) != 0:
            continue
        if k.state != CONN_FREE and k.deadline_ns <= now:
            if k.state == CONN_READ and not http_begun(&k.req.head):
                say_flow(c, 2, &k.req.flow, b"no request in headtimeout: closed")
                add64(&f.n.silent, 1)
                _leave_silent(f, k)
            elif k.state == CONN_READ:
                say_flow(c, 1, &k.req.flow, b"no complete request head in headtimeout: 408")
                _answer(f, k, ANSWER_408, &f.n.answered_408)
            elif k.state == CONN_LINGER:
                _discard(k)
                _close(f, k)
            elif k.state == CONN_TAKEN:
                _complete(f, w, k)
            elif k.state == CONN_WAIT:
                _offer_later(f, w, k)
            elif load32(&c.links[k.link].gen) == k.link_gen and \
                    load32(&c.links[k.link].state) == LINK_UP:
                _stalled(f, k)
                _offer_again(f, w, k, REFUSE_TIMEOUT)
            elif load32(&f.backends[k.req.backend].may.dead) or not _ask_again(f, w, k):
                _offer_again(f, w, k, REFUSE_LINK)
        pthread_mutex_unlock(&k.lock)


cdef void _on_retire(core *c, worker *w) noexcept nogil:
    cdef fe_worker *fw = <fe_worker *>w.role
    w.role = NULL
    if fw == NULL:
        return
    if fw.scratch != NULL:
        hs_free_scratch(fw.scratch)
    free(fw.bits)
    free(fw)
