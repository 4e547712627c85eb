# SPDX-License-Identifier: GPL-2.0-or-later
# For the workers: see datapath.pxd.

cdef int _divert(void *self, uint32_t worker, const tcpha_flow *flow, tcpha_entry *entry,
                 tcpha_entry *old) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int rc
    pthread_rwlock_wrlock(&d.lock)
    rc = ledger_divert(&d.book, worker, flow, entry, old)
    pthread_rwlock_unlock(&d.lock)
    return rc


cdef int _freeze(void *self, uint32_t worker, int fd, snapshot *s) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int rc = repair_freeze(fd, s)
    cdef uint16_t mss
    if rc != 0:
        return rc
    mss = saved_syn_mss(fd, s.mss, &s.ts_recent)
    if d.tunnel:
        s.mss = mss
    _recall(d, s)
    return 0


cdef kept *_take(fe_nfqueue *d, uint32_t slot) noexcept nogil:
    cdef kept *k = d.holders[slot].first
    d.holders[slot].first = d.holders[slot].last = NULL
    return k


cdef int _forward(void *self, uint32_t worker, tcpha_entry *entry, const snapshot *now,
                  const uint8_t *extra, uint32_t extra_len, bint extra_fin) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef uint8_t buf[FRAME_HEAD + 65536]
    cdef uint32_t at = 0, most, head
    cdef tcpha_entry *e
    cdef kept *k
    cdef kept *following
    cdef tcp_view v
    cdef segment s
    pthread_rwlock_wrlock(&d.lock)
    if _put(d, &now.flow, entry, 0) < 0:
        pthread_rwlock_unlock(&d.lock)
        return -1
    e = <tcpha_entry *>table_find(&d.flows, &now.flow)
    most = now.mss - 12 if now.mss > 100 else TCP_MSS_LOW - 12
    segment_from(&s, now)
    while at < extra_len or extra_fin:
        s.len = min(extra_len - at, most)
        s.seq = now.rcv_nxt - (1 if now.flags & SNAP_FIN else 0) - extra_len + at
        s.flags = TCP_ACK | TCP_PSH
        if extra_fin and at + s.len == extra_len:
            s.flags |= TCP_FIN
            extra_fin = False
        head = forge(buf, &s)
        memcpy(buf + head, extra + at, s.len)
        if tcp_parse(buf + VNET_SIZE + ETH_SIZE, head - VNET_SIZE - ETH_SIZE + s.len, &v) == 0:
            _to_backend(d, e, &v, SKB_CSUM_NOT_READY)
        at += s.len
    k = _take(d, entry.slot)
    while k != NULL:
        following = k.next
        if tcp_parse(k.data, k.len, &v) == 0 and _classify(d, e, &v):
            _to_backend(d, e, &v, k.skb_info)
            queue_verdict(k.q, k.id, V_DROP)
        else:
            queue_verdict(k.q, k.id, V_ACCEPT)
        free(k)
        k = following
    pthread_rwlock_unlock(&d.lock)
    return 0


cdef bint _answered(void *self, uint32_t slot, uint32_t snd_nxt) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef kept *k
    cdef tcp_view v
    cdef bint found = False
    pthread_rwlock_wrlock(&d.lock)
    k = d.holders[slot].first
    while k != NULL and not found:
        found = tcp_parse(k.data, k.len, &v) == 0 and acks_beyond(&v, snd_nxt)
        k = k.next
    pthread_rwlock_unlock(&d.lock)
    return found


cdef int _give_back(void *self, const tcpha_flow *flow, uint32_t slot) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef kept *k
    cdef kept *following
    pthread_rwlock_wrlock(&d.lock)
    ledger_remove(&d.book, flow)
    k = _take(d, slot)
    while k != NULL:
        following = k.next
        queue_verdict(k.q, k.id, V_ACCEPT)
        free(k)
        k = following
    pthread_rwlock_unlock(&d.lock)
    return 0


cdef int _forget(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, uint32_t backend,
                 bint linger, tcpha_entry *entry) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int rc
    pthread_rwlock_wrlock(&d.lock)
    rc = ledger_forget(&d.book, worker, flow, id, backend, linger, entry)
    pthread_rwlock_unlock(&d.lock)
    return rc


cdef int _restore(void *self, uint32_t worker, const tcpha_flow *flow, const tcpha_entry *entry,
                  uint64_t asked, tcpha_entry *old) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int rc
    pthread_rwlock_wrlock(&d.lock)
    rc = ledger_restore(&d.book, worker, flow, entry, asked, old)
    pthread_rwlock_unlock(&d.lock)
    return rc


cdef void _drop_unknown(void *self, bint drop) noexcept nogil:
    store32(&(<fe_nfqueue *>self).drop_unknown, drop)


cdef void _sweep(void *self, uint32_t worker, uint64_t now) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    pthread_rwlock_wrlock(&d.lock)
    ledger_sweep(&d.book, worker, now)
    pthread_rwlock_unlock(&d.lock)


cdef bint _on_packets(void *self) noexcept nogil:
    return False  # the queues have threads of their own


cdef int _next_entries(void *self, table_place *place, tcpha_flow *keys,
                       tcpha_entry *entries) noexcept nogil:
    """A place is the index of a cell."""
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef flow_cell *c
    cdef uint32_t end
    cdef int n = 0
    while n == 0 and place.at < load32(&d.flows.head.fresh):
        pthread_rwlock_rdlock(&d.lock)
        end = min(place.at + TABLE_PIECE, d.flows.head.fresh)
        while place.at < end:
            c = table_cell(&d.flows, place.at)
            place.at += 1
            if c.used:
                keys[n] = c.key
                entries[n] = (<tcpha_entry *>(c + 1))[0]
                n += 1
        pthread_rwlock_unlock(&d.lock)
    return n
