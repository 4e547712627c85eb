# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'ebpf': packets stay in the kernel, nothing is rewritten.

Both sides own a TAP device. A frame written to it has been handled by the BPF program, and if it
passed by the network stack, when write() returns; that makes it a synchronous call into the kernel
for look-ups (operation frames) and for adoption (forged segments).
"""
import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.bpf cimport (
    BPF_ANY, BPF_NOEXIST, Object, __sk_buff, bpf_map_delete_elem, bpf_map_lookup_batch,
    bpf_map_lookup_elem, bpf_map_update_elem, bpf_prog_test_run_opts, bpf_test_run_opts)
from tcpha._fast.bpf import possible_cpus
from tcpha._fast.core cimport SCRATCH
from tcpha._fast.datapath cimport (
    DP_ALIVE, DP_CLOSING, DP_GONE, DP_MORE, DP_TIME_WAIT, FAST_QUEUES, TABLE_PIECE, BeDatapath,
    FeDatapath, table_place)
from tcpha._fast.defs cimport (
    TCPHA_DIRECT, TCPHA_ETH_OP, TCPHA_FAST_EARLY, TCPHA_FAST_FIRST, TCPHA_FAST_LATER,
    TCPHA_FAST_PASSED, TCPHA_FAST_SEND, TCPHA_FAST_SOCKET, TCPHA_FLOWING,
    TCPHA_GIVEN_UP, TCPHA_IPID_PLAIN, TCPHA_LOCAL,
    TCPHA_LOCAL_NODE, TCPHA_LOCKED_OP, TCPHA_MAC_FAST, TCPHA_MAC_KEPT, TCPHA_MAC_MARK,
    TCPHA_MAC_ROOM, TCPHA_MARK_FORGED, TCPHA_MAX_BACKENDS, TCPHA_MAX_FAST, TCPHA_MAX_OPS,
    TCPHA_MAX_ROUTES, TCPHA_MAX_RULES, TCPHA_OP_ADOPT, TCPHA_OP_DROP, TCPHA_OP_END,
    TCPHA_OP_GIVE_BACK, TCPHA_OP_HAND_OVER, TCPHA_OP_LET_FLOW, TCPHA_OP_QUERY, TCPHA_OP_TAKE_BACK,
    TCPHA_R_ASSIGN, TCPHA_R_BACKLOG, TCPHA_R_LIVE, TCPHA_R_NONE, TCPHA_R_NO_LISTENER,
    TCPHA_R_NO_SOCKET, TCPHA_R_OK, TCPHA_R_TIME_WAIT, TCPHA_STATE_VERSION, TCPHA_TUNNEL,
    tcpha_adoption, tcpha_backend, tcpha_be_conf, tcpha_cache, tcpha_counters, tcpha_entry,
    tcpha_event, tcpha_fe_conf, tcpha_flow, tcpha_gate, tcpha_guesses, tcpha_keys, tcpha_load,
    tcpha_is_forwarded, tcpha_live, tcpha_offer, tcpha_op, tcpha_route, tcpha_shaken, tcpha_state,
    tcpha_state_of, tcpha_tag, tcpha_verdict)
from tcpha._fast.diag cimport SockDiag, diag, diag_refusal
from tcpha._fast.ledger cimport (
    PUT_NEW, ledger, ledger_close, ledger_divert, ledger_drop_pending, ledger_forget,
    ledger_linger, ledger_open, ledger_remove, ledger_restore, ledger_sweep)
from tcpha._fast.message cimport (
    REFUSE_BACKLOG, REFUSE_ERROR, REFUSE_LISTENER, REFUSE_UNSUPPORTED)
from tcpha._fast.packet cimport (
    ETH_SIZE, FRAME_HEAD, IP_SIZE, TCP_ACK, TCP_FIN, TCP_PSH, TCP_RST, VNET_SIZE, address_bytes,
    address_text, forge, segment, segment_from, tap_send)
from tcpha._fast.repair cimport saved_syn_mss
from tcpha._fast.rewrite cimport acks_beyond, get16, is_sound, tcp_parse_head, tcp_view
from tcpha._fast.snapshot cimport (
    SNAP_ECN, SNAP_FIN, SNAP_SACK, SNAP_TIMESTAMP, SNAP_USEC_TS, SNAP_WSCALE, snapshot)
from tcpha._fast.sys cimport (
    EINTR, ENOENT, IPPROTO_TCP, add64, errno, htons, load32, load64, now_ns, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_rwlock_destroy,
    pthread_rwlock_rdlock, pthread_rwlock_t, pthread_rwlock_unlock, pthread_rwlock_wrlock, read,
    rwlock_init, setsockopt, store32, store64, xchg32)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int usec)

MAX_ROUTES = TCPHA_MAX_ROUTES

cdef enum:
    TCP_REPAIR = 19
    TCP_ESTABLISHED = 1
    TCP_CLOSE_WAIT = 8
    CHUNK = 60000          # payload of a forged segment; one skb, so that overhead is small
    ADMIT = 64             # requests that one look for room is for
    TURN = 1024            # packets that are kept before others get the lock
    NEAR = 1 << 24         # a socket with numbers so little ahead is no other connection's
    HEAD_MOST = 10 + 14 + 60 + 20  # of a frame, to the ports and flags of its segment
    CHECKED = 3            # virtio-net: the checksum is not made yet, or was verified
    MSS_MIN = 536          # the kernel adopts nothing below (RFC 9293 section 3.7.1)
    HEADERS = 40           # of IP and TCP, as an MSS deducts them
    TIMESTAMPS = 12        # bytes of a forged segment's options
    WINDOW = 64240         # of a SYN-ACK: 44 segments of 1460 bytes, as Linux offers
    RING = 1 << 22         # bytes in the events' ring buffer
    FRONTENDS = 256        # that may tunnel to a back end: max_entries in be.bpf.c
    RING_HEAD = 8          # before each record: length and flags (struct bpf_ringbuf_hdr)
    RING_BUSY = 1u << 31
    RING_DISCARD = 1u << 30

# for the kernel to take in what passes from the TAP to another device
cdef uint64_t DETOUR_NS = 20000000
cdef uint64_t ARRIVAL_NS = 5000000       # until what another CPU has counted must have come
cdef uint64_t PATIENCE_NS = 1000000000   # of the Local Node, for its server's accept queue


cdef int _operate(int tap, tcpha_op *ops, uint32_t worker, const tcpha_flow *flow,
                  uint32_t what) noexcept nogil:
    """Have the program do something with a flow; the answer is in ops[worker]."""
    cdef uint8_t frame[10 + 14 + 46]
    cdef uint16_t kind = htons(TCPHA_ETH_OP)
    cdef tcpha_op *op = &ops[worker]
    memset(frame, 0, sizeof(frame))
    frame[VNET_SIZE] = 2
    frame[VNET_SIZE + 6] = 2
    memcpy(frame + VNET_SIZE + 12, &kind, 2)
    memcpy(frame + VNET_SIZE + ETH_SIZE, &worker, 4)
    op.flow = flow[0]
    op.kind = what
    op.result = TCPHA_R_NONE
    if tap_send(tap, frame, sizeof(frame), NULL, 0) != 0 or op.result == TCPHA_R_NONE:
        return -1
    return 0


cdef inline int _query(int tap, tcpha_op *ops, uint32_t worker,
                       const tcpha_flow *flow) noexcept nogil:
    """Look a flow's socket up."""
    return _operate(tap, ops, worker, flow, TCPHA_OP_QUERY)


