# SPDX-License-Identifier: GPL-2.0-or-later
# Control connections: what is queued for them, and what comes.

cdef int _next_bytes(link *l, uint8_t **data) noexcept nogil:
    """What to send next. How many bytes, or -1: they cannot be encrypted. l.lock is held."""
    cdef int n
    if l.tls == NULL:
        data[0] = l.out + l.out_sent
        return <int>(l.out_len - l.out_sent)
    if l.sealed_sent == l.sealed_len and l.out_sent < l.out_len:
        n = <int>min(l.out_len - l.out_sent, <uint32_t>TLS_RECORD)
        l.sealed_sent = l.sealed_len = 0
        l.out_sent += n
        n = tls_seal(l.tls, l.out + l.out_sent - n, n, l.sealed)
        if n < 0:
            return -1
        l.sealed_len = n
    data[0] = l.sealed + l.sealed_sent
    return <int>(l.sealed_len - l.sealed_sent)


cdef uint32_t link_queued(link *l) noexcept nogil:
    """Bytes that wait for its socket to take them."""
    cdef uint32_t n
    pthread_mutex_lock(&l.lock)
    n = l.out_len - l.out_sent
    pthread_mutex_unlock(&l.lock)
    return n


cdef void _shrink(link *l) noexcept nogil:
    """Give back what a long queue took, now that it is empty. l.lock is held."""
    cdef uint8_t *smaller
    if l.out_cap > LINK_LONG:
        smaller = <uint8_t *>realloc(l.out, LINK_OUT_MIN)
        if smaller != NULL:
            l.out = smaller
            l.out_cap = LINK_OUT_MIN


cdef void _rearm_link(core *c, link *l) noexcept nogil:
    watch(c, EPOLL_CTL_MOD, l.fd, LINK_EVENTS, EV_LINK, <uint32_t>(l - c.links), l.gen)


