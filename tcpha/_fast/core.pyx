# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop that the workers of both roles share, and the control connections.

All workers wait on one epoll instance, so that a slow client occupies none of them and any of them
may go. What has much to say gets a turn like all others: where more is left after one, rearm() puts
it at the end of the kernel's list. Memory that Python replaces (rules, links) is freed only after
each worker has passed a point where it holds nothing: see Core.later().
"""
import os
from collections import deque
from functools import partial

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove

from tcpha._fast.defs cimport TCPHA_LOCKED_OP, TCPHA_MAX_OPS, tcpha_flow
from tcpha._fast.message cimport (
    MSG_PING, MSG_PONG, MSG_PONG_SIZE, message, message_decode, message_pong, message_short)
from tcpha._fast.packet cimport flow_text
from tcpha._fast.peerclock cimport clock_answered, clock_told
from tcpha._fast.sys cimport (
    EAGAIN, ECONNRESET, EINTR, EOPNOTSUPP, EPIPE, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT,
    EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, IPPROTO_TCP, MSG_DONTWAIT,
    MSG_NOSIGNAL, SHUT_RDWR, add32, add64, epoll_ctl, epoll_event, epoll_wait, errno, getsockopt,
    load32, load64, now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, read, recv, send, set32, set64, shutdown, socklen_t, store32, store64,
    write, xchg32)
from tcpha._fast.tls cimport (
    TLS_BROKEN, TLS_CLOSED, TLS_RECORD, TLS_SEALED, Channel, tls_open, tls_received, tls_seal)

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info_head "tcp_info":
        uint8_t tcpi_state
        uint32_t tcpi_unacked

cdef uint64_t HELLO_NS = 3000000000  # that HELLO takes at most: PATIENCE in control/hello.py
MOST_LINKS = MAX_LINKS
cdef enum:
    EVENTS = 64
    TURN = 4               # reads of a control connection before it is others' turn
    LINK_OUT_MIN = 1 << 16  # bytes for the queue of a control connection; it grows,
    LINK_LONG = 1 << 20     # and shrinks again where it grew beyond these
    LINK_EVENTS = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET


cdef uint64_t event_data(int kind, uint32_t index, uint32_t gen) noexcept nogil:
    return (<uint64_t>kind << 56) | (<uint64_t>(gen & 0xffffff) << 32) | index


cdef int watch(core *c, int op, int fd, uint32_t events, int kind, uint32_t index,
               uint32_t gen) noexcept nogil:
    cdef epoll_event ev
    ev.events = events
    ev.data.u64 = event_data(kind, index, gen)
    return epoll_ctl(c.epfd, op, fd, &ev)


cdef void rearm(core *c, int fd, int kind, uint32_t index) noexcept nogil:
    """Have an edge-triggered descriptor that may still be readable wake a worker again."""
    watch(c, EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLET, kind, index, 0)


cdef void say(core *c, uint32_t level, const char *text) noexcept nogil:
    """Log a line if dbglevel is at least level. Never blocks: a full pipe loses the line."""
    cdef char line[512]
    cdef int n
    if level > load32(&c.dbglevel):
        return
    n = snprintf(line, sizeof(line), b"%u%s\n", level, text)
    if n >= <int>sizeof(line):
        n = sizeof(line)
        line[n - 1] = c'\n'
    if write(c.log_fd, line, n) < 0:
        add32(&c.log_lost, 1)


cdef void say_flow(core *c, uint32_t level, const tcpha_flow *flow,
                   const char *text) noexcept nogil:
    cdef char line[320]
    cdef int n
    if level > load32(&c.dbglevel):
        return
    n = flow_text(flow, line, sizeof(line))
    snprintf(line + n, sizeof(line) - n, b": %s", text)
    say(c, level, line)


cdef void say_more(core *c, uint32_t level, const tcpha_flow *flow, const char *fmt, const char *a,
                   long b) noexcept nogil:
    """As say_flow(). fmt takes a text (%s), or a text and a long (%ld)."""
    cdef char line[256]
    if level > load32(&c.dbglevel):
        return
    snprintf(line, sizeof(line), fmt, a, b)
    say_flow(c, level, flow, line)


cdef void say_number(core *c, uint32_t level, const tcpha_flow *flow, const char *fmt,
                     long a) noexcept nogil:
    """As say_flow(). fmt takes a long (%ld)."""
    cdef char line[160]
    if level > load32(&c.dbglevel):
        return
    snprintf(line, sizeof(line), fmt, a)
    say_flow(c, level, flow, line)


cdef void notice(core *c) noexcept nogil:
    """Wake Python's supervisor."""
    cdef uint64_t one = 1
    write(c.notice_fd, &one, 8)


