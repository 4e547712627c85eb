# SPDX-License-Identifier: GPL-2.0-or-later
"""The back end's work: adopt what front ends hand over, and tell them when a connection ends.

The kernel reports the end of each TCP socket (NETLINK_SOCK_DIAG, groups SKNLGRP_INET_TCP_DESTROY
and SKNLGRP_INET6_TCP_DESTROY: a listener for both families has IPv6 children). A report may come
late, when the 4-tuple belongs to a newer connection already; so it only makes us look whether a
socket owns the tuple.
"""
import os
import socket

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.core cimport (
    EV_NETLINK, EV_RING, EV_TAP, LINK_BUSY, LINK_UP, MAX_LINKS, SCRATCH, Core, core, half_closed,
    link, link_put, link_queued, notice, rearm, say_flow, say_more, say_number, watch, worker)
from tcpha._fast.datapath cimport (
    DP_ALIVE, DP_CLOSING, DP_MORE, DP_TIME_WAIT, BeDatapath)
from tcpha._fast.defs cimport (
    TCPHA_MAX_FAST, TCPHA_MAX_OPS, TCPHA_R_ASSIGN, TCPHA_R_BACKLOG, TCPHA_R_FULL,
    TCPHA_R_NO_LISTENER, TCPHA_R_OK, tcpha_event, tcpha_flow)
from tcpha._fast.diag cimport (
    TCP_CLOSE_WAIT, TCP_CLOSING, TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LAST_ACK,
    SockList, inet_diag_msg)
from tcpha._fast.message cimport (
    END_GONE, END_TIME_WAIT, MSG_ADOPTED, MSG_ASK, MSG_CLOSED_SIZE, MSG_DOUBT, MSG_HANDOFF,
    MSG_HEADER, MSG_KEYED, MSG_KEYS, MSG_MISSED, MSG_OWNED, MSG_PONG, MSG_REFUSED_SIZE, MSG_SERVER,
    MSG_TOLD,
    REFUSE_BACKLOG, REFUSE_FULL, REFUSE_LISTENER, REFUSE_LOST, REFUSE_STALE, REFUSE_UNSUPPORTED,
    fast_id, fast_isn, message, message_closed, message_flow, message_refused, message_return,
    message_short, refusal_text)
from tcpha._fast.peerclock cimport clock_oldest, clock_word, clock_youngest
from tcpha._fast.sys cimport (
    EINTR, ENOBUFS, EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLL_CTL_ADD, EPOLL_CTL_MOD, MSG_DONTWAIT,
    add32, add64, errno, load32, now_ns, or32, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock,
    read_counters, recv, set32, store32, store64, xchg32)

cdef extern from "<linux/netlink.h>" nogil:
    struct nlmsghdr:
        uint32_t nlmsg_len
    enum:
        NLMSG_HDRLEN

cdef extern from "<linux/sock_diag.h>" nogil:
    enum:
        SKNLGRP_INET_TCP_DESTROY
        SKNLGRP_INET6_TCP_DESTROY


cdef enum:
    CONNECTED = 1 << TCP_ESTABLISHED | 1 << TCP_FIN_WAIT1 | 1 << TCP_FIN_WAIT2 | \
        1 << TCP_CLOSE_WAIT | 1 << TCP_LAST_ACK | 1 << TCP_CLOSING
    PIECE = 1024           # buckets that are looked through before the loop does something else
    TURN = 4096            # reports of ends before it is others' turn
    RING_TURN = 1 << 16    # more events than the ring has room for
    SWEEP = 64             # buckets that are looked through at one turn of the timer
    MANY_ENDS = 32         # in one turn of the timer

FAST = TCPHA_MAX_FAST      # for Python

cdef uint64_t SETTLED_NS = 1000000000  # older connections surely have a socket, or none any more
cdef int64_t PATIENCE_NS = 3000000000  # of the front end, until it has our answer to an offer
cdef uint64_t YOUNG_NS = 20000000   # an adoption so recent may have no socket yet


# The table of adopted connections; b.lock is held.