# A packet that is kept while its flow is handed over.
cdef struct kept:
    kept *next
    uint32_t len
    uint8_t data[1]


# The kept packets of one connection slot.
cdef struct holder:
    bint active
    uint32_t count         # that have come since the flow was diverted
    tcpha_flow flow
    kept *first
    kept *last


cdef struct fe_ebpf:
    int tap
    tcpha_state *state
    int flows              # map
    int backends           # map
    bint tunnel
    tcpha_op *ops
    pthread_mutex_t lock   # the TAP's read side and the holders
    uint8_t *room          # for a frame, of SCRATCH bytes
    uint32_t nholders
    holder *holders
    ledger book
    int fast_fd[FAST_QUEUES]
    tcpha_offer *offers
    int verdicts           # maps
    int shaken
    pthread_rwlock_t silent_lock  # a silent client gets a socket, and no request of it is decided


cdef int _find(void *self, const tcpha_flow *flow, tcpha_entry *entry) noexcept nogil:
    return bpf_map_lookup_elem((<fe_ebpf *>self).flows, flow, entry)


cdef int _put(void *self, const tcpha_flow *flow, const tcpha_entry *entry, int how) noexcept nogil:
    cdef tcpha_entry e = entry[0]
    e.tag = tcpha_tag(flow)
    return bpf_map_update_elem((<fe_ebpf *>self).flows, flow, &e,
                               BPF_NOEXIST if how == PUT_NEW else BPF_ANY)


cdef int _remove(void *self, const tcpha_flow *flow) noexcept nogil:
    return bpf_map_delete_elem((<fe_ebpf *>self).flows, flow)


cdef int _change(fe_ebpf *d, uint32_t worker, const tcpha_flow *flow, uint64_t id, bint keep,
                 uint32_t what) noexcept nogil:
    d.ops[worker].id = id
    d.ops[worker].keep = keep
    return _operate(d.tap, d.ops, worker, flow, what) == 0 and d.ops[worker].result == TCPHA_R_OK


cdef int _end(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
              bint keep) noexcept nogil:
    return _change(<fe_ebpf *>self, worker, flow, id, keep, TCPHA_OP_END)


cdef int _drop(void *self, uint32_t worker, const tcpha_flow *flow,
               const tcpha_entry *found) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    op.phase = found.phase
    return _change(d, worker, flow, found.id, False, TCPHA_OP_DROP)


cdef int _divert(void *self, uint32_t worker, const tcpha_flow *flow, tcpha_entry *entry,
                 tcpha_entry *old) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef holder *h = &d.holders[entry.slot]
    cdef int rc
    pthread_mutex_lock(&d.lock)
    h.active = True
    h.count = entry.held = 0
    h.flow = flow[0]
    pthread_mutex_unlock(&d.lock)
    rc = ledger_divert(&d.book, worker, flow, entry, old)
    if rc < 0:
        pthread_mutex_lock(&d.lock)
        h.active = False
        pthread_mutex_unlock(&d.lock)
    return rc


cdef int _freeze(void *self, uint32_t worker, int fd, snapshot *s) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    cdef int one = 1
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &one, sizeof(one)) < 0:
        # EPERM stands for both: no CAP_NET_ADMIN, and a socket that is no longer open
        if _query(d.tap, d.ops, worker, &s.flow) == 0 and op.result != TCPHA_R_LIVE:
            return DP_GONE
        return -1
    if _query(d.tap, d.ops, worker, &s.flow) < 0:
        return -1
    if op.result != TCPHA_R_LIVE or \
            (op.state != TCP_ESTABLISHED and op.state != TCP_CLOSE_WAIT):
        return DP_GONE
    s.snd_nxt = op.snd_nxt
    s.rcv_nxt = op.rcv_nxt
    s.snd_wnd = op.snd_wnd
    s.rcv_wnd = op.rcv_wnd
    s.tsval = op.tsval
    s.ts_recent = op.ts_recent
    s.srtt_us = op.srtt_us
    s.mss = saved_syn_mss(fd, op.mss, NULL) if d.tunnel else op.mss
    s.snd_wscale = op.snd_wscale
    s.rcv_wscale = op.rcv_wscale
    s.flags = ((SNAP_TIMESTAMP if op.tstamp_ok else 0) | (SNAP_SACK if op.sack_ok else 0) |
               (SNAP_WSCALE if op.wscale_ok else 0) | (SNAP_ECN if op.ecn_ok else 0) |
               (SNAP_USEC_TS if op.usec_ts_ok else 0) |
               (SNAP_FIN if op.state == TCP_CLOSE_WAIT else 0))
    s.len = op.rcv_nxt - op.copied_seq - (1 if op.state == TCP_CLOSE_WAIT else 0)
    return 0


cdef bint _is_of(const holder *h, uint8_t *ip, uint32_t length) noexcept nogil:
    """Whether a packet is the flow's that a slot holds now. One that was on its way when the slot
    changed hands may be of any other connection, of the same client, too."""
    cdef uint32_t ihl = (ip[0] & 15) * 4u
    # what is behind the ports may be anything: who judged it by more could send it round for ever
    return h.active and length >= ihl + 4 and memcmp(&h.flow.caddr[12], ip + 12, 4) == 0 and \
        memcmp(&h.flow.cport, ip + ihl, 2) == 0


cdef bint _drain(fe_ebpf *d) noexcept nogil:
    """Take packets off the TAP. d.lock is held. True: there may be more."""
    cdef uint8_t *scratch = d.room
    cdef ssize_t n
    cdef uint32_t slot
    cdef kept *p
    cdef holder *h
    cdef int _i
    for _i in range(TURN):
        n = read(d.tap, scratch, SCRATCH)
        if n < 0:
            if errno == EINTR:
                continue
            return False
        if n < VNET_SIZE + ETH_SIZE + 40 or scratch[VNET_SIZE] != TCPHA_MAC_MARK >> 8 or \
                scratch[VNET_SIZE + 1] != (TCPHA_MAC_MARK & 0xff):
            continue  # something the kernel itself sent out of the device
        memcpy(&slot, scratch + VNET_SIZE + 2, 4)
        h = &d.holders[slot] if slot < d.nholders else NULL
        if h == NULL or not _is_of(h, scratch + VNET_SIZE + ETH_SIZE,
                                   <uint32_t>n - VNET_SIZE - ETH_SIZE):
            tap_send(d.tap, scratch, <uint32_t>n, NULL, 0)  # decided meanwhile: look again
            continue
        h.count += 1
        p = <kept *>malloc(sizeof(kept) + <size_t>n)
        if p == NULL:
            continue  # the client sends it again
        p.next = NULL
        p.len = <uint32_t>n
        memcpy(p.data, scratch, <size_t>n)
        _mark_kept(p.data)
        if h.last != NULL:
            h.last.next = p
        else:
            h.first = p
        h.last = p
    return True