cdef bint half_closed(int fd) noexcept nogil:
    """True if the peer has sent a FIN, seen before what it stands behind is read. Never true of the
    pair of sockets that leads to the Local Node."""
    cdef tcp_info_head info
    cdef socklen_t n = sizeof(info)
    if getsockopt(fd, IPPROTO_TCP, 11, &info, &n) < 0:  # TCP_INFO
        return errno != EOPNOTSUPP
    return info.tcpi_state != 1  # TCP_ESTABLISHED


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
        l.error = error
        link_break(c, w, l, error == EPIPE or error == ECONNRESET)


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
    up = l.state == LINK_UP
    if up and _has_room(l, <uint64_t>an + bn):
        memcpy(l.out + l.out_len, a, an)
        if bn:
            memcpy(l.out + l.out_len + an, b, bn)
        l.out_len += an + bn
        ok = True
    pthread_mutex_unlock(&l.lock)
    if up and not ok:
        say(c, 0, b"no memory for what a control connection has to carry: closing it")
        link_break(c, w, l, False)
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


cdef void link_break(core *c, worker *w, link *l, bint gone) noexcept nogil:
    """Take a link out of use. Whoever comes first tells the role; Python closes the descriptor.
    gone: the peer has closed it, and will read nothing more from it."""
    cdef bint first
    pthread_mutex_lock(&l.lock)
    first = l.state == LINK_UP
    if first:
        store32(&l.state, LINK_DOWN)
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
    cdef int used, turns = 0
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
            link_break(c, w, l, False)
            return False
        if got < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                l.error = errno
                link_break(c, w, l, l.error == ECONNRESET)
            return False
        if got == 0:
            link_break(c, w, l, True)
            return False
        l.buf_len += <uint32_t>got
        set64(&l.last_rx_ns, now_ns())
        at = 0
        while load32(&l.state) == LINK_UP:
            used = message_decode(l.buf + at, l.buf_len - at, &m)
            if used < 0:
                say(c, 0, b"malformed message on a control connection: closing it")
                link_break(c, w, l, False)
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
                link_break(c, w, l, False)
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


cdef void _loop(core *c, worker *w) noexcept nogil:
    cdef epoll_event ev[EVENTS]
    cdef uint64_t data, count
    cdef int n, i, kind
    cdef bint retire = False
    while not retire:
        n = epoll_wait(c.epfd, ev, EVENTS, -1)
        store64(&w.epoch, load64(&c.epoch))
        set32(&w.busy, 1)
        for i in range(n):
            data = ev[i].data.u64
            kind = <int>(data >> 56)
            if kind == EV_LINK:
                _on_link(c, w, <uint32_t>data, <uint32_t>(data >> 32) & 0xffffff, ev[i].events)
            elif kind == EV_WAKE:
                if load32(&c.stopping) or read(c.wake_fd, &count, 8) == 8:
                    retire = True  # after this batch
            elif kind == EV_TIMER:
                if read(c.timer_fd, &count, 8) == 8:
                    c.on_timer(c, w, now_ns())
            else:
                c.on_event(c, w, kind, <uint32_t>data, <uint32_t>(data >> 32) & 0xffffff,
                           ev[i].events)
        _flush_dirty(c, w)
        set32(&w.busy, 0)
        store64(&w.epoch, 0)


