# SPDX-License-Identifier: GPL-2.0-or-later
# What was offered or handed over, and by whom the answer was lost.

cdef void _restore(frontend *f, worker *w, uint32_t b, const message *m) noexcept nogil:
    """A back end has a connection that an earlier run of ours handed over, or another front end."""
    cdef tcpha_entry entry, old
    cdef int rc
    memset(&entry, 0, sizeof(entry))
    tcpha_forward(&entry, m.id)
    entry.start_ns = entry.last_ns = now_ns()
    entry.backend = b
    entry.rule = <uint32_t>NO_RULE
    entry.end_seq = m.reason
    # other links bring it too: whoever has read TOLD there must find it in the count
    pthread_mutex_lock(&f.restore_lock)
    rc = f.dp.restore(f.dp.self, w.index, &m.snap.flow, &entry, load64(&f.backends[b].asked_ns),
                      &old)
    if rc & RESTORED_OVER:
        _count_closed(f, old.backend)
    if rc & RESTORED:
        _restored(f, b)
        say_more(f.c, 2, &m.snap.flow, b"%s has it", f.backends[b].name, 0)
    pthread_mutex_unlock(&f.restore_lock)


cdef bint _waits(frontend *f, conn *k, uint32_t b) noexcept nogil:
    """Whether a connection waits for a back end's answer that cannot come any more."""
    cdef link *l = &f.c.links[load32(&k.link)]
    return load32(&k.state) == CONN_SENT and load32(&k.req.backend) == b and \
        (load32(&l.gen) != load32(&k.link_gen) or load32(&l.state) != LINK_UP)


cdef bint _ask_again(frontend *f, worker *w, conn *k) noexcept nogil:
    """Repeat an offer on another control connection: the back end may have adopted it, and then no
    other one must. k.lock is held. False: there is no other one now. A link may break while a
    message for it is queued, and then the worker's own buffer is in use."""
    cdef int one = TCP_RECV_QUEUE
    cdef uint8_t *data = <uint8_t *>malloc(max(k.snap.len, <uint32_t>1))
    cdef bint asked
    if data == NULL:
        return False
    setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
    asked = recv(k.fd, data, k.snap.len, MSG_PEEK | MSG_DONTWAIT) == <ssize_t>k.snap.len and \
        _send_offer(f, w, k, data, LINK_OUT_MAX)
    free(data)
    if not asked:
        return False
    set64(&k.deadline_ns, now_ns() + f.offer_ns)
    say_more(f.c, 1, &k.req.flow, b"asked %s again, as a control connection broke",
             f.backends[k.req.backend].name, 0)
    return True


cdef void _ask_all_again(frontend *f, worker *w, uint32_t b) noexcept nogil:
    """A back end has a new control connection."""
    cdef conn *k
    cdef uint32_t i
    for i in range(f.nconns):
        k = &f.conns[i]
        if _waits(f, k, b):
            pthread_mutex_lock(&k.lock)
            if _waits(f, k, b):
                _ask_again(f, w, k)
            pthread_mutex_unlock(&k.lock)


cdef void _lose_link(frontend *f, backend *be, uint32_t index) noexcept nogil:
    """A back end has a link no longer. It may break while it is entered: whoever takes it off the
    list counts that."""
    cdef uint32_t i
    for i in range(LINKS_MAX):
        if cas32(&be.link[i], index, MAX_LINKS):
            add32(&be.may.links, -1)
            _void_verdicts(f)


cdef void _on_link_down(core *c, worker *w, link *l) noexcept nogil:
    """Only the back end knows whether it has adopted what was offered on a link. It is asked on
    another link, or when it is back. If it closed the link (it was killed, then), it has REVIVE_NS
    for that before the next back end is offered the connection. If we did, since it does not
    answer, it may still find the offer: it has until it would refuse that as too old."""
    cdef frontend *f = <frontend *>c.role
    cdef backend *be = &f.backends[l.peer]
    cdef uint32_t i, index = <uint32_t>(l - c.links)
    cdef conn *k
    _lose_link(f, be, index)
    for i in range(f.nconns):
        k = &f.conns[i]
        if load32(&k.state) != CONN_SENT or load32(&k.link) != index:
            continue
        # the lock may be ours: a link can break while its own answer is being sent
        if pthread_mutex_trylock(&k.lock) != 0:
            continue  # then the deadline takes care of it
        if k.state == CONN_SENT and k.link == index and k.link_gen == l.gen and \
                (load32(&be.may.dead) or not _ask_again(f, w, k)) and l.gone:
            set64(&k.deadline_ns, min(k.deadline_ns, now_ns() + REVIVE_NS))
        pthread_mutex_unlock(&k.lock)


cdef void _stalled(frontend *f, conn *k) noexcept nogil:
    """A back end did not answer in time. It must not find the offer later: its links are broken (by
    Python, at once), and it refuses what has grown old on the way."""
    store32(&f.backends[k.req.backend].may.dead, 1)
    _void_verdicts(f)
    notice(f.c)
