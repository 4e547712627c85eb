# SPDX-License-Identifier: GPL-2.0-or-later
# For Python.

cdef class FeNfqueue(FeDatapath):
    """slots: connection slots of the workers; queues: Queue objects, started later."""

    cdef fe_nfqueue *d
    cdef list queues
    cdef object packet_socket
    cdef BeNfqueue local
    cdef SockDiag diag
    cdef readonly bint fresh  # an earlier run's connections are not known, if there are any

    def __cinit__(self, int slots, int maxflows, bint tunnel, list queues):
        cdef Queue q
        self.d = <fe_nfqueue *>calloc(1, sizeof(fe_nfqueue))
        if self.d == NULL:
            raise MemoryError
        rwlock_init(&self.d.lock)
        pthread_mutex_init(&self.d.hold_lock, NULL)
        table_open(&self.d.flows, maxflows, sizeof(tcpha_entry), 0, None)
        ledger_open(&self.d.book, maxflows)
        self.d.book.store.self = self.d
        self.d.book.store.find = _find
        self.d.book.store.put = _put
        self.d.book.store.remove = _remove
        self.d.book.store.end = _end
        self.d.book.store.drop = _drop
        self.d.nholders = slots
        self.d.holders = <holder *>calloc(slots, sizeof(holder))
        self.d.seen = <recent *>calloc(RECENT * WAYS, sizeof(recent))
        if self.d.holders == NULL or self.d.seen == NULL:
            raise MemoryError
        self.d.tunnel = tunnel
        self.diag = SockDiag()
        self.d.sockets = &self.diag.d
        self.fresh = True
        self.d.drop_unknown = 1
        self.packet_socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        self.packet_socket.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
        self.packet_socket.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)  # SO_SNDBUFFORCE
        self.d.packet_fd = self.packet_socket.fileno()
        self.queues = queues
        if len(queues) > MAX_QUEUES:
            raise ValueError("too many queues")
        self.d.first_queue = queues[0].num
        for q in queues:
            q.set_handler(_on_packet, _on_batch, self.d, &self.d.lock)
        self.table.self = self.d
        self.table.divert = _divert
        self.table.freeze = _freeze
        self.table.forward = _forward
        self.table.answered = _answered
        self.table.give_back = _give_back
        self.table.forget = _forget
        self.table.restore = _restore
        self.table.drop_unknown = _drop_unknown
        self.table.sweep = _sweep
        self.table.on_packets = _on_packets
        self.table.next_entries = _next_entries

    def __dealloc__(self):
        if self.d != NULL:
            table_close(&self.d.flows)
            ledger_close(&self.d.book)
            pthread_rwlock_destroy(&self.d.lock)
            free(self.d.holders)
            free(self.d.seen)
            free(self.d)

    def close(self):
        """No queue may be served any more."""
        self.packet_socket.close()
        self.diag.close()

    def set_backend(self, uint32_t index, way):
        """Say how to reach a back end: None, or (ifindex, tunnel, destination MAC, source MAC,
        address, source address, MTU)."""
        cdef path p
        cdef uint8_t addr[16]
        memset(&p, 0, sizeof(p))
        if way is not None:
            p.ifindex = way[0]
            p.tunnel = way[1]
            memcpy(p.ether, <const char *>(<bytes>way[2]), 6)
            memcpy(p.ether + 6, <const char *>(<bytes>way[3]), 6)
            p.ether[12] = 8
            address_bytes(way[4], addr)
            memcpy(&p.addr, addr + 12, 4)
            address_bytes(way[5], addr)
            memcpy(&p.src, addr + 12, 4)
            p.mtu = way[6]
        with nogil:
            pthread_rwlock_wrlock(&self.d.lock)
            self.d.paths[index] = p
            pthread_rwlock_unlock(&self.d.lock)

    def set_local(self, BeNfqueue local):
        """Flows of the Local Node are rewritten for it from now on."""
        self.local = local
        self.d.local = local.d

    def counters(self):
        cdef tcpha_counters n
        read_counters(&n, &self.d.n, sizeof(n))
        return {"forwarded": n.forwarded, "forwarded_bytes": n.forwarded_bytes, "held": n.held,
                "live_syn": n.live_syn, "unreachable": n.unreachable,
                "icmp": n.icmp, "thinned": load64(&self.d.thinned)}
