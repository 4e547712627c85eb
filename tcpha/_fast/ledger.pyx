# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end's book of diverted flows: when an entry comes, is replaced, and may go."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from tcpha._fast.defs cimport (
    TCPHA_F_FAST, TCPHA_F_FIN, TCPHA_F_RST, TCPHA_LINGERING, tcpha_entry, tcpha_flow,
    tcpha_is_forwarded, tcpha_is_pending, tcpha_live, tcpha_owed, tcpha_state_of)
from tcpha._fast.sys cimport (
    now_ns, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)

cdef uint64_t LINGER_NS = 2000000000     # for retransmissions of the client's FIN
cdef int ROOM = 64                       # of those that linger, looked at when the table is full
cdef uint64_t FIN_WAIT_NS = 60000000000  # net.ipv4.tcp_fin_timeout


cdef int ledger_open(ledger *l, uint32_t capacity) except -1:
    """capacity: the most flows that linger at one time. The store is the caller's to set."""
    cdef int i
    l.capacity = capacity
    l.linger = <lingering *>calloc(capacity, sizeof(lingering))
    if l.linger == NULL:
        raise MemoryError
    pthread_mutex_init(&l.lock, NULL)
    for i in range(STRIPES):
        pthread_mutex_init(&l.stripes[i], NULL)
    return 0


cdef void ledger_close(ledger *l) noexcept:
    free(l.linger)


cdef inline pthread_mutex_t *_stripe(ledger *l, const tcpha_flow *flow) noexcept nogil:
    return &l.stripes[(flow.cport ^ (flow.cport >> 8) ^ flow.caddr[15]) % STRIPES]


cdef int ledger_divert(ledger *l, uint32_t worker, const tcpha_flow *flow, tcpha_entry *entry,
                       tcpha_entry *old) noexcept nogil:
    """Enter a flow. 0; 1 if an older one, of back end old.backend, is over by this; -1 if there is
    no room."""
    cdef int rc
    cdef uint32_t older = 0
    while True:
        pthread_mutex_lock(_stripe(l, flow))
        rc = l.store.put(l.store.self, flow, entry, PUT_NEW)
        if rc < 0 and l.store.find(l.store.self, flow, old) == 0:
            older = tcpha_owed(old.phase, old.backend)
            if older:
                old.backend = older - 1
            rc = l.store.put(l.store.self, flow, entry, PUT_ANY)
        pthread_mutex_unlock(_stripe(l, flow))
        if rc >= 0 or not _make_room(l, worker):
            return -1 if rc < 0 else older != 0


cdef int ledger_restore(ledger *l, uint32_t worker, const tcpha_flow *flow,
                        const tcpha_entry *entry, uint64_t asked,
                        tcpha_entry *old) noexcept nogil:
    """Enter a flow that an earlier run or another front end handed over, if there is room and no
    newer one. RESTORED: it is there; RESTORED_OVER: an older one, of back end old.backend, is over
    by this: it began before 'asked', and the client has used its port again at the other front
    end."""
    cdef int rc, result = 0
    cdef bint found
    while True:
        pthread_mutex_lock(_stripe(l, flow))
        rc = l.store.put(l.store.self, flow, entry, PUT_NEW)
        found = rc < 0 and l.store.find(l.store.self, flow, old) == 0
        if found and tcpha_is_forwarded(tcpha_state_of(old)) and tcpha_live(old) != entry.id and \
                old.start_ns < asked:
            if tcpha_state_of(old) == TCPHA_LINGERING:
                rc = l.store.drop(l.store.self, worker, flow, old)
            else:
                rc = l.store.end(l.store.self, worker, flow, old.id, old.backend, False)
                result = RESTORED_OVER if rc == 1 else 0
            rc = l.store.put(l.store.self, flow, entry, PUT_NEW) if rc == 1 else -1
        pthread_mutex_unlock(_stripe(l, flow))
        if rc >= 0:
            return result | RESTORED
        if found or not _make_room(l, worker):
            return result


cdef void ledger_remove(ledger *l, const tcpha_flow *flow) noexcept nogil:
    pthread_mutex_lock(_stripe(l, flow))
    l.store.remove(l.store.self, flow)
    pthread_mutex_unlock(_stripe(l, flow))


cdef bint _linger(ledger *l, const tcpha_flow *flow, uint64_t id, uint64_t since) noexcept nogil:
    """Put a flow at the end of the queue of those that linger."""
    cdef uint32_t at
    cdef lingering *p
    pthread_mutex_lock(&l.lock)
    at = l.free
    if at:
        l.free = l.linger[at - 1].next
    elif l.fresh < l.capacity:
        l.fresh += 1
        at = l.fresh
    if at:
        p = &l.linger[at - 1]
        p.flow = flow[0]
        p.id = id
        p.since_ns = since
        p.check_ns = now_ns() + LINGER_NS
        p.next = 0
        if l.last:
            l.linger[l.last - 1].next = at
        else:
            l.first = at
        l.last = at
    pthread_mutex_unlock(&l.lock)
    return at != 0