cdef inline void _mark_kept(uint8_t *frame) noexcept nogil:
    frame[VNET_SIZE] = TCPHA_MAC_KEPT >> 8
    frame[VNET_SIZE + 1] = TCPHA_MAC_KEPT & 0xff


cdef void _release(fe_ebpf *d, holder *h) noexcept nogil:
    """Send a slot's kept packets, whose entry says by now where to. d.lock is held."""
    cdef kept *p = h.first
    cdef kept *following
    h.first = h.last = NULL
    while p != NULL:
        following = p.next
        tap_send(d.tap, p.data, p.len, NULL, 0)
        free(p)
        p = following


cdef uint32_t _most(fe_ebpf *d, uint32_t backend, const snapshot *now) noexcept nogil:
    """Bytes of payload that a forged segment may have, beside timestamps: what the client's MSS
    allows, and the way to the back end has room for now."""
    cdef uint32_t mss = now.mss if now.mss > 100 else MSS_MIN
    cdef tcpha_backend b
    if bpf_map_lookup_elem(d.backends, &backend, &b) == 0 and b.mtu > MSS_MIN:
        mss = min(mss, b.mtu - HEADERS - <uint32_t>(IP_SIZE if b.mode == TCPHA_TUNNEL else 0))
    return mss - TIMESTAMPS


cdef void _send_late(fe_ebpf *d, uint32_t most, const snapshot *now, const uint8_t *extra,
                     uint32_t extra_len, bint extra_fin) noexcept nogil:
    cdef uint8_t head[FRAME_HEAD]
    cdef uint32_t at = 0, chunk, length
    cdef segment s
    segment_from(&s, now)
    s.ip_id = TCPHA_IPID_PLAIN
    while at < extra_len or extra_fin:
        chunk = min(extra_len - at, most)
        s.seq = now.rcv_nxt - (1 if now.flags & SNAP_FIN else 0) - extra_len + at
        s.len = chunk
        s.flags = TCP_ACK | TCP_PSH
        if extra_fin and at + chunk == extra_len:
            s.flags |= TCP_FIN
            extra_fin = False
        length = forge(head, &s)
        _mark_kept(head)
        tap_send(d.tap, head, length, extra + at, chunk)
        at += chunk


cdef int _stop_holding(fe_ebpf *d, uint32_t worker, const tcpha_flow *flow, holder *h,
                       uint32_t what) noexcept nogil:
    """Packets must not overtake each other: first what was kept goes where the entry says, then
    'what' ends the keeping, if no more has come meanwhile. d.lock is held. 0, or -1."""
    cdef tcpha_op *op = &d.ops[worker]
    cdef uint64_t begin = now_ns()
    cdef int rc
    while True:
        _drain(d)
        _release(d, h)
        # one that was counted and does not come was lost on its way
        op.held = h.count if now_ns() - begin < ARRIVAL_NS else TCPHA_FLOWING
        rc = _operate(d.tap, d.ops, worker, flow, what)
        if rc < 0 or op.result != TCPHA_R_BACKLOG:
            return rc


cdef int _forward(void *self, uint32_t worker, tcpha_entry *entry, const snapshot *now,
                  const uint8_t *extra, uint32_t extra_len, bint extra_fin) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    cdef holder *h = &d.holders[entry.slot]
    cdef int rc = -1
    op.id = entry.id
    op.backend = entry.backend
    op.rule = entry.rule
    op.flags = entry.flags
    op.end_seq = entry.end_seq
    pthread_mutex_lock(&d.lock)
    if _operate(d.tap, d.ops, worker, &now.flow, TCPHA_OP_HAND_OVER) == 0 and \
            op.result == TCPHA_R_OK:
        _send_late(d, _most(d, entry.backend, now), now, extra, extra_len, extra_fin)
        rc = _stop_holding(d, worker, &now.flow, h, TCPHA_OP_LET_FLOW)
        h.active = rc < 0
    pthread_mutex_unlock(&d.lock)
    return rc


cdef bint _answered(void *self, uint32_t slot, uint32_t snd_nxt) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef kept *p
    cdef tcp_view v
    cdef bint found = False
    pthread_mutex_lock(&d.lock)
    p = d.holders[slot].first
    while p != NULL and not found:
        found = tcp_parse_head(p.data + VNET_SIZE + ETH_SIZE, p.len - VNET_SIZE - ETH_SIZE,
                               p.len - VNET_SIZE - ETH_SIZE, &v) == 0 and \
            acks_beyond(&v, snd_nxt)
        p = p.next
    pthread_mutex_unlock(&d.lock)
    return found


cdef int _give_back(void *self, const tcpha_flow *flow, uint32_t slot) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef int rc
    pthread_mutex_lock(&d.lock)
    d.ops[TCPHA_LOCKED_OP].slot = slot
    rc = _stop_holding(d, TCPHA_LOCKED_OP, flow, &d.holders[slot], TCPHA_OP_GIVE_BACK)
    d.holders[slot].active = False
    pthread_mutex_unlock(&d.lock)
    if rc < 0:
        ledger_remove(&d.book, flow)
    return 0


cdef int _forget(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, bint linger,
                 tcpha_entry *entry) noexcept nogil:
    return ledger_forget(&(<fe_ebpf *>self).book, worker, flow, id, linger, entry)


cdef int _restore(void *self, uint32_t worker, const tcpha_flow *flow, const tcpha_entry *entry,
                  uint64_t asked, tcpha_entry *old) noexcept nogil:
    return ledger_restore(&(<fe_ebpf *>self).book, worker, flow, entry, asked, old)


cdef void _drop_strangers(void *self, bint drop) noexcept nogil:
    (<fe_ebpf *>self).state.drop_strangers = drop


cdef void _sweep(void *self, uint32_t worker, uint64_t now) noexcept nogil:
    ledger_sweep(&(<fe_ebpf *>self).book, worker, now)


cdef bint _on_packets(void *self) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef bint more
    pthread_mutex_lock(&d.lock)
    more = _drain(d)
    pthread_mutex_unlock(&d.lock)
    return more


# The packet path

cdef inline ssize_t _without_padding(const uint8_t *ip, ssize_t n) noexcept nogil:
    """The size of a packet in n bytes: a short Ethernet frame has some behind it. 0: it is cut off.
    A total length of 0 stands for what has no room in 16 bits (BIG TCP)."""
    cdef ssize_t total = get16(ip + 2) if n >= 20 else 0
    if total == 0:
        return n
    return total if total <= n else 0


cdef int _fast_next(void *self, uint32_t queue, uint8_t *frame, uint32_t *length,
                    tcp_view *v) noexcept nogil:
    """A request that was damaged on the way must not decide anything: it is as good as lost."""
    cdef fe_ebpf *d = <fe_ebpf *>self
    cdef uint8_t *ip
    cdef ssize_t n
    while True:
        n = read(d.fast_fd[queue], frame, SCRATCH)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return 0
        if n < VNET_SIZE + ETH_SIZE or frame[VNET_SIZE] != TCPHA_MAC_FAST >> 8 or \
                frame[VNET_SIZE + 1] != (TCPHA_MAC_FAST & 0xff):
            continue  # something the kernel itself sent out of the device
        length[0] = <uint32_t>n
        ip = frame + VNET_SIZE + ETH_SIZE
        n = _without_padding(ip, n - VNET_SIZE - ETH_SIZE)
        if tcp_parse_head(ip, <uint32_t>n, <uint32_t>n, v) == 0 and \
                (frame[VNET_SIZE + 2] != TCPHA_FAST_FIRST or frame[0] & CHECKED or is_sound(v)):
            return frame[VNET_SIZE + 2]


