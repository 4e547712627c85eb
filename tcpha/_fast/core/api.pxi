# SPDX-License-Identifier: GPL-2.0-or-later
# What Python may call.

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
            link_break(self.c, w, &self.c.links[index], 0, False)
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
