# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end's work: accept, read the request, choose a back end, hand the connection over.

A connection belongs to one slot, whose lock makes one worker at a time handle it: events of the
client, answers of back ends and deadlines may come to different workers at once.
"""
import os
import time
from functools import partial

from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset, strlen, strstr

from tcpha._fast.core cimport (
    EV_CLIENT, EV_FAST, EV_LISTENER, EV_TAP, LINK_FULL, LINK_OUT_MAX, LINK_UP, MAX_LINKS, SCRATCH,
    Core, core, half_closed, link, link_put, link_queued, notice, rearm, say_flow, say_more,
    say_number, watch, worker)
from tcpha._fast.datapath cimport DP_GONE, FeDatapath
from tcpha._fast.defs cimport (
    TCPHA_AWAY, TCPHA_CHOICES, TCPHA_DEAD, TCPHA_DEAF, TCPHA_DRAINED, TCPHA_FAST_EARLY,
    TCPHA_FAST_FIRST, TCPHA_FAST_SEND, TCPHA_FULL, TCPHA_F_FIN, TCPHA_HEAD_MAX, TCPHA_LINE_MAX,
    TCPHA_LOCAL_NODE, TCPHA_MAX_BACKENDS, TCPHA_MAX_OPS, TCPHA_MAX_RULES, TCPHA_MAY,
    TCPHA_TARGET_MAX, tcpha_cache, tcpha_choice, tcpha_choose, tcpha_entry, tcpha_flow,
    tcpha_forward, tcpha_hold, tcpha_is_pending, tcpha_live, tcpha_load, tcpha_offer,
    tcpha_refusal, tcpha_siphash, tcpha_state_of, tcpha_verdict)
from tcpha._fast.http cimport HTTP_BAD, HTTP_DONE, HTTP_MORE, http_begun, http_head, http_parse
from tcpha._fast.ledger cimport RESTORED, RESTORED_OVER
from tcpha._fast.match cimport (
    HS_SUCCESS, Matcher, choice, hs_clone_scratch, hs_free_scratch, hs_scratch_t, match_target,
    ruleset, ruleset_free, ruleset_new)
from tcpha._fast.message cimport (
    END_TIME_WAIT, MSG_ADOPTED, MSG_ASK, MSG_CLOSED, MSG_FLOW, MSG_HANDOFF_FIXED, MSG_HEADER,
    MSG_KEYED, MSG_KEYS_SIZE, MSG_MISSED, MSG_OWNED_SIZE, MSG_PONG, MSG_REFUSED, MSG_RETURN,
    MSG_SERVER, MSG_TOLD,
    REFUSE_BACKLOG, REFUSE_FULL, REFUSE_LINK, REFUSE_LOST, REFUSE_STALE, REFUSE_TIMEOUT,
    REFUSE_UNSUPPORTED,
    fast_id, message, message_doubt, message_handoff, message_keys, message_owned, message_short,
    refusal_text)
from tcpha._fast.meter cimport (
    histogram_add, histogram_read, slow_close, slow_note, slow_open, slow_read)
from tcpha._fast.packet cimport TCP_URG, address_bytes, flow_text
from tcpha._fast.repair cimport repair_received
from tcpha._fast.rewrite cimport get32, tcp_view
from tcpha._fast.scan cimport Questions, Scan, question
from tcpha._fast.snapshot cimport SNAP_FIN, snapshot
from tcpha._fast.sys cimport (
    EAGAIN, EINTR, EMFILE, ENFILE, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLRDHUP, EPOLL_CTL_ADD,
    EPOLL_CTL_DEL, EPOLL_CTL_MOD, IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, MSG_TRUNC,
    SEEK_CUR, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, accept4, add32, add64, close, errno, ftruncate,
    getsockopt, htons, iovec, load32, load64, loadp, lseek, now_ns, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock, raise64,
    read_counters, realtime_ns, recv, send, set32, set64, setsockopt, shutdown, sockaddr,
    sockaddr_in, socklen_t, store32, store64, storep, writev, xchg32)

# for Python: see choose.h
MAY, AWAY, DEAD, DRAINED, DEAF, FULL = (
    TCPHA_MAY, TCPHA_AWAY, TCPHA_DEAD, TCPHA_DRAINED, TCPHA_DEAF, TCPHA_FULL)

cdef extern from "<linux/filter.h>" nogil:
    struct sock_filter:
        uint16_t code
        uint8_t jt
        uint8_t jf
        uint32_t k
    struct sock_fprog:
        unsigned short len
        sock_filter *filter
    enum:
        BPF_LD
        BPF_B
        BPF_ABS
        BPF_JMP
        BPF_JSET
        BPF_K
        BPF_RET

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info_head "tcp_info":
        uint32_t tcpi_unacked  # of a listener: its accept queue

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    struct tm:
        pass
    tm *gmtime_r(const time_t *when, tm *result)
    size_t strftime(char *to, size_t size, const char *format, const tm *when)

cdef extern from * nogil:
    int _lowest "__builtin_ctzll"(uint64_t v)

cdef enum:
    ACCEPT_BATCH = 32
    TURN = 256             # requests of the packet path before it is others' turn
    TCP_REPAIR = 19
    TCP_MAXSEG = 2
    MSS_MIN = 536          # RFC 9293 section 3.7.1
    TCP_REPAIR_QUEUE = 20
    TCP_RECV_QUEUE = 1
    SOL_SOCKET = 1
    SO_REUSEADDR = 2
    SO_ATTACH_FILTER = 26
    SLOT_BITS = 16         # of a handoff id
    NO_RULE = -1           # of what the Local Node takes because nobody else does

cdef uint64_t LINGER_NS = 2000000000     # after an answer of our own, for the client to close
cdef uint64_t REVIVE_NS = 2000000000     # for a back end that was killed to come back
cdef uint64_t ROOM_NS = 5000000000       # for room in an accept queue
cdef uint64_t ROOM_SOON_NS = 50000000    # between looks for it: at first,
cdef uint64_t ROOM_LATE_NS = 200000000   # and at last
cdef uint64_t FULL_NS = 100000000        # a back end that said FULL is not asked for so long
# a request that no back end has taken, and that its client has not sent again
cdef uint64_t PENDING_NS = 60000000000
# Edge-triggered: what was only peeked at stays in the queue and must not wake us again.
cdef uint32_t CLIENT_EVENTS = EPOLLIN | EPOLLRDHUP | EPOLLET

cdef const char *ANSWER_400 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n"
    b"Connection: close\r\n\r\nBad Request\n")
cdef const char *ANSWER_408 = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 16\r\n"
    b"Connection: close\r\n\r\nRequest Timeout\n")
cdef const char *ANSWER_431 = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 32\r\nConnection: close\r\n\r\nRequest Header Fields Too Large\n")
cdef const char *ANSWER_503 = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\nService Unavailable\n")


cdef inline void _flow_from(frontend *f, const void *address, const void *port,
                            tcpha_flow *flow) noexcept nogil:
    """The flow of a client at 4 bytes of address and 2 of port, network byte order."""
    memset(flow, 0, sizeof(tcpha_flow))
    flow.caddr[10] = flow.caddr[11] = 0xff
    memcpy(flow.caddr + 12, address, 4)
    memcpy(&flow.cport, port, 2)
    memcpy(flow.vaddr, f.vaddr, 16)
    flow.vport = f.vport


# Slots

cdef conn *_take_slot(frontend *f) noexcept nogil:
    cdef conn *k = NULL
    pthread_mutex_lock(&f.pool_lock)
    if f.pool_len:
        set32(&f.pool_len, f.pool_len - 1)
        k = &f.conns[f.pool[f.pool_len]]
    else:
        f.starved = 1
    pthread_mutex_unlock(&f.pool_lock)
    return k


cdef void _free_slot(frontend *f, conn *k) noexcept nogil:
    """The slot's lock is held; so it stays until the caller lets go."""
    cdef bint wake
    set32(&k.state, CONN_FREE)
    k.fd = -1
    k.gen += 1
    pthread_mutex_lock(&f.pool_lock)
    f.pool[f.pool_len] = k.index
    set32(&f.pool_len, f.pool_len + 1)
    wake = f.starved != 0
    f.starved = 0
    pthread_mutex_unlock(&f.pool_lock)
    if wake and not f.unloading:  # a changed registration reports the backlog again
        watch(f.c, EPOLL_CTL_MOD, f.listen_fd, EPOLLIN | EPOLLET, EV_LISTENER, 0, 0)


