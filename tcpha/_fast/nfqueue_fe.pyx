# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'nfqueue', the front end's half: clients' packets pass through netfilter queues.

Packets of flows that were handed over are sent on by a packet socket, with GSO and checksum offload
(direct), or cut and wrapped here (tunnel). All others are accepted as they are.

A queue's thread holds the lock for reading until the verdicts of its batch are sent; so whoever has
it for writing knows that each packet which was judged before has reached the stack.
"""
import socket

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.datapath cimport TABLE_PIECE, FeDatapath, table_place
from tcpha._fast.defs cimport (
    TCPHA_LOCAL_NODE, TCPHA_MARK_FRAGMENT, TCPHA_MAX_BACKENDS, TCPHA_TO_LIVE,
    TCPHA_TO_STACK, tcpha_classify, tcpha_counters, tcpha_drop, tcpha_end, tcpha_entry, tcpha_flow,
    tcpha_is_forwarded, tcpha_state_of)
from tcpha._fast.diag cimport SockDiag, diag, diag_answer, diag_query
from tcpha._fast.ledger cimport (
    PUT_NEW, ledger, ledger_close, ledger_divert, ledger_forget, ledger_open, ledger_remove,
    ledger_restore, ledger_sweep)
from tcpha._fast.nfqueue cimport (
    SKB_CSUM_NOT_READY, SKB_GSO, V_ACCEPT, V_DROP, V_KEEP, V_NUMBERS, Queue, packet, queue,
    queue_verdict)
from tcpha._fast.nfqueue_be cimport BeNfqueue, be_nfqueue, local_icmp, local_inject, local_inward
from tcpha._fast.packet cimport (
    ETH_SIZE, FRAME_HEAD, IP_SIZE, TCP_ACK, TCP_CWR, TCP_FIN, TCP_PSH, TCP_SIZE,
    TCP_SYN, VNET_SIZE, address_bytes, forge, ip_checksum, segment, segment_from)
from tcpha._fast.repair cimport repair_freeze, saved_syn_mss
from tcpha._fast.rewrite cimport (
    acks_beyond, ask_offload, get16, get32, icmp_parse, icmp_view, pseudo_sum, sum_bytes, tcp_parse,
    tcp_view)
from tcpha._fast.snapshot cimport SNAP_FIN, snapshot
from tcpha._fast.sys cimport (
    AF_PACKET, EINTR, MSG_DONTWAIT, add64, errno, htonl, htons, iovec, load32, load64, msghdr,
    now_ns, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
    pthread_rwlock_destroy, pthread_rwlock_rdlock, pthread_rwlock_t, pthread_rwlock_unlock,
    pthread_rwlock_wrlock, read_counters, rwlock_init, sendmsg, store64)
from tcpha._fast.table cimport (
    flow_cell, flow_table, table_add, table_cell, table_close, table_find, table_open, table_remove)

cdef extern from "<linux/if_packet.h>" nogil:
    struct sockaddr_ll:
        uint16_t sll_family
        uint16_t sll_protocol
        int sll_ifindex

cdef enum:
    RECENT = 1 << 16       # sets in the cache of TSvals
    WAYS = 4               # places in each
    REACH = 1 << 18        # how far a client may be ahead of what was noted: beyond its window
    TCP_MSS_LOW = 536
    MAX_QUEUES = 16
    ACKS = 32              # of a batch that may wait for a later one, each of another flow
    STRETCH = 8            # ACKs that become one


# A packet that waits in the kernel while its flow is handed over, and its copy.
cdef struct kept:
    kept *next
    queue *q
    uint32_t id
    uint32_t skb_info
    uint32_t len
    uint8_t data[1]


cdef struct holder:
    kept *first
    kept *last


# How to reach a back end. ifindex 0: not reachable.
cdef struct path:
    int ifindex
    bint tunnel
    uint8_t ether[14]      # the header of each frame
    uint32_t addr          # tunnel: outer addresses, network byte order
    uint32_t src
    uint32_t mtu


# The latest TSval of a client that our stack serves: no socket option tells (RFC 7323: TS.Recent).
# The queues' threads share these without a lock. What goes wrong between two of them leaves a seq
# that does not fit, and then the TSval of the SYN does.
cdef struct recent:
    uint64_t who           # client's address, port and ours; 0: free
    uint64_t value         # the packet's seq, and its TSval in the lower half


# A pure ACK of the batch at hand, not sent yet: a later one may make it superfluous.
cdef struct waiting_ack:
    tcpha_entry *e         # NULL: none
    tcp_view v
    uint32_t skb_info
    uint32_t stands_for    # so many ACKs


cdef struct fe_nfqueue:
    pthread_rwlock_t lock
    pthread_mutex_t hold_lock  # the holders, while 'lock' is held for reading
    flow_table flows       # of tcpha_entry
    ledger book
    uint32_t nholders
    holder *holders
    path paths[TCPHA_MAX_BACKENDS]
    be_nfqueue *local      # the Local Node; NULL: none
    diag *sockets          # our own
    bint drop_strangers
    recent *seen
    waiting_ack waiting[MAX_QUEUES][ACKS]
    uint64_t thinned
    uint64_t outer_id      # of the latest outer packet that routers may cut
    uint16_t first_queue
    int packet_fd
    bint tunnel
    uint8_t vaddr[16]
    uint16_t vport
    tcpha_counters n


# The store of the ledger; the lock is held for writing.

cdef int _find(void *self, const tcpha_flow *flow, tcpha_entry *entry) noexcept nogil:
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&(<fe_nfqueue *>self).flows, flow)
    if e == NULL:
        return -1
    entry[0] = e[0]
    return 0


cdef int _put(void *self, const tcpha_flow *flow, const tcpha_entry *entry, int how) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&d.flows, flow)
    if e != NULL and how == PUT_NEW:
        return -1
    if e == NULL:
        e = <tcpha_entry *>table_add(&d.flows, flow)
    if e == NULL:
        return -1
    e[0] = entry[0]
    return 0


cdef int _remove(void *self, const tcpha_flow *flow) noexcept nogil:
    return 0 if table_remove(&(<fe_nfqueue *>self).flows, flow) else -1


cdef int _end(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
              bint keep) noexcept nogil:
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&(<fe_nfqueue *>self).flows, flow)
    if e == NULL or not tcpha_end(e, id, keep):
        return 0
    if not keep:
        table_remove(&(<fe_nfqueue *>self).flows, flow)
    return 1


cdef int _drop(void *self, uint32_t worker, const tcpha_flow *flow,
               const tcpha_entry *found) noexcept nogil:
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&(<fe_nfqueue *>self).flows, flow)
    return e != NULL and tcpha_drop(e, found.phase) and \
        table_remove(&(<fe_nfqueue *>self).flows, flow)


# Sending

cdef bint _emit(fe_nfqueue *d, const path *way, const uint8_t *head, uint32_t head_len,
                const uint8_t *data, uint32_t data_len) noexcept nogil:
    """Send one frame: virtio-net header and all."""
    cdef sockaddr_ll to
    cdef iovec iov[2]
    cdef msghdr m
    memset(&to, 0, sizeof(to))
    to.sll_family = AF_PACKET
    to.sll_protocol = htons(0x0800)
    to.sll_ifindex = way.ifindex
    memset(&m, 0, sizeof(m))
    m.msg_name = &to
    m.msg_namelen = sizeof(to)
    iov[0].iov_base = <void *>head
    iov[0].iov_len = head_len
    iov[1].iov_base = <void *>data
    iov[1].iov_len = data_len
    m.msg_iov = iov
    m.msg_iovlen = 2 if data_len else 1
    while sendmsg(d.packet_fd, &m, MSG_DONTWAIT) < 0:
        if errno != EINTR:
            return False
    return True


cdef bint _send_direct(fe_nfqueue *d, const path *way, tcp_view *v, uint32_t skb_info,
                       uint32_t mss) noexcept nogil:
    """As it is, in an Ethernet frame. What the device or the kernel must still do to it, the
    virtio-net header says."""
    cdef uint8_t head[VNET_SIZE + ETH_SIZE]
    memset(head, 0, VNET_SIZE)
    memcpy(head + VNET_SIZE, way.ether, ETH_SIZE)
    if v.len > way.mtu or skb_info & (SKB_CSUM_NOT_READY | SKB_GSO):
        ask_offload(head, v, mss if v.len > way.mtu else 0)
    return _emit(d, way, head, sizeof(head), v.ip, v.len)


cdef bint _send_tunnel(fe_nfqueue *d, const path *way, tcp_view *v, uint32_t skb_info,
                       uint32_t mss) noexcept nogil:
    """Wrapped in IPIP (RFC 2003), cut into segments that fit."""
    cdef uint8_t head[VNET_SIZE + ETH_SIZE + IP_SIZE + 120]
    cdef uint8_t *outer = head + VNET_SIZE + ETH_SIZE
    cdef uint8_t *inner = outer + IP_SIZE
    cdef uint8_t *tcp = inner + (v.tcp - v.ip)
    cdef uint32_t headers = <uint32_t>(v.data - v.ip), at = 0, n, seq
    cdef uint16_t word
    cdef bint whole = v.len <= way.mtu - IP_SIZE
    memset(head, 0, VNET_SIZE)
    memcpy(head + VNET_SIZE, way.ether, ETH_SIZE)
    while True:
        n = v.data_len - at if whole else min(v.data_len - at, mss)
        memcpy(inner, v.ip, headers)
        if not whole:
            word = htons(<uint16_t>(headers + n))
            memcpy(inner + 2, &word, 2)
            memset(inner + 10, 0, 2)
            word = ip_checksum(inner, <uint32_t>(tcp - inner))
            memcpy(inner + 10, &word, 2)
            seq = htonl(get32(v.tcp + 4) + at)
            memcpy(tcp + 4, &seq, 4)
            if at:
                tcp[13] &= ~<uint8_t>TCP_CWR
            if at + n < v.data_len:
                tcp[13] &= ~<uint8_t>(TCP_FIN | TCP_PSH)
        if not whole or skb_info & (SKB_CSUM_NOT_READY | SKB_GSO):
            memset(tcp + 16, 0, 2)
            seq = <uint32_t>pseudo_sum(inner, headers + n - <uint32_t>(tcp - inner)) + \
                sum_bytes(tcp, headers - <uint32_t>(tcp - inner)) + sum_bytes(v.data + at, n)
            seq = (seq & 0xffff) + (seq >> 16)
            word = ~<uint16_t>((seq & 0xffff) + (seq >> 16))
            memcpy(tcp + 16, &word, 2)
        memset(outer, 0, IP_SIZE)
        outer[0] = 0x45
        outer[1] = inner[1]
        word = htons(<uint16_t>(IP_SIZE + headers + n))
        memcpy(outer + 2, &word, 2)
        memcpy(outer + 6, inner + 6, 2)  # keeps DF: path MTU discovery stays honest
        if not inner[6] & 0x40:  # routers may cut it: no two may be alike for a while (RFC 6864)
            word = htons(<uint16_t>add64(&d.outer_id, 1))
            memcpy(outer + 4, &word, 2)
        outer[8] = 64
        outer[9] = 4
        memcpy(outer + 12, &way.src, 4)
        memcpy(outer + 16, &way.addr, 4)
        word = ip_checksum(outer, IP_SIZE)
        memcpy(outer + 10, &word, 2)
        if not _emit(d, way, head, VNET_SIZE + ETH_SIZE + IP_SIZE + headers, v.data + at, n):
            return False
        at += n
        if at >= v.data_len:
            return True


cdef void _to_backend(fe_nfqueue *d, tcpha_entry *e, tcp_view *v, uint32_t skb_info) noexcept nogil:
    cdef path *way = &d.paths[e.backend]
    cdef uint32_t headers = <uint32_t>(v.data - v.ip), room, mss, segments
    cdef bint ok
    if e.backend == TCPHA_LOCAL_NODE and d.local != NULL:
        if local_inject(d.local, v):
            e.packets += 1
            e.bytes += v.len
        return
    if way.ifindex == 0:
        add64(<uint64_t *>&d.n.unreachable, 1)
        return
    room = way.mtu - (IP_SIZE if way.tunnel else 0)
    mss = room - headers if room > headers + TCP_MSS_LOW else TCP_MSS_LOW
    segments = max((v.data_len + mss - 1) // mss, <uint32_t>1)
    if way.tunnel:
        ok = _send_tunnel(d, way, v, skb_info, mss)
    else:
        ok = _send_direct(d, way, v, skb_info, mss)
    if not ok:
        add64(<uint64_t *>&d.n.unreachable, 1)
        return
    e.packets += segments
    e.bytes += v.len
    add64(<uint64_t *>&d.n.forwarded, segments)
    add64(<uint64_t *>&d.n.forwarded_bytes, v.len)


# Receiving

cdef inline uint32_t _place(const tcpha_flow *flow) noexcept nogil:
    cdef uint32_t h
    memcpy(&h, flow.caddr + 12, 4)
    h = (h ^ (<uint32_t>flow.cport << 16) ^ flow.cport) * 0x9e3779b1u
    return (h >> 8) & (RECENT - 1)


cdef inline recent *_recent(fe_nfqueue *d, const tcpha_flow *flow, uint64_t *who) noexcept nogil:
    """The first of the WAYS places in which a flow may be found, and what it is found by."""
    cdef uint32_t addr
    memcpy(&addr, flow.caddr + 12, 4)
    who[0] = (<uint64_t>addr << 32) | (<uint32_t>flow.cport << 16) | flow.vport
    return &d.seen[_place(flow) * WAYS]


cdef inline bint _follows(uint32_t seq, uint64_t value) noexcept nogil:
    return seq - <uint32_t>(value >> 32) < REACH


cdef void _note(fe_nfqueue *d, const tcpha_flow *flow, const tcp_view *v) noexcept nogil:
    """Remember the TSval of a packet to our stack. One whose seq does not follow is left out:
    anybody can forge such, and with a TSval of his the client would be out of time for ever."""
    cdef uint64_t who
    cdef recent *r = _recent(d, flow, &who)
    cdef uint32_t i, seq = get32(v.tcp + 4), tsval = get32(v.ts)
    cdef uint64_t new = (<uint64_t>seq << 32) | tsval, old
    cdef bint opens = (v.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN
    for i in range(WAYS):
        if r[i].who == who or (opens and r[i].who == 0):
            break
    else:
        if not opens:
            return
        i = seq % WAYS
    if opens:
        store64(&r[i].value, new)
        store64(&r[i].who, who)
        return
    old = load64(&r[i].value)
    if _follows(seq, old) and <int>(tsval - <uint32_t>old) >= 0:
        store64(&r[i].value, new)


cdef void _recall(fe_nfqueue *d, snapshot *s) noexcept nogil:
    """Set ts_recent, if what was noted fits rcv_nxt."""
    cdef uint64_t who, value
    cdef recent *r = _recent(d, &s.flow, &who)
    cdef uint32_t i
    for i in range(WAYS):
        if load64(&r[i].who) == who:
            value = load64(&r[i].value)
            if _follows(s.rcv_nxt, value):
                s.ts_recent = <uint32_t>value
            return


cdef bint _classify(fe_nfqueue *d, tcpha_entry *e, const tcp_view *v) noexcept nogil:
    """True: the packet belongs to the flow that was handed over. See flow.h."""
    cdef int where = tcpha_classify(e, v.flags, get32(v.tcp + 4), v.data_len, now_ns())
    if where == TCPHA_TO_LIVE:
        add64(<uint64_t *>&d.n.live_syn, 1)
    return where != TCPHA_TO_STACK


cdef bint _keep(fe_nfqueue *d, uint32_t slot, queue *q, const packet *p) noexcept nogil:
    cdef holder *h
    cdef kept *k
    if slot >= d.nholders:
        return False
    k = <kept *>malloc(sizeof(kept) + p.len)
    if k == NULL:
        return False
    k.next = NULL
    k.q = q
    k.id = p.id
    k.skb_info = p.skb_info
    k.len = p.len
    memcpy(k.data, p.data, p.len)
    pthread_mutex_lock(&d.hold_lock)
    h = &d.holders[slot]
    if h.last != NULL:
        h.last.next = k
    else:
        h.first = k
    h.last = k
    pthread_mutex_unlock(&d.hold_lock)
    return True


cdef inline bint _is_plain_ack(const tcp_view *v) noexcept nogil:
    """Nothing but an ACK, with no option but timestamps."""
    return v.flags == TCP_ACK and v.data_len == 0 and \
        v.data - v.tcp == (TCP_SIZE + 12 if v.ts != NULL else TCP_SIZE)


cdef inline bint _supersedes(const tcp_view *new, const waiting_ack *w) noexcept nogil:
    """A later plain ACK acknowledges more, and says all else that this one says. Duplicates, which
    have a meaning of their own (RFC 5681), and window updates are kept."""
    return w.stands_for < STRETCH and <int>(get32(new.tcp + 8) - get32(w.v.tcp + 8)) > 0 and \
        memcmp(new.tcp + 4, w.v.tcp + 4, 4) == 0 and new.ip[1] == w.v.ip[1] and \
        (new.ts == NULL) == (w.v.ts == NULL)


cdef inline void _send_waiting(fe_nfqueue *d, waiting_ack *w) noexcept nogil:
    if w.e != NULL:
        _to_backend(d, w.e, &w.v, w.skb_info)
        w.e = NULL


cdef void _forward_packet(fe_nfqueue *d, queue *q, const tcpha_flow *flow, tcpha_entry *e,
                          tcp_view *v, uint32_t skb_info) noexcept nogil:
    """Send a packet on. Of the ACKs in one batch those that a later one contains are left out: each
    would cost a pass through another host's queue, and say nothing."""
    cdef waiting_ack *w = &d.waiting[q.num - d.first_queue][_place(flow) & (ACKS - 1)]
    cdef bint plain = _is_plain_ack(v)
    if plain and w.e is e and _supersedes(v, w):
        w.stands_for += 1
        add64(&d.thinned, 1)
    else:
        _send_waiting(d, w)
        w.stands_for = 1
    if not plain:
        _to_backend(d, e, v, skb_info)
        return
    w.e = e
    w.v = v[0]
    w.skb_info = skb_info