cdef void _fast_socket(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                       const tcpha_flow *flow) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    _fast_pass(self, queue, worker, frame, length, TCPHA_FAST_SOCKET)
    if d.offers[worker].result == 1:  # the socket is there; until now, what followed came here
        ledger_drop_pending(&d.book, worker, flow, 0)


cdef void _write_fast(fe_ebpf *d, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                      int kind) noexcept nogil:
    cdef uint16_t n = <uint16_t>worker
    frame[VNET_SIZE + 2] = <uint8_t>kind
    memcpy(frame + VNET_SIZE + 3, &n, 2)
    tap_send(d.fast_fd[queue], frame, length, NULL, 0)


cdef void _fast_pass(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                     int kind) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    pthread_rwlock_rdlock(&d.silent_lock)
    _write_fast(d, queue, worker, frame, length, kind)
    pthread_rwlock_unlock(&d.silent_lock)
    if kind == TCPHA_FAST_SEND and d.offers[worker].result == 1 and not d.offers[worker].alone:
        _passed(d, queue, worker, frame, length)


cdef void _passed(fe_ebpf *d, uint32_t queue, uint32_t worker, uint8_t *frame,
                  uint32_t length) noexcept nogil:
    """A packet is on its way. Later ones of its flow may be, too, if it was the last one here."""
    memset(frame, 0, VNET_SIZE)
    _write_fast(d, queue, worker, frame, min(length, <uint32_t>HEAD_MOST), TCPHA_FAST_PASSED)


cdef void _fast_later(void *self, uint32_t queue, uint32_t worker, uint8_t *frame,
                      uint32_t length) noexcept nogil:
    _fast_pass(self, queue, worker, frame, length, TCPHA_FAST_LATER)
    _passed(<fe_ebpf *>self, queue, worker, frame, length)


cdef bint _wake(fe_ebpf *d, uint32_t queue, uint32_t worker, const tcpha_flow *flow,
                uint64_t before) noexcept nogil:
    """A socket of ours for a client that has said nothing since its handshake at a time 'before'
    or earlier: its ACK is forged once more. False: it has one, or has said something, or there is
    no room for it at present."""
    cdef uint8_t frame[FRAME_HEAD]
    cdef tcpha_shaken shaken
    cdef tcpha_shaken *r = &shaken
    cdef segment g
    cdef bint over = False
    pthread_rwlock_wrlock(&d.silent_lock)
    if bpf_map_lookup_elem(d.shaken, flow, r) == 0 and r.since_ns <= before:
        memset(&g, 0, sizeof(g))
        g.flow = flow
        g.seq = r.isn + 1
        g.ack = r.ours + 1
        g.flags = TCP_ACK
        g.window = r.window
        g.timestamps = r.timestamps
        g.tsval = r.tsval
        g.tsecr = r.tsecr
        g.ip_id = <uint16_t>min(r.rtt_ms, <uint32_t>0xffff)
        d.offers[worker].result = 0
        _write_fast(d, queue, worker, frame, forge(frame, &g), TCPHA_FAST_SOCKET)
        over = d.offers[worker].result != 0
        if over:  # only now that there is a socket: until then it tells who may be early
            bpf_map_delete_elem(d.shaken, flow)
    pthread_rwlock_unlock(&d.silent_lock)
    return over


cdef void _fast_early(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                      const tcpha_flow *flow) noexcept nogil:
    cdef fe_ebpf *d = <fe_ebpf *>self
    _wake(d, queue, worker, flow, now_ns())
    _fast_pass(self, queue, worker, frame, length, TCPHA_FAST_EARLY)


cdef int _take_back(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                    uint32_t backend, tcpha_entry *entry) noexcept nogil:
    """The entry stays, so that what the client still sends is not mistaken for a stranger's. A
    request has one id, and the word of who had it before may come when another one has it."""
    cdef fe_ebpf *d = <fe_ebpf *>self
    return id and _find(d, flow, entry) == 0 and tcpha_live(entry) == id and \
        entry.backend == backend and _change(d, worker, flow, id, True, TCPHA_OP_TAKE_BACK)


cdef void _keep_verdict(void *self, uint64_t key, const tcpha_verdict *verdict) noexcept nogil:
    cdef tcpha_verdict v = verdict[0]
    v.key = key
    bpf_map_update_elem((<fe_ebpf *>self).verdicts, &key, &v, BPF_ANY)


cdef dict _counters(Object obj):
    """The per-CPU counters of an object, summed."""
    cdef uint32_t zero = 0
    cdef int i, cpus = possible_cpus()
    cdef tcpha_counters *c = <tcpha_counters *>malloc(cpus * sizeof(tcpha_counters))
    if c == NULL:
        raise MemoryError
    total = dict.fromkeys(("forwarded", "forwarded_bytes", "held", "live_syn", "unreachable",
                           "guarded", "foreign", "decapsulated", "cookies", "requests", "cached",
                           "forged", "adopted", "yielded", "again", "icmp",
                           "too_big", "not_ect", "wary"), 0)
    if bpf_map_lookup_elem(obj.map_fd("counters"), &zero, c) == 0:
        for i in range(cpus):
            total["forwarded"] += c[i].forwarded
            total["forwarded_bytes"] += c[i].forwarded_bytes
            total["held"] += c[i].held
            total["live_syn"] += c[i].live_syn
            total["unreachable"] += c[i].unreachable
            total["guarded"] += c[i].guarded
            total["foreign"] += c[i].foreign
            total["decapsulated"] += c[i].decapsulated
            total["cookies"] += c[i].cookies
            total["requests"] += c[i].requests
            total["cached"] += c[i].cached
            total["forged"] += c[i].forged
            total["adopted"] += c[i].adopted
            total["yielded"] += c[i].yielded
            total["again"] += c[i].again
            total["too_big"] += c[i].too_big
            total["not_ect"] += c[i].not_ect
            total["wary"] += c[i].wary
            total["icmp"] += c[i].icmp
    free(c)
    return total


cdef int _next_batch(int fd, table_place *place, tcpha_flow *keys, void *values) noexcept nogil:
    """How many elements of a map whose keys are flows came into keys and values, TABLE_PIECE at
    most; 0: there are no more; or -errno."""
    cdef uint32_t count = 0
    cdef int rc = 0
    while count == 0 and rc == 0 and not place.ended:
        count = TABLE_PIECE
        rc = bpf_map_lookup_batch(fd, &place.at if place.begun else NULL, &place.at, keys, values,
                                  &count, NULL)
        place.begun = True
        place.ended = rc < 0
    return rc if rc < 0 and rc != -ENOENT else <int>count  # ENOENT: the last batch


cdef int _next_entries(void *self, table_place *place, tcpha_flow *keys,
                       tcpha_entry *entries) noexcept nogil:
    return _next_batch((<fe_ebpf *>self).flows, place, keys, entries)