cdef void _close(frontend *f, conn *k) noexcept nogil:
    """Close the socket: silently if frozen, else as close() does."""
    close(k.fd)
    _free_slot(f, k)


cdef void _watch_client(frontend *f, conn *k) noexcept nogil:
    """Have events of the client reported; once is enough. One that is due comes at once."""
    if k.watched:
        return
    k.watched = True
    if watch(f.c, EPOLL_CTL_ADD, k.fd, CLIENT_EVENTS, EV_CLIENT, k.index, k.gen) < 0:
        _close(f, k)


# Answers of our own

cdef bint _discard(conn *k) noexcept nogil:
    """Throw away what the client has sent, so that close() sends no RST. False at its end."""
    cdef ssize_t n
    while True:
        n = recv(k.fd, NULL, SCRATCH, MSG_DONTWAIT | MSG_TRUNC)
        if n > 0 or (n < 0 and errno == EINTR):
            continue
        return n < 0 and errno == EAGAIN


cdef void _thaw(frontend *f, conn *k) noexcept nogil:
    """The connection is our own stack's again, if it was frozen for an offer."""
    cdef int off = -1, one = 1  # -1: without a window probe
    if k.frozen:
        setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR, &off, sizeof(off))
        # The kernel takes this from a socket that was in repair mode, which would keep our next run
        # from its port even in TIME_WAIT.
        setsockopt(k.fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one))
        k.frozen = False
    if k.diverted:
        f.dp.give_back(f.dp.self, &k.req.flow, k.index)
        k.diverted = False


cdef void _answer(frontend *f, conn *k, const char *text, uint64_t *counter) noexcept nogil:
    """Send a response and close in the lingering way."""
    cdef size_t n
    _thaw(f, k)
    add64(counter, 1)
    _discard(k)
    n = strlen(text)
    if k.method_head:  # no content then (RFC 9110 section 9.3.2)
        n = <size_t>(strstr(text, b"\r\n\r\n") - text) + 4
    send(k.fd, text, n, MSG_DONTWAIT | MSG_NOSIGNAL)
    shutdown(k.fd, SHUT_WR)
    set32(&k.state, CONN_LINGER)
    set64(&k.deadline_ns, now_ns() + LINGER_NS)
    _watch_client(f, k)


cdef void _leave_silent(frontend *f, conn *k) noexcept nogil:
    """Close without a word. Where no request has begun, nobody waits for an answer: a client that
    keeps the connection for later would take it for the answer to its first request."""
    _discard(k)                # empty lines, perhaps
    _close(f, k)


# Choosing a back end

cdef inline uint32_t _live(frontend *f, uint32_t b) noexcept nogil:
    """Connections that a back end has, offers included."""
    return load32(&f.loads[b].live)


cdef inline uint32_t _refusal(frontend *f, uint32_t b, const uint64_t *tried, bint desperate,
                              uint64_t now) noexcept nogil:
    """Why a back end may not take a request (TCPHA_AWAY and so on), or TCPHA_MAY."""
    return tcpha_refusal(&f.backends[b].may, _live(f, b), tried[b >> 6] >> (b & 63) & 1, desperate,
                         now)


cdef uint32_t _members(frontend *f, const ruleset *rules, uint32_t g, const uint64_t *tried,
                       bint desperate, tcpha_choice *may, uint64_t *until) noexcept nogil:
    """Those of a group that may take a request; returns how many. until: when this may change for
    one that is full, if that is sooner; 0: never."""
    cdef uint64_t now = now_ns(), then
    cdef uint32_t i, why, n = 0
    cdef const choice *ch
    for i in range(rules.first[g], rules.first[g + 1]):
        ch = &rules.choices[i]
        if n == TCPHA_MAX_BACKENDS:
            break
        why = _refusal(f, ch.backend, tried, desperate, now)
        if why == TCPHA_MAY:
            may[n].backend = ch.backend
            may[n].rule = ch.rule
            n += 1
        elif why == TCPHA_FULL:
            then = load64(&f.backends[ch.backend].may.full_until_ns)
            if until[0] == 0 or then < until[0]:
                until[0] = then
    return n


cdef inline int64_t _next_group(const uint64_t *matched, uint32_t words, int64_t g) noexcept nogil:
    """The first one behind g that matched, or -1."""
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


cdef bint _pick(frontend *f, const ruleset *rules, const uint64_t *matched, const uint64_t *tried,
                bint desperate, tcpha_choice *chosen) noexcept nogil:
    """Whether there is somebody: see choose.h."""
    cdef tcpha_choice may[TCPHA_MAX_BACKENDS]
    cdef uint64_t until = 0
    cdef int64_t g = _next_group(matched, rules.words, -1)
    cdef uint32_t n
    cdef int at
    while g >= 0:
        n = _members(f, rules, <uint32_t>g, tried, desperate, may, &until)
        at = tcpha_choose(may, n, TCPHA_MAX_BACKENDS, load64(&f.next_id), f.loads)
        if at >= 0:
            chosen[0] = may[at]
            return True
        g = _next_group(matched, rules.words, g)
    return False


cdef inline void _void_verdicts(frontend *f) noexcept nogil:
    """Something has changed that cached verdicts depend on."""
    if f.dp.cache != NULL:
        add64(&f.dp.cache.generation, 1)


cdef fe_worker *_of_worker(worker *w) noexcept nogil:
    """What a worker keeps, or NULL: out of memory."""
    if w.role == NULL:
        w.role = calloc(1, sizeof(fe_worker))
    return <fe_worker *>w.role


cdef bint _by_rules(frontend *f, worker *w, request *r, const uint8_t *buf) noexcept nogil:
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
    if not _pick(f, rules, fw.bits, r.tried, False, &chosen) and \
            not _pick(f, rules, fw.bits, r.tried, True, &chosen):
        return False
    set32(&r.backend, chosen.backend)
    r.rule = chosen.rule
    return True


cdef bint _choose(frontend *f, worker *w, request *r, const uint8_t *buf) noexcept nogil:
    """Pick who takes the request, whose head begins at buf: a back end, or the Local Node. False:
    nobody."""
    if _by_rules(f, w, r, buf):
        return True
    set32(&r.backend, TCPHA_LOCAL_NODE)
    r.rule = <uint32_t>NO_RULE
    return _refusal(f, TCPHA_LOCAL_NODE, r.tried, False, now_ns()) == TCPHA_MAY