cdef void _on_batch(void *self, queue *q) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int i
    for i in range(ACKS):
        _send_waiting(d, &d.waiting[q.num - d.first_queue][i])


cdef bint _is_stranger(fe_nfqueue *d, const tcpha_flow *flow, const tcp_view *v) noexcept nogil:
    """Whether our stack has no connection for a packet, and would answer with a RST."""
    cdef diag_answer a
    return not v.flags & TCP_SYN and diag_query(d.sockets, flow, &a) == 0 and a.state == 0


cdef int _on_error(fe_nfqueue *d, packet *p, icmp_view *error) noexcept nogil:
    """An ICMP error about a segment that a back end sent in the name of the VIP belongs to that
    back end: it has the connection. Path MTU discovery needs this (RFC 1191)."""
    cdef tcpha_flow flow
    cdef tcpha_entry *e
    cdef path *way
    cdef tcp_view v
    cdef bint ok
    memset(&flow, 0, sizeof(flow))
    flow.caddr[10] = flow.caddr[11] = flow.vaddr[10] = flow.vaddr[11] = 0xff
    memcpy(flow.caddr + 12, error.inner + 16, 4)
    memcpy(flow.vaddr + 12, error.inner + 12, 4)
    memcpy(&flow.vport, error.tcp, 2)
    memcpy(&flow.cport, error.tcp + 2, 2)
    e = <tcpha_entry *>table_find(&d.flows, &flow)
    if e == NULL or not tcpha_is_forwarded(tcpha_state_of(e)):
        return V_ACCEPT
    if e.backend == TCPHA_LOCAL_NODE:
        return local_icmp(d.local, error) if d.local != NULL else V_ACCEPT
    way = &d.paths[e.backend]
    memset(&v, 0, sizeof(v))
    v.ip = error.ip
    v.tcp = v.data = error.icmp
    v.len = error.len
    v.data_len = error.len - <uint32_t>(error.icmp - error.ip)
    if way.ifindex == 0 or v.len + (IP_SIZE if way.tunnel else 0) > way.mtu:
        return V_DROP
    if way.tunnel:
        ok = _send_tunnel(d, way, &v, 0, 0)
    else:
        ok = _send_direct(d, way, &v, 0, 0)
    if ok:
        add64(<uint64_t *>&d.n.icmp, 1)
    return V_DROP