cdef inline adopted **_bucket(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    cdef uint32_t h
    memcpy(&h, flow.caddr + 12, 4)
    h = (h ^ (<uint32_t>flow.cport << 16) ^ flow.cport) * 0x9e3779b1u
    return &b.buckets[(h >> 8) & b.mask]


cdef adopted *_find(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    cdef adopted *a = _bucket(b, flow)[0]
    while a != NULL and memcmp(&a.flow, flow, sizeof(tcpha_flow)) != 0:
        a = a.next
    return a


cdef inline void _tell_live(backend_state *b) noexcept nogil:
    """The packet path asks nobody: it reads how many there are, and may be."""
    if b.dp.gate != NULL:
        store32(&b.dp.gate.max, 0 if b.unloading else min(b.max, b.opened + b.entries - b.live))
        store32(&b.dp.gate.live, b.opened)


cdef inline void _set_open(backend_state *b, adopted *a, bint is_open) noexcept nogil:
    """Whether the application has it open, as far as is known. The one count of that stays exact
    while others come and go. b.lock is held."""
    if a.is_open != is_open:
        a.is_open = is_open
        set32(&b.opened, b.opened + (1 if is_open else -1))
        _tell_live(b)


cdef inline bint _is_full(backend_state *b) noexcept nogil:
    return load32(&b.opened) >= b.max or load32(&b.live) >= b.entries


cdef adopted *_insert(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    """NULL if maxclients is reached."""
    return NULL if _is_full(b) else _insert_any(b, flow)


cdef adopted *_insert_any(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    """NULL if there is no memory left."""
    cdef adopted *a = b.free_list
    cdef adopted **head
    if a == NULL:
        return NULL
    b.free_list = a.next
    a.flow = flow[0]
    a.over = a.adopting = a.recheck = a.fast = a.found = a.is_open = a.shared = a.untold = False
    head = _bucket(b, flow)
    a.next = head[0]
    head[0] = a
    set32(&b.live, b.live + 1)
    _set_open(b, a, True)
    return a


cdef void _remove(backend_state *b, adopted *a) noexcept nogil:
    cdef adopted **at = _bucket(b, &a.flow)
    while at[0] != a:
        at = &at[0].next
    at[0] = a.next
    a.next = b.free_list
    b.free_list = a
    set32(&b.live, b.live - 1)
    _set_open(b, a, False)
    _tell_live(b)


cdef inline bint _living(int owner) noexcept nogil:
    return owner == DP_ALIVE or owner == DP_CLOSING


cdef inline bint _unborn(adopted *a, int owner) noexcept nogil:
    """Nobody owns the tuple; but unless its end has been reported, the packet that adopted it may
    still be on its way up (its CPU may be doing something else), and its socket come."""
    return owner == 0 and a.fast and now_ns() - a.since_ns < YOUNG_NS


cdef bint _tell_closed(backend_state *b, worker *w, adopted *a, uint32_t how) noexcept nogil:
    """CLOSED to the front end: on the link that the handoff came by, so that it cannot overtake
    ADOPTED, or on another one if that is gone. False: there is none. Others that know the
    connection, too, may be told twice, or ask when they are back."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef uint32_t i, n = message_closed(buf, a.id, &a.flow, how)
    cdef link *l = &b.c.links[a.link]
    cdef bint told = l.gen == a.link_gen and link_put(b.c, w, l, buf, n, NULL, 0) == 0
    for i in range(MAX_LINKS):
        if told and not a.shared:
            break
        l = &b.c.links[i]
        if load32(&l.state) != LINK_UP:
            continue
        if l.peer != a.peer:
            if a.shared:
                link_put(b.c, w, l, buf, n, NULL, 0)
        elif not told:
            told = link_put(b.c, w, l, buf, n, NULL, 0) == 0
    return told


cdef inline finished *_was_over(backend_state *b, uint64_t id) noexcept nogil:
    return &b.over[(id * 0x9e3779b97f4a7c15u) >> 52]


cdef bint _ended(backend_state *b, worker *w, adopted *a, uint32_t how) noexcept nogil:
    """A connection is over. b.lock is held. True: it is out of the table; else nobody could be told
    yet."""
    cdef finished *was = _was_over(b, a.id)
    was.id = a.id
    was.flow = a.flow
    if not a.over:
        b.dp.ended(b.dp.self, &a.flow)
        _set_open(b, a, False)
        add64(&b.n.closed, 1)
        say_flow(b.c, 2, &a.flow, b"closed")
    if _tell_closed(b, w, a, how):
        _remove(b, a)
        return True
    a.over = True  # told when the front end is back
    return False


cdef void _replaced(backend_state *b, worker *w, adopted *a) noexcept nogil:
    """Its client has connected anew, which it could not have otherwise: out of the table, whether
    somebody hears of it or not. b.lock is held."""
    if not _ended(b, w, a, END_GONE):
        _remove(b, a)


cdef uint32_t _check_piece(backend_state *b, worker *w, uint32_t at, uint32_t end) noexcept nogil:
    """Look at each connection of some buckets. The first that was not looked at."""
    cdef uint32_t i
    cdef int owner
    cdef bint unborn
    cdef adopted *a
    cdef adopted *following
    for i in range(at, min(end, b.mask + 1)):
        pthread_mutex_lock(&b.lock)
        a = b.buckets[i]
        while a != NULL:
            following = a.next
            if a.adopting:
                a.recheck = True
                a = following
                continue
            owner = b.dp.alive(b.dp.self, w.index, &a.flow)
            unborn = _unborn(a, owner)
            if a.over or not (_living(owner) or unborn):
                _ended(b, w, a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
            else:
                _set_open(b, a, owner == DP_ALIVE or unborn)
            a = following
        pthread_mutex_unlock(&b.lock)
    return min(end, b.mask + 1)


cdef void _check_all(backend_state *b, worker *w) noexcept nogil:
    """Look at each connection: after lost reports, or for want of room."""
    _check_piece(b, w, 0, b.mask + 1)


cdef void _reap(backend_state *b, worker *w, uint64_t asked_ns, bint anyway) noexcept nogil:
    """Look before refusing for want of room: reports of ended connections lag behind under load,
    and those that the application has closed are no load for it. One look counts for all that was
    asked before it began; what is older than the question says nothing. anyway: there may be too
    little room, though not none."""
    pthread_mutex_lock(&b.reap_lock)
    if (anyway or _is_full(b)) and b.looked_ns < asked_ns:
        b.looked_ns = now_ns()
        _check_all(b, w)
    pthread_mutex_unlock(&b.reap_lock)


# Messages

cdef void _keep_leftover(backend_state *b, message *m) noexcept nogil:
    cdef leftover *p = <leftover *>malloc(sizeof(leftover) + m.snap.len)
    if p == NULL:
        say_flow(b.c, 0, &m.snap.flow, b"out of memory: request bytes are lost")
        return
    p.snap = m.snap
    memcpy(p.data, m.data, m.snap.len)
    add64(&b.n.late, 1)
    pthread_mutex_lock(&b.feed_lock)
    p.next = b.leftovers
    b.leftovers = p
    pthread_mutex_unlock(&b.feed_lock)


cdef void _claim(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    """A connection that an earlier run of ours adopted: watch it again, or say that it is over."""
    cdef adopted a
    cdef adopted *p
    cdef int owner = b.dp.alive(b.dp.self, w.index, &m.snap.flow)
    pthread_mutex_lock(&b.lock)
    p = _find(b, &m.snap.flow)
    if p == NULL and _living(owner):
        p = _insert(b, &m.snap.flow)
        if p != NULL:
            _set_origin(b, p, l, m.id)
    elif p != NULL and p.found and p.peer == l.peer:
        # it asked for what we have when it started, we were killed before we had said all, and were
        # asked again: but it knew this one, under the id that its handoff had
        _set_origin(b, p, l, m.id)
        p.found = False
    elif p != NULL and p.id == m.id:
        p.shared |= p.peer != l.peer
    elif p == NULL or not p.found:
        a.flow = m.snap.flow
        a.shared = False
        _set_origin(b, &a, l, m.id)
        _tell_closed(b, w, &a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
    pthread_mutex_unlock(&b.lock)
    _check(b, w, &m.snap.flow)  # its end may have been reported before it was in the table


cdef void _doubted(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    """A request of the packet path that may not have arrived. If it comes while we say so, it is
    not adopted: the client has to repeat it. An earlier run of ours may have adopted it."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef finished *was
    cdef bint over, known
    _on_ring(b, w)
    pthread_mutex_lock(&b.lock)
    known = _find(b, &m.snap.flow) != NULL
    was = _was_over(b, m.id)
    over = was.id == m.id and memcmp(&was.flow, &m.snap.flow, sizeof(tcpha_flow)) == 0
    pthread_mutex_unlock(&b.lock)
    if over:
        link_put(b.c, w, l, buf, message_closed(buf, m.id, &m.snap.flow, END_GONE), NULL, 0)
        return
    if not known:
        b.dp.give_up(b.dp.self, &m.snap.flow, fast_isn(m.id))
    if known or _living(b.dp.alive(b.dp.self, w.index, &m.snap.flow)):
        _claim(b, w, l, m)
    else:
        link_put(b.c, w, l, buf, message_return(buf, m.id, &m.snap.flow, REFUSE_LOST), NULL, 0)


cdef void _set_origin(backend_state *b, adopted *a, link *l, uint64_t id) noexcept nogil:
    a.id = id
    a.since_ns = now_ns()
    a.link = <uint32_t>(l - b.c.links)
    a.link_gen = l.gen
    a.peer = l.peer


cdef void _adopted(backend_state *b, worker *w, message *m) noexcept nogil:
    """The socket exists: from now on reports of its end count, and one that came is looked into."""
    cdef adopted *a
    cdef bint again = False
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    if a != NULL and a.id == m.id:
        a.adopting = False
        again = a.recheck
        _share(b, w, a)
    pthread_mutex_unlock(&b.lock)
    if again:
        _check(b, w, &m.snap.flow)


cdef int _on_message(core *c, worker *w, link *l, message *m) noexcept nogil:
    cdef backend_state *b = <backend_state *>c.role
    cdef uint8_t buf[MSG_REFUSED_SIZE]
    cdef adopted *a
    cdef int rc
    if m.type == MSG_PONG:
        if b.dp.keys != NULL and l.peer < TCPHA_MAX_FAST:
            store64(&b.dp.keys[l.peer].clock, clock_word(&l.clock))
        return 0
    if m.type == MSG_OWNED:
        _on_ring(b, w)
        _claim(b, w, l, m)
        return 0
    if m.type == MSG_ASK:
        store32(&l.asked, <uint32_t>m.id)
        notice(c)
        return 0
    if m.type == MSG_DOUBT:
        if b.dp.gate != NULL:
            _doubted(b, w, l, m)
        else:
            _claim(b, w, l, m)
        return 0
    if m.type == MSG_KEYS:
        if b.dp.keys != NULL and l.peer < TCPHA_MAX_FAST:
            memcpy(b.dp.keys[l.peer].key[m.id >> 8 & 1], m.data, 16)
            store64(&b.dp.keys[l.peer].clock, clock_word(&l.clock))
            store32(&b.dp.keys[l.peer].wscale, m.id & 0xff)
            # the other one is yet to come: until then, a stranger may know what is in its place
            or32(&b.dp.keys[l.peer].used, <uint32_t>1 << (m.id >> 8 & 1))
            link_put(c, w, l, buf, message_short(buf, MSG_KEYED, m.id), NULL, 0)
        return 0
    if m.type != MSG_HANDOFF:
        return -1
    say_number(c, 4, &m.snap.flow, b"HANDOFF of %ld bytes", m.data_len)
    if _is_stale(b, l, m):
        rc = REFUSE_STALE  # the front end has given up on it, or is about to
    else:
        _on_ring(b, w)     # what came before this one is in the table
        if _is_known(b, w, l, m):
            return 0
        # In the table before the socket exists: its end may be reported at any moment after.
        pthread_mutex_lock(&b.lock)
        a = _find(b, &m.snap.flow)
        if a != NULL:
            _replaced(b, w, a)
        a = NULL if b.unloading else _insert(b, &m.snap.flow)
        if a == NULL and not b.unloading:
            pthread_mutex_unlock(&b.lock)
            _reap(b, w, l.last_rx_ns, False)
            pthread_mutex_lock(&b.lock)
            a = _insert(b, &m.snap.flow)
        if a != NULL:
            _set_origin(b, a, l, m.id)
            a.adopting = True
        pthread_mutex_unlock(&b.lock)
        if a == NULL:
            rc = REFUSE_FULL
        else:
            rc = b.dp.adopt(b.dp.self, w.index, &m.snap, m.data)
            if rc == DP_MORE:
                _keep_leftover(b, m)
                rc = 0
            l = _answer_to(b, l, m)
            if rc != 0:
                pthread_mutex_lock(&b.lock)
                a = _find(b, &m.snap.flow)
                if a != NULL and a.id == m.id:
                    _remove(b, a)
                pthread_mutex_unlock(&b.lock)
    if rc == 0:
        add64(&b.n.adopted, 1)
        say_flow(c, 2, &m.snap.flow, b"adopted")
        link_put(c, w, l, buf, message_short(buf, MSG_ADOPTED, m.id), NULL, 0)
        _adopted(b, w, m)  # behind ADOPTED: CLOSED must not overtake it
    else:
        add64(&b.n.refused[rc & 15], 1)
        say_more(c, 1, &m.snap.flow, b"refused: %s", refusal_text(rc), 0)
        link_put(c, w, l, buf, message_refused(buf, m.id, rc), NULL, 0)
    return 0


cdef bint _is_stale(backend_state *b, link *l, message *m) noexcept nogil:
    """Whether an offer may have been made to another back end before our answer is there. It is no
    older than the control connection that it came by. If our own clock stood still, as that of a
    virtual machine that is paused does, only the end of the connection tells: the front end has
    closed it."""
    cdef uint64_t now = now_ns()
    if half_closed(l.fd):
        return True
    return now - l.since_ns > b.stale_ns and (
        clock_youngest(&l.clock, m.sent_ns, now) > <int64_t>b.stale_ns or
        clock_oldest(&l.clock, m.sent_ns, now) > PATIENCE_NS)


cdef bint _is_known(backend_state *b, worker *w, link *l, message *m) noexcept nogil:
    """An offer that came before, on a control connection that broke before the front end read the
    answer. Adopting it again would serve its request twice: the answer is given again."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef finished *was
    cdef adopted *a
    cdef bint known, over = False
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    was = _was_over(b, m.id)
    known = a != NULL and a.id == m.id and not a.fast
    if known and not half_closed(l.fd):
        a.shared |= a.peer != l.peer  # another one has asked for it meanwhile
        a.peer = l.peer
        a.link = <uint32_t>(l - b.c.links)
        a.link_gen = l.gen
        if a.adopting:     # whoever does that answers here
            pthread_mutex_unlock(&b.lock)
            return True
    elif not known and was.id == m.id and memcmp(&was.flow, &m.snap.flow, sizeof(tcpha_flow)) == 0:
        known = over = True
    pthread_mutex_unlock(&b.lock)
    if known:
        link_put(b.c, w, l, buf, message_short(buf, MSG_ADOPTED, m.id), NULL, 0)
    if over:
        link_put(b.c, w, l, buf, message_closed(buf, m.id, &m.snap.flow, END_GONE), NULL, 0)
    return known


cdef link *_answer_to(backend_state *b, link *l, message *m) noexcept nogil:
    """Where the answer to an offer is awaited: where it came last."""
    cdef adopted *a
    pthread_mutex_lock(&b.lock)
    a = _find(b, &m.snap.flow)
    if a != NULL and a.id == m.id and b.c.links[a.link].gen == a.link_gen:
        l = &b.c.links[a.link]
    pthread_mutex_unlock(&b.lock)
    return l


cdef bint _is_there(backend_state *b, uint32_t peer) noexcept nogil:
    cdef uint32_t i
    for i in range(MAX_LINKS):
        if load32(&b.c.links[i].state) == LINK_UP and b.c.links[i].peer == peer:
            return True
    return False


cdef bint _has_any(backend_state *b, uint32_t peer, bint living) noexcept nogil:
    """Whether a front end has connections here. living: they are not over, and it knows of them, or
    may. The table is read in pieces."""
    cdef uint32_t at = 0, end
    cdef adopted *a
    cdef bint found = False
    while at <= b.mask and not found:
        end = min(at + PIECE, b.mask + 1)
        pthread_mutex_lock(&b.lock)
        while at < end and not found:
            a = b.buckets[at]
            at += 1
            while a != NULL and not found:
                found = not a.over and (a.peer == peer or a.shared) if living else a.peer == peer
                a = a.next
        pthread_mutex_unlock(&b.lock)
    return found


cdef inline void _again(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    """Have _look_again() look. b.lock is held."""
    if b.nagain < AGAIN:       # or _sweep() finds it
        b.again[b.nagain] = flow[0]
        b.nagain += 1


cdef bint _tell_flow(backend_state *b, worker *w, adopted *a, link *l) noexcept nogil:
    """Make a connection the one of a link's front end, which knows nothing of it. False: it cannot
    be told. b.lock is held."""
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef uint32_t rcv_nxt = 0
    if not b.dp.position(b.dp.self, w.index, &a.flow, &rcv_nxt) or link_put(
            b.c, w, l, buf, message_flow(buf, a.id, &a.flow, rcv_nxt), NULL, 0) != 0:
        return False
    a.shared |= a.peer != l.peer
    a.peer = l.peer
    a.link = <uint32_t>(l - b.c.links)
    a.link_gen = l.gen
    return True


cdef uint32_t _tell_piece(backend_state *b, worker *w, link *l, uint32_t number,
                          uint32_t at) noexcept nogil:
    """The front end that asks has the virtual address now. So all connections are its own, whoever
    has handed them over: whether that one is dead, nobody can know in time. It may go on with them,
    and hears of their ends, too. Where it is gone, those that are over are not kept for it: when it
    is back, it asks about each that it knows.

    at: the bucket to begin with. Returns where to go on when the link has room for it."""
    cdef uint8_t buf[MSG_HEADER]
    cdef adopted *a
    cdef adopted *following
    cdef uint32_t end = min(at + PIECE, b.mask + 1)
    if at == 0:
        store32(&b.holder, l.peer + 1)
        _on_ring(b, w)
    while at < end and link_queued(l) <= LINK_BUSY:
        pthread_mutex_lock(&b.lock)
        a = b.buckets[at]
        while a != NULL:
            following = a.next
            if a.over and not _is_there(b, a.peer):
                _remove(b, a)
            elif not a.over and not a.adopting:
                _tell_flow(b, w, a, l)
            a = following
        pthread_mutex_unlock(&b.lock)
        at += 1
    if at > b.mask:
        link_put(b.c, w, l, buf, message_short(buf, MSG_TOLD, number), NULL, 0)
    return at


cdef void _share(backend_state *b, worker *w, adopted *a) noexcept nogil:
    """What a front end had in its hands when another one took the virtual address: that one has
    asked already. b.lock is held."""
    cdef uint32_t i, holder = load32(&b.holder)
    cdef link *l
    a.untold = False
    if holder == 0 or a.peer == holder - 1:
        return
    for i in range(MAX_LINKS):
        l = &b.c.links[i]
        if load32(&l.state) != LINK_UP or l.peer != holder - 1:
            continue
        a.untold = not _tell_flow(b, w, a, l)
        if not a.untold:
            return
    if a.untold:               # its socket may not be there yet
        _again(b, &a.flow)


# The packet path

cdef void _take_event(backend_state *b, worker *w, const tcpha_event *e) noexcept nogil:
    """The program has adopted a connection, or refused it."""
    cdef adopted *a
    cdef uint64_t id = fast_id(e.isn, e.ours)
    cdef uint32_t reason = REFUSE_FULL
    cdef bint reused = e.reused != 0
    cdef uint8_t buf[MSG_CLOSED_SIZE]
    cdef link *l
    cdef int i
    if e.result == TCPHA_R_OK:
        pthread_mutex_lock(&b.lock)
        a = _find(b, &e.flow)
        if a != NULL and a.found and a.id != id:
            a.found = False    # the search for what an earlier run adopted has seen it before us
            a.id = id
            a.fast = True
            a.peer = e.frontend
        if a != NULL and a.id != id:
            _replaced(b, w, a)
            a = NULL
            reused = True
        if a == NULL:
            a = _insert_any(b, &e.flow)
            if a == NULL:  # full of connections whose end we have not heard of yet
                pthread_mutex_unlock(&b.lock)
                _check_all(b, w)
                pthread_mutex_lock(&b.lock)
                a = _insert_any(b, &e.flow)
            if a != NULL:
                a.fast = True
                a.reused = reused
                a.id = id
                a.since_ns = e.at_ns
                a.link = a.link_gen = 0  # any: no link has generation 0
                a.peer = e.frontend
                _share(b, w, a)
                add64(&b.n.adopted, 1)
                add64(&b.n.fast, 1)
                say_flow(b.c, 2, &e.flow, b"adopted")
            else:
                say_flow(b.c, 0, &e.flow, b"no room in the table: its end will not be noticed")
        pthread_mutex_unlock(&b.lock)
        add32(&b.dp.gate.coming, -1)
        return
    if e.result == TCPHA_R_FULL:
        if not b.unloading:
            _reap(b, w, e.at_ns, False)
            if not _is_full(b):
                return     # the client's next attempt finds room
    elif e.result == TCPHA_R_BACKLOG:
        reason = REFUSE_BACKLOG
    elif e.result == TCPHA_R_NO_LISTENER:
        reason = REFUSE_LISTENER
    elif e.result == TCPHA_R_ASSIGN:
        reason = REFUSE_UNSUPPORTED
    add64(&b.n.refused[reason], 1)
    say_more(b.c, 1, &e.flow, b"refused: %s", refusal_text(reason), 0)
    for i in range(MAX_LINKS):
        l = &b.c.links[i]
        if load32(&l.state) == LINK_UP and l.peer == e.frontend and link_put(
                b.c, w, l, buf, message_return(buf, id, &e.flow, reason), NULL, 0) == 0:
            return


cdef void _on_ring(backend_state *b, worker *w) noexcept nogil:
    """Take note of all that the packet path had said when this began."""
    cdef tcpha_event e
    cdef int left = RING_TURN
    if b.dp.gate == NULL:
        return
    pthread_mutex_lock(&b.ring_lock)
    while left and b.dp.next_event(b.dp.self, &e):
        _take_event(b, w, &e)
        left -= 1
    pthread_mutex_unlock(&b.ring_lock)
    if left == 0:
        rearm(b.c, b.dp.event_fd, EV_RING, 0)


cdef void _sweep(backend_state *b, worker *w, uint64_t now) noexcept nogil:
    """Look through a part of the table. The packet path's program is not told whether the kernel
    made a socket of what it adopted."""
    cdef adopted *a
    cdef adopted *following
    cdef int owner
    cdef uint32_t _i
    if b.dp.gate == NULL or load32(&b.live) == 0:
        return
    pthread_mutex_lock(&b.lock)
    for _i in range(SWEEP):
        b.swept = (b.swept + 1) & b.mask
        a = b.buckets[b.swept]
        while a != NULL:
            following = a.next
            if not a.adopting and not a.over and now > a.since_ns + SETTLED_NS:
                owner = b.dp.alive(b.dp.self, w.index, &a.flow)
                if not _living(owner):
                    _ended(b, w, a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
            a = following
    pthread_mutex_unlock(&b.lock)


# The end of connections

cdef void _check(backend_state *b, worker *w, const tcpha_flow *flow) noexcept nogil:
    cdef adopted *a
    cdef int owner
    pthread_mutex_lock(&b.lock)
    a = _find(b, flow)
    if a != NULL and a.adopting:
        a.recheck = True  # perhaps the end of an earlier connection on the same 4-tuple
    elif a != NULL and not a.over:
        owner = b.dp.alive(b.dp.self, w.index, &a.flow)  # the report may be of an older one
        if (a.reused or a.untold) and _unborn(a, owner):
            _again(b, flow)
        elif not _living(owner):
            _ended(b, w, a, END_TIME_WAIT if owner == DP_TIME_WAIT else END_GONE)
        elif a.untold:
            _share(b, w, a)
    pthread_mutex_unlock(&b.lock)


cdef void _look_again(backend_state *b, worker *w) noexcept nogil:
    cdef tcpha_flow flow
    cdef uint32_t n
    pthread_mutex_lock(&b.lock)
    n = b.nagain
    while n:
        n -= 1
        flow = b.again[n]
        b.nagain -= 1
        b.again[n] = b.again[b.nagain]
        pthread_mutex_unlock(&b.lock)
        _check(b, w, &flow)
        pthread_mutex_lock(&b.lock)
        n = min(n, b.nagain)
    pthread_mutex_unlock(&b.lock)


cdef void _on_netlink(backend_state *b, worker *w) noexcept nogil:
    cdef ssize_t n
    cdef uint8_t *p
    cdef nlmsghdr *h
    cdef inet_diag_msg *d
    cdef tcpha_flow flow
    cdef bint lost = False, unheard = False
    cdef int _i
    for _i in range(TURN):     # the caller, or the timer, brings us back for the rest
        n = recv(b.netlink_fd, w.scratch, SCRATCH, MSG_DONTWAIT)
        if n < 0:
            if errno == ENOBUFS:
                lost = True
                continue
            if errno == EINTR:
                continue
            break
        _on_ring(b, w)     # before its end is reported, each adoption was noted there
        p = w.scratch
        while n >= <ssize_t>(NLMSG_HDRLEN + sizeof(inet_diag_msg)):
            h = <nlmsghdr *>p
            if h.nlmsg_len < NLMSG_HDRLEN + sizeof(inet_diag_msg) or h.nlmsg_len > n:
                break
            d = <inet_diag_msg *>(p + NLMSG_HDRLEN)
            # A listener is gone, and with it the sockets in its accept queue: these were
            # disconnected before, so that their reports name no client. See inet_csk_listen_stop().
            if d.id.idiag_dport == 0 and d.id.idiag_sport == b.dp.listen_port:
                unheard = True
            if _flow_of(d, &flow) and b.dp.outside(b.dp.self, &flow):
                _check(b, w, &flow)
                add32(&b.ends, 1)
            p += (h.nlmsg_len + 3) & ~3u
            n -= (h.nlmsg_len + 3) & ~3u
    if lost:
        add64(&b.n.resyncs, 1)
    if lost or unheard:
        _check_all(b, w)


cdef bint _flow_of(const inet_diag_msg *d, tcpha_flow *flow) noexcept nogil:
    """The flow of a socket; its local end is the VIP. IPv6 sockets may hold v4-mapped ones."""
    if d.idiag_family == 2:  # AF_INET
        memset(flow, 0, sizeof(tcpha_flow))
        flow.vaddr[10] = flow.vaddr[11] = flow.caddr[10] = flow.caddr[11] = 0xff
        memcpy(flow.vaddr + 12, d.id.idiag_src, 4)
        memcpy(flow.caddr + 12, d.id.idiag_dst, 4)
    elif d.idiag_family == 10:  # AF_INET6
        memcpy(flow.vaddr, d.id.idiag_src, 16)
        memcpy(flow.caddr, d.id.idiag_dst, 16)
    else:
        return False
    flow.vport = d.id.idiag_sport
    flow.cport = d.id.idiag_dport
    return True


cdef void _claim_socket(backend_state *b, uint32_t peer, const inet_diag_msg *s) noexcept nogil:
    cdef tcpha_flow flow
    cdef uint32_t rcv_nxt = 0
    cdef adopted *a = NULL
    if not _flow_of(s, &flow) or not b.dp.outside(b.dp.self, &flow):
        return
    pthread_mutex_lock(&b.lock)
    if _find(b, &flow) == NULL and \
            b.dp.position(b.dp.self, TCPHA_MAX_OPS - 2, &flow, &rcv_nxt):
        a = _insert_any(b, &flow)
    if a != NULL:
        a.since_ns = now_ns()
        a.found = True
        a.id = b.claimed = b.claimed + 1
        a.link = a.link_gen = 0
        a.peer = peer
    pthread_mutex_unlock(&b.lock)


cdef int _await_ends(backend_state *b, int op) noexcept nogil:
    """Have the next report wake a worker, once."""
    return watch(b.c, op, b.netlink_fd, EPOLLIN | EPOLLONESHOT, EV_NETLINK, 0, 0)


cdef void _pace(backend_state *b, worker *w) noexcept nogil:
    """At each turn of the timer. Where many connections end, a wake-up and a message for each would
    cost more than all else: the reports wait for the timer then, unless so many in the table that
    are over could be missed as room for others."""
    cdef uint32_t n
    cdef bint lazy
    if load32(&b.lazy):
        _on_netlink(b, w)
    n = xchg32(&b.ends, 0)
    lazy = n >= MANY_ENDS and (<uint64_t>load32(&b.opened) + 2 * n) * 2 < b.max
    if lazy:
        store32(&b.lazy, 1)
    elif xchg32(&b.lazy, 0):
        _await_ends(b, EPOLL_CTL_MOD)


cdef void _on_waiting(backend_state *b, worker *w) noexcept nogil:
    """Requests came when there seemed to be no room."""
    _on_ring(b, w)
    if not b.unloading:
        _reap(b, w, now_ns(), True)
    if b.dp.admit(b.dp.self, w.scratch, b.unloading or _is_full(b)):
        rearm(b.c, b.dp.tap_fd, EV_TAP, 0)


cdef void _on_event(core *c, worker *w, int kind, uint32_t index, uint32_t gen,
                    uint32_t events) noexcept nogil:
    cdef backend_state *b = <backend_state *>c.role
    if kind == EV_NETLINK:
        if not load32(&b.lazy):
            _on_netlink(b, w)
            _await_ends(b, EPOLL_CTL_MOD)
    elif kind == EV_RING:
        _on_ring(b, w)
    elif kind == EV_TAP:
        _on_waiting(b, w)


cdef void _on_timer(core *c, worker *w, uint64_t now) noexcept nogil:
    """Look for ends that wait, and feed sockets that had no room."""
    cdef backend_state *b = <backend_state *>c.role
    cdef leftover **at
    cdef leftover *p
    b.dp.sweep(b.dp.self, now)
    _pace(b, w)
    _on_ring(b, w)
    _look_again(b, w)
    _sweep(b, w, now)
    if b.leftovers == NULL or pthread_mutex_trylock(&b.feed_lock) != 0:
        return
    at = &b.leftovers
    while at[0] != NULL:
        p = at[0]
        if b.dp.feed(b.dp.self, w.index, &p.snap, p.data) == 0:
            at[0] = p.next
            free(p)
        else:
            at = &p.next
    pthread_mutex_unlock(&b.feed_lock)


cdef void _on_link_down(core *c, worker *w, link *l) noexcept nogil:
    """The front end may have given the link up long before we heard of it, and what we said there
    is lost: it should ask what is over. Other links may be as dead as this one."""
    cdef uint8_t buf[MSG_HEADER]
    cdef uint32_t i
    for i in range(MAX_LINKS):
        if load32(&c.links[i].state) == LINK_UP and c.links[i].peer == l.peer:
            link_put(c, w, &c.links[i], buf, message_short(buf, MSG_MISSED, 0), NULL, 0)


cdef void _on_retire(core *c, worker *w) noexcept nogil:
    pass


cdef class BackEnd(Core):
    """The back end's shared state.

    maxclients: adopted connections that the application has open at one time; stale: seconds after
    which an offer is too old to be adopted.
    """

    def __cinit__(self, uint32_t maxclients, double stale=2.0):
        cdef uint32_t i, size = 16, entries = maxclients * 2 + 256
        if not 0 < maxclients <= 1 << 24:
            raise ValueError("maxclients out of range")
        self.b = <backend_state *>calloc(1, sizeof(backend_state))
        if self.b == NULL:
            raise MemoryError
        while size < entries:
            size *= 2
        self.b.mask = size - 1
        self.b.max = maxclients
        self.b.entries = entries
        self.b.pool = <adopted *>calloc(entries, sizeof(adopted))
        self.b.buckets = <adopted **>calloc(size, sizeof(adopted *))
        if self.b.pool == NULL or self.b.buckets == NULL:
            raise MemoryError
        for i in range(entries):
            self.b.pool[i].next = self.b.free_list
            self.b.free_list = &self.b.pool[i]
        pthread_mutex_init(&self.b.lock, NULL)
        pthread_mutex_init(&self.b.feed_lock, NULL)
        pthread_mutex_init(&self.b.reap_lock, NULL)
        pthread_mutex_init(&self.b.ring_lock, NULL)
        self.b.c = self.c
        self.b.stale_ns = <uint64_t>(stale * 1e9)
        self.b.claimed = int.from_bytes(os.urandom(7), "little")
        self.b.netlink_fd = -1
        self.c.role = self.b
        self.c.on_event = _on_event
        self.c.on_message = _on_message
        self.c.on_link_down = _on_link_down
        self.c.on_timer = _on_timer
        self.c.on_retire = _on_retire
        self._open(20)

    def __dealloc__(self):
        cdef leftover *p
        if self.b == NULL:
            return
        while self.b.leftovers != NULL:
            p = self.b.leftovers
            self.b.leftovers = p.next
            free(p)
        pthread_mutex_destroy(&self.b.lock)
        pthread_mutex_destroy(&self.b.feed_lock)
        pthread_mutex_destroy(&self.b.reap_lock)
        pthread_mutex_destroy(&self.b.ring_lock)
        free(self.b.pool)
        free(self.b.buckets)
        free(self.b)

    def start(self, datapath):
        """Begin to watch for the end of connections, over an opened datapath."""
        cdef BeDatapath d = datapath
        self.datapath = d
        self.b.dp = d.table
        nl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)  # SOCK_DIAG
        nl.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        nl.bind((0, 1 << (SKNLGRP_INET_TCP_DESTROY - 1) | 1 << (SKNLGRP_INET6_TCP_DESTROY - 1)))
        nl.setblocking(False)
        self.fds["netlink"] = self.b.netlink_fd = nl.detach()
        _await_ends(self.b, EPOLL_CTL_ADD)
        if self.b.dp.gate != NULL:
            watch(self.c, EPOLL_CTL_ADD, self.b.dp.event_fd, EPOLLIN | EPOLLET, EV_RING, 0, 0)
            watch(self.c, EPOLL_CTL_ADD, self.b.dp.tap_fd, EPOLLIN | EPOLLET, EV_TAP, 0, 0)
            _tell_live(self.b)

    cdef void _tell_all(self, uint8_t kind, uint64_t id):
        cdef worker *w = self.outsider()
        cdef uint8_t buf[16]
        cdef int i
        with nogil:
            for i in range(MAX_LINKS):
                if load32(&self.c.links[i].state) == LINK_UP:
                    link_put(self.c, w, &self.c.links[i], buf, message_short(buf, kind, id), NULL,
                             0)
            self.flush_outsider()

    def tell_server(self, uint64_t said):
        """SERVER to all front ends: see message.pxd."""
        self._tell_all(MSG_SERVER, said)

    def claim(self, uint32_t peer):
        """Note connections that an earlier run adopted, for a front end that knows as little of
        them: whatever sockets there are. Called in a thread of its own, one at a time, behind
        catch_up(). Raises OSError."""
        cdef SockList sockets = SockList(CONNECTED)
        cdef const inet_diag_msg *s
        with nogil:
            s = sockets.next()
            while s != NULL:
                _claim_socket(self.b, peer, s)
                s = sockets.next()
        sockets.check()

    def asked(self):
        """[(link, its generation, its peer, number), ...] of front ends that have asked what there
        is since the last call."""
        cdef link *l
        cdef uint32_t i, number
        out = []
        for i in range(MAX_LINKS):
            l = &self.c.links[i]
            number = xchg32(&l.asked, 0) if load32(&l.state) == LINK_UP else 0
            if number:
                out.append((i, l.gen, l.peer, number))
        return out

    def tell_flows(self, uint32_t link_index, uint32_t gen, uint32_t number, uint32_t at=0):
        """Answer a front end's question; what ends later is told behind. Not if the link is broken,
        or another one by now: then it asks again. It is a long answer: returns the place in the
        table at which to go on (the same one: the link has no room yet), or None."""
        cdef worker *w = self.outsider()
        cdef link *l = &self.c.links[link_index]
        if l.gen != gen or load32(&l.state) != LINK_UP:
            return None
        with nogil:
            at = _tell_piece(self.b, w, l, number, at)
            self.flush_outsider()
        return at if at <= self.b.mask else None

    def release(self, uint32_t peer):
        """Free the place of a front end without links, for another one. False: it has connections
        here, of which it may want to hear."""
        cdef bint found
        self.catch_up()
        with nogil:
            found = _has_any(self.b, peer, False)
        if found:
            return False
        if load32(&self.b.holder) == peer + 1:
            store32(&self.b.holder, 0)
        if self.b.dp.keys != NULL and peer < TCPHA_MAX_FAST:
            store32(&self.b.dp.keys[peer].used, 0)
        return True

    def leave_fast_path(self):
        """Tell front ends to send no more requests that nobody has offered."""
        self._tell_all(MSG_KEYED, 0)

    def refuse_all(self):
        """Adopt nothing more (FULL is the answer); what lives goes on."""
        with nogil:
            pthread_mutex_lock(&self.b.lock)
            self.b.unloading = 1
            _tell_live(self.b)
            pthread_mutex_unlock(&self.b.lock)

    def check(self, uint32_t at=0):
        """Tell front ends of connections that ended while they were away. There may be many:
        returns the place in the table at which to go on, or None."""
        cdef worker *w = self.outsider()
        with nogil:
            at = _check_piece(self.b, w, at, at + PIECE)
            self.flush_outsider()
        return at if at <= self.b.mask else None

    def catch_up(self):
        """Take note of what the packet path has adopted up to now."""
        cdef worker *w = self.outsider()
        with nogil:
            _on_ring(self.b, w)
            self.flush_outsider()

    def counters(self):
        cdef be_counters n
        read_counters(&n, &self.b.n, sizeof(n))
        from tcpha._fast.message import REFUSALS
        out = {"adopted": n.adopted, "fast": n.fast, "closed": n.closed,
               "live": load32(&self.b.live),
               "refused": sum([n.refused[i] for i in range(16)]), "late_feeds": n.late,
               "resyncs": n.resyncs}
        out["refusals"] = {text.decode(): n.refused[i] for i, text in enumerate(REFUSALS)
                           if n.refused[i]}
        return out

    def has_any_of(self, uint32_t peer):
        """Whether a connection lives that a front end knows, or may know."""
        cdef bint found
        with nogil:
            found = _has_any(self.b, peer, True)
        return bool(found)