# A request's life. Each request that is offered ends with one of _handed() and _refused(); who has it is
# over with _count_closed().

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
    bytes, for the access log, or NULL if they are gone."""
    add64(&f.n.handed, 1)
    add64(&f.backends[r.backend].handed, 1)
    if r.rule < TCPHA_MAX_RULES:
        add64(&f.rule_hits[r.rule], 1)
    slow_note(&f.slow, took, &r.flow, r.backend, r.rule, target, r.head.target_len)
    say_more(f.c, 2, &r.flow, b"handed over to %s by rule %ld", f.backends[r.backend].name,
             <int>r.rule)
    if f.access_fd >= 0:
        _log_access(f, r, head)


cdef void _refused(frontend *f, request *r, uint32_t reason) noexcept nogil:
    """The back end does not take it; another one may."""
    cdef backend *be = &f.backends[r.backend]
    cdef uint64_t bit = <uint64_t>1 << (r.backend & 63)
    cdef char line[160]
    if reason != REFUSE_LOST:
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


# The socket path

cdef bint _send_offer(frontend *f, worker *w, conn *k, const uint8_t *data,
                      uint32_t most) noexcept nogil:
    """Queue the HANDOFF on one of the back end's links, with at most so many bytes queued. False:
    none takes it."""
    cdef backend *be = &f.backends[k.req.backend]
    cdef uint8_t head[MSG_HANDOFF_FIXED]
    cdef uint32_t i, n, at = add32(&be.next_link, 1)
    cdef link *l
    for i in range(LINKS_MAX):
        n = load32(&be.link[(at + i) % LINKS_MAX])
        if n >= MAX_LINKS:
            continue
        l = &f.c.links[n]
        if load32(&l.state) != LINK_UP or l.peer != k.req.backend or link_queued(l) > most:
            continue
        set32(&k.link, n)
        set32(&k.link_gen, l.gen)
        n = message_handoff(head, k.req.id, &k.snap)
        if link_put(f.c, w, l, head, n, data, k.snap.len) == 0:
            say_more(f.c, 4, &k.req.flow, b"HANDOFF to %s on control connection %ld", be.name,
                     k.link)
            return True
    return False


cdef bint _await_room(frontend *f, conn *k) noexcept nogil:
    """Where an accept queue was full, offer it again a little later, as TCP does with a SYN that
    finds no room. False: there was none, or it has waited long enough; or half of our slots are in
    use, which requests for other back ends need."""
    cdef uint64_t crowded = 0, waited, now = now_ns()
    cdef uint32_t i
    for i in range(TRIED_WORDS):
        crowded |= k.req.crowded[i]
        k.req.tried[i] &= ~k.req.crowded[i]
        k.req.crowded[i] = 0
    if k.crowded_ns == 0:
        k.crowded_ns = now
    waited = now - k.crowded_ns
    if crowded == 0 or waited > ROOM_NS or load32(&f.pool_len) < f.nconns // 2:
        return False
    say_number(f.c, 3, &k.req.flow, b"an accept queue is full, waiting since %ld ms",
               waited // 1000000)
    _thaw(f, k)                # our stack acknowledges meanwhile, and hears of the client's end
    set64(&k.deadline_ns, now + min(max(waited, ROOM_SOON_NS), ROOM_LATE_NS))
    set32(&k.state, CONN_WAIT)
    _watch_client(f, k)
    return True


cdef inline void _describe(conn *k, const uint8_t *head) noexcept nogil:
    """Its entry, as the flow table gets it."""
    k.entry.start_ns = k.req.began_ns
    k.entry.last_ns = now_ns()
    k.entry.backend = k.req.backend
    k.entry.rule = k.req.rule
    tcpha_hold(&k.entry, k.index)
    k.entry.target_len = k.req.head.target_len
    memcpy(k.entry.target, head + k.req.head.target, min(k.entry.target_len, TCPHA_TARGET_MAX))


cdef void _offer(frontend *f, worker *w, conn *k, uint8_t *buf) noexcept nogil:
    """Freeze and offer the connection to back ends in turn until one has it; or wait, or answer
    503. buf (SCRATCH bytes) holds the head; k.seen bytes of the connection were peeked into it."""
    cdef int rc, one = TCP_RECV_QUEUE
    cdef ssize_t n
    cdef tcpha_entry old
    # a client on this very host: its packets and the answers would never meet
    while not k.local and _choose(f, w, &k.req, buf):
        k.req.id = (add64(&f.next_id, 1) << SLOT_BITS) | k.index
        _say_chosen(f, &k.req)
        if not k.diverted:
            _describe(k, buf)
            rc = f.dp.divert(f.dp.self, w.index, &k.req.flow, &k.entry, &old)
            if rc < 0:
                say_flow(f.c, 1, &k.req.flow, b"the flow table is full")
                add64(&f.n.table_full, 1)
                break
            if rc == 1:        # the client reused its port before CLOSED came
                _count_closed(f, old.backend)
            k.diverted = True
        rc = f.dp.freeze(f.dp.self, w.index, k.fd, &k.snap)
        k.frozen = True
        if rc == DP_GONE:
            say_flow(f.c, 2, &k.req.flow, b"the client has reset the connection")
            add64(&f.n.lost, 1)
            f.dp.give_back(f.dp.self, &k.req.flow, k.index)
            _close(f, k)
            return
        if rc < 0:
            say_flow(f.c, 0, &k.req.flow, b"cannot freeze the connection")
            break
        if k.snap.len != k.seen or k.seen == 0:
            setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
            n = recv(k.fd, buf, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
            if n < <ssize_t>k.snap.len:
                say_flow(f.c, 0, &k.req.flow, b"cannot read the connection's bytes")
                break
            k.seen = <uint32_t>n
            if k.seen > k.snap.len:  # arrived between the two looks
                k.snap.rcv_nxt += k.seen - k.snap.len
                k.snap.len = k.seen
        _offered(f, &k.req, now_ns())
        set32(&k.state, CONN_SENT)
        set64(&k.deadline_ns, k.req.offered_ns + f.offer_ns)
        if _send_offer(f, w, k, buf, LINK_FULL):
            say_more(f.c, 3, &k.req.flow, b"offered to %s, %ld bytes",
                     f.backends[k.req.backend].name, k.snap.len)
            return
        _refused(f, &k.req, REFUSE_LINK)
    else:
        if _await_room(f, k):
            return
    say_flow(f.c, 1, &k.req.flow, b"no back end takes the request: 503")
    _answer(f, k, ANSWER_503, &f.n.answered_503)


cdef inline bint _may_have_it(conn *k, uint32_t reason) noexcept nogil:
    """Whether the back end at hand, and no other one, may have adopted a connection of which it has
    not said so: what it has refused in so many words it has not."""
    return _untried(&k.req) and \
        (reason == REFUSE_TIMEOUT or reason == REFUSE_LINK or reason == REFUSE_STALE)


cdef void _offer_again(frontend *f, worker *w, conn *k, uint32_t reason) noexcept nogil:
    """After a refusal: read the head again (it never left the receive queue) and go on."""
    cdef int one = TCP_RECV_QUEUE
    cdef ssize_t n
    if _may_have_it(k, reason) and f.dp.answered(f.dp.self, k.index, k.snap.snd_nxt):
        # what was lost is the word of the back end that has it, and none other must answer now
        say_more(f.c, 1, &k.req.flow, b"%s has adopted it without a word",
                 f.backends[k.req.backend].name, 0)
        _complete(f, w, k)
        return
    _refused(f, &k.req, reason)
    setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
    n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
    k.seen = <uint32_t>n if n > 0 else 0
    if k.seen < k.req.head.pos:
        _answer(f, k, ANSWER_503, &f.n.answered_503)
        return
    _offer(f, w, k, w.scratch)


cdef void _offer_later(frontend *f, worker *w, conn *k) noexcept nogil:
    """There may be room now."""
    cdef ssize_t n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
    if n < <ssize_t>k.req.head.pos:  # reset
        add64(&f.n.lost, 1)
        _close(f, k)
        return
    k.seen = <uint32_t>n
    _offer(f, w, k, w.scratch)


cdef void _log_access(frontend *f, const request *r, const uint8_t *head_bytes) noexcept nogil:
    """One line: time, client, request-target, number of the rule (or -), back end, microseconds in
    the front end. What a full disk had room for of one is taken back: only whole lines stay."""
    cdef char head[96]
    cdef char tail[96]
    cdef char rule[12]
    cdef iovec iov[3]
    cdef size_t size
    cdef ssize_t written
    cdef uint64_t now = realtime_ns()
    cdef time_t seconds = <time_t>(now // 1000000000)
    cdef tm at
    cdef int n
    if head_bytes == NULL:
        add64(&f.n.access_lost, 1)
        return
    memcpy(rule, b"-", 2)
    gmtime_r(&seconds, &at)
    n = <int>strftime(head, sizeof(head), b"%Y-%m-%dT%H:%M:%S", &at)
    n += snprintf(head + n, sizeof(head) - n, b".%06uZ ",
                  <unsigned int>(now // 1000 % 1000000))
    n += flow_text(&r.flow, head + n, <int>sizeof(head) - n)
    head[n] = c" "
    iov[0].iov_base = head
    iov[0].iov_len = n + 1
    iov[1].iov_base = <uint8_t *>head_bytes + r.head.target
    iov[1].iov_len = r.head.target_len
    if r.rule != <uint32_t>NO_RULE:
        snprintf(rule, sizeof(rule), b"%u", r.rule)
    iov[2].iov_base = tail
    iov[2].iov_len = snprintf(tail, sizeof(tail), b" %s %s %lu\n", rule,
                              f.backends[r.backend].name,
                              <unsigned long>((now_ns() - r.began_ns) // 1000))
    size = iov[0].iov_len + iov[1].iov_len + iov[2].iov_len
    pthread_mutex_lock(&f.access_lock)  # for the position, which is then the end of our line
    written = writev(f.access_fd, iov, 3)
    if 0 <= written < <ssize_t>size:
        written = ftruncate(f.access_fd, lseek(f.access_fd, 0, SEEK_CUR) - written)
    pthread_mutex_unlock(&f.access_lock)
    if written != <ssize_t>size:
        add64(&f.n.access_lost, 1)


cdef bint _look_again(conn *k, worker *w, snapshot *now, uint32_t *late) noexcept nogil:
    """As a second freeze() would tell, had not the Local Node's socket taken the place of ours:
    what was received after the snapshot, which w.scratch holds then. Returns whether a FIN was."""
    cdef uint32_t rcv_nxt
    cdef ssize_t n
    now[0] = k.snap
    if repair_received(k.fd, &rcv_nxt) < 0 or rcv_nxt == k.snap.rcv_nxt:
        return False
    n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
    if n > <ssize_t>k.snap.len:
        late[0] = <uint32_t>n - k.snap.len
    now.rcv_nxt = rcv_nxt
    if rcv_nxt - k.snap.rcv_nxt == late[0]:
        return False
    now.flags |= SNAP_FIN
    return True


cdef bint _forget(frontend *f, worker *w, const tcpha_flow *flow, uint64_t id,
                  bint linger) noexcept nogil:
    """A back end's connection is over. False: it was not known."""
    cdef tcpha_entry entry
    if f.dp.forget(f.dp.self, w.index, flow, id, linger, &entry) != 1:
        return False
    _count_closed(f, entry.backend)
    say_flow(f.c, 2, flow, b"closed")
    return True