cdef uint32_t _drop_pending(void *self, uint32_t worker, const tcpha_flow *flow,
                            uint64_t idle) noexcept nogil:
    return ledger_drop_pending(&(<fe_ebpf *>self).book, worker, flow, idle)


cdef class Batches:
    """The elements of a map whose keys are flows, piece by piece. size: of a value."""

    cdef int fd
    cdef tcpha_flow *keys
    cdef void *values
    cdef table_place place

    def __cinit__(self, int fd, size_t size):
        self.fd = fd
        self.keys = <tcpha_flow *>malloc(TABLE_PIECE * sizeof(tcpha_flow))
        self.values = malloc(TABLE_PIECE * size)
        if self.keys == NULL or self.values == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.keys)
        free(self.values)

    cdef int more(self) except -1:
        """How many came into keys and values; 0: that was all. Raises OSError."""
        cdef int count
        with nogil:
            count = _next_batch(self.fd, &self.place, self.keys, self.values)
        if count < 0:
            raise OSError(-count, "cannot read the flow table")
        return count


cdef dict _fitting(dict left, dict sizes):
    """Of the maps that an earlier run left, {name: descriptor} of those in sizes ({name: (size of a
    key, of a value)}); {} if one is missing or different, or there was no such run."""
    out = {}
    for name, (key, value) in sizes.items() if left else ():
        fd, *found = left.get(name, (-1, 0, 0))
        if found != [key, value]:
            return {}
        out[name] = fd
    return out


cdef class FeEbpf(FeDatapath):
    """The front end's half. tap: (descriptor, ifindex) of its TAP device; fast: None, or
    (descriptors, ifindex, MSS, window scale, options as in struct tcpha_fe_conf) of the packet
    path; instance: see Object; left: the maps of a run that was killed, as maps_of() says."""

    cdef fe_ebpf *d
    cdef readonly Object obj
    cdef readonly bint taken_over  # the connections of that run go on
    cdef readonly bint fresh       # not all of them are known, if there are any
    cdef tcpha_guesses *guesses    # NULL: no packet path

    def __cinit__(self, str path, tap, str vaddr, int port, int slots, int maxflows, bint tunnel,
                  uint32_t instance, fast=None, dict left=None):
        cdef tcpha_fe_conf conf
        cdef int i
        self.d = <fe_ebpf *>calloc(1, sizeof(fe_ebpf))
        if self.d == NULL:
            raise MemoryError
        self.d.holders = <holder *>calloc(slots, sizeof(holder))
        self.d.room = <uint8_t *>malloc(SCRATCH)
        if self.d.holders == NULL or self.d.room == NULL:
            raise MemoryError
        self.d.nholders = slots
        pthread_mutex_init(&self.d.lock, NULL)
        rwlock_init(&self.d.silent_lock)
        ledger_open(&self.d.book, maxflows)
        self.d.book.store.self = self.d
        self.d.book.store.find = _find
        self.d.book.store.put = _put
        self.d.book.store.remove = _remove
        self.d.book.store.end = _end
        self.d.book.store.drop = _drop
        memset(&conf, 0, sizeof(conf))
        address_bytes(vaddr, conf.vaddr)
        conf.vport = htons(port)
        conf.tap = tap[1]
        if fast is not None:
            conf.fast_tap, conf.headers, conf.wscale, conf.options = fast[1:]
            conf.window = WINDOW
        sizes = {"flows": maxflows}
        if fast is None:
            sizes["verdicts"] = sizes["rule_hits"] = 1
        reuse = self._reusable(left, &conf)
        self.taken_over = bool(reuse)
        self.obj = Object(path, (<char *>&conf)[:sizeof(conf)],
                          {k: v for k, v in sizes.items() if k not in reuse}, reuse, instance)
        self.table.state = <tcpha_state *>self.obj.map_memory("state", sizeof(tcpha_state))
        memcpy(self.table.state.vaddr, conf.vaddr, 16)
        self.table.state.vport = conf.vport
        self.table.state.version = TCPHA_STATE_VERSION
        self.fresh = not self.taken_over or self.table.state.drop_strangers
        self.table.state.drop_strangers = self.fresh
        self.d.tap = self.table.event_fd = tap[0]
        self.d.tunnel = tunnel
        self.d.flows = self.obj.map_fd("flows")
        self.d.backends = self.obj.map_fd("backends")
        self.d.ops = <tcpha_op *>self.obj.map_memory("ops", TCPHA_MAX_OPS * sizeof(tcpha_op))
        self.table.self = self.d
        self.table.divert = _divert
        self.table.freeze = _freeze
        self.table.forward = _forward
        self.table.answered = _answered
        self.table.give_back = _give_back
        self.table.forget = _forget
        self.table.restore = _restore
        self.table.drop_strangers = _drop_strangers
        self.d.state = self.table.state
        self.table.sweep = _sweep
        self.table.on_packets = _on_packets
        self.table.next_entries = _next_entries
        self.table.drop_pending = _drop_pending
        if fast is not None:
            for i, fd in enumerate(fast[0]):
                self.d.fast_fd[i] = self.table.fast_fd[i] = fd
            self.table.nfast = <uint32_t>len(fast[0])
            self.table.keys = &self.table.state.keys
            self.table.keys.wscale = conf.wscale
            self.table.keys.used = 0
            self.table.offers = <tcpha_offer *>self.obj.map_memory(
                "offers", TCPHA_MAX_OPS * sizeof(tcpha_offer))
            self.table.fast_next = _fast_next
            self.table.fast_pass = _fast_pass
            self.table.fast_later = _fast_later
            self.table.take_back = _take_back
            self.table.fast_socket = _fast_socket
            self.d.offers = self.table.offers
            self.d.verdicts = self.obj.map_fd("verdicts")
            self.d.shaken = self.obj.map_fd("shaken")
            self.table.fast_early = _fast_early
            self.table.cache = <tcpha_cache *>self.obj.map_memory("cache", sizeof(tcpha_cache))
            key = os.urandom(16)
            memcpy(self.table.cache.key, <const char *>(<bytes>key), 16)
            self.table.loads = <tcpha_load *>self.obj.map_memory(
                "loads", TCPHA_MAX_BACKENDS * sizeof(tcpha_load))
            self.table.rule_hits = <uint64_t *>self.obj.map_memory(
                "rule_hits", TCPHA_MAX_RULES * sizeof(uint64_t))
            self.table.keep_verdict = _keep_verdict
            self.guesses = <tcpha_guesses *>self.obj.map_memory("guesses", sizeof(tcpha_guesses))

    cdef dict _reusable(self, dict left, tcpha_fe_conf *conf):
        cdef tcpha_state state
        cdef uint32_t zero = 0
        maps = _fitting(left, {
            "state": (4, sizeof(tcpha_state)), "flows": (sizeof(tcpha_flow), sizeof(tcpha_entry)),
            "backends": (4, sizeof(tcpha_backend))})
        if "shaken" in (left or {}):  # that run had the packet path
            maps = maps and maps | _fitting(left, {
                "shaken": (sizeof(tcpha_flow), sizeof(tcpha_shaken))})
        if not maps or bpf_map_lookup_elem(maps["state"], &zero, &state) < 0 or \
                state.version != TCPHA_STATE_VERSION or state.vport != conf.vport or \
                memcmp(state.vaddr, conf.vaddr, 16) != 0:
            return {}
        return maps

    def take_over(self):
        """Go through the entries of an earlier run. Connections that were in its hands are lost;
        the Local Node's sockets find their packets by themselves. Returns ({back end: how many
        live}, {back end: its address})."""
        cdef Batches b = Batches(self.d.flows, sizeof(tcpha_entry))
        cdef tcpha_entry *e
        cdef tcpha_backend way
        cdef uint32_t index
        cdef int i, count
        live = {}
        while (count := b.more()) > 0:
            for i in range(count):
                e = <tcpha_entry *>b.values + i
                if not tcpha_is_forwarded(tcpha_state_of(e)) or e.backend == TCPHA_LOCAL_NODE:
                    ledger_remove(&self.d.book, &b.keys[i])
                elif tcpha_live(e):
                    live[e.backend] = live.get(e.backend, 0) + 1
                else:
                    ledger_linger(&self.d.book, &b.keys[i], e.id, now_ns())
        known = {}
        for index in range(TCPHA_LOCAL_NODE):
            if bpf_map_lookup_elem(self.obj.map_fd("backends"), &index, &way) == 0 and way.mode:
                known[index] = address_text(way.addr)
        return live, known

    def __dealloc__(self):
        if self.d != NULL:
            free(self.d.holders)
            free(self.d.room)
            pthread_rwlock_destroy(&self.d.silent_lock)
            ledger_close(&self.d.book)
            free(self.d)

    def set_backend(self, uint32_t index, path):
        """Say how to reach a back end: None, or (ifindex, tunnel, next hop, address, source,
        MTU)."""
        cdef tcpha_backend b, old
        memset(&b, 0, sizeof(b))
        if path is not None:
            b.ifindex = path[0]
            b.mode = TCPHA_TUNNEL if path[1] else TCPHA_DIRECT
            address_bytes(path[2], b.nexthop)
            address_bytes(path[3], b.addr)
            address_bytes(path[4], b.src)
            b.mtu = path[5]
            if bpf_map_lookup_elem(self.obj.map_fd("backends"), &index, &old) == 0 and \
                    memcmp(old.addr, b.addr, sizeof(b.addr)) == 0:
                b.down = old.down
        bpf_map_update_elem(self.obj.map_fd("backends"), &index, &b, BPF_ANY)

    def set_down(self, uint32_t index, bint down):
        """Say whether requests that a back end has not answered may go to another one."""
        cdef tcpha_backend b
        if bpf_map_lookup_elem(self.obj.map_fd("backends"), &index, &b) == 0 and b.down != down:
            b.down = down
            bpf_map_update_elem(self.obj.map_fd("backends"), &index, &b, BPF_ANY)

    def set_route(self, place, mss):
        """Say which MSS clients are told whose route is at a place (interface, length of the
        prefix, address), or with None that there is no such place any more. Raises OSError."""
        cdef tcpha_route key
        cdef uint32_t value = mss or 0
        cdef bytes raw
        cdef int rc
        index, length, address = place
        raw = address.to_bytes(4, "big")
        memset(&key, 0, sizeof(key))
        key.prefixlen = 8 * (sizeof(key.ifindex) + 12) + length
        key.ifindex = index
        memset(&key.addr[10], 0xff, 2)
        memcpy(&key.addr[12], <const char *>raw, 4)
        if mss is None:
            rc = bpf_map_delete_elem(self.obj.map_fd("routes"), &key)
        else:
            rc = bpf_map_update_elem(self.obj.map_fd("routes"), &key, &value, BPF_ANY)
        if rc < 0:
            raise OSError(-rc, f"a route's MSS: {os.strerror(-rc)}")

    def set_local(self):
        """Flows of the Local Node are left to our own stack from now on."""
        cdef tcpha_backend b
        cdef uint32_t index = TCPHA_LOCAL_NODE
        memset(&b, 0, sizeof(b))
        b.mode = TCPHA_LOCAL
        bpf_map_update_elem(self.obj.map_fd("backends"), &index, &b, BPF_ANY)

    def counters(self):
        return _counters(self.obj)

    def wary(self):
        """Whether cookies of clients without timestamps mean nothing: see struct tcpha_guesses."""
        return self.guesses != NULL and now_ns() < load64(&self.guesses.until_ns)

    def take_silent(self, double seconds):
        """Make sockets of connections whose client has said nothing for so long since the
        handshake: they are accepted like any other. Returns how many."""
        cdef Batches b = Batches(self.d.shaken, sizeof(tcpha_shaken))
        cdef uint64_t before = now_ns() - <uint64_t>(seconds * 1e9)
        cdef int i, count, taken = 0
        while (count := b.more()) > 0:
            with nogil:
                for i in range(count):
                    if (<tcpha_shaken *>b.values + i).since_ns <= before:
                        taken += _wake(self.d, 0, TCPHA_MAX_OPS - 1, &b.keys[i], before)
        return taken


