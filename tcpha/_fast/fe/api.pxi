# SPDX-License-Identifier: GPL-2.0-or-later
# What Python may call.

cdef class FrontEnd(Core):
    """The front end's shared state.

    maxclients: connections in hand at one time (at most 65,535); headlimit in bytes; headtimeout
    and offer_timeout in seconds.
    """

    def __cinit__(self, int maxclients, uint32_t headlimit, double headtimeout,
                  double offer_timeout=3.0):
        cdef uint32_t i
        if not 0 < maxclients < 1 << SLOT_BITS:
            raise ValueError("maxclients out of range")
        self.f = <frontend *>calloc(1, sizeof(frontend))
        if self.f == NULL:
            raise MemoryError
        self.f.nconns = maxclients
        self.f.conns = <conn *>calloc(maxclients, sizeof(conn))
        self.f.pool = <uint32_t *>calloc(maxclients, sizeof(uint32_t))
        if not _open_no_path(self.f) or self.f.conns == NULL or self.f.pool == NULL:
            raise MemoryError
        slow_open(&self.f.slow)
        pthread_mutex_init(&self.f.pool_lock, NULL)
        pthread_mutex_init(&self.f.return_lock, NULL)
        pthread_mutex_init(&self.f.restore_lock, NULL)
        pthread_mutex_init(&self.f.place_lock, NULL)
        pthread_mutex_init(&self.f.access_lock, NULL)
        for i in range(self.f.nconns):
            self.f.conns[i].index = i
            self.f.conns[i].fd = -1
            pthread_mutex_init(&self.f.conns[i].lock, NULL)
            self.f.pool[i] = maxclients - 1 - i
        self.f.pool_len = maxclients
        self.f.c = self.c
        self.f.access_fd = -1
        self.f.headlimit = headlimit
        self.f.headtimeout_ns = <uint64_t>(headtimeout * 1e9)
        self.f.offer_ns = <uint64_t>(offer_timeout * 1e9)
        # ids of an earlier run must not come again: it may have left flows behind
        self.f.next_id = <uint64_t>(time.time() * 1e6) >> 3
        self.f.key = 1         # and so no back end has it
        self.c.role = self.f
        self.c.on_event = _on_event
        self.c.on_message = _on_message
        self.c.on_link_down = _on_link_down
        self.c.on_timer = _on_timer
        self.c.on_retire = _on_retire
        self._open(50)

    def __dealloc__(self):
        cdef uint32_t i
        if self.f == NULL:
            return
        if self.f.conns != NULL:
            for i in range(self.f.nconns):
                pthread_mutex_destroy(&self.f.conns[i].lock)
        pthread_mutex_destroy(&self.f.pool_lock)
        pthread_mutex_destroy(&self.f.return_lock)
        pthread_mutex_destroy(&self.f.restore_lock)
        pthread_mutex_destroy(&self.f.place_lock)
        pthread_mutex_destroy(&self.f.access_lock)
        ruleset_free(self.f.rules)
        free(self.f.conns)
        free(self.f.pool)
        free(self.f.no_path.loads)
        free(self.f.no_path.rule_hits)
        slow_close(&self.f.slow)
        free(self.f)

    def start(self, datapath):
        """Take over an opened datapath."""
        cdef FeDatapath d = datapath
        cdef uint32_t i
        self.datapath = d
        self.f.dp = d.table
        _take_path(self.f, d.table.fast)
        if d.table.event_fd >= 0:
            watch(self.c, EPOLL_CTL_ADD, d.table.event_fd, EPOLLIN | EPOLLET, EV_TAP, 0, 0)
        for i in range(self.f.dp.fast.queues):
            watch(self.c, EPOLL_CTL_ADD, self.f.dp.fast.fd[i], EPOLLIN | EPOLLET, EV_FAST, i, 0)

    def key_in_use(self):
        """The number of the cookie key that an earlier run used last, if its connections go on; the
        other place holds the one before, or the next. 0: there are none."""
        return self.f.dp.state.key_number if self.datapath.taken_over else 0

    def set_key(self, uint64_t number, bytes key):
        """Know a cookie key (16 bytes) by its number: it replaces the last but one."""
        memcpy(self.f.dp.fast.keys.key[number & 1], <const char *>key, 16)

    def use_key(self, uint64_t number):
        """Make cookies with a key from now on."""
        store64(&self.f.key, number)
        self.f.dp.state.key_number = number
        store32(&self.f.dp.fast.keys.current, number & 1)
        _void_verdicts(self.f)

    def answer_syns(self, bint answer):
        """Answer SYNs by cookie from now on, or leave them to the listener."""
        store32(&self.f.dp.fast.keys.used, answer)

    def answers_syns(self):
        return bool(load32(&self.f.dp.fast.keys.used))

    def cache_verdicts(self, bint on):
        """Have the packet path's program decide repeated requests from now on, or no longer."""
        store32(&self.f.dp.fast.cache.on, on)

    def send_key(self, uint32_t link_index, uint64_t number):
        """Tell a back end a cookie key."""
        cdef worker *w = self.outsider()
        cdef uint8_t buf[MSG_KEYS_SIZE]
        with nogil:
            link_put(self.c, w, &self.c.links[link_index], buf, message_keys(
                buf, number << 8 | self.f.dp.fast.keys.wscale,
                <const uint64_t *>self.f.dp.fast.keys.key[number & 1]), NULL, 0)
            self.flush_outsider()

    def fast_backends(self):
        """How many back ends could take a request of the packet path now."""
        cdef uint32_t i
        return sum([_takes_fast(self.f, i) for i in range(TCPHA_LOCAL_NODE)])

    def ask_all(self, uint32_t b, double age):
        """Have a back end tell which connections it has; told (see backend_stats) is false until it
        has, or as long as it cannot be asked."""
        cdef backend *be = &self.f.backends[b]
        cdef worker *w = self.outsider()
        cdef uint8_t buf[MSG_HEADER]
        cdef uint32_t n
        cdef int i
        store64(&be.asked_ns, now_ns() - min(<uint64_t>(age * 1e9), now_ns()))
        store32(&be.asked, be.asked + 1)
        for i in range(LINKS_MAX):
            n = be.link[i]
            if n < MAX_LINKS and link_put(self.c, w, &self.c.links[n], buf,
                                          message_short(buf, MSG_ASK, be.asked), NULL, 0) == 0:
                break
        with nogil:
            self.flush_outsider()

    def ask(self, Questions questions):
        """Have back ends say whether they have the flows that were found last. Those of requests
        that have reached them need no answer: they take note of them, if they were started anew."""
        cdef worker *w = self.outsider()
        cdef uint32_t i
        with nogil:
            for i in range(questions.count):
                self._ask(w, &questions.list[i])
            self.flush_outsider()

    cdef void _ask(self, worker *w, const question *q) noexcept nogil:
        cdef uint8_t buf[MSG_OWNED_SIZE]
        cdef uint32_t n, length = message_doubt(buf, q.id, &q.flow) if q.doubtful else \
            message_owned(buf, q.id, &q.flow)
        cdef int i
        for i in range(LINKS_MAX):
            n = self.f.backends[q.backend].link[i]
            if n < MAX_LINKS and link_put(self.c, w, &self.c.links[n], buf, length, NULL, 0) == 0:
                return

    def drop_pending(self):
        """Remove the entries of requests that came to nothing on the way through user space."""
        cdef Scan scan
        cdef uint32_t older
        if self.f.dp.fast.queues == 0:
            return
        scan = Scan(self.datapath)
        with nogil:
            while scan.next():
                if tcpha_is_pending(tcpha_state_of(scan.entry)):
                    older = self.f.dp.fast.drop_pending(
                        self.f.dp.self, TCPHA_MAX_OPS - 2, scan.key, PENDING_NS)
                    if older:  # of whose flow that had taken the place
                        _count_closed(self.f, older - 1)
        scan.check()

    def offer_mtu(self, int mtu, int headers):
        """Offer clients an MSS that this leaves room for, headers deducted, and no more than their
        interface has room for. 0: that decides alone."""
        cdef uint32_t i
        self.mss = max(mtu - headers, MSS_MIN) if mtu else 0
        if self.f.dp.state != NULL:
            self.f.dp.state.mtu = mtu
        for i in range(self.f.nservices):
            self._offer_mss(i)

    cdef void _offer_mss(self, uint32_t number):
        cdef int fd = self.f.services[number].fd
        if fd >= 0:
            setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &self.mss, sizeof(self.mss))

    # Services, by number

    def open_service(self, listener, str vaddr):
        """Take over a listening socket on vaddr. Returns the number of the service, the one that
        it had if it was closed before. Raises OverflowError if there were TCPHA_MAX_SERVICES
        already."""
        cdef tcpha_flow flow
        cdef service *s
        cdef uint32_t number
        memset(&flow, 0, sizeof(flow))
        address_bytes(vaddr, flow.vaddr)
        flow.vport = htons(listener.getsockname()[1])
        number = _service_of(self.f, &flow)
        if number == NO_SERVICE:
            number = self.f.nservices
            if number == TCPHA_MAX_SERVICES:
                raise OverflowError(f"{TCPHA_MAX_SERVICES} services since the start")
            s = &self.f.services[number]
            memcpy(s.vaddr, flow.vaddr, 16)
            s.vport = flow.vport
            s.fd = -1
            store32(&self.f.nservices, number + 1)
        s = &self.f.services[number]
        listener.setblocking(False)
        self.fds[f"listener {number}"] = listener.detach()
        store32(<uint32_t *>&s.fd, self.fds[f"listener {number}"])
        self._offer_mss(number)
        return number

    def services(self):
        """[(number, address, port, whether it has a listener, connections), ...]; also those that
        were closed."""
        cdef service *s
        cdef uint32_t i
        out = []
        for i in range(self.f.nservices):
            s = &self.f.services[i]
            out.append((i, address_text(s.vaddr), htons(s.vport), s.fd >= 0,
                        load64(&s.accepted) + load64(&self.f.dp.fast.service_hits[i])))
        return out

    def accept(self):
        """Begin to accept, for all services that are open."""
        cdef uint32_t i
        for i in range(self.f.nservices):
            _await_clients(self.f, i, EPOLL_CTL_ADD)

    def refuse_new(self, uint32_t number):
        """Take no SYN any more. Handshakes that have begun can end and be accepted: close() would
        reset them."""
        if self.f.services[number].fd >= 0 and _refuse_syns(self.f.services[number].fd) < 0:
            raise OSError(errno, os.strerror(errno))

    def backlog(self, uint32_t number):
        """Connections that wait to be accepted."""
        cdef tcp_info_head info
        cdef socklen_t n = sizeof(info)
        if self.f.services[number].fd < 0 or \
                getsockopt(self.f.services[number].fd, IPPROTO_TCP, 11, &info, &n) < 0:  # TCP_INFO
            return 0
        return info.tcpi_unacked

    def close_service(self, uint32_t number):
        """Close its listener; connections in hand go on."""
        cdef int fd = self.f.services[number].fd
        if fd < 0:
            return
        store32(<uint32_t *>&self.f.services[number].fd, <uint32_t>-1)
        watch(self.c, EPOLL_CTL_DEL, fd, 0, EV_LISTENER, number, 0)
        shutdown(fd, SHUT_RDWR)  # at once: another one may take its port
        self.later(partial(os.close, self.fds.pop(f"listener {number}")))

    def access_log(self, str path):
        """Append a line for each handoff to a file from now on, opened anew; None: no longer.
        Raises OSError and goes on as before."""
        fd = -1
        if path is not None:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        old = self.fds.pop("access", None)
        if fd >= 0:
            self.fds["access"] = fd
        self.f.access_fd = fd
        if old is not None:
            self.later(partial(os.close, old))

    def set_limits(self, uint32_t headlimit, double headtimeout):
        store32(&self.f.headlimit, headlimit)
        store64(&self.f.headtimeout_ns, <uint64_t>(headtimeout * 1e9))
        _void_verdicts(self.f)

    def publish_rules(self, Matcher matcher, list groups):
        """Put rules in force. matcher: of their groups' patterns, in order; groups: of each, [(bits
        of the services that it is for, by number, [(backend index, rule index), ...]), ...]."""
        cdef ruleset *old
        self.generation += 1
        fresh = ruleset_new(matcher, groups, self.generation)
        old = self.f.rules
        storep(<void **>&self.f.rules, fresh)
        _void_verdicts(self.f)
        self.later(partial(self._free_rules, <size_t>old))

    def _free_rules(self, size_t rules):
        ruleset_free(<ruleset *>rules)

    def hits(self, int count):
        """How many connections each of the first 'count' rules has handed over since the start, by
        index: rules that were at its place before are included."""
        cdef int i
        return [load64(&self.f.rule_hits[i]) for i in range(min(count, <int>TCPHA_MAX_RULES))]

    def stages(self):
        """{stage: what histogram_read() says}, see fe_worker.pxd."""
        return {name: histogram_read(&self.f.stages[i]) for name, i in (
            ("head", STAGE_HEAD), ("offer", STAGE_OFFER), ("total", STAGE_TOTAL),
            ("fast", STAGE_FAST))}

    def slowest(self, double seconds):
        """The slowest handoffs of the last so many seconds, one dict each."""
        return slow_read(&self.f.slow, seconds)

    def consider(self, bytes head, uint32_t number):
        """What would become of a service's request with this head: (what is wrong with it or None,
        target, what rules see of that, [(index of a rule that matches, MAY or why not)] in the
        order in which they are tried, the rule whose back end gets it or -1, the one whose back end
        is asked before the Local Node though nobody listens there or -1, what the Local Node says
        of it: MAY or why not). Raises MemoryError."""
        return _consider(self.f, head, number)

    # Back ends, by index

    def backend_open(self, uint32_t b, str name):
        """Take a place in the table of back ends into use. name: its address."""
        cdef backend *be = &self.f.backends[b]
        cdef bytes text = name.encode()[:sizeof(be.name) - 1] + b"\0"
        cdef int i
        memcpy(be.name, <const char *>text, len(text))
        for i in range(LINKS_MAX):
            be.link[i] = MAX_LINKS
        be.may.links = 0
        be.may.dead = be.missed = be.told = 0
        be.may.draining = be.may.app_down = be.may.lacking = 0
        be.nplaces = 0
        be.may.full_until_ns = 0
        store32(&be.may.used, 1)

    def backend_has(self, uint32_t b, uint32_t live):
        """So many connections of an earlier run go on there."""
        store32(&self.f.loads[b].live, live)

    def backend_close(self, uint32_t b):
        store32(&self.f.backends[b].may.used, 0)
        _void_verdicts(self.f)

    def backend_add_link(self, uint32_t b, uint32_t link_index):
        """Use a link (see add_link) for a back end."""
        cdef backend *be = &self.f.backends[b]
        cdef worker *w = self.outsider()
        cdef int i
        for i in range(LINKS_MAX):
            if load32(&be.link[i]) == MAX_LINKS:
                add32(&be.may.links, 1)
                store32(&be.link[i], link_index)
                _void_verdicts(self.f)
                if load32(&self.c.links[link_index].state) != LINK_UP:
                    _lose_link(self.f, be, link_index)
                with nogil:
                    _ask_all_again(self.f, w, b)
                    self.flush_outsider()
                return
        raise RuntimeError("too many links to a back end")

    def backend_missed(self, uint32_t b):
        """Whether MISSED came since the last call."""
        return bool(xchg32(&self.f.backends[b].missed, 0))

    def backend_server(self, uint32_t b, uint64_t said):
        """What HELLO told of the application, as SERVER does."""
        store64(&self.f.backends[b].server_said, said)

    def backend_forgets_keys(self, uint32_t b):
        """A new run of it, or one that cannot have them."""
        store64(&self.f.backends[b].keyed, 0)
        _void_verdicts(self.f)

    def backend_places(self, uint32_t b, list places):
        """What HELLO told of its places, as PLACE does: [(address, port or 0, said), ...]."""
        cdef backend *be = &self.f.backends[b]
        cdef place_said *p
        cdef uint32_t i
        pthread_mutex_lock(&self.f.place_lock)
        be.nplaces = 0
        for vaddr, port, said in places[:TCPHA_MAX_SERVICES]:
            p = &be.places[be.nplaces]
            address_bytes(vaddr, p.vaddr)
            p.vport = htons(port)
            p.said = said
            be.nplaces += 1
        pthread_mutex_unlock(&self.f.place_lock)

    def backend_listens(self, uint32_t b):
        """Bits of the services, by number, for which somebody listens there. What a back end says
        of a place counts for its address and port; without, what it says of the address; without,
        what SERVER says."""
        cdef backend *be = &self.f.backends[b]
        cdef uint64_t bits = 0
        cdef uint32_t i
        pthread_mutex_lock(&self.f.place_lock)
        for i in range(self.f.nservices):
            bits |= (_said_of(be, &self.f.services[i]) & 1) << i
        pthread_mutex_unlock(&self.f.place_lock)
        return bits

    def backend_flags(self, uint32_t b, draining=None, dead=None, app_down=None,
                      lacking=None):
        """draining, app_down, lacking: bits of services, by number."""
        cdef backend *be = &self.f.backends[b]
        before = _flags(be)
        if draining is not None:
            store64(&be.may.draining, draining)
        if dead is not None:
            store32(&be.may.dead, dead)
        if app_down is not None:
            store64(&be.may.app_down, app_down)
        if lacking is not None:
            store64(&be.may.lacking, lacking)
        if before != _flags(be):
            _void_verdicts(self.f)

    def backend_stats(self, uint32_t b):
        cdef backend *be = &self.f.backends[b]
        cdef tcpha_load *load = &self.f.loads[b]
        cdef uint64_t returned = load64(&be.returned)
        cdef uint64_t handed = load64(&be.handed) + load64(<uint64_t *>&load.handed)
        return {"links": load32(&be.may.links),
                "told": be.asked != 0 and load32(&be.told) == be.asked,
                "fast": _takes_fast(self.f, b),
                "draining": load64(&be.may.draining), "dead": bool(load32(&be.may.dead)),
                "live": load32(&load.live),
                "handed": max(handed, returned) - returned,  # that may be of an earlier run
                "refused": load64(&be.refused),
                "returned": returned,
                "closed": load64(&be.closed) + load64(<uint64_t *>&load.closed)}

    def drop_unknown(self, bint drop):
        """See datapath.pxd."""
        self.f.dp.drop_unknown(self.f.dp.self, drop)

    def counters(self):
        """accepted, handed and fast are without what was returned: it comes again. Some of it may
        have been handed over by an earlier run."""
        cdef fe_counters n
        cdef uint64_t cached = 0, closed = 0
        cdef uint32_t i
        read_counters(&n, &self.f.n, sizeof(n))
        for i in range(TCPHA_MAX_BACKENDS):
            cached += load64(<uint64_t *>&self.f.loads[i].handed)
            closed += load64(<uint64_t *>&self.f.loads[i].closed)
        cached -= min(n.returned, n.accepted + cached, n.handed + cached, n.fast + cached)
        return {"accepted": n.accepted + cached, "handed": n.handed + cached,
                "closed": n.closed + closed,
                "refused": n.refused, "returned": n.returned, "lost": n.lost, "silent": n.silent,
                "expired": n.expired, "restored": n.restored,
                "answered_400": n.answered_400, "answered_408": n.answered_408,
                "fast": n.fast + cached, "answered_431": n.answered_431,
                "answered_503": n.answered_503, "no_descriptors": n.no_descriptors,
                "table_full": n.table_full, "access_lost": n.access_lost,
                "late_bytes": n.late_bytes}

    def in_hand(self):
        """Connections accepted and not yet handed over or closed."""
        return self.f.nconns - load32(&self.f.pool_len)

    def expire(self, double idle, dict limits):
        """Forget flows that were silent for 'idle' seconds (limits: {back end: seconds} for others
        than that). Returns how many."""
        cdef Scan scan = Scan(self.datapath)
        cdef uint64_t silence[TCPHA_MAX_BACKENDS]
        cdef uint64_t now = now_ns()
        cdef tcpha_entry entry
        cdef uint64_t id
        cdef uint32_t b
        cdef long n = 0
        for b in range(TCPHA_MAX_BACKENDS):
            silence[b] = _ns(limits.get(b, idle))
        with nogil:
            while scan.next():
                b = scan.entry.backend
                id = tcpha_live(scan.entry)
                if id and now > scan.entry.last_ns and \
                        now - scan.entry.last_ns > silence[b] and self.f.dp.forget(
                            self.f.dp.self, TCPHA_MAX_OPS - 2, scan.key, id, b, False,
                            &entry) == 1:
                    n += 1
                    _expired(self.f, b)
        scan.check()
        return n


cdef uint64_t _ns(double seconds) noexcept:
    return <uint64_t>-1 if seconds == INFINITY else <uint64_t>(seconds * 1e9)
