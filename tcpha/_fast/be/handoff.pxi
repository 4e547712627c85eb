# SPDX-License-Identifier: GPL-2.0-or-later
# A front end hands a connection over.

cdef void _keep_leftover(backend_state *b, message *m) noexcept nogil:
    cdef leftover *p = <leftover *>malloc(sizeof(leftover) + m.snap.len)
    if p == NULL:
        say_flow(b.c, 0, &m.snap.flow, b"out of memory: request bytes are lost")
        return
    p.snap = m.snap
    memcpy(p.data, m.data, m.snap.len)
    add64(&b.n.late, 1)
    pthread_mutex_lock(&b.feed_lock)
    p.next = b.leftovers
    b.leftovers = p
    pthread_mutex_unlock(&b.feed_lock)


cdef void _set_origin(backend_state *b, adopted *a, link *l, uint64_t id) noexcept nogil:
    a.id = id
    a.since_ns = now_ns()
    a.link = <uint32_t>(l - b.c.links)
    a.link_gen = l.gen
    a.peer = l.peer


cdef void _adopted(backend_state *b, worker *w, message *m) noexcept nogil:
    """The socket exists: from now on reports of its end count, and one that came is looked into."""
    cdef adopted *a
    cdef bint again = False
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    if a != NULL and a.id == m.id:
        a.adopting = False
        again = a.recheck
        _share(b, w, a)
    pthread_mutex_unlock(&b.lock)
    if again:
        _check(b, w, &m.snap.flow)


cdef bint _is_stale(backend_state *b, link *l, message *m) noexcept nogil:
    """Whether an offer may have been made to another back end before our answer is there. It is no
    older than the control connection that it came by. If our own clock stood still, as that of a
    virtual machine that is paused does, only the end of the connection tells: the front end has
    closed it."""
    cdef uint64_t now = now_ns()
    if half_closed(l.fd):
        return True
    return now - l.since_ns > b.stale_ns and (
        clock_youngest(&l.clock, m.sent_ns, now) > <int64_t>b.stale_ns or
        clock_oldest(&l.clock, m.sent_ns, now) > PATIENCE_NS)


cdef bint _is_known(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    """An offer that came before, on a control connection that broke before the front end read the
    answer. Adopting it again would serve its request twice: the answer is given again."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef finished *was
    cdef adopted *a
    cdef bint known, over = False
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    was = _was_over(b, m.id)
    known = a != NULL and a.id == m.id and not a.fast
    if known and not half_closed(l.fd):
        a.shared |= a.peer != l.peer  # another one has asked for it meanwhile
        a.peer = l.peer
        a.link = <uint32_t>(l - b.c.links)
        a.link_gen = l.gen
        if a.adopting:     # whoever does that answers here
            pthread_mutex_unlock(&b.lock)
            return True
    elif not known and was.id == m.id and memcmp(&was.flow, &m.snap.flow, sizeof(tcpha_flow)) == 0:
        known = over = True
    pthread_mutex_unlock(&b.lock)
    if known:
        link_put(b.c, w, l, buf, message_short(buf, MSG_ADOPTED, m.id), NULL, 0)
    if over:
        link_put(b.c, w, l, buf, message_closed(buf, m.id, &m.snap.flow, END_GONE), NULL, 0)
    return known


cdef link *_answer_to(backend_state *b, link *l, message *m) noexcept nogil:
    """Where the answer to an offer is awaited: where it came last."""
    cdef adopted *a
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    if a != NULL and a.id == m.id and b.c.links[a.link].gen == a.link_gen:
        l = &b.c.links[a.link]
    pthread_mutex_unlock(&b.lock)
    return l


cdef bint _enter(backend_state *b, worker *w, link *l, const message *m) noexcept nogil:
    """Have the connection in the table, before its socket exists: its end may be reported at any
    moment after. False: there is no room."""
    cdef adopted *a
    pthread_mutex_lock(&b.lock)
    _replace(b, w, &m.snap.flow)
    a = NULL if b.unloading else _insert(b, &m.snap.flow)
    if a == NULL and not b.unloading:
        pthread_mutex_unlock(&b.lock)
        _reap(b, w, l.last_rx_ns, False)
        pthread_mutex_lock(&b.lock)
        a = _insert(b, &m.snap.flow)
    if a != NULL:
        _set_origin(b, a, l, m.id)
        a.adopting = True
    pthread_mutex_unlock(&b.lock)
    return a != NULL


cdef void _leave(backend_state *b, const message *m) noexcept nogil:
    """It was not adopted."""
    cdef adopted *a
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    if a != NULL and a.id == m.id:
        _remove(b, a)
    pthread_mutex_unlock(&b.lock)


cdef int _take(backend_state *b, worker *w, link **l, message *m) noexcept nogil:
    """Adopt it. 0, or why not: REFUSE_*. l: where it came; then, where the answer is awaited."""
    cdef int rc
    if not _enter(b, w, l[0], m):
        return REFUSE_FULL     # another worker may have it: the same offer, that came once more
    rc = b.dp.adopt(b.dp.self, w.index, &m.snap, m.data)
    if rc == DP_MORE:
        _keep_leftover(b, m)
        rc = 0
    l[0] = _answer_to(b, l[0], m)
    if rc != 0:
        _leave(b, m)
    return rc


cdef void _on_handoff(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    cdef uint8_t buf[MSG_REFUSED_SIZE]
    cdef int rc = REFUSE_STALE  # the front end has given up on it, or is about to
    say_number(b.c, 4, &m.snap.flow, b"HANDOFF of %ld bytes", m.data_len)
    if not _is_stale(b, l, m):
        _on_ring(b, w)     # what came before this one is in the table
        if _is_known(b, w, l, m):
            return
        rc = _take(b, w, &l, m)
    if rc == 0:
        add64(&b.n.adopted, 1)
        say_flow(b.c, 2, &m.snap.flow, b"adopted")
        link_put(b.c, w, l, buf, message_short(buf, MSG_ADOPTED, m.id), NULL, 0)
        _adopted(b, w, m)  # behind ADOPTED: CLOSED must not overtake it
    else:
        add64(&b.n.refused[rc & 15], 1)
        say_more(b.c, 1, &m.snap.flow, b"refused: %s", refusal_text(rc), 0)
        link_put(b.c, w, l, buf, message_refused(buf, m.id, rc), NULL, 0)
