# SPDX-License-Identifier: GPL-2.0-or-later
# A connection in hand has a slot; and what we answer ourselves.

cdef inline void _flow_from(const sockaddr_in *client, const service *s,
                            tcpha_flow *flow) noexcept nogil:
    memset(flow, 0, sizeof(tcpha_flow))
    flow.caddr[10] = flow.caddr[11] = 0xff
    memcpy(flow.caddr + 12, &client.sin_addr, 4)
    flow.cport = client.sin_port
    memcpy(flow.vaddr, s.vaddr, 16)
    flow.vport = s.vport


# Slots

cdef conn *_take_slot(frontend *f) noexcept nogil:
    cdef conn *k = NULL
    pthread_mutex_lock(&f.pool_lock)
    if f.pool_len:
        set32(&f.pool_len, f.pool_len - 1)
        k = &f.conns[f.pool[f.pool_len]]
    else:
        f.starved = 1
    pthread_mutex_unlock(&f.pool_lock)
    return k


cdef void _free_slot(frontend *f, conn *k) noexcept nogil:
    """The slot's lock is held; so it stays until the caller lets go."""
    cdef bint wake
    set32(&k.state, CONN_FREE)
    k.fd = -1
    k.gen += 1
    pthread_mutex_lock(&f.pool_lock)
    f.pool[f.pool_len] = k.index
    set32(&f.pool_len, f.pool_len + 1)
    wake = f.starved != 0
    f.starved = 0
    pthread_mutex_unlock(&f.pool_lock)
    if wake:                   # a changed registration reports the backlog again
        _await_all(f)


cdef void _close(frontend *f, conn *k) noexcept nogil:
    """Close the socket: silently if frozen, else as close() does."""
    close(k.fd)
    _free_slot(f, k)


cdef void _watch_client(frontend *f, conn *k) noexcept nogil:
    """Have events of the client reported; once is enough. One that is due comes at once."""
    if k.watched:
        return
    k.watched = True
    if watch(f.c, EPOLL_CTL_ADD, k.fd, CLIENT_EVENTS, EV_CLIENT, k.index, k.gen) < 0:
        _close(f, k)


# Answers of our own

cdef const char *ANSWER_400 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n"
    b"Connection: close\r\n\r\nBad Request\n")
cdef const char *ANSWER_408 = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 16\r\n"
    b"Connection: close\r\n\r\nRequest Timeout\n")
cdef const char *ANSWER_431 = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 32\r\nConnection: close\r\n\r\nRequest Header Fields Too Large\n")
cdef const char *ANSWER_503 = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\nService Unavailable\n")

cdef bint _discard(conn *k) noexcept nogil:
    """Throw away what the client has sent, so that close() sends no RST. False at its end."""
    cdef ssize_t n
    while True:
        n = recv(k.fd, NULL, SCRATCH, MSG_DONTWAIT | MSG_TRUNC)
        if n > 0 or (n < 0 and errno == EINTR):
            continue
        return n < 0 and errno == EAGAIN


cdef void _thaw(frontend *f, conn *k) noexcept nogil:
    """The connection is our own stack's again, if it was frozen for an offer."""
    cdef int off = -1, one = 1  # -1: without a window probe
    if k.frozen:
        setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR, &off, sizeof(off))
        # The kernel takes this from a socket that was in repair mode, which would keep our next run
        # from its port even in TIME_WAIT.
        setsockopt(k.fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one))
        k.frozen = False
    if k.diverted:
        f.dp.give_back(f.dp.self, &k.req.flow, k.index)
        k.diverted = False


cdef void _answer(frontend *f, conn *k, const char *text, uint64_t *counter) noexcept nogil:
    """Send a response and close in the lingering way."""
    cdef size_t n
    _thaw(f, k)
    add64(counter, 1)
    _discard(k)
    n = strlen(text)
    if k.method_head:  # no content then (RFC 9110 section 9.3.2)
        n = <size_t>(strstr(text, b"\r\n\r\n") - text) + 4
    send(k.fd, text, n, MSG_DONTWAIT | MSG_NOSIGNAL)
    shutdown(k.fd, SHUT_WR)
    set32(&k.state, CONN_LINGER)
    set64(&k.deadline_ns, now_ns() + LINGER_NS)
    _watch_client(f, k)


cdef void _leave_silent(frontend *f, conn *k) noexcept nogil:
    """Close without a word. Where no request has begun, nobody waits for an answer: a client that
    keeps the connection for later would take it for the answer to its first request."""
    _discard(k)                # empty lines, perhaps
    _close(f, k)