cdef class Core:
    """What Python holds of the shared state. The roles derive from it.

    timer_ms: period of the timer that checks deadlines.
    """

    def __cinit__(self, *args, **kwargs):
        cdef int i
        self.c = <core *>calloc(1, sizeof(core))
        if self.c == NULL:
            raise MemoryError
        self.c.epoch = 1
        self.c.epfd = self.c.wake_fd = self.c.timer_fd = self.c.log_fd = self.c.notice_fd = -1
        for i in range(MAX_LINKS):
            pthread_mutex_init(&self.c.links[i].lock, NULL)
        self.fds = {}
        self.channels = {}
        self.late = deque()

    def _open(self, int timer_ms):
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)
        self.log_file = os.fdopen(reader, "rb")
        self.fds["log"] = writer
        self.c.log_fd = writer
        epfd = libc.epoll_create1(os.O_CLOEXEC)
        timer = libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)  # CLOCK_MONOTONIC
        period = (ctypes.c_long * 4)(0, timer_ms * 1000000, 0, timer_ms * 1000000)
        if epfd < 0 or timer < 0 or libc.timerfd_settime(timer, 0, period, None) < 0:
            raise OSError(ctypes.get_errno(), "cannot create epoll or timer")
        self.fds["epoll"] = self.c.epfd = epfd
        self.fds["timer"] = self.c.timer_fd = timer
        self.fds["wake"] = self.c.wake_fd = os.eventfd(
            0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fds["notice"] = self.c.notice_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        watch(self.c, EPOLL_CTL_ADD, self.c.wake_fd, EPOLLIN, EV_WAKE, 0, 0)
        watch(self.c, EPOLL_CTL_ADD, self.c.timer_fd, EPOLLIN | EPOLLET, EV_TIMER, 0, 0)

    def __dealloc__(self):
        cdef int i
        if self.c == NULL:
            return
        for i in range(MAX_LINKS):
            free(self.c.links[i].out)
            free(self.c.links[i].buf)
            free(self.c.links[i].sealed)
            pthread_mutex_destroy(&self.c.links[i].lock)
        free(self.c.outside.scratch)
        free(self.c)

    def close(self):
        """Close all descriptors. No worker may be running."""
        self.reclaim()
        for i in range(MAX_LINKS):
            if self.c.links[i].state != LINK_FREE:
                os.close(self.c.links[i].fd)
                self.c.links[i].state = LINK_FREE
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    @property
    def notice_fd(self):
        """Readable when Python should call links() or the like."""
        return self.c.notice_fd

    @property
    def dbglevel(self):
        return self.c.dbglevel

    @dbglevel.setter
    def dbglevel(self, uint32_t level):
        store32(&self.c.dbglevel, level)

    @property
    def log_lost(self):
        return load32(&self.c.log_lost)

    def log_lines(self):
        """The pipe of log lines, a binary file: a digit (the level), the text, a newline."""
        return self.log_file

    # Workers

    def run_worker(self):
        """Be a worker until retired or stopped. Called in a thread of its own."""
        cdef worker *w = NULL
        cdef uint32_t i
        for i in range(TCPHA_LOCKED_OP):
            if xchg32(&self.c.workers[i].state, 1) == 0:
                w = &self.c.workers[i]
                break
        if w == NULL:
            raise RuntimeError("too many workers")
        w.index = i
        w.ndirty = 0
        w.scratch = <uint8_t *>malloc(SCRATCH)
        if w.scratch == NULL:
            store32(&w.state, 0)
            raise MemoryError
        with nogil:
            _loop(self.c, w)
            self.c.on_retire(self.c, w)
        free(w.scratch)
        w.scratch = NULL
        store32(&w.state, 0)

    def workers(self):
        """(running, busy): how many there are, how many are handling events right now."""
        cdef uint32_t i, running = 0, busy = 0
        for i in range(TCPHA_MAX_OPS):
            if load32(&self.c.workers[i].state):
                running += 1
                busy += load32(&self.c.workers[i].busy)
        return running, busy

    def retire_worker(self):
        """Ask one idle worker to leave."""
        cdef uint64_t one = 1
        write(self.c.wake_fd, &one, 8)

    def stop_workers(self):
        """Ask all workers to leave."""
        cdef uint64_t many = 1 << 20
        store32(&self.c.stopping, 1)
        write(self.c.wake_fd, &many, 8)

    def later(self, work):
        """Call work() when no worker holds what it could see before this call: see reclaim()."""
        self.late.append((add64(&self.c.epoch, 1), work))

    def reclaim(self):
        """Do what later() was told, as far as no worker stands in its way."""
        cdef uint64_t seen, passed = load64(&self.c.epoch)
        cdef uint32_t i
        for i in range(TCPHA_MAX_OPS):
            seen = load64(&self.c.workers[i].epoch)
            if seen and load32(&self.c.workers[i].state):
                passed = min(passed, seen)
        while self.late and self.late[0][0] <= passed:
            self.late.popleft()[1]()

    # Control connections

    def add_link(self, sock, uint32_t peer, uint64_t clock, Channel channel=None):
        """Hand a connected socket over to the workers; HELLO has been exchanged. Returns its index.

        clock: the peer's, as HELLO told it; channel: what encrypts it, if something does.
        """
        cdef uint32_t i
        cdef link *l
        for i in range(MAX_LINKS):
            if self.c.links[i].state == LINK_FREE:
                break
        else:
            raise RuntimeError("too many control connections")
        l = &self.c.links[i]
        if l.buf == NULL:
            l.buf = <uint8_t *>malloc(LINK_IN)
            l.out = <uint8_t *>malloc(LINK_OUT_MIN)
            l.out_cap = LINK_OUT_MIN
        if channel is not None and l.sealed == NULL:
            l.sealed = <uint8_t *>malloc(TLS_SEALED)
        if l.buf == NULL or l.out == NULL or (channel is not None and l.sealed == NULL):
            raise MemoryError
        self.channels[i] = channel
        l.tls = NULL if channel is None else &channel.t
        sock.setblocking(False)
        l.fd = sock.detach()
        set32(&l.gen, l.gen + 1)
        l.peer = peer
        l.readers = l.asked = 0
        l.paused = False
        l.error = 0
        l.buf_len = l.out_len = l.out_sent = l.sealed_len = l.sealed_sent = 0
        l.last_rx_ns = l.since_ns = now_ns()
        clock_told(&l.clock, clock, HELLO_NS, l.since_ns)
        store32(&l.state, LINK_UP)
        watch(self.c, EPOLL_CTL_ADD, l.fd, LINK_EVENTS, EV_LINK, i, l.gen)
        self.ping(i)
        return i

    def links(self):
        """[(index, peer, up, seconds since the last message), ...] of all links not yet reaped."""
        cdef uint64_t heard
        cdef uint32_t state
        out = []
        for i in range(MAX_LINKS):
            state = load32(&self.c.links[i].state)
            if state == LINK_UP or state == LINK_DOWN:
                heard = load64(&self.c.links[i].last_rx_ns)  # before the clock: a worker sets it
                out.append((i, self.c.links[i].peer, state == LINK_UP, (now_ns() - heard) / 1e9))
        return out

    cdef worker *outsider(self) except NULL:
        """A stand-in for a worker, for calls by Python's supervisor thread (only one at a time)."""
        if self.c.outside.scratch == NULL:
            self.c.outside.scratch = <uint8_t *>malloc(SCRATCH)
            if self.c.outside.scratch == NULL:
                raise MemoryError
            self.c.outside.index = TCPHA_MAX_OPS - 1
        return &self.c.outside

    cdef void flush_outsider(self) noexcept nogil:
        _flush_dirty(self.c, &self.c.outside)
        if self.c.outside.role != NULL:
            self.c.on_retire(self.c, &self.c.outside)

    def link_unacked(self, uint32_t index):
        """Segments on a link that the peer's kernel has not acknowledged."""
        cdef tcp_info_head info
        cdef socklen_t n = sizeof(info)
        if load32(&self.c.links[index].state) != LINK_UP or \
                getsockopt(self.c.links[index].fd, IPPROTO_TCP, 11, &info, &n) < 0:  # TCP_INFO
            return 0
        return info.tcpi_unacked

    def is_busy(self, uint32_t index):
        """Whether what can wait should not be put on a link."""
        cdef link *l = &self.c.links[index]
        cdef bint busy
        with nogil:
            busy = link_queued(l) > LINK_BUSY
        return busy

    def break_link(self, uint32_t index):
        """Close a link (its peer is dead or stalled). What it carried is offered elsewhere."""
        cdef worker *w = self.outsider()
        with nogil:
            link_break(self.c, w, &self.c.links[index], False)
            self.flush_outsider()

    def link_error(self, uint32_t index):
        """The errno with which the kernel broke a link; 0: somebody closed it."""
        return self.c.links[index].error

    def reap_links(self):
        """[(index, peer), ...] of links that have broken since the last call. They are closed, and
        their places free, once no worker uses them."""
        out = []
        for i in range(MAX_LINKS):
            if load32(&self.c.links[i].state) == LINK_DOWN:
                store32(&self.c.links[i].state, LINK_LEFT)
                self.later(partial(self._close_link, i))
                out.append((i, self.c.links[i].peer))
        return out

    def _close_link(self, uint32_t index):
        os.close(self.c.links[index].fd)
        self.c.links[index].tls = NULL
        self.channels.pop(index)
        store32(&self.c.links[index].state, LINK_FREE)

    def ponged(self, uint32_t index):
        """When the latest PING that a link's peer has answered was sent, CLOCK_MONOTONIC in ns: it
        has read all that came before."""
        return load64(&self.c.links[index].ponged)

    def ping(self, uint32_t index):
        """Send a PING on a link; its arrival back shows in links() and ponged()."""
        cdef worker *w = self.outsider()
        cdef uint8_t buf[16]
        with nogil:
            link_put(self.c, w, &self.c.links[index], buf, message_short(buf, MSG_PING, now_ns()),
                     NULL, 0)
            self.flush_outsider()
