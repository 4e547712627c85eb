# SPDX-License-Identifier: GPL-2.0-or-later
# For Python.

cdef class BeNfqueue(BeDatapath):
    """ways: as for Places; capacity: connections in the table, those in TIME_WAIT included; mark:
    of packets that we inject; queues: Queue objects, started later; file: where the table lies, or
    None; devices: by which clients' packets may come; local: on the front end, for its Local
    Node."""

    def __cinit__(self, list ways, uint32_t capacity, uint32_t mark, list queues, file,
                  list devices, bint local=False):
        cdef Queue q
        cdef bint kept
        cdef uint32_t i
        self.d = <be_nfqueue *>calloc(1, sizeof(be_nfqueue))
        if self.d == NULL:
            raise MemoryError
        self.sockets = SockDiag()
        self.d.sockets = &self.sockets.d
        self.d.chunk = CHUNK
        rwlock_init(&self.d.lock)
        pthread_mutex_init(&self.d.wait_lock, NULL)
        pthread_cond_init(&self.d.answered, NULL)
        kept = table_open(&self.d.flows, capacity, sizeof(be_flow), LAYOUT, file)
        self.places = Places(ways)
        self.d.places = self.table.places = &self.places.p
        self.d.local = self.d.shared = local
        for i in range(self.d.places.nlisteners):
            self.d.shared |= not is_vip(self.d.places, self.d.places.listeners[i].addr)
        self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                 socket.IPPROTO_RAW)
        self.raw.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
        self.d.raw_fd = self.raw.fileno()
        if kept:
            self._take_over(devices)
        self.queues = queues
        for q in queues:
            q.set_handler(_on_packet, NULL, self.d, &self.d.lock)
        self.table.self = self.d
        self.table.adopt = _adopt
        self.table.feed = _feed
        self.table.alive = _alive
        self.table.position = _position
        self.table.outside = _outside
        self.table.ended = _ended
        self.table.sweep = _sweep

    def __dealloc__(self):
        if self.d != NULL:
            table_close(&self.d.flows)
            pthread_rwlock_destroy(&self.d.lock)
            pthread_mutex_destroy(&self.d.wait_lock)
            pthread_cond_destroy(&self.d.answered)
            free(self.d)

    def _take_over(self, list devices):
        """Keep those flows of an earlier run whose sockets live. What they are bound to, the
        listener of now need not tell."""
        cdef uint32_t i
        cdef flow_cell *c
        cdef be_flow *f
        for i in range(self.d.flows.head.fresh):
            c = table_cell(&self.d.flows, i)
            f = <be_flow *>(c + 1)
            if c.used and (f.state != B_LIVE or f.ended_ns or
                           not self._has_socket(&c.key, devices)):
                table_remove(&self.d.flows, &c.key)

    cdef bint _has_socket(self, const tcpha_flow *local, list devices):
        cdef diag_answer a
        for device in devices:
            if diag_query(self.d.sockets, local, device, &a) == 0 and a.state != 0:
                return True
        return False

    def end_all(self):
        """Reset the connections that live: nobody will rewrite their packets any more."""
        cdef uint32_t i
        cdef flow_cell *c
        cdef diag_answer a
        with nogil:
            for i in range(self.d.flows.head.fresh):
                c = table_cell(&self.d.flows, i)
                if c.used and not (<be_flow *>(c + 1)).ended_ns and \
                        _query(self.d, &c.key, &a) == 0:
                    diag_destroy(self.d.sockets, &c.key, &a)

    def follow(self, str address, int port, uint32_t device, int mtu):
        """A listener is bound to a device, by which what we inject comes in: Linux before 5.12
        drops there what is longer than its MTU. See BeEbpf.follow()."""
        store32(&self.d.chunk, min(self.d.chunk, <uint32_t>(mtu - HEADERS)))
        self.places.bind(address, port, device)

    def close(self):
        """No queue may be served any more."""
        self.raw.close()
        self.sockets.close()

    def handshake(self, bytes payload):
        """A SYN for a local server's own address and port, or a SYN-ACK that wants to leave this
        host. True: it may pass, it is none of ours."""
        cdef bytearray copy = bytearray(payload)
        cdef tcp_view v
        cdef bint ours = False
        if tcp_parse(copy, <uint32_t>len(copy), &v) < 0:
            return bool(self.d.shared)
        with nogil:
            if v.flags & TCP_ACK:
                ours = _on_syn_ack(self.d, &v)
            else:
                _on_syn(self.d, &v)
        return not ours

    def allow(self, str address, bint allowed):
        """As BeEbpf.allow()."""
        cdef uint8_t addr[16]
        cdef uint32_t v, i
        address_bytes(address, addr)
        memcpy(&v, addr + 12, 4)
        with nogil:
            pthread_rwlock_wrlock(&self.d.lock)
            for i in range(self.d.nfrontends):
                if self.d.frontends[i] == v:
                    self.d.nfrontends -= 1
                    self.d.frontends[i] = self.d.frontends[self.d.nfrontends]
                    break
            if allowed and self.d.nfrontends < MAX_FRONTENDS:
                self.d.frontends[self.d.nfrontends] = v
                self.d.nfrontends += 1
            pthread_rwlock_unlock(&self.d.lock)

    def allowed(self):
        """As BeEbpf.allowed(): nobody, when it begins."""
        return []

    def counters(self):
        cdef tcpha_counters n
        read_counters(&n, &self.d.n, sizeof(n))
        return {"guarded": n.guarded, "foreign": n.foreign, "decapsulated": n.decapsulated,
                "not_ect": n.not_ect,
                "killed": load64(&self.d.killed), "unknown": load64(&self.d.unknown),
                "flows": load32(&self.d.flows.head.used)}