cdef bint _next(ledger *l, uint64_t due, lingering *item) noexcept nogil:
    """Take the one that has lingered longest, if its time has come."""
    cdef bint found
    cdef uint32_t at
    cdef lingering *p
    pthread_mutex_lock(&l.lock)
    at = l.first
    found = at != 0 and l.linger[at - 1].check_ns <= due
    if found:
        p = &l.linger[at - 1]
        item[0] = p[0]
        l.first = p.next
        if l.first == 0:
            l.last = 0
        p.next = l.free
        l.free = at
    pthread_mutex_unlock(&l.lock)
    return found


cdef bint _retire(ledger *l, uint32_t worker, const lingering *item, uint64_t now) noexcept nogil:
    """Remove an entry that lingered, unless its client is still expected to close. Returns whether
    that made room."""
    cdef tcpha_entry entry
    cdef bint removed = False
    pthread_mutex_lock(_stripe(l, &item.flow))
    if l.store.find(l.store.self, &item.flow, &entry) == 0 and entry.id == item.id and \
            tcpha_state_of(&entry) == TCPHA_LINGERING:
        # without a FIN from the client, the back end waits for it in FIN-WAIT-2
        if entry.flags & (TCPHA_F_FIN | TCPHA_F_RST) or now - item.since_ns > FIN_WAIT_NS or \
                not _linger(l, &item.flow, item.id, item.since_ns):
            removed = l.store.drop(l.store.self, worker, &item.flow, &entry)
            if not removed:    # it is not the same any more, or that went wrong: look later
                _linger(l, &item.flow, item.id, item.since_ns)
    pthread_mutex_unlock(_stripe(l, &item.flow))
    return removed


cdef bint _make_room(ledger *l, uint32_t worker) noexcept nogil:
    """The table is full: those that are over make room for those that begin."""
    cdef lingering item
    cdef int made = 0, _i
    for _i in range(ROOM):
        if not _next(l, <uint64_t>-1, &item):
            break
        made += _retire(l, worker, &item, now_ns())
    return made != 0


cdef int ledger_forget(ledger *l, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                       uint32_t backend, bint linger, tcpha_entry *entry) noexcept nogil:
    """The connection of handoff 'id' is over at a back end. 1: it was known, and entry is what it
    was. 0: it was not, or that was said before: a back end that was started anew may say it again.
    Or another back end has it now: a request may be offered to a second one while the first is cut
    off, whose connection is nobody's then."""
    cdef int known = 0
    cdef bint keep
    pthread_mutex_lock(_stripe(l, flow))
    if id and l.store.find(l.store.self, flow, entry) == 0 and tcpha_live(entry) == id and \
            entry.backend == backend:
        # a late copy of a request with a cookie would begin anew; of such, two seconds are enough
        keep = (linger or entry.flags & TCPHA_F_FAST) and \
            _linger(l, flow, id, now_ns() if linger else 0)
        known = l.store.end(l.store.self, worker, flow, id, backend, keep)
    pthread_mutex_unlock(_stripe(l, flow))
    return known


cdef uint32_t ledger_drop_pending(ledger *l, uint32_t worker, const tcpha_flow *flow,
                                  uint64_t idle) noexcept nogil:
    """A request became a socket of ours, or came to nothing. Its entry goes, if it was not replaced
    already and no packet has come for so many ns. Returns the back end of an older flow, over by
    this, + 1; or 0."""
    cdef tcpha_entry entry
    cdef uint32_t older = 0
    pthread_mutex_lock(_stripe(l, flow))
    if l.store.find(l.store.self, flow, &entry) == 0 and \
            tcpha_is_pending(tcpha_state_of(&entry)) and \
            now_ns() >= entry.last_ns + idle and l.store.drop(l.store.self, worker, flow, &entry):
        older = tcpha_owed(entry.phase, 0)
    pthread_mutex_unlock(_stripe(l, flow))
    return older


cdef void ledger_linger(ledger *l, const tcpha_flow *flow, uint64_t id,
                        uint64_t since) noexcept nogil:
    """An entry that is no longer live, of an earlier run: it goes in the same way."""
    if not _linger(l, flow, id, since):
        ledger_remove(l, flow)


cdef void ledger_sweep(ledger *l, uint32_t worker, uint64_t now) noexcept nogil:
    """Remove entries whose lingering is over."""
    cdef lingering item
    while _next(l, now, &item):
        _retire(l, worker, &item, now)
