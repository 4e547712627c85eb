# SPDX-License-Identifier: GPL-2.0-or-later
# Who owns a local 4-tuple: the client's address and port, and those of the application. An adopted
# connection does, or a direct one, or nobody. There are direct ones where the application listens
# at an address of its own, or for others than us ('shared'): a client that is adopted through the
# VIP may connect there from the same port.
#
#   entry            socket                  what it means, and what is done
#   ---------------  ----------------------  ----------------------------------------------------
#   none             none                    nobody's: _claim_tuple() enters an adopted one
#   none             any                     shared: a direct one's. Else an earlier run's: ended
#   SYN, SYNACK      none, or a request's    being adopted: _being_adopted()
#   SYN, SYNACK      older                   left over: _room() ends it. Or, shared, of a client
#                                            that was faster: the adoption is refused
#   LIVE             one that it fits        adopted: _is_of(). The last words of an older socket
#                                            do not fit
#   LIVE, ended      TIME_WAIT, or none      a direct SYN takes it: _on_syn(), _hand_back()
#   DIRECT           any                     a direct one's. What is left of the adopted one may
#                                            still be said: it has the number that comes next

cdef be_flow *_being_adopted(be_nfqueue *d, const tcpha_flow *local,
                             const snapshot *s) noexcept nogil:
    """The entry of a connection that is being adopted. NULL: its 4-tuple is a newer one's by now,
    or a direct one's. The lock is held."""
    cdef be_flow *f = <be_flow *>table_find(&d.flows, local)
    return f if f != NULL and f.state != B_DIRECT and f.asked == _start(s) else NULL


cdef inline uint32_t _next(const be_flow *f, uint64_t volume) noexcept nogil:
    """The sequence number behind all that the socket has used."""
    return f.isn + <uint32_t>volume


cdef inline bint _comes_next(be_flow *f, const tcp_view *v) noexcept nogil:
    cdef uint64_t volume = load64(&f.volume)
    return volume != 0 and get32(v.tcp + 4) == _next(f, volume)


cdef bint _is_of(be_flow *f, const tcp_view *v) noexcept nogil:
    """Whether a packet fits the socket's numbers. If not, it comes from an older socket of the
    same 4-tuple, whose last words (a RST, when it was destroyed) were still in the queue."""
    cdef uint64_t volume = load64(&f.volume)
    cdef int64_t ahead = <int>(get32(v.tcp + 4) - _next(f, volume))
    if ahead > LEAP or -ahead > <int64_t>min(volume, <uint64_t>1 << 30):
        return False
    ahead += v.data_len + (1 if v.flags & TCP_FIN else 0)
    if ahead > 0:
        raise64(&f.volume, volume + ahead)
    return True


cdef void _tell(be_nfqueue *d) noexcept nogil:
    """Wake the workers that wait for an answer. Nobody takes another lock under wait_lock."""
    pthread_mutex_lock(&d.wait_lock)
    store32(&d.answers, d.answers + 1)
    pthread_cond_broadcast(&d.answered)
    pthread_mutex_unlock(&d.wait_lock)


cdef void _hand_back(be_flow *f) noexcept nogil:
    """The 4-tuple of an adopted connection is a direct one's now. The entry stays, lest the socket
    is taken for the adopted one's. The lock is held for writing."""
    f.state = B_DIRECT
    if f.ended_ns == 0:
        f.ended_ns = now_ns()


cdef int _claim_tuple(be_nfqueue *d, const tcpha_flow *local, const snapshot *s,
                      bint *unknown) noexcept nogil:
    """Enter an adopted connection as the owner, in place of an older one's entry. 0 or a refusal.
    unknown: what was there may be a direct connection."""
    cdef int refusal = REFUSE_FULL
    cdef be_flow *f
    pthread_rwlock_wrlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, local)
    unknown[0] = f == NULL or f.state == B_DIRECT
    # a client with one port and two places that lead here: the local server cannot tell them apart
    if f != NULL and not _same(&f.outside, &s.flow) and f.ended_ns == 0:
        f = NULL
        refusal = REFUSE_UNSUPPORTED
    else:
        if f != NULL:
            table_remove(&d.flows, local)
        f = <be_flow *>table_add(&d.flows, local)
        if f == NULL and _evict(d):
            f = <be_flow *>table_add(&d.flows, local)
    if f != NULL:
        f.state = B_SYN
        f.outside = s.flow
        f.after_direct = _is_shared(d, local) and unknown[0]
        f.asked = _start(s)
    pthread_rwlock_unlock(&d.lock)
    return 0 if f != NULL else refusal