cdef void _flush(core *c, worker *w, link *l) noexcept nogil:
    """Send what is queued, as far as the socket takes it; EPOLLOUT brings us back for the rest."""
    cdef ssize_t n
    cdef int error = 0, want
    cdef uint8_t *data
    cdef bint broken = False, resume
    pthread_mutex_lock(&l.lock)
    while load32(&l.state) == LINK_UP:
        want = _next_bytes(l, &data)
        broken = want < 0
        if want <= 0:
            break
        n = send(l.fd, data, want, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n > 0 and l.tls == NULL:
            l.out_sent += <uint32_t>n
        elif n > 0:
            l.sealed_sent += <uint32_t>n
        elif errno == EINTR:
            continue
        else:
            error = errno
            broken = error != EAGAIN
            break
    if l.out_sent == l.out_len:
        l.out_sent = l.out_len = 0
        _shrink(l)
    resume = l.paused and l.out_len - l.out_sent < LINK_RESUME
    if resume:
        l.paused = False
    pthread_mutex_unlock(&l.lock)
    if resume:
        _rearm_link(c, l)
    if broken:
        link_break(c, w, l, error, error == EPIPE or error == ECONNRESET)


cdef bint _has_room(link *l, uint64_t more) noexcept nogil:
    """Make room for more bytes in the queue. l.lock is held."""
    cdef uint64_t cap = l.out_cap
    cdef uint8_t *grown
    if l.out_sent and l.out_sent * <uint64_t>2 >= l.out_len:
        memmove(l.out, l.out + l.out_sent, l.out_len - l.out_sent)
        l.out_len -= l.out_sent
        l.out_sent = 0
    while cap < l.out_len + more:
        cap *= 2
    if cap == l.out_cap:
        return True
    grown = <uint8_t *>realloc(l.out, cap) if cap <= LINK_OUT_MAX else NULL
    if grown == NULL:
        return False
    l.out = grown
    l.out_cap = <uint32_t>cap
    return True


cdef int link_put(core *c, worker *w, link *l, const uint8_t *a, uint32_t an, const uint8_t *b,
                  uint32_t bn) noexcept nogil:
    """Queue a message made of two parts. It leaves when the worker has handled its batch of events,
    with all others of the batch. 0, or -1: the link is down. What has no room is never left out: a
    link that cannot carry all is broken, and so both ends ask each other anew."""
    cdef uint32_t i
    cdef bint up, ok = False
    pthread_mutex_lock(&l.lock)
    up = load32(&l.state) == LINK_UP
    if up and _has_room(l, <uint64_t>an + bn):
        memcpy(l.out + l.out_len, a, an)
        if bn:
            memcpy(l.out + l.out_len + an, b, bn)
        l.out_len += an + bn
        ok = True
    pthread_mutex_unlock(&l.lock)
    if up and not ok:
        say(c, 0, b"no memory for what a control connection has to carry: closing it")
        link_break(c, w, l, 0, False)
    if not ok:
        return -1
    for i in range(w.ndirty):
        if w.dirty[i] == l:
            return 0
    if w.ndirty == MAX_DIRTY:
        _flush_dirty(c, w)
    w.dirty[w.ndirty] = l
    w.ndirty += 1
    return 0


cdef void _flush_dirty(core *c, worker *w) noexcept nogil:
    while w.ndirty:
        w.ndirty -= 1
        _flush(c, w, w.dirty[w.ndirty])


cdef void link_break(core *c, worker *w, link *l, int error, bint gone) noexcept nogil:
    """Take a link out of use. Whoever comes first tells the role; Python closes the descriptor.
    error: an errno, or 0; gone: the peer has closed it, and will read nothing more from it."""
    cdef bint first
    pthread_mutex_lock(&l.lock)
    first = load32(&l.state) == LINK_UP
    if first:
        store32(&l.state, LINK_DOWN)
        l.error = error
        l.gone = gone
    pthread_mutex_unlock(&l.lock)
    if not first:
        return
    epoll_ctl(c.epfd, EPOLL_CTL_DEL, l.fd, NULL)
    shutdown(l.fd, SHUT_RDWR)
    c.on_link_down(c, w, l)
    notice(c)


cdef ssize_t _receive(worker *w, link *l, uint8_t *to, uint32_t room) noexcept nogil:
    """As recv() does, decrypted; TLS_BROKEN: the peer's bytes are not what it encrypted."""
    cdef ssize_t got
    if l.tls == NULL:
        return recv(l.fd, to, room, MSG_DONTWAIT)
    while True:
        pthread_mutex_lock(&l.lock)
        got = tls_open(l.tls, to, room)
        pthread_mutex_unlock(&l.lock)
        if got > 0 or got == TLS_BROKEN:
            return got
        if got == TLS_CLOSED:
            return 0
        got = recv(l.fd, w.scratch, SCRATCH, MSG_DONTWAIT)
        if got <= 0:
            return got
        pthread_mutex_lock(&l.lock)
        tls_received(l.tls, w.scratch, <uint32_t>got)
        pthread_mutex_unlock(&l.lock)


cdef bint _pauses(link *l) noexcept nogil:
    """Who sends much and reads nothing gets no answers until it does: _flush() goes on then."""
    cdef bint paused
    pthread_mutex_lock(&l.lock)
    paused = l.paused = l.out_len - l.out_sent > LINK_PAUSE
    pthread_mutex_unlock(&l.lock)
    return paused


cdef bint _read_link(core *c, worker *w, link *l) noexcept nogil:
    """Handle what has come. True: there may be more."""
    cdef ssize_t got
    cdef int used, error, turns = 0
    cdef uint32_t at
    cdef message m
    cdef uint8_t pong[MSG_PONG_SIZE]
    while load32(&l.state) == LINK_UP and not _pauses(l):
        if turns == TURN:
            return True
        turns += 1
        got = _receive(w, l, l.buf + l.buf_len, LINK_IN - l.buf_len)
        if got == TLS_BROKEN:
            say(c, 0, b"a control connection was tampered with: closing it")
            link_break(c, w, l, 0, False)
            return False
        if got < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                error = errno
                link_break(c, w, l, error, error == ECONNRESET)
            return False
        if got == 0:
            link_break(c, w, l, 0, True)
            return False
        l.buf_len += <uint32_t>got
        set64(&l.last_rx_ns, now_ns())
        at = 0
        while load32(&l.state) == LINK_UP:
            used = message_decode(l.buf + at, l.buf_len - at, &m)
            if used < 0:
                say(c, 0, b"malformed message on a control connection: closing it")
                link_break(c, w, l, 0, False)
                return False
            if used == 0:
                break
            at += <uint32_t>used
            if m.type == MSG_PING:
                link_put(c, w, l, pong, message_pong(pong, m.id), NULL, 0)
                continue
            if m.type == MSG_PONG:
                store64(&l.ponged, m.id)
                clock_answered(&l.clock, m.id, m.sent_ns, l.last_rx_ns)
            if c.on_message(c, w, l, &m) < 0:
                say(c, 0, b"unexpected message on a control connection: closing it")
                link_break(c, w, l, 0, False)
                return False
        if at:
            l.buf_len -= at
            memmove(l.buf, l.buf + at, l.buf_len)
        _flush_dirty(c, w)  # the peer waits for the answers: do not hold them for the next batch
    return False


cdef void _on_link(core *c, worker *w, uint32_t index, uint32_t gen,
                   uint32_t events) noexcept nogil:
    cdef link *l = &c.links[index]
    if load32(&l.state) != LINK_UP or (l.gen & 0xffffff) != gen:
        return
    if events & EPOLLOUT:
        _flush(c, w, l)
    # what came behind the peer's HELLO may have been decrypted, and no event tells of it
    if l.tls != NULL or events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        # one reader at a time; who comes second makes the first look again
        if add32(&l.readers, 1) == 1:
            while True:
                store32(&l.readers, 1)
                if _read_link(c, w, l):
                    store32(&l.readers, 0)
                    _rearm_link(c, l)
                    break
                if add32(&l.readers, -1) == 0:
                    break
