# SPDX-License-Identifier: GPL-2.0-or-later
# The front end's half, for Python.

cdef class FeEbpf(FeDatapath):
    """The front end's half. tap: (descriptor, ifindex) of its TAP device; fast: None, or
    (descriptors, ifindex, MSS, window scale, options as in struct tcpha_fe_conf) of the packet
    path; instance: see Object; left: the maps of a run that was killed, as maps_of() says."""

    cdef fe_ebpf *d
    cdef readonly Object obj
    cdef readonly bint taken_over  # the connections of that run go on
    cdef readonly bint fresh       # not all of them are known, if there are any
    cdef tcpha_guesses *guesses    # NULL: no packet path

    def __cinit__(self, str path, tap, int slots, int maxflows, bint tunnel, uint32_t instance,
                  fast=None, dict left=None):
        cdef tcpha_fe_conf conf
        self.d = <fe_ebpf *>calloc(1, sizeof(fe_ebpf))
        if self.d == NULL:
            raise MemoryError
        self.d.holders = <holder *>calloc(slots, sizeof(holder))
        self.d.room = <uint8_t *>malloc(SCRATCH)
        if self.d.holders == NULL or self.d.room == NULL:
            raise MemoryError
        self.d.nholders = slots
        pthread_mutex_init(&self.d.lock, NULL)
        rwlock_init(&self.d.silent_lock)
        ledger_open(&self.d.book, maxflows)
        self.d.book.store.self = self.d
        self.d.book.store.find = _find
        self.d.book.store.put = _put
        self.d.book.store.remove = _remove
        self.d.book.store.end = _end
        self.d.book.store.drop = _drop
        memset(&conf, 0, sizeof(conf))
        conf.tap = tap[1]
        if fast is not None:
            conf.fast_tap, conf.headers, conf.wscale, conf.options = fast[1:]
            conf.window = WINDOW
        sizes = {"flows": maxflows}
        if fast is None:
            sizes["verdicts"] = sizes["rule_hits"] = 1
        reuse = self._reusable(left)
        self.taken_over = bool(reuse)
        self.obj = Object(path, (<char *>&conf)[:sizeof(conf)],
                          {k: v for k, v in sizes.items() if k not in reuse}, reuse, instance)
        self.table.state = <tcpha_state *>self.obj.map_memory("state", sizeof(tcpha_state))
        self.table.state.version = TCPHA_STATE_VERSION
        self.fresh = not self.taken_over or self.table.state.drop_unknown
        self.table.state.drop_unknown = self.fresh
        self.d.tap = self.table.event_fd = tap[0]
        self.d.tunnel = tunnel
        self.d.flows = self.obj.map_fd("flows")
        self.d.backends = self.obj.map_fd("backends")
        self.d.ops = <tcpha_op *>self.obj.map_memory("ops", TCPHA_MAX_OPS * sizeof(tcpha_op))
        self.table.self = self.d
        self.table.divert = _divert
        self.table.freeze = _freeze
        self.table.forward = _forward
        self.table.answered = _answered
        self.table.give_back = _give_back
        self.table.forget = _forget
        self.table.restore = _restore
        self.table.drop_unknown = _drop_unknown
        self.d.state = self.table.state
        self.table.sweep = _sweep
        self.table.on_packets = _on_packets
        self.table.next_entries = _next_entries
        if fast is not None:
            self._open_packet_path(fast[0], conf.wscale)

    cdef int _open_packet_path(self, list queues, uint8_t wscale) except -1:
        cdef packet_path *p = &self.path
        cdef bytes key = os.urandom(16)
        cdef int i
        for i, fd in enumerate(queues):
            self.d.fast_fd[i] = p.fd[i] = fd
        p.queues = <uint32_t>len(queues)
        p.keys = &self.table.state.keys
        p.keys.wscale = wscale
        p.keys.used = 0
        p.offers = <tcpha_offer *>self.obj.map_memory(
            "offers", TCPHA_MAX_OPS * sizeof(tcpha_offer))
        p.cache = <tcpha_cache *>self.obj.map_memory("cache", sizeof(tcpha_cache))
        memcpy(p.cache.key, <const char *>key, 16)
        p.loads = <tcpha_load *>self.obj.map_memory(
            "loads", TCPHA_MAX_BACKENDS * sizeof(tcpha_load))
        p.rule_hits = <uint64_t *>self.obj.map_memory(
            "rule_hits", TCPHA_MAX_RULES * sizeof(uint64_t))
        p.service_hits = <uint64_t *>self.obj.map_memory(
            "service_hits", TCPHA_MAX_SERVICES * sizeof(uint64_t))
        p.next = _fast_next
        p.send = _fast_send
        p.later = _fast_later
        p.to_socket = _fast_socket
        p.early = _fast_early
        p.take_back = _take_back
        p.drop_pending = _drop_pending
        p.keep_verdict = _keep_verdict
        self.d.offers = p.offers
        self.d.verdicts = self.obj.map_fd("verdicts")
        self.d.shaken = self.obj.map_fd("shaken")
        self.guesses = <tcpha_guesses *>self.obj.map_memory("guesses", sizeof(tcpha_guesses))
        self.table.fast = p
        return 0

    cdef dict _reusable(self, dict left):
        cdef tcpha_state state
        cdef uint32_t zero = 0
        maps = _fitting(left, {
            "state": (4, sizeof(tcpha_state)), "flows": (sizeof(tcpha_flow), sizeof(tcpha_entry)),
            "backends": (4, sizeof(tcpha_backend)),
            "services": (sizeof(tcpha_service), 4)})
        if "shaken" in (left or {}):  # that run had the packet path
            maps = maps and maps | _fitting(left, {
                "shaken": (sizeof(tcpha_flow), sizeof(tcpha_shaken))})
        if not maps or bpf_map_lookup_elem(maps["state"], &zero, &state) < 0 or \
                state.version != TCPHA_STATE_VERSION:
            return {}
        return maps

    def take_over(self):
        """Go through the entries of an earlier run. Connections that were in its hands are lost;
        the Local Node's sockets find their packets by themselves. Returns ({back end: how many
        live}, {back end: its address})."""
        cdef Batches b = Batches(self.d.flows, sizeof(tcpha_entry))
        cdef tcpha_entry *e
        cdef tcpha_backend way
        cdef uint32_t index
        cdef int i, count
        self._close_services()
        live = {}
        while (count := b.more()) > 0:
            for i in range(count):
                e = <tcpha_entry *>b.values + i
                if not tcpha_is_forwarded(tcpha_state_of(e)) or e.backend == TCPHA_LOCAL_NODE:
                    ledger_remove(&self.d.book, &b.keys[i])
                elif tcpha_live(e):
                    live[e.backend] = live.get(e.backend, 0) + 1
                else:
                    ledger_linger(&self.d.book, &b.keys[i], e.id, now_ns())
        known = {}
        for index in range(TCPHA_LOCAL_NODE):
            if bpf_map_lookup_elem(self.obj.map_fd("backends"), &index, &way) == 0 and way.mode:
                known[index] = address_text(way.addr)
        return live, known

    def __dealloc__(self):
        if self.d != NULL:
            free(self.d.holders)
            free(self.d.room)
            pthread_rwlock_destroy(&self.d.silent_lock)
            ledger_close(&self.d.book)
            free(self.d)

    def set_backend(self, uint32_t index, path):
        """Say how to reach a back end: None, or (ifindex, tunnel, next hop, address, source,
        MTU)."""
        cdef tcpha_backend b, old
        memset(&b, 0, sizeof(b))
        if path is not None:
            b.ifindex = path[0]
            b.mode = TCPHA_TUNNEL if path[1] else TCPHA_DIRECT
            address_bytes(path[2], b.nexthop)
            address_bytes(path[3], b.addr)
            address_bytes(path[4], b.src)
            b.mtu = path[5]
            if bpf_map_lookup_elem(self.obj.map_fd("backends"), &index, &old) == 0 and \
                    memcmp(old.addr, b.addr, sizeof(b.addr)) == 0:
                b.down = old.down
        bpf_map_update_elem(self.obj.map_fd("backends"), &index, &b, BPF_ANY)

    def set_service(self, str vaddr, int port, number):
        """Look at packets for an address and port. number: of the service, or None: it takes no new
        connections. Raises OSError."""
        cdef tcpha_service key
        cdef uint32_t value = TCPHA_CLOSED if number is None else number
        cdef int rc
        memset(&key, 0, sizeof(key))
        address_bytes(vaddr, key.vaddr)
        key.vport = htons(port)
        rc = bpf_map_update_elem(self.obj.map_fd("services"), &key, &value, BPF_ANY)
        if rc < 0:
            raise OSError(-rc, f"a service: {os.strerror(-rc)}")

    cdef void _close_services(self):
        """Those of an earlier run take no new connections, unless they are opened again."""
        cdef int fd = self.obj.map_fd("services")
        cdef tcpha_service keys[2 * TCPHA_MAX_SERVICES]
        cdef uint32_t closed = TCPHA_CLOSED, i, count = 0
        # all first: an update puts its key before others, and they would come again
        while count < 2 * TCPHA_MAX_SERVICES and bpf_map_get_next_key(
                fd, &keys[count - 1] if count else NULL, &keys[count]) == 0:
            count += 1
        for i in range(count):
            bpf_map_update_elem(fd, &keys[i], &closed, BPF_EXIST)

    def set_down(self, uint32_t index, bint down):
        """Say whether requests that a back end has not answered may go to another one."""
        cdef tcpha_backend b
        if bpf_map_lookup_elem(self.obj.map_fd("backends"), &index, &b) == 0 and b.down != down:
            b.down = down
            bpf_map_update_elem(self.obj.map_fd("backends"), &index, &b, BPF_ANY)

    def set_route(self, place, mss):
        """Say which MSS clients are told whose route is at a place (interface, length of the
        prefix, address), or with None that there is no such place any more. Raises OSError."""
        cdef tcpha_route key
        cdef uint32_t value = mss or 0
        cdef bytes raw
        cdef int rc
        index, length, address = place
        raw = address.to_bytes(4, "big")
        memset(&key, 0, sizeof(key))
        key.prefixlen = 8 * (sizeof(key.ifindex) + 12) + length
        key.ifindex = index
        memset(&key.addr[10], 0xff, 2)
        memcpy(&key.addr[12], <const char *>raw, 4)
        if mss is None:
            rc = bpf_map_delete_elem(self.obj.map_fd("routes"), &key)
        else:
            rc = bpf_map_update_elem(self.obj.map_fd("routes"), &key, &value, BPF_ANY)
        if rc < 0:
            raise OSError(-rc, f"a route's MSS: {os.strerror(-rc)}")

    def set_local(self):
        """Flows of the Local Node are left to our own stack from now on."""
        cdef tcpha_backend b
        cdef uint32_t index = TCPHA_LOCAL_NODE
        memset(&b, 0, sizeof(b))
        b.mode = TCPHA_LOCAL
        bpf_map_update_elem(self.obj.map_fd("backends"), &index, &b, BPF_ANY)

    def counters(self):
        return _counters(self.obj)

    def wary(self):
        """Whether cookies of clients without timestamps mean nothing: see struct tcpha_guesses."""
        return self.guesses != NULL and now_ns() < load64(&self.guesses.until_ns)

    def take_silent(self, double seconds):
        """Make sockets of connections whose client has said nothing for so long since the
        handshake: they are accepted like any other. Returns how many."""
        cdef Batches b = Batches(self.d.shaken, sizeof(tcpha_shaken))
        cdef uint64_t before = now_ns() - <uint64_t>(seconds * 1e9)
        cdef int i, count, taken = 0
        while (count := b.more()) > 0:
            with nogil:
                for i in range(count):
                    if (<tcpha_shaken *>b.values + i).since_ns <= before:
                        taken += _wake(self.d, 0, TCPHA_MAX_OPS - 1, &b.keys[i], before)
        return taken