cdef void _release_tuple(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """An adoption comes to nothing. If the 4-tuple is another connection's by now, that one keeps
    it."""
    pthread_rwlock_wrlock(&d.lock)
    if _being_adopted(d, local, s) != NULL:
        table_remove(&d.flows, local)
    pthread_rwlock_unlock(&d.lock)


cdef int _room(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """Make an adopted connection the owner: its entry is there, and no older socket any more. 0 or
    a refusal."""
    cdef diag_answer before, a
    cdef bint unknown, whole, shared = _is_shared(d, local)
    cdef int _tries, refusal
    # Whose this socket is, the entry says afterwards: a direct connection takes the 4-tuple first.
    if not shared or _query(d, local, &before) < 0:
        before.state = 0
    refusal = _claim_tuple(d, local, s, &unknown)
    if refusal != 0:
        return refusal
    for _tries in range(4):
        if _query(d, local, &a) < 0 or a.state == 0:
            return 0
        whole = a.full or a.state == TCP_NEW_SYN_RECV or a.state == TCP_SYN_RECV
        if shared and whole and (unknown or before.state == 0 or
                                 memcmp(a.cookie, before.cookie, sizeof(a.cookie)) != 0):
            _release_tuple(d, local, s)  # the client talks to the local server directly
            return REFUSE_UNSUPPORTED
        # A socket of an earlier connection owns the 4-tuple. The client has given that one up, or
        # the front end could not have accepted this one. If it is not there any more: look again.
        if diag_destroy(d.sockets, local, &a):
            add64(&d.killed, 1)
            return 0
    return 0


cdef void _drop_flow(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """Take back an adoption. What the server says of it is dropped from now on, a RST too. If the
    4-tuple is another connection's by now, that one goes on."""
    cdef diag_answer a
    cdef be_flow *f
    if _query(d, local, &a) < 0:
        a.state = 0
    pthread_rwlock_wrlock(&d.lock)
    f = _being_adopted(d, local, s)
    if f != NULL:
        # As long as no SYN-ACK was seen, the socket may come from the client's SYN instead of ours.
        if _is_shared(d, local) and f.state == B_SYN:
            a.state = 0
        table_remove(&d.flows, local)
    pthread_rwlock_unlock(&d.lock)
    if f != NULL:
        diag_destroy(d.sockets, local, &a)


cdef void _on_syn(be_nfqueue *d, tcp_view *v) noexcept nogil:
    """A client begins to talk to the local server directly. If it used the same port for an adopted
    connection, which is over, then the TIME_WAIT socket has the new one's 4-tuple, but numbers and
    timestamps of another. It would answer by ACKs that mean nothing to the client. So would the
    request socket of one that is being adopted."""
    cdef tcpha_flow local
    cdef be_flow *f
    cdef diag_answer a
    cdef uint32_t state
    cdef bint over
    _flow_between(v.ip + 12, v.tcp, v.ip + 16, v.tcp + 2, &local)
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    state = f.state if f != NULL else <uint32_t>B_DIRECT
    pthread_rwlock_unlock(&d.lock)
    if state == B_DIRECT or _query(d, &local, &a) < 0 or a.full:
        return
    pthread_rwlock_wrlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    over = f != NULL and f.state == state  # or an adoption has succeeded since, or begun
    if over:
        _hand_back(f)
    pthread_rwlock_unlock(&d.lock)
    if over:
        _tell(d)
        if diag_destroy(d.sockets, &local, &a):
            add64(&d.killed, 1)


cdef bint _on_syn_ack(be_nfqueue *d, tcp_view *v) noexcept nogil:
    """The local server's answer to a forged SYN; it must not leave the host. False: another's."""
    cdef tcpha_flow local
    cdef be_flow *f
    cdef bint ours, shared
    _flow_between(v.ip + 16, v.tcp + 2, v.ip + 12, v.tcp, &local)
    shared = _is_shared(d, &local)
    pthread_rwlock_wrlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    if f != NULL and shared and (
            (f.state == B_SYN and get32(v.tcp + 8) != f.asked) or
            ((f.state == B_SYNACK or f.state == B_LIVE) and get32(v.tcp + 4) != f.isn)):
        # the SYN came while we sent ours, or just before the adopted connection ended
        _hand_back(f)
    elif f != NULL and f.state == B_SYN and get32(v.tcp + 8) == f.asked:
        f.isn = get32(v.tcp + 4)
        f.ts_ok = v.ts != NULL
        f.tsval = get32(v.ts) if v.ts != NULL else 0
        f.wscale = v.wscale
        f.ecn_ok = (v.flags & (TCP_ECE | TCP_CWR)) == TCP_ECE
        f.state = B_SYNACK
    # the client may have begun, or even ended, a direct connection before our SYN arrived
    ours = f != NULL and (f.state != B_DIRECT or get32(v.tcp + 8) == f.asked)
    pthread_rwlock_unlock(&d.lock)
    _tell(d)
    return ours or not shared