cdef void _complete(frontend *f, worker *w, conn *k) noexcept nogil:
    """ADOPTED: the back end owns the connection. Let its packets go there, forget our socket. The
    timer tries again if the kernel has no memory; packets are kept meanwhile."""
    cdef snapshot now
    cdef uint32_t late = 0
    cdef int one = TCP_RECV_QUEUE
    cdef ssize_t n
    cdef bint fin
    cdef uint64_t at
    cdef const uint8_t *head = NULL
    now.flow = k.req.flow
    # A packet that another CPU had in its hands when the flow was diverted may have reached our
    # socket after the snapshot: our stack has acknowledged it, so it must be passed on from here.
    if k.req.backend == TCPHA_LOCAL_NODE:
        fin = _look_again(k, w, &now, &late)
    elif f.dp.freeze(f.dp.self, w.index, k.fd, &now) == 0:
        fin = (now.flags & SNAP_FIN) != 0 and not k.snap.flags & SNAP_FIN
        late = now.len - k.snap.len
        if late:
            setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
            n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
            if n < <ssize_t>now.len:
                late = 0
    else:
        fin = False
        now = k.snap
    k.entry.backend = k.req.backend
    k.entry.rule = k.req.rule
    tcpha_forward(&k.entry, k.req.id)
    k.entry.end_seq = now.rcv_nxt
    if now.flags & SNAP_FIN:
        k.entry.flags |= TCPHA_F_FIN
    if f.dp.forward(f.dp.self, w.index, &k.entry, &now, w.scratch + k.snap.len, late, fin) < 0:
        if k.state != CONN_TAKEN:
            say_flow(f.c, 0, &k.req.flow, b"cannot divert the flow, trying again: out of memory")
        set32(&k.state, CONN_TAKEN)
        set64(&k.deadline_ns, now_ns())
        return
    k.diverted = False
    add64(&f.n.late_bytes, late)
    at = now_ns()
    histogram_add(&f.stages[STAGE_OFFER], at - k.req.offered_ns)
    histogram_add(&f.stages[STAGE_TOTAL], at - k.req.began_ns)
    if f.access_fd >= 0:
        setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
        n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
        if n >= <ssize_t>(k.req.head.target + k.req.head.target_len):
            head = w.scratch
    _handed(f, &k.req, k.entry.target, at - k.req.began_ns, head)
    if k.ended:
        _forget(f, w, &k.req.flow, k.req.id, k.linger)
    _close(f, k)


# Events

cdef void _read_head(frontend *f, worker *w, conn *k) noexcept nogil:
    cdef ssize_t n
    cdef int rc
    cdef bint ended = False
    while True:
        n = recv(k.fd, w.scratch, SCRATCH, MSG_PEEK | MSG_DONTWAIT)
        if n < 0 and errno == EINTR:
            continue
        if n < 0 and errno == EAGAIN:
            _watch_client(f, k)
            return
        if n <= 0:  # reset, or closed without a word
            add64(&f.n.lost, 1)
            _close(f, k)
            return
        k.seen = <uint32_t>n
        say_number(f.c, 6, &k.req.flow, b"%ld bytes are there", k.seen)
        rc = http_parse(&k.req.head, w.scratch, min(k.seen, f.headlimit))
        # a FIN may have come with the last bytes; if so, look once more for what came before it
        if rc != HTTP_MORE or ended or not half_closed(k.fd):
            break
        ended = True
    if rc == HTTP_BAD:
        say_flow(f.c, 1, &k.req.flow, k.req.head.error)
        _answer(f, k, ANSWER_400, &f.n.answered_400)
    elif rc != HTTP_MORE:
        k.method_head = (k.req.head.method_len == 4
                         and memcmp(w.scratch + k.req.head.method, b"HEAD", 4) == 0)
        histogram_add(&f.stages[STAGE_HEAD], now_ns() - k.req.began_ns)
        _offer(f, w, k, w.scratch)
    elif k.seen >= f.headlimit:
        say_flow(f.c, 1, &k.req.flow, b"request head over headlimit: 431")
        _answer(f, k, ANSWER_431, &f.n.answered_431)
    elif ended and not http_begun(&k.req.head):
        add64(&f.n.lost, 1)
        _leave_silent(f, k)
    elif ended:
        say_flow(f.c, 1, &k.req.flow, b"the client ended in its request head: 400")
        _answer(f, k, ANSWER_400, &f.n.answered_400)
    else:
        _watch_client(f, k)