cdef int _on_packet(void *self, queue *q, packet *p) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef tcpha_flow flow
    cdef tcpha_entry *e
    cdef tcp_view v
    cdef icmp_view error
    cdef bint handed
    if icmp_parse(p.data, p.len, &error) == 0:
        return _on_error(d, p, &error)
    if tcp_parse(p.data, p.len, &v) < 0:
        if p.len >= IP_SIZE and get16(p.data + 6) & 0x3fff == 0x2000:  # a first fragment
            p.mark = TCPHA_MARK_FRAGMENT
            return V_NUMBERS
        return V_ACCEPT    # our stack knows what to do with it
    memset(&flow, 0, sizeof(flow))
    flow.caddr[10] = flow.caddr[11] = flow.vaddr[10] = flow.vaddr[11] = 0xff
    memcpy(flow.caddr + 12, v.ip + 12, 4)
    memcpy(flow.vaddr + 12, v.ip + 16, 4)
    memcpy(&flow.cport, v.tcp, 2)
    memcpy(&flow.vport, v.tcp + 2, 2)
    e = <tcpha_entry *>table_find(&d.flows, &flow)
    if e == NULL or not _classify(d, e, &v):
        if d.drop_strangers and _is_stranger(d, &flow, &v):
            return V_DROP
        if v.ts != NULL:
            _note(d, &flow, &v)
        return V_ACCEPT
    handed = tcpha_is_forwarded(tcpha_state_of(e))
    if handed and e.backend == TCPHA_LOCAL_NODE and d.local != NULL:
        e.packets += 1
        e.bytes += v.len
        return local_inward(d.local, p)
    if handed:
        _forward_packet(d, q, &flow, e, &v, p.skb_info)
        return V_DROP
    add64(<uint64_t *>&d.n.held, 1)
    return V_KEEP if _keep(d, e.slot, q, p) else V_DROP  # out of memory: the client sends it again


