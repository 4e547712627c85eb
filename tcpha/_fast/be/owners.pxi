# SPDX-License-Identifier: GPL-2.0-or-later
# Whose connections are whose: what front ends are told, and ask.

cdef void _claim(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    """A connection that an earlier run of ours adopted: watch it again, or say that it is over."""
    cdef adopted a
    cdef adopted *p
    cdef int owner = b.dp.alive(b.dp.self, w.index, &m.snap.flow)
    pthread_mutex_lock(&b.lock)
    p = _find(b, &m.snap.flow)
    if p == NULL and _living(owner):
        p = _insert(b, &m.snap.flow)
        if p != NULL:
            _set_origin(b, p, l, m.id)
    elif p != NULL and p.found and p.peer == l.peer:
        # it asked for what we have when it started, we were killed before we had said all, and were
        # asked again: but it knew this one, under the id that its handoff had
        _set_origin(b, p, l, m.id)
        p.found = False
    elif p != NULL and p.id == m.id:
        p.shared |= p.peer != l.peer
    elif p == NULL or not p.found:
        a.flow = m.snap.flow
        a.shared = False
        _set_origin(b, &a, l, m.id)
        _tell_closed(b, w, &a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
    pthread_mutex_unlock(&b.lock)
    _check(b, w, &m.snap.flow)  # its end may have been reported before it was in the table


cdef void _doubted(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    """A request of the packet path that may not have arrived. If it comes while we say so, it is
    not adopted: the client has to repeat it. An earlier run of ours may have adopted it."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef finished *was
    cdef bint over, known
    _on_ring(b, w)
    pthread_mutex_lock(&b.lock)
    known = _find(b, &m.snap.flow) != NULL
    was = _was_over(b, m.id)
    over = was.id == m.id and memcmp(&was.flow, &m.snap.flow, sizeof(tcpha_flow)) == 0
    pthread_mutex_unlock(&b.lock)
    if over:
        link_put(b.c, w, l, buf, message_closed(buf, m.id, &m.snap.flow, END_GONE), NULL, 0)
        return
    if not known:
        b.dp.fast.give_up(b.dp.self, &m.snap.flow, fast_isn(m.id))
    if known or _living(b.dp.alive(b.dp.self, w.index, &m.snap.flow)):
        _claim(b, w, l, m)
    else:
        link_put(b.c, w, l, buf, message_return(buf, m.id, &m.snap.flow, REFUSE_LOST), NULL, 0)


cdef bint _is_there(backend_state *b, uint32_t peer) noexcept nogil:
    cdef uint32_t i
    for i in range(MAX_LINKS):
        if load32(&b.c.links[i].state) == LINK_UP and b.c.links[i].peer == peer:
            return True
    return False


cdef bint _has_any(backend_state *b, uint32_t peer, bint living) noexcept nogil:
    """Whether a front end has connections here. living: they are not over, and it knows of them, or
    may. The table is read in pieces."""
    cdef uint32_t at = 0, end
    cdef adopted *a
    cdef bint found = False
    while at <= b.mask and not found:
        end = min(at + PIECE, b.mask + 1)
        pthread_mutex_lock(&b.lock)
        while at < end and not found:
            a = b.buckets[at]
            at += 1
            while a != NULL and not found:
                found = not a.over and (a.peer == peer or a.shared) if living else a.peer == peer
                a = a.next
        pthread_mutex_unlock(&b.lock)
    return found


cdef inline void _again(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    """Have _look_again() look. b.lock is held."""
    if b.nagain < AGAIN:       # or _sweep() finds it
        b.again[b.nagain] = flow[0]
        b.nagain += 1


cdef bint _tell_flow(backend_state *b, worker *w, adopted *a, link *l) noexcept nogil:
    """Make a connection the one of a link's front end, which knows nothing of it. False: it cannot
    be told. b.lock is held."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef uint32_t rcv_nxt = 0
    if not b.dp.position(b.dp.self, w.index, &a.flow, &rcv_nxt) or link_put(
            b.c, w, l, buf, message_flow(buf, a.id, &a.flow, rcv_nxt), NULL, 0) != 0:
        return False
    a.shared |= a.peer != l.peer
    a.peer = l.peer
    a.link = <uint32_t>(l - b.c.links)
    a.link_gen = l.gen
    return True


cdef uint32_t _tell_piece(backend_state *b, worker *w, link *l, uint32_t number,
                          uint32_t at) noexcept nogil:
    """The front end that asks has the virtual address now. So all connections are its own, whoever
    has handed them over: whether that one is dead, nobody can know in time. It may go on with them,
    and hears of their ends, too. Where it is gone, those that are over are not kept for it: when it
    is back, it asks about each that it knows.

    at: the bucket to begin with. Returns where to go on when the link has room for it."""
    cdef uint8_t buf[MSG_HEADER]
    cdef adopted *a
    cdef adopted *following
    cdef uint32_t end = min(at + PIECE, b.mask + 1)
    if at == 0:
        store32(&b.holder, l.peer + 1)
        _on_ring(b, w)
    while at < end and link_queued(l) <= LINK_BUSY:
        pthread_mutex_lock(&b.lock)
        a = b.buckets[at]
        while a != NULL:
            following = a.next
            if a.over and not _is_there(b, a.peer):
                _remove(b, a)
            elif not a.over and not a.adopting:
                _tell_flow(b, w, a, l)
            a = following
        pthread_mutex_unlock(&b.lock)
        at += 1
    if at > b.mask:
        link_put(b.c, w, l, buf, message_short(buf, MSG_TOLD, number), NULL, 0)
    return at


cdef void _share(backend_state *b, worker *w, adopted *a) noexcept nogil:
    """What a front end had in its hands when another one took the virtual address: that one has
    asked already. b.lock is held."""
    cdef uint32_t i, holder = load32(&b.holder)
    cdef link *l
    a.untold = False
    if holder == 0 or a.peer == holder - 1:
        return
    for i in range(MAX_LINKS):
        l = &b.c.links[i]
        if load32(&l.state) != LINK_UP or l.peer != holder - 1:
            continue
        a.untold = not _tell_flow(b, w, a, l)
        if not a.untold:
            return
    if a.untold:               # its socket may not be there yet
        _again(b, &a.flow)
