# SPDX-License-Identifier: GPL-2.0-or-later
# What Python may call.

cdef class BackEnd(Core):
    """The back end's shared state.

    maxclients: adopted connections that the application has open at one time; stale: seconds after
    which an offer is too old to be adopted.
    """

    def __cinit__(self, uint32_t maxclients, double stale=2.0):
        cdef uint32_t i, size = 16, entries = maxclients * 2 + 256
        if not 0 < maxclients <= 1 << 24:
            raise ValueError("maxclients out of range")
        self.b = <backend_state *>calloc(1, sizeof(backend_state))
        if self.b == NULL:
            raise MemoryError
        while size < entries:
            size *= 2
        self.b.mask = size - 1
        self.b.max = maxclients
        self.b.entries = entries
        self.b.pool = <adopted *>calloc(entries, sizeof(adopted))
        self.b.buckets = <adopted **>calloc(size, sizeof(adopted *))
        if self.b.pool == NULL or self.b.buckets == NULL:
            raise MemoryError
        for i in range(entries):
            self.b.pool[i].next = self.b.free_list
            self.b.free_list = &self.b.pool[i]
        pthread_mutex_init(&self.b.lock, NULL)
        pthread_mutex_init(&self.b.feed_lock, NULL)
        pthread_mutex_init(&self.b.reap_lock, NULL)
        pthread_mutex_init(&self.b.ring_lock, NULL)
        self.b.c = self.c
        _take_path(self.b, NULL)
        self.b.stale_ns = <uint64_t>(stale * 1e9)
        self.b.claimed = int.from_bytes(os.urandom(7), "little")
        self.b.netlink_fd = -1
        self.c.role = self.b
        self.c.on_event = _on_event
        self.c.on_message = _on_message
        self.c.on_link_down = _on_link_down
        self.c.on_timer = _on_timer
        self.c.on_retire = _on_retire
        self._open(20)

    def __dealloc__(self):
        cdef leftover *p
        if self.b == NULL:
            return
        while self.b.leftovers != NULL:
            p = self.b.leftovers
            self.b.leftovers = p.next
            free(p)
        pthread_mutex_destroy(&self.b.lock)
        pthread_mutex_destroy(&self.b.feed_lock)
        pthread_mutex_destroy(&self.b.reap_lock)
        pthread_mutex_destroy(&self.b.ring_lock)
        free(self.b.pool)
        free(self.b.buckets)
        free(self.b)

    def start(self, datapath):
        """Begin to watch for the end of connections, over an opened datapath."""
        cdef BeDatapath d = datapath
        self.datapath = d
        self.b.dp = d.table
        _take_path(self.b, d.table.fast)
        nl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)  # SOCK_DIAG
        nl.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        nl.bind((0, 1 << (SKNLGRP_INET_TCP_DESTROY - 1) | 1 << (SKNLGRP_INET6_TCP_DESTROY - 1)))
        nl.setblocking(False)
        self.fds["netlink"] = self.b.netlink_fd = nl.detach()
        _await_ends(self.b, EPOLL_CTL_ADD)
        if _has_path(self.b):
            watch(self.c, EPOLL_CTL_ADD, self.b.dp.fast.event_fd, EPOLLIN | EPOLLET, EV_RING, 0, 0)
            watch(self.c, EPOLL_CTL_ADD, self.b.dp.fast.tap_fd, EPOLLIN | EPOLLET, EV_TAP, 0, 0)
            _tell_live(self.b)

    cdef void _tell(self, const uint8_t *message, uint32_t length, links=None):
        """On links by their indexes, or on all."""
        cdef worker *w = self.outsider()
        cdef int i
        for i in range(MAX_LINKS) if links is None else links:
            if load32(&self.c.links[i].state) == LINK_UP:
                with nogil:
                    link_put(self.c, w, &self.c.links[i], message, length, NULL, 0)
        with nogil:
            self.flush_outsider()

    def tell_server(self, uint64_t said):
        """SERVER to all front ends: see message.pxd."""
        cdef uint8_t buf[MSG_HEADER]
        self._tell(buf, message_short(buf, MSG_SERVER, said))

    def tell_place(self, uint64_t said, str vaddr, int vport, links):
        """PLACE on the links of front ends that know it: see message.pxd."""
        cdef uint8_t buf[MSG_PLACE_SIZE]
        cdef uint8_t addr[16]
        address_bytes(vaddr, addr)
        self._tell(buf, message_place(buf, said, addr, htons(vport)), links)

    def claim(self, uint32_t peer):
        """Note connections that an earlier run adopted, for a front end that knows as little of
        them: whatever sockets there are. Called in a thread of its own, one at a time, behind
        catch_up(). Raises OSError."""
        cdef SockList sockets = SockList(CONNECTED)
        cdef const inet_diag_msg *s
        with nogil:
            s = sockets.next()
            while s != NULL:
                _claim_socket(self.b, peer, s)
                s = sockets.next()
        sockets.check()

    def asked(self):
        """[(link, its generation, its peer, number), ...] of front ends that have asked what there
        is since the last call."""
        cdef link *l
        cdef uint32_t i, number
        out = []
        for i in range(MAX_LINKS):
            l = &self.c.links[i]
            number = xchg32(&l.asked, 0) if load32(&l.state) == LINK_UP else 0
            if number:
                out.append((i, l.gen, l.peer, number))
        return out

    def tell_flows(self, uint32_t link_index, uint32_t gen, uint32_t number, uint32_t at=0):
        """Answer a front end's question; what ends later is told behind. Not if the link is broken,
        or another one by now: then it asks again. It is a long answer: returns the place in the
        table at which to go on (the same one: the link has no room yet), or None."""
        cdef worker *w = self.outsider()
        cdef link *l = &self.c.links[link_index]
        if l.gen != gen or load32(&l.state) != LINK_UP:
            return None
        with nogil:
            at = _tell_piece(self.b, w, l, number, at)
            self.flush_outsider()
        return at if at <= self.b.mask else None

    def release(self, uint32_t peer):
        """Free the place of a front end without links, for another one. False: it has connections
        here, of which it may want to hear."""
        cdef bint found
        self.catch_up()
        with nogil:
            found = _has_any(self.b, peer, False)
        if found:
            return False
        if load32(&self.b.holder) == peer + 1:
            store32(&self.b.holder, 0)
        if peer < TCPHA_MAX_FAST:
            store32(&self.b.dp.fast.keys[peer].used, 0)
        return True

    def leave_fast_path(self):
        """Tell front ends to send no more requests that nobody has offered."""
        cdef uint8_t buf[MSG_HEADER]
        self._tell(buf, message_short(buf, MSG_KEYED, 0))

    def refuse_all(self):
        """Adopt nothing more (FULL is the answer); what lives goes on."""
        with nogil:
            pthread_mutex_lock(&self.b.lock)
            self.b.unloading = 1
            _tell_live(self.b)
            pthread_mutex_unlock(&self.b.lock)

    def check(self, uint32_t at=0):
        """Tell front ends of connections that ended while they were away. There may be many:
        returns the place in the table at which to go on, or None."""
        cdef worker *w = self.outsider()
        with nogil:
            at = _check_piece(self.b, w, at, at + PIECE)
            self.flush_outsider()
        return at if at <= self.b.mask else None

    def catch_up(self):
        """Take note of what the packet path has adopted up to now."""
        cdef worker *w = self.outsider()
        with nogil:
            _on_ring(self.b, w)
            self.flush_outsider()

    def counters(self):
        cdef be_counters n
        read_counters(&n, &self.b.n, sizeof(n))
        from tcpha._fast.message import REFUSALS
        out = {"adopted": n.adopted, "fast": n.fast, "closed": n.closed,
               "live": load32(&self.b.live),
               "refused": sum([n.refused[i] for i in range(16)]), "late_feeds": n.late,
               "resyncs": n.resyncs}
        out["refusals"] = {text.decode(): n.refused[i] for i, text in enumerate(REFUSALS)
                           if n.refused[i]}
        return out

    def has_any_of(self, uint32_t peer):
        """Whether a connection lives that a front end knows, or may know."""
        cdef bint found
        with nogil:
            found = _has_any(self.b, peer, True)
        return bool(found)