# For the workers: see datapath.pxd

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


cdef int _forget(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, bint linger,
                 tcpha_entry *entry) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef int rc
    pthread_rwlock_wrlock(&d.lock)
    rc = ledger_forget(&d.book, worker, flow, id, linger, entry)
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


cdef void _drop_strangers(void *self, bint drop) noexcept nogil:
    (<fe_nfqueue *>self).drop_strangers = drop


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


cdef uint32_t _drop_pending(void *self, uint32_t worker, const tcpha_flow *flow,
                            uint64_t idle) noexcept nogil:
    return 0


cdef class FeNfqueue(FeDatapath):
    """slots: connection slots of the workers; queues: Queue objects, started later."""

    cdef fe_nfqueue *d
    cdef list queues
    cdef object packet_socket
    cdef BeNfqueue local
    cdef SockDiag diag
    cdef readonly bint fresh  # an earlier run's connections are not known, if there are any

    def __cinit__(self, str vaddr, int port, int slots, int maxflows, bint tunnel, list queues):
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
        address_bytes(vaddr, self.d.vaddr)
        self.d.vport = htons(port)
        self.d.tunnel = tunnel
        self.diag = SockDiag()
        self.d.sockets = &self.diag.d
        self.fresh = self.d.drop_strangers = True
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
        self.table.drop_strangers = _drop_strangers
        self.table.sweep = _sweep
        self.table.on_packets = _on_packets
        self.table.next_entries = _next_entries
        self.table.drop_pending = _drop_pending

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
