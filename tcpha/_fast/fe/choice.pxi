# SPDX-License-Identifier: GPL-2.0-or-later
# Who gets a request: see choose.h.

cdef inline uint32_t _live(frontend *f, uint32_t b) noexcept nogil:
    """Connections that a back end has, offers included."""
    return load32(&f.loads[b].live)


cdef inline uint32_t _refusal(frontend *f, uint32_t b, uint32_t service, const uint64_t *tried,
                              bint desperate, uint64_t now) noexcept nogil:
    """Why a back end may not take a request (TCPHA_AWAY and so on), or TCPHA_MAY."""
    return tcpha_refusal(&f.backends[b].may, <uint64_t>1 << service, _live(f, b),
                         tried[b >> 6] >> (b & 63) & 1, desperate, now)


cdef uint32_t _members(frontend *f, const ruleset *rules, uint32_t g, uint32_t service,
                       const uint64_t *tried, bint desperate, tcpha_choice *may,
                       uint64_t *until) noexcept nogil:
    """Those of a group that may take a service's request; returns how many. until: lowered to when
    the first one that is full is asked again; 0: none is full."""
    cdef uint64_t now = now_ns(), then
    cdef uint32_t i, why, n = 0
    cdef const choice *ch
    for i in range(rules.first[g], rules.first[g + 1]):
        ch = &rules.choices[i]
        why = _refusal(f, ch.backend, service, tried, desperate, now)
        if why == TCPHA_MAY:
            may[n].backend = ch.backend
            may[n].rule = ch.rule
            n += 1
        elif why == TCPHA_FULL:
            then = load64(&f.backends[ch.backend].may.full_until_ns)
            if until[0] == 0 or then < until[0]:
                until[0] = then
    return n


cdef inline int64_t _next_match(const uint64_t *matched, uint32_t words, int64_t g) noexcept nogil:
    """The first one behind g whose pattern matched, or -1."""
    cdef uint32_t word = <uint32_t>(g + 1) >> 6
    cdef uint64_t bits
    while word < words:
        bits = matched[word]
        if word == <uint32_t>(g + 1) >> 6:
            bits &= <uint64_t>-1 << (g + 1 & 63)
        if bits:
            return <int64_t>word * 64 + _lowest(bits)
        word += 1
    return -1


cdef inline int64_t _next_group(const ruleset *rules, const uint64_t *matched, uint32_t service,
                                int64_t g) noexcept nogil:
    """The first one behind g that matched and is for a service, or -1."""
    g = _next_match(matched, rules.words, g)
    while g >= 0 and not rules.services[g] >> service & 1:
        g = _next_match(matched, rules.words, g)
    return g


cdef int _candidates(frontend *f, const ruleset *rules, const uint64_t *matched, uint32_t service,
                     const uint64_t *tried, bint desperate, uint32_t room, tcpha_choice *may,
                     uint64_t *until) noexcept nogil:
    """Those of the first group that matched and has some who may take a service's request. Returns
    how many; 0: there are none; -1: a group before has more members than there is room for."""
    cdef int64_t g = _next_group(rules, matched, service, -1)
    cdef uint32_t n
    while g >= 0:
        if rules.first[g + 1] - rules.first[g] > room:
            return -1
        n = _members(f, rules, <uint32_t>g, service, tried, desperate, may, until)
        if n:
            return n
        g = _next_group(rules, matched, service, g)
    return 0


cdef bint _pick(frontend *f, const ruleset *rules, const uint64_t *matched, uint32_t service,
                const uint64_t *tried, bint desperate, tcpha_choice *chosen) noexcept nogil:
    """Whether there is somebody: see choose.h."""
    cdef tcpha_choice may[TCPHA_MAX_BACKENDS]
    cdef uint64_t until = 0
    cdef int n = _candidates(f, rules, matched, service, tried, desperate, TCPHA_MAX_BACKENDS, may,
                             &until)
    cdef int at
    if n <= 0:
        return False
    at = tcpha_choose(may, n, TCPHA_MAX_BACKENDS, load64(&f.next_id), f.loads)
    chosen[0] = may[at]
    return True


cdef inline void _void_verdicts(frontend *f) noexcept nogil:
    """Something has changed that cached verdicts depend on."""
    add64(&f.dp.fast.cache.generation, 1)


cdef fe_worker *_of_worker(worker *w) noexcept nogil:
    """What a worker keeps, or NULL: out of memory."""
    if w.role == NULL:
        w.role = calloc(1, sizeof(fe_worker))
    return <fe_worker *>w.role


cdef bint _by_rules(frontend *f, worker *w, request *r, uint8_t *buf) noexcept nogil:
    """Match the rules and pick a back end. False: there is none."""
    cdef ruleset *rules = <ruleset *>loadp(<void **>&f.rules)
    cdef fe_worker *fw = _of_worker(w)
    cdef hs_scratch_t *fresh = NULL
    cdef tcpha_choice chosen
    if rules == NULL or rules.groups == 0 or fw == NULL:
        return False
    if fw.scratch_of != rules.generation:
        if hs_clone_scratch(rules.patterns.scratch, &fresh) != HS_SUCCESS:
            return False
        if fw.scratch != NULL:
            hs_free_scratch(fw.scratch)
        fw.scratch = fresh
        fw.scratch_of = rules.generation
    if fw.words < rules.words:
        fw.bits = <uint64_t *>realloc(fw.bits, rules.words * 8)
        fw.words = rules.words if fw.bits != NULL else 0
        if fw.bits == NULL:
            return False
    fw.rules = rules
    if match_target(rules, fw.scratch, &r.head, buf, fw.bits) < 0:
        return False
    if not _pick(f, rules, fw.bits, r.service, r.tried, False, &chosen) and \
            not _pick(f, rules, fw.bits, r.service, r.tried, True, &chosen):
        return False
    set32(&r.backend, chosen.backend)
    r.rule = chosen.rule
    return True


cdef bint _choose(frontend *f, worker *w, request *r, uint8_t *buf) noexcept nogil:
    """Pick who takes the request, whose head begins at buf: a back end, or the Local Node. False:
    nobody."""
    if _by_rules(f, w, r, buf):
        return True
    set32(&r.backend, TCPHA_LOCAL_NODE)
    r.rule = <uint32_t>NO_RULE
    return _refusal(f, TCPHA_LOCAL_NODE, r.service, r.tried, False, now_ns()) == TCPHA_MAY


cdef object _flags(backend *be):
    return (load64(&be.may.draining), load32(&be.may.dead), load64(&be.may.app_down),
            load64(&be.may.lacking))
