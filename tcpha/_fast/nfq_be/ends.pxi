# SPDX-License-Identifier: GPL-2.0-or-later
# The end of connections.

cdef bint _position(void *self, uint32_t worker, const tcpha_flow *flow,
                    uint32_t *rcv_nxt) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef diag_answer a
    cdef be_flow *f
    cdef bint known
    _local(d, flow, &local)
    if _query(d, &local, &a) < 0 or a.state == 0 or not a.full:
        return False
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    known = f != NULL and f.state == B_LIVE
    if known:
        rcv_nxt[0] = f.asked + <uint32_t>a.received
    pthread_rwlock_unlock(&d.lock)
    return known


cdef int _alive(void *self, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef diag_answer a
    cdef be_flow *f
    cdef bint known, direct
    _local(d, flow, &local)
    if _query(d, &local, &a) < 0:
        return DP_ALIVE
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    known = f != NULL
    direct = known and f.state == B_DIRECT
    pthread_rwlock_unlock(&d.lock)
    if direct:
        return 0
    if a.state != 0 and not known:
        if not _is_shared(d, &local):  # or it may be one of those who talk to the server directly
            diag_destroy(d.sockets, &local, &a)  # an earlier run's; nobody can rewrite its packets
        return 0
    # a request socket is a newer connection's: an adopted one is beyond that
    if a.state == 0 or a.state == TCP_NEW_SYN_RECV or (a.state == TCP_SYN_RECV and not a.full):
        return 0
    if a.state == TCP_TIME_WAIT or not a.full:
        return DP_TIME_WAIT
    return DP_CLOSING if a.full and a.state != TCP_ESTABLISHED and a.state != TCP_CLOSE_WAIT \
        else DP_ALIVE


cdef bint _outside(void *self, tcpha_flow *flow) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef be_flow *f
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, flow)
    if f != NULL:
        flow[0] = f.outside
    pthread_rwlock_unlock(&d.lock)
    return f != NULL


cdef void _ended(void *self, const tcpha_flow *flow) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef be_flow *f
    _local(d, flow, &local)
    pthread_rwlock_wrlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    if f != NULL and _same(&f.outside, flow):
        f.ended_ns = now_ns()
    pthread_rwlock_unlock(&d.lock)


cdef bint _evict(be_nfqueue *d) noexcept nogil:
    """Make room at the cost of a TIME_WAIT socket's last words. The lock is held for writing."""
    cdef uint32_t i
    cdef flow_cell *c
    for i in range(d.flows.head.fresh):
        c = table_cell(&d.flows, (d.cursor + i) % d.flows.head.fresh)
        if c.used and (<be_flow *>(c + 1)).ended_ns:
            d.cursor = (d.cursor + i) % d.flows.head.fresh
            return table_remove(&d.flows, &c.key)
    return False


cdef void _sweep(void *self, uint64_t now) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef uint32_t _i
    cdef flow_cell *c
    cdef be_flow *f
    pthread_rwlock_wrlock(&d.lock)
    if d.flows.head.used:
        for _i in range(SWEEP):
            d.cursor = (d.cursor + 1) % d.flows.head.fresh
            c = table_cell(&d.flows, d.cursor)
            f = <be_flow *>(c + 1)
            if c.used and f.ended_ns and now > f.ended_ns + RETAIN_NS:
                table_remove(&d.flows, &c.key)
    pthread_rwlock_unlock(&d.lock)