cdef struct be_ebpf:
    int tap
    tcpha_gate *gate
    int forged             # the program that runs where the listener is bound to a device
    tcpha_op *ops
    uint8_t vaddr[16]
    uint8_t listen_addr[16]
    uint16_t listen_port   # network byte order
    uint64_t killed        # older sockets on the same 4-tuple
    int adoptions          # map
    diag *sockets          # of the Local Node, where the front end's socket has the same 4-tuple
    uint64_t *consumed     # the events' ring buffer: where we are, and where the program is
    uint64_t *produced
    uint8_t *ring


cdef int _look(be_ebpf *d, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    """Look a flow's socket up; at the listener's device, if it is bound to one: what is made on the
    TAP device does not find it. The answer is in ops[worker]."""
    cdef uint8_t frame[ETH_SIZE + 46]
    cdef uint16_t kind = htons(TCPHA_ETH_OP)
    cdef uint32_t device = load32(&d.gate.device)
    cdef tcpha_op *op = &d.ops[worker]
    cdef bpf_test_run_opts run
    cdef __sk_buff skb
    if device == 0:
        return _query(d.tap, d.ops, worker, flow)
    memset(frame, 0, sizeof(frame))
    memcpy(frame + 12, &kind, 2)
    memcpy(frame + ETH_SIZE, &worker, 4)
    memset(&skb, 0, sizeof(skb))
    skb.ifindex = device
    skb.mark = TCPHA_MARK_FORGED
    memset(&run, 0, sizeof(run))
    run.sz = sizeof(run)
    run.data_in = frame
    run.data_size_in = sizeof(frame)
    run.ctx_in = &skb
    run.ctx_size_in = sizeof(skb)
    op.flow = flow[0]
    op.kind = TCPHA_OP_QUERY
    op.result = TCPHA_R_NONE
    return 0 if bpf_prog_test_run_opts(d.forged, &run) == 0 and op.result != TCPHA_R_NONE else -1


cdef bint _await(be_ebpf *d, tcpha_op *op) noexcept nogil:
    """Whether the program has seen the packet that op is about. A packet that passes on to the
    listener's device may do so when write() has returned."""
    cdef uint64_t begin = now_ns()
    while not load32(&op.done):
        if (load32(&d.gate.device) == 0 or now_ns() - begin > DETOUR_NS) and \
                xchg32(&op.kind, 0) == TCPHA_OP_ADOPT:
            return False   # nobody has it, and nobody will: it would be adopted behind our back
        usleep(100)
    return True


cdef int _verify(be_ebpf *d, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    """Whether what the program has adopted became a socket, in ops[worker]: the kernel is silent if
    the accept queue was full. Behind a detour, it may take a moment. 0 or a refusal."""
    cdef uint64_t begin = now_ns()
    while True:
        if _look(d, worker, flow) < 0:
            return REFUSE_ERROR
        if d.ops[worker].result != TCPHA_R_NO_SOCKET:
            return 0
        if load32(&d.gate.device) == 0 or now_ns() - begin > DETOUR_NS:
            return REFUSE_BACKLOG
        usleep(100)


cdef int _attach(be_ebpf *d, uint32_t worker, const snapshot *s, const uint8_t *data, segment *g,
                 uint32_t tick) noexcept nogil:
    """Make the first segment a socket. 0 or a refusal; the socket is looked up in ops[worker]."""
    cdef tcpha_op *op = &d.ops[worker]
    cdef uint8_t head[FRAME_HEAD]
    cdef int _tries
    for _tries in range(4):
        op.kind = TCPHA_OP_ADOPT
        op.flow = s.flow
        memcpy(op.listen_addr, d.listen_addr, 16)
        op.listen_port = d.listen_port
        op.mss = s.mss
        op.snd_wscale = s.snd_wscale
        op.rcv_wscale = s.rcv_wscale
        op.wscale_ok = (s.flags & SNAP_WSCALE) != 0
        op.sack_ok = (s.flags & SNAP_SACK) != 0
        op.tstamp_ok = (s.flags & SNAP_TIMESTAMP) != 0
        op.usec_ts_ok = (s.flags & SNAP_USEC_TS) != 0
        op.ecn_ok = (s.flags & SNAP_ECN) != 0
        op.tsval = tick
        op.ts_recent = s.ts_recent
        op.result = TCPHA_R_NONE
        op.done = 0
        op.error = 0
        g.ip_id = <uint16_t>worker
        g.seq = s.rcv_nxt - (1 if s.flags & SNAP_FIN else 0) - s.len
        g.flags = TCP_ACK | TCP_PSH
        g.len = min(s.len, <uint32_t>CHUNK)
        if tap_send(d.tap, head, forge(head, g), data, g.len) != 0 or not _await(d, op):
            return REFUSE_ERROR
        if op.result != TCPHA_R_TIME_WAIT and op.result != TCPHA_R_LIVE:
            break
        if d.sockets == NULL and op.result == TCPHA_R_LIVE and op.rcv_nxt - g.seq < NEAR and \
                op.snd_nxt - s.snd_nxt < NEAR:
            return 0       # this very connection: a run of ours that was killed has adopted it
        # A socket of an earlier connection owns the 4-tuple; the client has given that one up, or
        # the front end could not have accepted this one. Or it is the front end's, if we are the
        # Local Node. A RST with exactly the sequence number that it expects ends it without a
        # packet leaving the host (RFC 5961 section 3.2).
        add64(&d.killed, 1)
        g.ip_id = TCPHA_IPID_PLAIN
        g.seq = op.rcv_nxt
        g.flags = TCP_RST
        g.len = 0
        g.timestamps = False
        tap_send(d.tap, head, forge(head, g), NULL, 0)
        g.timestamps = (s.flags & SNAP_TIMESTAMP) != 0
    if op.result == TCPHA_R_NO_LISTENER:
        return REFUSE_LISTENER
    if op.result == TCPHA_R_ASSIGN:
        return REFUSE_UNSUPPORTED
    if op.result != TCPHA_R_OK:
        return REFUSE_ERROR
    return _verify(d, worker, &s.flow)


cdef int _adopt(void *self, uint32_t worker, const snapshot *s,
                const uint8_t *data) noexcept nogil:
    """Forge the client's ACK and request. The first segment becomes the socket, the rest is
    received by it like any other."""
    cdef be_ebpf *d = <be_ebpf *>self
    cdef uint32_t tick, rtt
    cdef segment g
    cdef int rc
    cdef uint64_t begin = now_ns()
    if s.mss < MSS_MIN:
        return REFUSE_UNSUPPORTED
    if d.sockets != NULL:  # while the front end could still go on with its socket
        rc = diag_refusal(d.sockets, d.listen_addr, d.listen_port)
        if rc != 0:
            return rc
    segment_from(&g, s)
    # Our clock goes on one tick after the snapshot: the front end may have sent at that very tick.
    # The echo lies one RTT before, since the kernel takes its first RTT sample from the difference.
    tick = s.tsval + (1000 if s.flags & SNAP_USEC_TS else 1)
    rtt = s.srtt_us if s.flags & SNAP_USEC_TS else s.srtt_us // 1000
    g.tsecr = tick - max(rtt, <uint32_t>1)
    rc = _attach(d, worker, s, data, &g, tick)
    # somebody else's connection took the last place in the accept queue since we looked
    while d.sockets != NULL and (rc == REFUSE_BACKLOG or rc == REFUSE_LISTENER) and \
            now_ns() - begin < PATIENCE_NS:
        usleep(1000)
        rc = _attach(d, worker, s, data, &g, tick)
    return rc if rc != 0 else _feed_from(d, worker, s, data, &g)


cdef int _feed_from(be_ebpf *d, uint32_t worker, const snapshot *s, const uint8_t *data,
                    segment *g) noexcept nogil:
    """Inject what the socket has not received, by the look-up in ops[worker]. The front end has
    acknowledged these bytes: the client will never send them again."""
    cdef tcpha_op *op = &d.ops[worker]
    cdef uint8_t head[FRAME_HEAD]
    cdef uint32_t fin = 1 if s.flags & SNAP_FIN else 0
    cdef uint32_t start = s.rcv_nxt - fin - s.len, have
    while op.result == TCPHA_R_LIVE:
        have = op.rcv_nxt - start
        if have >= s.len + fin:
            return 0
        g.ip_id = TCPHA_IPID_PLAIN
        g.seq = op.rcv_nxt
        g.len = min(s.len - have, <uint32_t>CHUNK)
        g.flags = TCP_ACK | TCP_PSH
        if have + g.len == s.len and fin:
            g.flags |= TCP_FIN
        if tap_send(d.tap, head, forge(head, g), data + have, g.len) != 0 or \
                _look(d, worker, &s.flow) < 0 or op.rcv_nxt - start == have:
            return DP_MORE
    return 0


cdef int _feed(void *self, uint32_t worker, const snapshot *s, const uint8_t *data) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    cdef segment g
    if _look(d, worker, &s.flow) < 0:
        return DP_MORE
    segment_from(&g, s)
    return _feed_from(d, worker, s, data, &g)


cdef int _alive(void *self, uint32_t worker, const tcpha_flow *flow) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    cdef tcpha_op *op = &d.ops[worker]
    if _look(d, worker, flow) < 0:
        return DP_ALIVE
    if op.result == TCPHA_R_LIVE:
        return DP_ALIVE if op.state == TCP_ESTABLISHED or op.state == TCP_CLOSE_WAIT else DP_CLOSING
    return DP_TIME_WAIT if op.result == TCPHA_R_TIME_WAIT else 0


cdef bint _admit(void *self, uint8_t *scratch, bint refuse) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    cdef ssize_t n
    cdef int _i
    for _i in range(ADMIT):
        n = read(d.tap, scratch, SCRATCH)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return False
        if n >= VNET_SIZE + ETH_SIZE and scratch[VNET_SIZE] == TCPHA_MAC_ROOM >> 8 and \
                scratch[VNET_SIZE + 1] == (TCPHA_MAC_ROOM & 0xff):
            scratch[VNET_SIZE + 2] = refuse
            tap_send(d.tap, scratch, <uint32_t>n, NULL, 0)
    return True


cdef void _give_up(void *self, const tcpha_flow *flow, uint32_t isn) noexcept nogil:
    cdef tcpha_adoption a
    a.at_ns = now_ns()
    a.isn = isn
    a.state = TCPHA_GIVEN_UP
    bpf_map_update_elem((<be_ebpf *>self).adoptions, flow, &a, BPF_ANY)


cdef bint _position(void *self, uint32_t worker, const tcpha_flow *flow,
                    uint32_t *rcv_nxt) noexcept nogil:
    cdef be_ebpf *d = <be_ebpf *>self
    if _look(d, worker, flow) < 0 or d.ops[worker].result != TCPHA_R_LIVE:
        return False
    rcv_nxt[0] = d.ops[worker].rcv_nxt
    return True


cdef bint _next_event(void *self, tcpha_event *event) noexcept nogil:
    """Take one record off the ring buffer (kernel: kernel/bpf/ringbuf.c)."""
    cdef be_ebpf *d = <be_ebpf *>self
    cdef uint64_t at = d.consumed[0]
    cdef uint32_t head
    while at < load64(d.produced):
        head = load32(<uint32_t *>(d.ring + (at & (RING - 1))))
        if head & RING_BUSY:
            return False
        if not head & RING_DISCARD:
            memcpy(event, d.ring + (at & (RING - 1)) + RING_HEAD, sizeof(tcpha_event))
        at += ((head & ~(RING_BUSY | RING_DISCARD)) + RING_HEAD + 7) & ~<uint64_t>7
        store64(d.consumed, at)
        if not head & RING_DISCARD:
            return True
    return False


cdef bint _outside(void *self, tcpha_flow *flow) noexcept nogil:
    return memcmp(flow.vaddr, (<be_ebpf *>self).vaddr, 16) == 0


cdef void _ended(void *self, const tcpha_flow *flow) noexcept nogil:
    pass


cdef void _nothing(void *self, uint64_t now) noexcept nogil:
    pass


cdef class BeEbpf(BeDatapath):
    """The back end's half. instance, and left, for those who tunnel to us: as for FeEbpf; sockets:
    given on the front end, for its Local Node; fast: with the packet path."""

    cdef be_ebpf *d
    cdef readonly Object obj
    cdef SockDiag sockets

    def __cinit__(self, str path, tap, str vaddr, str raddr, str listen_addr, int listen_port,
                  uint32_t instance, SockDiag sockets=None, bint fast=False, dict left=None):
        cdef tcpha_be_conf conf
        self.d = <be_ebpf *>calloc(1, sizeof(be_ebpf))
        if self.d == NULL:
            raise MemoryError
        memset(&conf, 0, sizeof(conf))
        address_bytes(vaddr, conf.vaddr)
        address_bytes(raddr, conf.raddr)
        conf.tap = tap[1]
        conf.fast = fast
        self.obj = Object(path, (<char *>&conf)[:sizeof(conf)], None,
                          _fitting(left, {"frontends": (16, 4)}), instance)
        self.d.tap = tap[0]
        self.d.forged = self.obj.program_fd("be_forged")
        self.d.gate = <tcpha_gate *>self.obj.map_memory("gate", sizeof(tcpha_gate))
        self.d.ops = <tcpha_op *>self.obj.map_memory("ops", TCPHA_MAX_OPS * sizeof(tcpha_op))
        self.sockets = sockets
        if sockets is not None:
            self.d.sockets = &sockets.d
        address_bytes(vaddr, self.d.vaddr)
        address_bytes(listen_addr, self.d.listen_addr)
        self.d.listen_port = self.table.listen_port = htons(listen_port)
        self.table.self = self.d
        self.table.adopt = _adopt
        self.table.alive = _alive
        self.table.feed = _feed
        self.table.position = _position
        self.table.outside = _outside
        self.table.ended = _ended
        self.table.sweep = _nothing
        self.table.event_fd = -1
        if fast:
            self.table.event_fd = self.obj.map_fd("events")
            self.d.consumed = <uint64_t *>self.obj.ring_memory("events", 0, True, 4096)
            self.d.produced = <uint64_t *>self.obj.ring_memory("events", 4096, False,
                                                               4096 + 2 * RING)
            self.d.ring = <uint8_t *>self.d.produced + 4096
            self.table.next_event = _next_event
            self.table.give_up = _give_up
            self.table.tap_fd = tap[0]
            self.table.admit = _admit
            self.d.adoptions = self.obj.map_fd("adoptions")
            self.table.keys = <tcpha_keys *>self.obj.map_memory(
                "keys", TCPHA_MAX_FAST * sizeof(tcpha_keys))
            self.table.gate = self.d.gate
            memcpy(self.table.gate.listen_addr, self.d.listen_addr, 16)
            self.table.gate.listen_port = self.d.listen_port

    def __dealloc__(self):
        free(self.d)

    def follow(self, uint32_t device):
        """The listener is bound to a device. The way over it, where be_forged must run, is kept
        when one comes that is bound to none: its sockets are found there, too."""
        store32(&self.d.gate.device, device)
        if self.sockets is not None:
            self.sockets.look_from(device)

    def allow(self, str address, bint allowed):
        """Accept tunnelled packets from a front end, or no longer."""
        cdef uint8_t key[16]
        cdef uint32_t one = 1
        address_bytes(address, key)
        if allowed:
            bpf_map_update_elem(self.obj.map_fd("frontends"), key, &one, BPF_ANY)
        else:
            bpf_map_delete_elem(self.obj.map_fd("frontends"), key)

    def allowed(self):
        """Front ends whose tunnelled packets are accepted; also those of an earlier run."""
        cdef uint8_t keys[FRONTENDS * 16]
        cdef uint32_t values[FRONTENDS]
        cdef uint32_t cursor, i, count = FRONTENDS
        cdef int rc = bpf_map_lookup_batch(self.obj.map_fd("frontends"), NULL, &cursor, keys,
                                           values, &count, NULL)
        if rc < 0 and rc != -ENOENT:  # ENOENT: that was all
            raise OSError(-rc, "cannot read the table of front ends")
        return [address_text(keys + 16 * i) for i in range(count)]

    def counters(self):
        out = _counters(self.obj)
        out["killed"] = self.d.killed
        return out
