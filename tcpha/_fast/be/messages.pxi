# SPDX-License-Identifier: GPL-2.0-or-later
# What wakes a worker: a message, the kernel, a deadline. Each goes to the part that it concerns.

cdef int _on_message(core *c, worker *w, link *l, message *m) noexcept nogil:
    cdef backend_state *b = <backend_state *>c.role
    if m.type == MSG_HANDOFF:
        _on_handoff(b, w, l, m)
        return 0
    if m.type == MSG_PONG:
        if l.peer < TCPHA_MAX_FAST:
            store64(&b.dp.fast.keys[l.peer].clock, clock_word(&l.clock))
        return 0
    if m.type == MSG_OWNED:
        _on_ring(b, w)
        _claim(b, w, l, m)
        return 0
    if m.type == MSG_ASK:
        store32(&l.asked, <uint32_t>m.id)
        notice(c)
        return 0
    if m.type == MSG_DOUBT:
        if _has_path(b):
            _doubted(b, w, l, m)
        else:
            _claim(b, w, l, m)
        return 0
    if m.type == MSG_KEYS:
        _on_keys(b, w, l, m)
        return 0
    return -1


cdef void _on_keys(backend_state *b, worker *w, link *l, const message *m) noexcept nogil:
    cdef uint8_t buf[MSG_HEADER]
    if not _has_path(b) or l.peer >= TCPHA_MAX_FAST:
        return
    memcpy(b.dp.fast.keys[l.peer].key[m.id >> 8 & 1], m.data, 16)
    store64(&b.dp.fast.keys[l.peer].clock, clock_word(&l.clock))
    store32(&b.dp.fast.keys[l.peer].wscale, m.id & 0xff)
    # the other one is yet to come: until then, a stranger may know what is in its place
    or32(&b.dp.fast.keys[l.peer].used, <uint32_t>1 << (m.id >> 8 & 1))
    link_put(b.c, w, l, buf, message_short(buf, MSG_KEYED, m.id), NULL, 0)


cdef void _on_event(core *c, worker *w, int kind, uint32_t index, uint32_t gen,
                    uint32_t events) noexcept nogil:
    cdef backend_state *b = <backend_state *>c.role
    if kind == EV_NETLINK:
        if not load32(&b.lazy):
            _on_netlink(b, w)
            _await_ends(b, EPOLL_CTL_MOD)
    elif kind == EV_RING:
        _on_ring(b, w)
    elif kind == EV_TAP:
        _on_waiting(b, w)


cdef void _on_timer(core *c, worker *w, uint64_t now) noexcept nogil:
    """Look for ends that wait, and feed sockets that had no room."""
    cdef backend_state *b = <backend_state *>c.role
    cdef leftover **at
    cdef leftover *p
    b.dp.sweep(b.dp.self, now)
    _pace(b, w)
    _on_ring(b, w)
    _look_again(b, w)
    _sweep(b, w, now)
    if b.leftovers == NULL or pthread_mutex_trylock(&b.feed_lock) != 0:
        return
    at = &b.leftovers
    while at[0] != NULL:
        p = at[0]
        if b.dp.feed(b.dp.self, w.index, &p.snap, p.data) == 0:
            at[0] = p.next
            free(p)
        else:
            at = &p.next
    pthread_mutex_unlock(&b.feed_lock)


cdef void _on_link_down(core *c, worker *w, link *l) noexcept nogil:
    """The front end may have given the link up long before we heard of it, and what we said there
    is lost: it should ask what is over. Other links may be as dead as this one."""
    cdef uint8_t buf[MSG_HEADER]
    cdef uint32_t i
    for i in range(MAX_LINKS):
        if load32(&c.links[i].state) == LINK_UP and c.links[i].peer == l.peer:
            link_put(c, w, &c.links[i], buf, message_short(buf, MSG_MISSED, 0), NULL, 0)


cdef void _on_retire(core *c, worker *w) noexcept nogil:
    pass