cdef void _accept(frontend *f, worker *w) noexcept nogil:
    cdef sockaddr_in peer
    cdef socklen_t n
    cdef conn *k
    cdef int fd, _i
    for _i in range(ACCEPT_BATCH):
        k = _take_slot(f)
        if k == NULL:
            return  # the rest waits in the kernel's backlog: maxclients
        pthread_mutex_lock(&k.lock)
        n = sizeof(peer)
        fd = accept4(f.listen_fd, <sockaddr *>&peer, &n, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EMFILE or errno == ENFILE:
                add64(&f.n.no_descriptors, 1)
            if errno != EAGAIN:
                f.accept_failed = 1  # tried again by the timer: more may wait, and nobody says so
            _free_slot(f, k)
            pthread_mutex_unlock(&k.lock)
            return
        add64(&f.n.accepted, 1)
        k.fd = fd
        k.frozen = k.diverted = k.watched = k.method_head = k.ended = False
        k.seen = 0
        memset(&k.req, 0, sizeof(k.req))
        k.req.began_ns = now_ns()
        set64(&k.deadline_ns, k.req.began_ns + f.headtimeout_ns)
        memset(&k.snap, 0, sizeof(k.snap))
        memset(&k.entry, 0, sizeof(k.entry))
        k.crowded_ns = 0
        _flow_from(f, &peer.sin_addr, &peer.sin_port, &k.req.flow)
        k.snap.flow = k.req.flow
        k.local = memcmp(&peer.sin_addr, f.vaddr + 12, 4) == 0
        set32(&k.state, CONN_READ)
        say_flow(f.c, 6, &k.req.flow, b"accepted")
        _read_head(f, w, k)
        pthread_mutex_unlock(&k.lock)
    # more may wait: let another worker have a share
    watch(f.c, EPOLL_CTL_MOD, f.listen_fd, EPOLLIN | EPOLLET, EV_LISTENER, 0, 0)


# The packet path

cdef bint _takes_fast(frontend *f, uint32_t b) noexcept nogil:
    """Whether a back end is there and has the key of the cookies that we make."""
    cdef backend *be = &f.backends[b]
    return load32(&be.may.used) and load32(&be.may.links) and load64(&be.keyed) >= load64(&f.key)


cdef bint _make_verdict(frontend *f, fe_worker *fw, tcpha_verdict *t) noexcept nogil:
    """Who may take a request by the rules that matched. False: no verdict can say so."""
    cdef const ruleset *rules = fw.rules
    cdef int64_t g = _next_group(fw.bits, rules.words, -1)
    cdef uint32_t i
    while g >= 0 and rules.first[g + 1] - rules.first[g] <= TCPHA_CHOICES:
        t.count = _members(f, rules, <uint32_t>g, fw.req.tried, False, t.choice,
                           <uint64_t *>&t.until_ns)
        for i in range(t.count):
            if load64(&f.backends[t.choice[i].backend].keyed) < load64(&f.key):
                return False  # its requests take the socket path
        if t.count:
            return True
        g = _next_group(fw.bits, rules.words, g)
    return False


cdef bint _sighted(frontend *f, uint64_t key) noexcept nogil:
    """Whether it was there lately. What comes once is not worth a place in the kernel."""
    cdef uint64_t *p = &f.sighted[key % SIGHTED]
    if load64(p) == key:
        return True
    store64(p, key)
    return False


cdef void _keep_verdict(frontend *f, fe_worker *fw, const tcp_view *v,
                        uint64_t generation) noexcept nogil:
    """Have the program decide requests like this one, from the second on: see verdict.bpf.h."""
    cdef tcpha_cache *c = f.dp.cache
    cdef request *r = &fw.req
    cdef uint32_t line = r.head.target + r.head.target_len
    cdef uint32_t limit = load32(&f.headlimit)
    cdef uint64_t target, rest
    cdef tcpha_verdict t
    if c == NULL or not load32(&c.on) or r.head.pos != v.data_len or \
            v.data_len > TCPHA_HEAD_MAX or line >= TCPHA_LINE_MAX:
        return
    # the program knows a head by its halves, and any two of those that are known may come together
    if limit < TCPHA_HEAD_MAX and max(line, v.data_len - line) > limit // 2:
        return
    if not _untried(r):
        return
    target = tcpha_siphash(v.data, line, c.key[0], c.key[1])
    rest = tcpha_siphash(v.data + line, v.data_len - line, c.key[0], ~c.key[1])
    memset(&t, 0, sizeof(t))
    t.generation = generation
    if _sighted(f, rest):
        f.dp.keep_verdict(f.dp.self, rest, &t)
    if _sighted(f, target) and _make_verdict(f, fw, &t):
        f.dp.keep_verdict(f.dp.self, target, &t)


cdef void _recall(frontend *f, request *r, uint64_t id) noexcept nogil:
    """A request of the packet path, with what is remembered of it."""
    cdef returned *back = &f.back[id % RETURNED]
    memset(r, 0, sizeof(request))
    r.id = id
    if load32(&f.returns) == 0:
        return
    pthread_mutex_lock(&f.return_lock)
    if back.id == id:
        memcpy(r.tried, back.tried, sizeof(r.tried))
    pthread_mutex_unlock(&f.return_lock)


cdef void _remember(frontend *f, const request *r) noexcept nogil:
    """Who has refused it, for when the client sends it again."""
    cdef returned *back = &f.back[r.id % RETURNED]
    pthread_mutex_lock(&f.return_lock)
    back.id = r.id
    memcpy(back.tried, r.tried, sizeof(r.tried))
    pthread_mutex_unlock(&f.return_lock)
    add32(&f.returns, 1)


cdef bint _choose_fast(frontend *f, worker *w, request *r, const tcp_view *v) noexcept nogil:
    """Whether the request is plain and somebody takes it by a cookie of ours, who is chosen then."""
    # of urgent data, a server reads other bytes than there are in the segment: so does our socket
    return not v.tcp[13] & TCP_URG and \
        http_parse(&r.head, v.data, min(v.data_len, f.headlimit)) == HTTP_DONE and \
        _choose(f, w, r, v.data) and \
        load64(&f.backends[r.backend].keyed) >= load64(&f.key)  # never the Local Node


cdef void _dispatch(frontend *f, worker *w, uint32_t queue, uint8_t *frame, uint32_t length,
                    const tcp_view *v) noexcept nogil:
    """A request in one segment: to a back end. Whatever is not plain becomes a socket of ours, from
    this very segment, and is accepted."""
    cdef fe_worker *fw = _of_worker(w)
    cdef tcpha_offer *o = &f.dp.offers[w.index]
    cdef request *r
    cdef uint64_t generation = 0, took
    if fw == NULL:
        return                 # out of memory: the client sends it again
    if f.dp.cache != NULL:     # before we look at anything that it stands for
        generation = load64(&f.dp.cache.generation)
    r = &fw.req
    _recall(f, r, fast_id(get32(v.tcp + 4) - 1, get32(v.tcp + 8) - 1))
    _flow_from(f, v.ip + 12, v.tcp, &r.flow)
    say_number(f.c, 6, &r.flow, b"a first segment of %ld bytes", v.data_len)
    o.id = r.id
    o.old = o.result = 0
    if not _choose_fast(f, w, r, v):
        say_flow(f.c, 5, &r.flow, b"to a socket")
        f.dp.fast_socket(f.dp.self, queue, w.index, frame, length, &r.flow)
        if o.old:
            _count_closed(f, o.old - 1)
        return
    add64(&f.next_id, 1)       # equal loads take turns
    _say_chosen(f, r)
    o.backend = r.backend
    o.rule = r.rule
    o.alone = r.head.pos == v.data_len and v.data[0] in (b'G', b'H')  # GET, HEAD
    o.target_len = r.head.target_len
    memcpy(o.target, v.data + r.head.target, min(r.head.target_len, TCPHA_TARGET_MAX))
    say_more(f.c, 3, &r.flow, b"offered to %s, %ld bytes", f.backends[r.backend].name, v.data_len)
    _offered(f, r, 0)
    f.dp.fast_pass(f.dp.self, queue, w.index, frame, length, TCPHA_FAST_SEND)
    if o.old:
        _count_closed(f, o.old - 1)
    if o.result != 1:          # a copy of a segment, or its flow is over
        _call_off(f, r)
        return
    r.began_ns = o.start_ns
    took = now_ns() - o.start_ns
    add64(&f.n.accepted, 1)
    add64(&f.n.fast, 1)
    histogram_add(&f.stages[STAGE_FAST], took)
    _handed(f, r, o.target, took, v.data)
    _keep_verdict(f, fw, v, generation)


cdef void _on_requests(frontend *f, worker *w, uint32_t queue) noexcept nogil:
    """What a queue holds, or as much as one turn is for. One reader at a time keeps the segments of
    a flow in order; who comes second makes the first look again."""
    cdef tcp_view v
    cdef tcpha_flow flow
    cdef uint32_t length
    cdef int kind
    cdef int turns = 0
    if add32(&f.fast_readers[queue], 1) != 1:
        return
    while True:
        store32(&f.fast_readers[queue], 1)
        while turns < TURN:
            turns += 1
            kind = f.dp.fast_next(f.dp.self, queue, w.scratch, &length, &v)
            if kind == 0:
                break
            if kind == TCPHA_FAST_FIRST:
                _dispatch(f, w, queue, w.scratch, length, &v)
            elif kind == TCPHA_FAST_EARLY:
                _flow_from(f, v.ip + 12, v.tcp, &flow)
                say_flow(f.c, 6, &flow, b"a later segment has come first: to a socket")
                f.dp.fast_early(f.dp.self, queue, w.index, w.scratch, length, &flow)
            else:
                f.dp.fast_later(f.dp.self, queue, w.index, w.scratch, length)
        if turns == TURN:
            store32(&f.fast_readers[queue], 0)
            rearm(f.c, f.dp.fast_fd[queue], EV_FAST, queue)
            return
        if add32(&f.fast_readers[queue], -1) == 0:
            return


cdef void _on_event(core *c, worker *w, int kind, uint32_t index, uint32_t gen,
                    uint32_t events) noexcept nogil:
    cdef frontend *f = <frontend *>c.role
    cdef conn *k
    if kind == EV_LISTENER:
        _accept(f, w)
    elif kind == EV_FAST:
        _on_requests(f, w, index)
    elif kind == EV_TAP:
        if f.dp.on_packets(f.dp.self):
            rearm(c, f.dp.event_fd, EV_TAP, 0)
    elif kind == EV_CLIENT:
        k = &f.conns[index]
        pthread_mutex_lock(&k.lock)
        if (k.gen & 0xffffff) == gen:
            if k.state == CONN_READ:
                _read_head(f, w, k)
            elif k.state == CONN_LINGER:
                if not _discard(k):
                    _close(f, k)
            elif k.state == CONN_WAIT and events & EPOLLHUP:  # reset
                add64(&f.n.lost, 1)
                _close(f, k)
        pthread_mutex_unlock(&k.lock)


cdef void _on_return(frontend *f, worker *w, uint32_t b, message *m) noexcept nogil:
    """A request of the packet path that the back end did not take: the client sends it again, and
    then it is dispatched anew."""
    cdef backend *be = &f.backends[b]
    cdef tcpha_entry entry
    cdef request r
    say_more(f.c, 4, &m.snap.flow, b"RETURN from %s", be.name, 0)
    if f.dp.nfast == 0 or \
            f.dp.take_back(f.dp.self, w.index, &m.snap.flow, m.id, b, &entry) != 1:
        return
    _recall(f, &r, m.id)
    r.flow = m.snap.flow
    r.backend = b
    r.rule = entry.rule
    add64(&f.n.returned, 1)    # it was counted when it was sent, and is again when it comes again
    add64(&be.returned, 1)
    if m.reason == REFUSE_UNSUPPORTED:
        store64(&be.keyed, 0)  # of the connections that our cookies make
        _void_verdicts(f)
    _refused(f, &r, m.reason)
    _remember(f, &r)


cdef void _restore(frontend *f, worker *w, uint32_t b, const message *m) noexcept nogil:
    """A back end has a connection that an earlier run of ours handed over, or another front end."""
    cdef tcpha_entry entry, old
    cdef int rc
    memset(&entry, 0, sizeof(entry))
    tcpha_forward(&entry, m.id)
    entry.start_ns = entry.last_ns = now_ns()
    entry.backend = b
    entry.rule = <uint32_t>NO_RULE
    entry.end_seq = m.reason
    # other links bring it too: whoever has read TOLD there must find it in the count
    pthread_mutex_lock(&f.restore_lock)
    rc = f.dp.restore(f.dp.self, w.index, &m.snap.flow, &entry, load64(&f.backends[b].asked_ns),
                      &old)
    if rc & RESTORED_OVER:
        _count_closed(f, old.backend)
    if rc & RESTORED:
        add32(&f.loads[b].live, 1)
        add64(&f.n.restored, 1)
        say_more(f.c, 2, &m.snap.flow, b"%s has it", f.backends[b].name, 0)
    pthread_mutex_unlock(&f.restore_lock)


cdef void _on_closed(frontend *f, worker *w, uint32_t b, const message *m) noexcept nogil:
    cdef uint32_t slot = <uint32_t>(m.id & ((1 << SLOT_BITS) - 1))
    cdef bint linger = m.reason == END_TIME_WAIT
    cdef conn *k
    if _forget(f, w, &m.snap.flow, m.id, linger) or slot >= f.nconns:
        return
    k = &f.conns[slot]
    pthread_mutex_lock(&k.lock)
    if k.state == CONN_TAKEN and k.req.id == m.id and k.req.backend == b:
        k.ended = True
        k.linger = linger
    pthread_mutex_unlock(&k.lock)
    _forget(f, w, &m.snap.flow, m.id, linger)  # it may have been completed just now


cdef int _on_message(core *c, worker *w, link *l, message *m) noexcept nogil:
    cdef frontend *f = <frontend *>c.role
    cdef conn *k
    cdef uint32_t slot
    if m.type == MSG_PONG:
        return 0
    if m.type == MSG_SERVER:
        if raise64(&f.backends[l.peer].server_said, m.id):  # several connections bring it
            notice(c)
        return 0
    if m.type == MSG_CLOSED:
        say_more(c, 4, &m.snap.flow, b"CLOSED from %s", f.backends[l.peer].name, 0)
        _on_closed(f, w, l.peer, m)
        return 0
    if m.type == MSG_KEYED:
        if m.id == 0 or m.id >> 8 > f.backends[l.peer].keyed:  # several connections bring it
            store64(&f.backends[l.peer].keyed, m.id >> 8)
            _void_verdicts(f)
        return 0
    if m.type == MSG_MISSED:
        store32(&f.backends[l.peer].missed, 1)
        notice(c)
        return 0
    if m.type == MSG_RETURN:
        _on_return(f, w, l.peer, m)
        return 0
    if m.type == MSG_FLOW:
        _restore(f, w, l.peer, m)
        return 0
    if m.type == MSG_TOLD:
        store32(&f.backends[l.peer].told, <uint32_t>m.id)
        notice(c)
        return 0
    if m.type != MSG_ADOPTED and m.type != MSG_REFUSED:
        return -1
    slot = <uint32_t>(m.id & ((1 << SLOT_BITS) - 1))
    if slot >= f.nconns:
        return -1
    k = &f.conns[slot]
    pthread_mutex_lock(&k.lock)
    if k.state == CONN_SENT and k.req.id == m.id and k.req.backend == l.peer:
        say_more(c, 4, &k.req.flow, b"ADOPTED from %s" if m.type == MSG_ADOPTED else
                 b"REFUSED from %s", f.backends[l.peer].name, 0)
        if m.type == MSG_ADOPTED:
            _complete(f, w, k)
        else:
            _offer_again(f, w, k, m.reason)
    pthread_mutex_unlock(&k.lock)
    return 0


cdef bint _waits(frontend *f, conn *k, uint32_t b) noexcept nogil:
    """Whether a connection waits for a back end's answer that cannot come any more."""
    cdef link *l = &f.c.links[load32(&k.link)]
    return load32(&k.state) == CONN_SENT and load32(&k.req.backend) == b and \
        (load32(&l.gen) != load32(&k.link_gen) or load32(&l.state) != LINK_UP)


cdef bint _ask_again(frontend *f, worker *w, conn *k) noexcept nogil:
    """Repeat an offer on another control connection: the back end may have adopted it, and then no
    other one must. k.lock is held. False: there is no other one now. A link may break while a
    message for it is queued, and then the worker's own buffer is in use."""
    cdef int one = TCP_RECV_QUEUE
    cdef uint8_t *data = <uint8_t *>malloc(max(k.snap.len, <uint32_t>1))
    cdef bint asked
    if data == NULL:
        return False
    setsockopt(k.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &one, sizeof(one))
    asked = recv(k.fd, data, k.snap.len, MSG_PEEK | MSG_DONTWAIT) == <ssize_t>k.snap.len and \
        _send_offer(f, w, k, data, LINK_OUT_MAX)
    free(data)
    if not asked:
        return False
    set64(&k.deadline_ns, now_ns() + f.offer_ns)
    say_more(f.c, 1, &k.req.flow, b"asked %s again, as a control connection broke",
             f.backends[k.req.backend].name, 0)
    return True


cdef void _ask_all_again(frontend *f, worker *w, uint32_t b) noexcept nogil:
    """A back end has a new control connection."""
    cdef conn *k
    cdef uint32_t i
    for i in range(f.nconns):
        k = &f.conns[i]
        if _waits(f, k, b):
            pthread_mutex_lock(&k.lock)
            if _waits(f, k, b):
                _ask_again(f, w, k)
            pthread_mutex_unlock(&k.lock)


cdef void _on_link_down(core *c, worker *w, link *l) noexcept nogil:
    """Whether the back end has adopted what was offered on a link is known to it alone: it is asked
    on another link, or as soon as it is back. If it closed the link (it was killed, then), it has
    two seconds for that before the next back end is offered the connection; if we did, since it
    does not answer, it may still find the offer: it has until it would refuse that as too old."""
    cdef frontend *f = <frontend *>c.role
    cdef backend *be = &f.backends[l.peer]
    cdef uint32_t i, index = <uint32_t>(l - c.links)
    cdef conn *k
    for i in range(LINKS_MAX):
        if load32(&be.link[i]) == index:
            store32(&be.link[i], MAX_LINKS)
            add32(&be.may.links, -1)
            _void_verdicts(f)
    for i in range(f.nconns):
        k = &f.conns[i]
        if load32(&k.state) != CONN_SENT or load32(&k.link) != index:
            continue
        # the lock may be ours: a link can break while its own answer is being sent
        if pthread_mutex_trylock(&k.lock) != 0:
            continue  # then the deadline takes care of it
        if k.state == CONN_SENT and k.link == index and k.link_gen == l.gen and \
                (load32(&be.may.dead) or not _ask_again(f, w, k)) and l.gone:
            set64(&k.deadline_ns, min(k.deadline_ns, now_ns() + REVIVE_NS))
        pthread_mutex_unlock(&k.lock)


cdef void _on_timer(core *c, worker *w, uint64_t now) noexcept nogil:
    cdef frontend *f = <frontend *>c.role
    cdef conn *k
    cdef uint32_t i
    if xchg32(&f.accept_failed, 0) and not f.unloading:
        watch(c, EPOLL_CTL_MOD, f.listen_fd, EPOLLIN | EPOLLET, EV_LISTENER, 0, 0)
    f.dp.sweep(f.dp.self, w.index, now)
    for i in range(f.nconns):
        k = &f.conns[i]
        if load32(&k.state) == CONN_FREE or load64(&k.deadline_ns) > now:
            continue
        if pthread_mutex_trylock(&k.lock) != 0:
            continue
        if k.state != CONN_FREE and k.deadline_ns <= now:
            if k.state == CONN_READ and not http_begun(&k.req.head):
                say_flow(c, 2, &k.req.flow, b"no request in headtimeout: closed")
                add64(&f.n.silent, 1)
                _leave_silent(f, k)
            elif k.state == CONN_READ:
                say_flow(c, 1, &k.req.flow, b"no complete request head in headtimeout: 408")
                _answer(f, k, ANSWER_408, &f.n.answered_408)
            elif k.state == CONN_LINGER:
                _discard(k)
                _close(f, k)
            elif k.state == CONN_TAKEN:
                _complete(f, w, k)
            elif k.state == CONN_WAIT:
                _offer_later(f, w, k)
            elif load32(&c.links[k.link].gen) == k.link_gen and \
                    load32(&c.links[k.link].state) == LINK_UP:
                _stalled(f, k)
                _offer_again(f, w, k, REFUSE_TIMEOUT)
            elif load32(&f.backends[k.req.backend].may.dead) or not _ask_again(f, w, k):
                _offer_again(f, w, k, REFUSE_LINK)
        pthread_mutex_unlock(&k.lock)


cdef void _stalled(frontend *f, conn *k) noexcept nogil:
    """A back end did not answer in time. It must not find the offer later: its links are broken (by
    Python, at once), and it refuses what has grown old on the way."""
    store32(&f.backends[k.req.backend].may.dead, 1)
    _void_verdicts(f)
    notice(f.c)


cdef void _on_retire(core *c, worker *w) noexcept nogil:
    cdef fe_worker *fw = <fe_worker *>w.role
    w.role = NULL
    if fw == NULL:
        return
    if fw.scratch != NULL:
        hs_free_scratch(fw.scratch)
    free(fw.bits)
    free(fw)


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
        self.f.own_loads = <tcpha_load *>calloc(TCPHA_MAX_BACKENDS, sizeof(tcpha_load))
        self.f.own_hits = <uint64_t *>calloc(TCPHA_MAX_RULES, sizeof(uint64_t))
        if self.f.conns == NULL or self.f.pool == NULL or self.f.own_loads == NULL or \
                self.f.own_hits == NULL:
            raise MemoryError
        self.f.loads = self.f.own_loads
        self.f.rule_hits = self.f.own_hits
        slow_open(&self.f.slow)
        pthread_mutex_init(&self.f.pool_lock, NULL)
        pthread_mutex_init(&self.f.return_lock, NULL)
        pthread_mutex_init(&self.f.restore_lock, NULL)
        pthread_mutex_init(&self.f.access_lock, NULL)
        for i in range(self.f.nconns):
            self.f.conns[i].index = i
            self.f.conns[i].fd = -1
            pthread_mutex_init(&self.f.conns[i].lock, NULL)
            self.f.pool[i] = maxclients - 1 - i
        self.f.pool_len = maxclients
        self.f.c = self.c
        self.f.listen_fd = self.f.access_fd = -1
        self.f.headlimit = headlimit
        self.f.headtimeout_ns = <uint64_t>(headtimeout * 1e9)
        self.f.offer_ns = <uint64_t>(offer_timeout * 1e9)
        # ids of an earlier run must not come again: it may have left flows behind
        self.f.next_id = <uint64_t>(time.time() * 1e6) >> 3
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
        pthread_mutex_destroy(&self.f.access_lock)
        ruleset_free(self.f.rules)
        free(self.f.conns)
        free(self.f.pool)
        free(self.f.own_loads)
        free(self.f.own_hits)
        slow_close(&self.f.slow)
        free(self.f)

    def start(self, datapath, listener, str vaddr):
        """Take over a listening socket on vaddr and an opened datapath: see accept()."""
        cdef FeDatapath d = datapath
        cdef uint32_t i
        self.datapath = d
        self.f.dp = d.table
        self.f.key = 1         # and so no back end has it
        if d.table.loads != NULL:
            self.f.loads = d.table.loads
            self.f.rule_hits = d.table.rule_hits
        address_bytes(vaddr, self.f.vaddr)
        self.f.vport = htons(listener.getsockname()[1])
        listener.setblocking(False)
        self.f.listen_fd = listener.detach()
        self.fds["listener"] = self.f.listen_fd
        if d.table.event_fd >= 0:
            watch(self.c, EPOLL_CTL_ADD, d.table.event_fd, EPOLLIN | EPOLLET, EV_TAP, 0, 0)
        for i in range(d.table.nfast):
            watch(self.c, EPOLL_CTL_ADD, d.table.fast_fd[i], EPOLLIN | EPOLLET, EV_FAST, i, 0)

    def key_in_use(self):
        """The number of the cookie key that an earlier run used last, if its connections go on; the
        other place holds the one before, or the next. 0: there are none."""
        return self.f.dp.state.key_number if self.datapath.taken_over else 0

    def set_key(self, uint64_t number, bytes key):
        """Know a cookie key (16 bytes) by its number: it replaces the last but one."""
        memcpy(self.f.dp.keys.key[number & 1], <const char *>key, 16)

    def use_key(self, uint64_t number):
        """Make cookies with a key from now on."""
        store64(&self.f.key, number)
        self.f.dp.state.key_number = number
        store32(&self.f.dp.keys.current, number & 1)
        _void_verdicts(self.f)

    def answer_syns(self, bint answer):
        """Answer SYNs by cookie from now on, or leave them to the listener."""
        if self.f.dp.nfast:
            store32(&self.f.dp.keys.used, answer)

    def answers_syns(self):
        return bool(self.f.dp.nfast and load32(&self.f.dp.keys.used))

    def cache_verdicts(self, bint on):
        """Have the packet path's program decide repeated requests from now on, or no longer."""
        if self.f.dp.cache != NULL:
            store32(&self.f.dp.cache.on, on)

    def send_key(self, uint32_t link_index, uint64_t number):
        """Tell a back end a cookie key."""
        cdef worker *w = self.outsider()
        cdef uint8_t buf[MSG_KEYS_SIZE]
        with nogil:
            link_put(self.c, w, &self.c.links[link_index], buf, message_keys(
                buf, number << 8 | self.f.dp.keys.wscale,
                <const uint64_t *>self.f.dp.keys.key[number & 1]), NULL, 0)
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
        cdef Scan scan = Scan(self.datapath)
        cdef uint32_t older
        with nogil:
            while scan.next():
                if tcpha_is_pending(tcpha_state_of(scan.entry)):
                    older = self.f.dp.drop_pending(self.f.dp.self, TCPHA_MAX_OPS - 2, scan.key,
                                                   PENDING_NS)
                    if older:  # of whose flow that had taken the place
                        _count_closed(self.f, older - 1)
        scan.check()

    def offer_mtu(self, int mtu, int headers):
        """Offer clients an MSS that this leaves room for, headers deducted, and no more than their
        interface has room for. 0: that decides alone."""
        cdef int mss = max(mtu - headers, MSS_MIN) if mtu else 0
        if self.f.dp.state != NULL:
            self.f.dp.state.mtu = mtu
        if "listener" in self.fds:
            setsockopt(self.f.listen_fd, IPPROTO_TCP, TCP_MAXSEG, &mss, sizeof(mss))

    def accept(self):
        """Begin to accept, if the listener was not closed meanwhile."""
        if "listener" not in self.fds:
            return
        watch(self.c, EPOLL_CTL_ADD, self.f.listen_fd, EPOLLIN | EPOLLET, EV_LISTENER, 0, 0)

    def refuse_new(self):
        """Take no SYN any more. Handshakes that have begun can end and be accepted: close() would
        reset them."""
        cdef sock_filter program[4]
        cdef sock_fprog filter
        program[0] = sock_filter(code=BPF_LD | BPF_B | BPF_ABS, jt=0, jf=0, k=13)  # TCP's flags
        program[1] = sock_filter(code=BPF_JMP | BPF_JSET | BPF_K, jt=0, jf=1, k=2)  # SYN
        program[2] = sock_filter(code=BPF_RET | BPF_K, jt=0, jf=0, k=0)
        program[3] = sock_filter(code=BPF_RET | BPF_K, jt=0, jf=0, k=<uint32_t>-1)
        filter.len = 4
        filter.filter = program
        if setsockopt(self.f.listen_fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter)) < 0:
            raise OSError(errno, os.strerror(errno))

    def backlog(self):
        """Connections that wait to be accepted."""
        cdef tcp_info_head info
        cdef socklen_t n = sizeof(info)
        if "listener" not in self.fds or \
                getsockopt(self.f.listen_fd, IPPROTO_TCP, 11, &info, &n) < 0:  # TCP_INFO
            return 0
        return info.tcpi_unacked

    def stop_accepting(self):
        """Close the listener; connections in hand go on."""
        if "listener" in self.fds:
            store32(&self.f.unloading, 1)
            watch(self.c, EPOLL_CTL_DEL, self.f.listen_fd, 0, EV_LISTENER, 0, 0)
            self.later(partial(os.close, self.fds.pop("listener")))

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
        self.f.headlimit = headlimit
        self.f.headtimeout_ns = <uint64_t>(headtimeout * 1e9)
        _void_verdicts(self.f)

    def publish_rules(self, Matcher matcher, list groups):
        """Put rules in force. matcher: of their patterns, in order; groups: the rules that bear
        each, [[(backend index, rule index), ...], ...]."""
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

    def consider(self, bytes head):
        """What would become of a request with this head: (what is wrong with it or None, target,
        what rules see of that, [(index of a rule that matches, MAY or why not)] in the order in
        which they are tried, the rule whose back end gets it or -1, the same of the Local Node).
        Raises MemoryError."""
        cdef http_head h
        cdef bytearray buf = bytearray(head)
        cdef ruleset *rules
        cdef hs_scratch_t *scratch = NULL
        cdef uint64_t nobody[TRIED_WORDS]
        cdef tcpha_choice chosen
        cdef uint32_t g, i, b
        cdef int rc
        memset(&h, 0, sizeof(h))
        memset(nobody, 0, sizeof(nobody))
        rc = http_parse(&h, head, min(<uint32_t>len(head), self.f.headlimit))
        if rc != HTTP_DONE:
            error = h.error.decode() if rc == HTTP_BAD else \
                "longer than headlimit" if len(head) >= self.f.headlimit else "not complete"
            return error, "", "", [], -1, 0
        target = head[h.target:h.target + h.target_len].decode("ascii")
        seen = (chr(h.root) if h.root else "") + target[h.origin - h.target:]
        rules = self.f.rules   # the loop's thread publishes them, and runs this
        matched = []
        winner = -1
        if rules != NULL and rules.groups:
            bits = bytearray(rules.words * 8)
            if hs_clone_scratch(rules.patterns.scratch, &scratch) != HS_SUCCESS:
                raise MemoryError
            rc = match_target(rules, scratch, &h, <uint8_t *><char *>buf,
                              <uint64_t *><char *>bits)
            hs_free_scratch(scratch)
            if rc < 0:
                raise MemoryError
            for g in range(rules.groups):
                if bits[g >> 3] >> (g & 7) & 1:
                    for i in range(rules.first[g], rules.first[g + 1]):
                        b = rules.choices[i].backend
                        matched.append((rules.choices[i].rule,
                                        _refusal(self.f, b, nobody, False, now_ns())))
            if _pick(self.f, rules, <uint64_t *><char *>bits, nobody, False, &chosen):
                winner = chosen.rule
        return None, target, seen, matched, winner, \
            _refusal(self.f, TCPHA_LOCAL_NODE, nobody, False, now_ns())

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
        be.may.dead = be.may.draining = be.may.app_down = be.missed = be.told = 0
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
                store32(&be.link[i], link_index)
                add32(&be.may.links, 1)
                _void_verdicts(self.f)
                if load32(&self.c.links[link_index].state) != LINK_UP and \
                        load32(&be.link[i]) == link_index:
                    store32(&be.link[i], MAX_LINKS)
                    add32(&be.may.links, -1)
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

    def backend_flags(self, uint32_t b, draining=None, dead=None, app_down=None):
        cdef backend *be = &self.f.backends[b]
        before = (load32(&be.may.draining), load32(&be.may.dead), load32(&be.may.app_down))
        if draining is not None:
            store32(&be.may.draining, draining)
        if dead is not None:
            store32(&be.may.dead, dead)
        if app_down is not None:
            store32(&be.may.app_down, app_down)
        if before != (load32(&be.may.draining), load32(&be.may.dead), load32(&be.may.app_down)):
            _void_verdicts(self.f)

    def backend_stats(self, uint32_t b):
        cdef backend *be = &self.f.backends[b]
        cdef tcpha_load *load = &self.f.loads[b]
        return {"links": load32(&be.may.links),
                "told": be.asked != 0 and load32(&be.told) == be.asked,
                "fast": bool(self.f.dp.nfast and _takes_fast(self.f, b)),
                "app_down": bool(load32(&be.may.app_down)),
                "draining": bool(load32(&be.may.draining)), "dead": bool(load32(&be.may.dead)),
                "listens": bool(load64(&be.server_said) & 1), "live": load32(&load.live),
                "handed": load64(&be.handed) + load64(<uint64_t *>&load.handed),
                "refused": load64(&be.refused), "returned": load64(&be.returned),
                "closed": load64(&be.closed) + load64(<uint64_t *>&load.closed)}

    def drop_strangers(self, bint drop):
        """See datapath.pxd."""
        self.f.dp.drop_strangers(self.f.dp.self, drop)

    def counters(self):
        cdef fe_counters n
        cdef uint64_t cached = 0, closed = 0
        cdef uint32_t i
        read_counters(&n, &self.f.n, sizeof(n))
        for i in range(TCPHA_MAX_BACKENDS):
            cached += load64(<uint64_t *>&self.f.loads[i].handed)
            closed += load64(<uint64_t *>&self.f.loads[i].closed)
        return {"accepted": n.accepted + cached, "handed": n.handed + cached,
                "closed": n.closed + closed,
                "refused": n.refused, "returned": n.returned, "lost": n.lost, "silent": n.silent, "expired": n.expired,
                "restored": n.restored,
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
                            self.f.dp.self, TCPHA_MAX_OPS - 2, scan.key, id, False,
                            &entry) == 1:
                    n += 1
                    add64(&self.f.n.expired, 1)
                    add32(&self.f.loads[b].live, -1)
        scan.check()
        return n


cdef uint64_t _ns(double seconds) noexcept:
    return <uint64_t>-1 if seconds == INFINITY else <uint64_t>(seconds * 1e9)
