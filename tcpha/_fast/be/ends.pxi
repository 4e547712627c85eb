# SPDX-License-Identifier: GPL-2.0-or-later
# The end of connections: what the kernel says of it, and looking for what it has not said.

cdef inline bint _living(int owner) noexcept nogil:
    return owner == DP_ALIVE or owner == DP_CLOSING


cdef inline bint _unborn(adopted *a, int owner) noexcept nogil:
    """Nobody owns the 4-tuple; but unless its end has been reported, the packet that adopted it may
    still be on its way up (its CPU may be doing something else), and its socket come."""
    return owner == 0 and a.fast and now_ns() - a.since_ns < YOUNG_NS


cdef bint _tell_closed(backend_state *b, worker *w, adopted *a, uint32_t how) noexcept nogil:
    """CLOSED to the front end: on the link that the handoff came by, so that it cannot overtake
    ADOPTED, or on another one if that is gone. False: there is none. Others that know the
    connection, too, may be told twice, or ask when they are back."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef uint32_t i, n = message_closed(buf, a.id, &a.flow, how)
    cdef link *l = &b.c.links[a.link]
    cdef bint told = l.gen == a.link_gen and link_put(b.c, w, l, buf, n, NULL, 0) == 0
    for i in range(MAX_LINKS):
        if told and not a.shared:
            break
        l = &b.c.links[i]
        if load32(&l.state) != LINK_UP:
            continue
        if l.peer != a.peer:
            if a.shared:
                link_put(b.c, w, l, buf, n, NULL, 0)
        elif not told:
            told = link_put(b.c, w, l, buf, n, NULL, 0) == 0
    return told


cdef inline finished *_was_over(backend_state *b, uint64_t id) noexcept nogil:
    return &b.over[(id * 0x9e3779b97f4a7c15u) >> 52]


cdef bint _ended(backend_state *b, worker *w, adopted *a, uint32_t how) noexcept nogil:
    """A connection is over. b.lock is held. True: it is out of the table; else nobody could be told
    yet."""
    cdef finished *was = _was_over(b, a.id)
    was.id = a.id
    was.flow = a.flow
    if not a.over:
        b.dp.ended(b.dp.self, &a.flow)
        _set_open(b, a, False)
        add64(&b.n.closed, 1)
        say_flow(b.c, 2, &a.flow, b"closed")
    if _tell_closed(b, w, a, how):
        _remove(b, a)
        return True
    a.over = True  # told when the front end is back
    return False


cdef bint _replace(backend_state *b, worker *w, const tcpha_flow *flow) noexcept nogil:
    """An older connection of the flow is over: the client could not have connected anew otherwise.
    b.lock is held. Whether there was one."""
    cdef adopted *a = _find(b, flow)
    if a == NULL:
        return False
    if not _ended(b, w, a, END_GONE):
        _remove(b, a)
    return True


cdef uint32_t _check_piece(backend_state *b, worker *w, uint32_t at, uint32_t end) noexcept nogil:
    """Look at each connection of some buckets. The first that was not looked at."""
    cdef uint32_t i
    cdef int owner
    cdef bint unborn
    cdef adopted *a
    cdef adopted *following
    for i in range(at, min(end, b.mask + 1)):
        pthread_mutex_lock(&b.lock)
        a = b.buckets[i]
        while a != NULL:
            following = a.next
            if a.adopting:
                a.recheck = True
                a = following
                continue
            owner = b.dp.alive(b.dp.self, w.index, &a.flow)
            unborn = _unborn(a, owner)
            if a.over or not (_living(owner) or unborn):
                _ended(b, w, a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
            else:
                _set_open(b, a, owner == DP_ALIVE or unborn)
            a = following
        pthread_mutex_unlock(&b.lock)
    return min(end, b.mask + 1)


cdef void _check_all(backend_state *b, worker *w) noexcept nogil:
    """Look at each connection: after lost reports, or for want of room."""
    _check_piece(b, w, 0, b.mask + 1)


cdef void _reap(backend_state *b, worker *w, uint64_t asked_ns, bint anyway) noexcept nogil:
    """Before refusing for want of room, look for connections that have ended: reports lag under
    load, and those that the application has closed are no load for it. One look serves all who
    asked before it began. anyway: look though there is some room."""
    pthread_mutex_lock(&b.reap_lock)
    if (anyway or _is_full(b)) and b.looked_ns < asked_ns:
        b.looked_ns = now_ns()
        _check_all(b, w)
    pthread_mutex_unlock(&b.reap_lock)


cdef void _check(backend_state *b, worker *w, const tcpha_flow *flow) noexcept nogil:
    cdef adopted *a
    cdef int owner
    pthread_mutex_lock(&b.lock)
    a = _find(b, flow)
    if a != NULL and a.adopting:
        a.recheck = True  # perhaps the end of an earlier connection on the same 4-tuple
    elif a != NULL and not a.over:
        owner = b.dp.alive(b.dp.self, w.index, &a.flow)  # the report may be of an older one
        if (a.reused or a.untold) and _unborn(a, owner):
            _again(b, flow)
        elif not _living(owner):
            _ended(b, w, a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
        elif a.untold:
            _share(b, w, a)
    pthread_mutex_unlock(&b.lock)


cdef void _look_again(backend_state *b, worker *w) noexcept nogil:
    cdef tcpha_flow flow
    cdef uint32_t n
    pthread_mutex_lock(&b.lock)
    n = b.nagain
    while n:
        n -= 1
        flow = b.again[n]
        b.nagain -= 1
        b.again[n] = b.again[b.nagain]
        pthread_mutex_unlock(&b.lock)
        _check(b, w, &flow)
        pthread_mutex_lock(&b.lock)
        n = min(n, b.nagain)
    pthread_mutex_unlock(&b.lock)


cdef void _on_netlink(backend_state *b, worker *w) noexcept nogil:
    cdef ssize_t n
    cdef uint8_t *p
    cdef nlmsghdr *h
    cdef inet_diag_msg *d
    cdef tcpha_flow flow
    cdef bint lost = False, unheard = False
    cdef int _i
    for _i in range(TURN):     # the caller, or the timer, brings us back for the rest
        n = recv(b.netlink_fd, w.scratch, SCRATCH, MSG_DONTWAIT)
        if n < 0:
            if errno == ENOBUFS:
                lost = True
                continue
            if errno == EINTR:
                continue
            break
        _on_ring(b, w)     # before its end is reported, each adoption was noted there
        p = w.scratch
        while n >= <ssize_t>(NLMSG_HDRLEN + sizeof(inet_diag_msg)):
            h = <nlmsghdr *>p
            if h.nlmsg_len < NLMSG_HDRLEN + sizeof(inet_diag_msg) or h.nlmsg_len > n:
                break
            d = <inet_diag_msg *>(p + NLMSG_HDRLEN)
            # A listener is gone, and with it the sockets in its accept queue: these were
            # disconnected before, so that their reports name no client. See inet_csk_listen_stop().
            if d.id.idiag_dport == 0 and is_listened_on(b.dp.places, d.id.idiag_sport):
                unheard = True
            if _flow_of(d, &flow) and b.dp.outside(b.dp.self, &flow):
                _check(b, w, &flow)
                add32(&b.ends, 1)
            p += (h.nlmsg_len + 3) & ~3u
            n -= (h.nlmsg_len + 3) & ~3u
    if lost:
        add64(&b.n.resyncs, 1)
    if lost or unheard:
        _check_all(b, w)


cdef bint _flow_of(const inet_diag_msg *d, tcpha_flow *flow) noexcept nogil:
    """The flow of a socket; its local end is the VIP. IPv6 sockets may hold v4-mapped ones."""
    if d.idiag_family == 2:  # AF_INET
        memset(flow, 0, sizeof(tcpha_flow))
        flow.vaddr[10] = flow.vaddr[11] = flow.caddr[10] = flow.caddr[11] = 0xff
        memcpy(flow.vaddr + 12, d.id.idiag_src, 4)
        memcpy(flow.caddr + 12, d.id.idiag_dst, 4)
    elif d.idiag_family == 10:  # AF_INET6
        memcpy(flow.vaddr, d.id.idiag_src, 16)
        memcpy(flow.caddr, d.id.idiag_dst, 16)
    else:
        return False
    flow.vport = d.id.idiag_sport
    flow.cport = d.id.idiag_dport
    return True


cdef void _claim_socket(backend_state *b, uint32_t peer, const inet_diag_msg *s) noexcept nogil:
    cdef tcpha_flow flow
    cdef uint32_t rcv_nxt = 0
    cdef adopted *a = NULL
    if not _flow_of(s, &flow) or not b.dp.outside(b.dp.self, &flow):
        return
    pthread_mutex_lock(&b.lock)
    if _find(b, &flow) == NULL and \
            b.dp.position(b.dp.self, TCPHA_MAX_OPS - 2, &flow, &rcv_nxt):
        a = _insert_any(b, &flow)
    if a != NULL:
        a.since_ns = now_ns()
        a.found = True
        a.id = b.claimed = b.claimed + 1
        a.link = a.link_gen = 0
        a.peer = peer
    pthread_mutex_unlock(&b.lock)


cdef int _await_ends(backend_state *b, int op) noexcept nogil:
    """Have the next report wake a worker, once."""
    return watch(b.c, op, b.netlink_fd, EPOLLIN | EPOLLONESHOT, EV_NETLINK, 0, 0)


cdef void _pace(backend_state *b, worker *w) noexcept nogil:
    """At each turn of the timer. Where many connections end, a wake-up and a message for each would
    cost more than all else: the reports wait for the timer then, unless so many in the table that
    are over could be missed as room for others."""
    cdef uint32_t n
    cdef bint lazy
    if load32(&b.lazy):
        _on_netlink(b, w)
    n = xchg32(&b.ends, 0)
    lazy = n >= MANY_ENDS and (<uint64_t>load32(&b.opened) + 2 * n) * 2 < b.max
    if lazy:
        store32(&b.lazy, 1)
    elif xchg32(&b.lazy, 0):
        _await_ends(b, EPOLL_CTL_MOD)


cdef void _on_waiting(backend_state *b, worker *w) noexcept nogil:
    """Requests came when there seemed to be no room."""
    _on_ring(b, w)
    if not b.unloading:
        _reap(b, w, now_ns(), True)
    if b.dp.fast.admit(b.dp.self, w.scratch, b.unloading or _is_full(b)):
        rearm(b.c, b.dp.fast.tap_fd, EV_TAP, 0)
