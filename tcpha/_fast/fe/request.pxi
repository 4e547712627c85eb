# SPDX-License-Identifier: GPL-2.0-or-later
# A request's life, and its accounts with back ends. One that is offered ends with _handed(),
# _refused() or _call_off(); what a back end has ends with _count_closed(), _returned() or
# _expired().

cdef inline bint _untried(const request *r) noexcept nogil:
    """Nobody has refused it."""
    cdef uint32_t i
    for i in range(TRIED_WORDS):
        if r.tried[i]:
            return False
    return True


cdef inline void _say_chosen(frontend *f, const request *r) noexcept nogil:
    say_more(f.c, 5, &r.flow, b"chosen: back end %s, rule %ld", f.backends[r.backend].name,
             <int>r.rule)


cdef inline void _accepted(frontend *f, uint32_t service, bint fast) noexcept nogil:
    """A service's connection has come to us, by the socket path or by the packet path."""
    add64(&f.n.accepted, 1)
    add64(&f.services[service].accepted, 1)
    add64(&f.n.fast, fast)


cdef inline void _offered(frontend *f, request *r, uint64_t now) noexcept nogil:
    """It counts as the back end's from here."""
    r.offered_ns = now
    add32(&f.loads[r.backend].live, 1)


cdef inline void _call_off(frontend *f, const request *r) noexcept nogil:
    """It was not offered after all."""
    add32(&f.loads[r.backend].live, -1)


cdef void _handed(frontend *f, const request *r, const char *target, uint64_t took,
                  const uint8_t *head) noexcept nogil:
    """The back end has it, 'took' ns after it began. target: as the flow table has it; head: its
    bytes, for the access log, or NULL if there is none."""
    add64(&f.n.handed, 1)
    add64(&f.backends[r.backend].handed, 1)
    if r.rule < TCPHA_MAX_RULES:
        add64(&f.rule_hits[r.rule], 1)
    slow_note(&f.slow, took, &r.flow, r.backend, r.rule, target, r.head.target_len)
    say_more(f.c, 2, &r.flow, b"handed over to %s by rule %ld", f.backends[r.backend].name,
             <int>r.rule)
    if head != NULL:
        _log_access(f, r, head)


cdef void _refused(frontend *f, request *r, uint32_t reason) noexcept nogil:
    """The back end does not take it; another one may."""
    cdef backend *be = &f.backends[r.backend]
    cdef uint64_t bit = <uint64_t>1 << (r.backend & 63)
    cdef char line[160]
    r.tried[r.backend >> 6] |= bit
    if reason == REFUSE_BACKLOG and r.backend != TCPHA_LOCAL_NODE:  # that has waited itself
        r.crowded[r.backend >> 6] |= bit
    add32(&f.loads[r.backend].live, -1)
    add64(&be.refused, 1)
    add64(&f.n.refused, 1)
    if reason == REFUSE_FULL:
        set32(&be.may.full_live, _live(f, r.backend))
        set64(&be.may.full_until_ns, now_ns() + FULL_NS)
        _void_verdicts(f)
    if load32(&f.c.dbglevel) >= 1:
        snprintf(line, sizeof(line), b"back end %s does not take it: %s", be.name,
                 refusal_text(reason))
        say_flow(f.c, 1, &r.flow, line)


cdef void _count_closed(frontend *f, uint32_t b) noexcept nogil:
    """What a back end had is over."""
    add64(&f.n.closed, 1)
    add64(&f.backends[b].closed, 1)
    add32(&f.loads[b].live, -1)


cdef void _returned(frontend *f, request *r, uint32_t reason) noexcept nogil:
    """What was handed over by the packet path came back. It comes again, and is counted again."""
    add64(&f.n.returned, 1)
    add64(&f.backends[r.backend].returned, 1)
    _refused(f, r, reason)


cdef inline void _expired(frontend *f, uint32_t b) noexcept nogil:
    """Nobody has heard of a back end's connection for long."""
    add64(&f.n.expired, 1)
    add32(&f.loads[b].live, -1)


cdef inline void _restored(frontend *f, uint32_t b) noexcept nogil:
    """A back end has a connection that we have not handed over."""
    add64(&f.n.restored, 1)
    add32(&f.loads[b].live, 1)


cdef bint _forget(frontend *f, worker *w, const tcpha_flow *flow, uint64_t id, uint32_t b,
                  bint linger) noexcept nogil:
    """A back end's connection is over. False: it was not known to be there."""
    cdef tcpha_entry entry
    if f.dp.forget(f.dp.self, w.index, flow, id, b, linger, &entry) != 1:
        return False
    _count_closed(f, b)
    say_flow(f.c, 2, flow, b"closed")
    return True
