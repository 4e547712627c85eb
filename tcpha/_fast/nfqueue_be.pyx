# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'nfqueue', the back end's half: a connection goes on in a socket that was opened by a
forged handshake, and each packet is rewritten between the client's numbers and the socket's.

The client's sequence numbers stay as they are. Ours differ: what the client has acknowledged of the
front end's SYN-ACK is not what the local server's SYN-ACK said, nor are timestamp clock and window
scale the same.
"""
import socket

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memmove, memset

from tcpha._fast.datapath cimport (
    DP_ALIVE, DP_CLOSING, DP_MORE, DP_TIME_WAIT, BeDatapath)
from tcpha._fast.defs cimport TCPHA_MARK_FRAGMENT, tcpha_counters, tcpha_flow
from tcpha._fast.diag cimport (
    TCP_CLOSE_WAIT, TCP_ESTABLISHED, TCP_NEW_SYN_RECV, TCP_SYN_RECV, TCP_TIME_WAIT, SockDiag,
    diag_answer, diag_destroy, diag_query, diag_refusal)
from tcpha._fast.message cimport (
    REFUSE_BACKLOG, REFUSE_ERROR, REFUSE_FULL, REFUSE_LISTENER, REFUSE_UNSUPPORTED)
from tcpha._fast.nfqueue cimport (
    HOOK_PREROUTING, SKB_CSUM_NOT_READY, SKB_GSO, V_ACCEPT, V_CHANGED, V_DROP, V_NUMBERS, V_WHOLE,
    Queue, packet, queue)
from tcpha._fast.packet cimport (
    ETH_SIZE, FRAME_HEAD, IP_SIZE, TCP_ACK, TCP_CWR, TCP_ECE, TCP_FIN, TCP_PSH, TCP_RST, TCP_SIZE,
    TCP_SYN, VNET_SIZE, address_bytes, forge, ip_checksum, segment, segment_from)
from tcpha._fast.rewrite cimport (
    SUM_FULL, SUM_LEAVE, SUM_UPDATE, checksum_full, combine_ecn, get16, get32, icmp_parse,
    icmp_translate, icmp_view, tcp_parse, tcp_parse_head, tcp_view, translate, translation)
from tcpha._fast.snapshot cimport (
    SNAP_ECN, SNAP_FIN, SNAP_SACK, SNAP_TIMESTAMP, SNAP_USEC_TS, SNAP_WSCALE, snapshot)
from tcpha._fast.sys cimport (
    AF_INET, EINTR, add64, cond_wait_ms, errno, htonl, htons, load32, load64, now_ns,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, pthread_rwlock_destroy,
    pthread_rwlock_rdlock, pthread_rwlock_unlock, pthread_rwlock_wrlock, read_counters,
    rwlock_init, sendto, sockaddr, sockaddr_in, store32)
from tcpha._fast.table cimport (
    flow_cell, table_add, table_cell, table_close, table_find, table_open, table_remove)

cdef enum:
    CHUNK = 60000          # payload of a forged segment; one skb, so that overhead is small
    HEADERS = 60           # of a forged segment, and some room
    LEAP = 1 << 24         # how far 'high' may be behind, if the queue was full
    SWEEP = 512            # entries looked at by one call of sweep()
    LAYOUT = 2             # version of struct be_flow

cdef uint64_t HANDSHAKE_NS = 1000000000  # for the local server's SYN-ACK
cdef uint64_t SILENT_NS = 100000000      # after this, a SYN that left no trace is looked into
cdef uint64_t SETTLE_NS = 20000000       # for the stack to handle what we injected
cdef uint64_t RETAIN_NS = 65000000000    # beyond TIME_WAIT (60 s)


cdef enum be_state:
    B_SYN = 1              # SYN injected, the server's answer is awaited
    B_SYNACK = 2
    B_REFUSED = 3          # it was a RST: nothing listens
    B_LIVE = 4
    B_DIRECT = 5           # it is over, and the client talks to the local server directly now


# What the table knows of an adopted connection. Its key is the flow of the local socket.
cdef struct be_flow:
    uint32_t state
    tcpha_flow outside     # as the client sees it
    uint32_t asked         # what the SYN-ACK acknowledges
    uint32_t isn           # of the local server
    uint32_t tsval         # of its SYN-ACK
    int wscale             # of its SYN-ACK; -1: none
    bint ts_ok
    bint ecn_ok
    bint after_direct      # the name was a direct connection's, whose last packets may still come
    translation inward
    translation outward
    uint64_t ended_ns      # 0: alive
    uint32_t high          # behind the highest sequence number that the local socket has used
    uint64_t volume        # how far that has come, the SYN included; 0: it never lived
    uint64_t sent          # packets from the local socket


cdef void _local(const be_nfqueue *d, const tcpha_flow *outside, tcpha_flow *local) noexcept nogil:
    local[0] = outside[0]
    memcpy(local.vaddr, d.listen_addr, 16)
    local.vport = d.listen_port


cdef void _key(const be_nfqueue *d, const uint8_t *client, const uint8_t *port,
               tcpha_flow *local) noexcept nogil:
    """The key of a client's flow, by its address and port as they stand in a packet."""
    memset(local, 0, sizeof(tcpha_flow))
    local.caddr[10] = local.caddr[11] = 0xff
    memcpy(local.caddr + 12, client, 4)
    memcpy(&local.cport, port, 2)
    memcpy(local.vaddr, d.listen_addr, 16)
    local.vport = d.listen_port


cdef inline uint32_t _start(const snapshot *s) noexcept nogil:
    """The sequence number of the request's first byte."""
    return s.rcv_nxt - (1 if s.flags & SNAP_FIN else 0) - s.len


# Packets

cdef be_flow *_flow_to(be_nfqueue *d, const tcp_view *v) noexcept nogil:
    """The flow of a packet from the client, or NULL: it may not pass."""
    cdef tcpha_flow local
    cdef be_flow *f
    cdef diag_answer a
    _key(d, v.ip + 12, v.tcp, &local)
    f = <be_flow *>table_find(&d.flows, &local)
    if f != NULL and f.state == B_DIRECT and v.flags & TCP_FIN and \
            memcmp(&f.outside.vport, v.tcp + 2, 2) == 0:
        _acknowledge(d, v)
    if f == NULL or f.state != B_LIVE or memcmp(&f.outside.vport, v.tcp + 2, 2) != 0 or \
            (v.flags & TCP_SYN and (f.ended_ns or diag_query(d.sockets, &local, &a) < 0
                                    or not a.full)):
        # a SYN is for the socket that it challenges; without one it would meet the listener
        add64(<uint64_t *>&d.n.guarded, 1)
        return NULL
    return f


cdef void _acknowledge(be_nfqueue *d, const tcp_view *v) noexcept nogil:
    """A FIN that comes once more, in the name of the TIME_WAIT socket that had to go: its client
    could not use the port again before it is answered."""
    cdef uint8_t buf[IP_SIZE + TCP_SIZE]
    cdef uint32_t ack = htonl(get32(v.tcp + 4) + v.data_len + 1)
    cdef uint16_t length = htons(sizeof(buf))
    memset(buf, 0, sizeof(buf))
    buf[0] = 0x45
    memcpy(buf + 2, &length, 2)
    buf[6] = 0x40          # DF
    buf[8] = 64
    buf[9] = 6
    memcpy(buf + 12, v.ip + 16, 4)
    memcpy(buf + 16, v.ip + 12, 4)
    memcpy(buf + IP_SIZE, v.tcp + 2, 2)
    memcpy(buf + IP_SIZE + 2, v.tcp, 2)
    memcpy(buf + IP_SIZE + 4, v.tcp + 8, 4)
    memcpy(buf + IP_SIZE + 8, &ack, 4)
    buf[IP_SIZE + 12] = 5 << 4
    buf[IP_SIZE + 13] = TCP_ACK
    _inject(d, buf, sizeof(buf))


cdef bint _icmp_inward(be_nfqueue *d, icmp_view *v) noexcept nogil:
    """Rewrite an ICMP error about a segment of an adopted connection for the socket that sent it.
    False: it is about something else."""
    cdef tcpha_flow local
    cdef be_flow *f
    _key(d, v.inner + 16, v.tcp + 2, &local)
    f = <be_flow *>table_find(&d.flows, &local)
    if f == NULL or f.state != B_LIVE or memcmp(&f.outside.vport, v.tcp, 2) != 0 or \
            memcmp(d.vaddr + 12, v.inner + 12, 4) != 0:
        return False
    icmp_translate(v, &f.outward, &f.inward)
    return True


cdef bint _is_frontend(be_nfqueue *d, uint32_t addr) noexcept nogil:
    cdef uint32_t i
    for i in range(d.nfrontends):
        if d.frontends[i] == addr:
            return True
    add64(<uint64_t *>&d.n.foreign, 1)
    return False


cdef bint _unwrap(be_nfqueue *d, uint8_t *outer, uint32_t outer_src) noexcept nogil:
    """Whether what is behind an outer header may go on by itself."""
    if not _is_frontend(d, outer_src):
        return False
    if not combine_ecn(outer + IP_SIZE, outer[1]):
        add64(<uint64_t *>&d.n.not_ect, 1)
        return False
    add64(<uint64_t *>&d.n.decapsulated, 1)
    return True


cdef inline bint _is_for_vip(const be_nfqueue *d, const uint8_t *ip) noexcept nogil:
    """Whether a header begins a TCP segment for the VIP, or a fragment of one."""
    return ip[0] >> 4 == 4 and ip[9] == 6 and memcmp(ip + 16, d.vaddr + 12, 4) == 0


cdef int _tunnelled(be_nfqueue *d, packet *p) noexcept nogil:
    """What is wrapped up, for us by a front end, or so it says; see be.bpf.c. V_CHANGED: what is in
    it may go on by itself."""
    cdef uint32_t outer_src, size = (p.data[0] & 15) * 4u
    cdef uint16_t fragment = get16(p.data + 6) & 0x3fff
    cdef uint8_t *inner = p.data + size
    cdef tcp_view v
    cdef icmp_view error
    cdef bint whole
    if fragment & 0x1fff:
        return V_ACCEPT    # the first one is judged
    if p.len < size + IP_SIZE:
        return V_DROP if fragment else V_ACCEPT
    memcpy(&outer_src, p.data + 12, 4)
    if not _is_for_vip(d, inner):
        if fragment or size != IP_SIZE or icmp_parse(inner, p.len - size, &error) < 0 or \
                memcmp(inner + 16, d.vaddr + 12, 4) != 0:
            return V_ACCEPT
        return V_CHANGED if _unwrap(d, p.data, outer_src) else V_DROP
    whole = size == IP_SIZE and tcp_parse(inner, p.len - size, &v) == 0
    if not fragment:
        return V_CHANGED if whole and _unwrap(d, p.data, outer_src) else V_DROP
    if not _is_frontend(d, outer_src) or not whole:
        return V_DROP
    p.mark = TCPHA_MARK_FRAGMENT
    return V_NUMBERS


cdef int _inward(be_nfqueue *d, packet *p) noexcept nogil:
    """From the network: tunnelled by a front end, or to the VIP."""
    cdef uint8_t *inner = p.data
    cdef uint32_t length = p.len
    cdef uint16_t word
    cdef int verdict
    cdef bint tunnelled = length >= IP_SIZE and inner[9] == 4  # IPIP
    cdef be_flow *f
    cdef tcp_view v
    cdef icmp_view error
    if tunnelled:
        verdict = _tunnelled(d, p)
        if verdict != V_CHANGED:
            return verdict
        inner += IP_SIZE
        length -= IP_SIZE
    if icmp_parse(inner, length, &error) == 0 and memcmp(inner + 16, d.vaddr + 12, 4) == 0:
        if not _icmp_inward(d, &error):
            return V_DROP if tunnelled else V_ACCEPT
        if tunnelled and error.icmp - error.ip > IP_SIZE:
            return V_DROP  # as below, and rare: a router's errors have no IP options
        p.data = inner
        p.len = length
        return V_CHANGED
    if length < IP_SIZE or not _is_for_vip(d, inner):
        return V_ACCEPT    # none of ours
    if tcp_parse(inner, length, &v) < 0:
        add64(<uint64_t *>&d.n.guarded, 1)
        return V_DROP      # our stack would put fragments together, and front ends send none
    if tunnelled and v.tcp - v.ip > IP_SIZE:
        # The kernel has noted where the outer packet's payload begins. So the inner header must
        # have the same size: its options, which nobody reads here, go.
        inner = v.tcp - IP_SIZE
        length -= <uint32_t>(inner - v.ip)
        memmove(inner, v.ip, IP_SIZE)
        inner[0] = 0x45
        word = htons(<uint16_t>length)
        memcpy(inner + 2, &word, 2)
        memset(inner + 10, 0, 2)
        word = ip_checksum(inner, IP_SIZE)
        memcpy(inner + 10, &word, 2)
        tcp_parse(inner, length, &v)
    f = _flow_to(d, &v)
    if f == NULL:
        return V_DROP
    p.data = inner
    p.len = length
    # our stack checks it, whatever the device had checked: the kernel takes it for unchecked now
    translate(&v, &f.inward,
              SUM_FULL if p.skb_info & (SKB_GSO | SKB_CSUM_NOT_READY) else SUM_UPDATE)
    return V_CHANGED


cdef int local_inward(be_nfqueue *d, packet *p) noexcept nogil:
    """Rewrite a packet of a client for the local server. Returns its verdict."""
    cdef tcp_view v
    cdef be_flow *f
    if tcp_parse(p.data, p.len, &v) < 0:
        return V_DROP
    pthread_rwlock_rdlock(&d.lock)
    f = _flow_to(d, &v)
    if f != NULL:
        translate(&v, &f.inward,
                  SUM_FULL if p.skb_info & (SKB_GSO | SKB_CSUM_NOT_READY) else SUM_UPDATE)
    pthread_rwlock_unlock(&d.lock)
    return V_DROP if f == NULL else V_CHANGED


cdef int local_icmp(be_nfqueue *d, icmp_view *v) noexcept nogil:
    """Rewrite an ICMP error for the local server. Returns its verdict."""
    cdef bint ours
    pthread_rwlock_rdlock(&d.lock)
    ours = _icmp_inward(d, v)
    pthread_rwlock_unlock(&d.lock)
    return V_CHANGED if ours else V_ACCEPT


cdef bint local_inject(be_nfqueue *d, tcp_view *v) noexcept nogil:
    """Rewrite a packet that was kept, or forged, and send it to our own stack. False: it was not
    sent."""
    cdef be_flow *f
    pthread_rwlock_rdlock(&d.lock)
    f = _flow_to(d, v)
    if f != NULL:
        translate(v, &f.inward, SUM_LEAVE)
    pthread_rwlock_unlock(&d.lock)
    return f != NULL and _inject(d, v.ip, v.len) == 0


cdef void _tell(be_nfqueue *d) noexcept nogil:
    """Wake the workers that wait for an answer. Nobody takes another lock under wait_lock."""
    pthread_mutex_lock(&d.wait_lock)
    store32(&d.answers, d.answers + 1)
    pthread_cond_broadcast(&d.answered)
    pthread_mutex_unlock(&d.wait_lock)


cdef bint _is_of(be_flow *f, const tcp_view *v) noexcept nogil:
    """Whether a packet fits the socket's numbers. If not, it comes from an older socket with the
    same name, whose last words (a RST, when it was destroyed) were still in the queue."""
    cdef uint32_t seq = get32(v.tcp + 4)
    cdef int64_t ahead = <int>(seq - f.high)
    if ahead > LEAP or -ahead > <int64_t>min(f.volume, <uint64_t>1 << 30):
        return False
    seq += v.data_len + (1 if v.flags & TCP_FIN else 0)
    if <int>(seq - f.high) > 0:
        f.volume += seq - f.high
        f.high = seq
    return True


cdef bint _number(const be_flow *f, const tcp_view *v, packet *p) noexcept nogil:
    """Rewrite without the packet: the new sequence number (as mark) and TSval (as priority), as
    they stand in memory, for rules to store; zero stores nothing. False: more must change, or the
    packet's own mark or priority would be lost."""
    cdef uint32_t seq
    if p.mark or p.priority or f.outward.addr or f.outward.window_left != f.outward.window_right:
        return False
    seq = get32(v.tcp + 4) + f.outward.seq
    p.mark = htonl(seq)
    if v.ts != NULL and f.outward.tsval:
        p.priority = htonl(get32(v.ts) + f.outward.tsval)
        if p.priority == 0:
            return False
    return seq != 0


cdef int _outward(be_nfqueue *d, queue *q, packet *p) noexcept nogil:
    """From the local server."""
    cdef tcpha_flow local
    cdef be_flow *f
    cdef tcp_view v
    if tcp_parse_head(p.data, p.have, p.len, &v) < 0:
        return V_ACCEPT if d.shared else V_DROP
    _key(d, v.ip + 16, v.tcp + 2, &local)
    f = <be_flow *>table_find(&d.flows, &local)
    if f == NULL or (f.state == B_DIRECT and (f.volume == 0 or get32(v.tcp + 4) != f.high)):
        if d.shared:
            return V_ACCEPT
        add64(&d.unknown, 1)
        return V_DROP
    if f.state == B_DIRECT and not f.sent and v.flags & TCP_RST:
        return V_DROP      # it answers the ACK of an adoption that was called off
    if f.state != B_LIVE and f.state != B_DIRECT:
        if v.flags & TCP_RST and f.state == B_SYN:
            f.state = B_REFUSED
            _tell(d)
        elif f.after_direct and not v.flags & (TCP_SYN | TCP_RST):
            return V_ACCEPT
        return V_DROP
    if not _is_of(f, &v):
        if f.after_direct:
            return V_ACCEPT
        add64(&d.unknown, 1)
        return V_DROP
    f.sent += 1
    if q.whole:
        return V_NUMBERS if _number(f, &v, p) else V_WHOLE
    translate(&v, &f.outward, SUM_LEAVE if p.skb_info & SKB_GSO else
              SUM_FULL if p.skb_info & SKB_CSUM_NOT_READY else SUM_UPDATE)
    return V_CHANGED


cdef int _on_packet(void *self, queue *q, packet *p) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    if p.hook != HOOK_PREROUTING:
        return _outward(d, q, p)
    return V_WHOLE if q.whole else _inward(d, p)


cdef void _hand_back(be_flow *f) noexcept nogil:
    """The name of an adopted connection is a direct one's now. The entry stays, lest the socket is
    taken for the adopted one's. The lock is held for writing."""
    f.state = B_DIRECT
    if f.ended_ns == 0:
        f.ended_ns = now_ns()


cdef void _on_syn(be_nfqueue *d, tcp_view *v) noexcept nogil:
    """A client begins to talk to the local server directly. If it used the same port for an adopted
    connection, which is over, then the TIME_WAIT socket has the new one's name, but numbers and
    timestamps of another, and would answer by ACKs that mean nothing to the client. So would the
    request socket of one that is being adopted."""
    cdef tcpha_flow local
    cdef be_flow *f
    cdef diag_answer a
    cdef uint32_t state
    cdef bint over
    _key(d, v.ip + 12, v.tcp, &local)
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    state = f.state if f != NULL else <uint32_t>B_DIRECT
    pthread_rwlock_unlock(&d.lock)
    if state == B_DIRECT or diag_query(d.sockets, &local, &a) < 0 or a.full:
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
    cdef bint ours
    _key(d, v.ip + 16, v.tcp + 2, &local)
    pthread_rwlock_wrlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    if f != NULL and d.shared and (
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
    return ours or not d.shared


# Adoption

cdef int _inject(be_nfqueue *d, uint8_t *ip, uint32_t length) noexcept nogil:
    """Send an IP packet to our own stack, its TCP checksum completed. 0 or an errno."""
    cdef sockaddr_in to
    cdef tcp_view v
    if tcp_parse(ip, length, &v) < 0:
        return -1
    checksum_full(&v)
    memset(&to, 0, sizeof(to))
    to.sin_family = AF_INET
    memcpy(&to.sin_addr, ip + 16, 4)
    while sendto(d.raw_fd, ip, length, 0, <sockaddr *>&to, sizeof(to)) < 0:
        if errno != EINTR:
            return errno
    return 0


cdef int _send_segment(be_nfqueue *d, segment *g, const uint8_t *data) noexcept nogil:
    cdef uint8_t buf[FRAME_HEAD + CHUNK]
    cdef uint32_t n = forge(buf, g)
    if g.len:
        memcpy(buf + n, data, g.len)
    return _inject(d, buf + VNET_SIZE + ETH_SIZE, n - VNET_SIZE - ETH_SIZE + g.len)


cdef int _send_syn(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """The client's SYN once more, with the options that were agreed on; its sequence number lies
    just before the request."""
    cdef uint8_t buf[IP_SIZE + TCP_SIZE + 20]
    cdef uint8_t *tcp = buf + IP_SIZE
    cdef uint8_t *o = tcp + TCP_SIZE
    cdef uint32_t v
    cdef uint16_t w
    memset(buf, 0, sizeof(buf))
    buf[0] = 0x45
    buf[6] = 0x40          # DF
    buf[8] = 64
    buf[9] = 6
    memcpy(buf + 12, local.caddr + 12, 4)
    memcpy(buf + 16, local.vaddr + 12, 4)
    memcpy(tcp, &local.cport, 2)
    memcpy(tcp + 2, &local.vport, 2)
    v = htonl(_start(s) - 1)
    memcpy(tcp + 4, &v, 4)
    tcp[13] = TCP_SYN | (TCP_ECE | TCP_CWR if s.flags & SNAP_ECN else 0)
    w = htons(<uint16_t>min(s.snd_wnd, <uint32_t>0xffff))
    memcpy(tcp + 14, &w, 2)
    o[0] = 2
    o[1] = 4
    w = htons(s.mss)
    memcpy(o + 2, &w, 2)
    o += 4
    if s.flags & SNAP_SACK:
        o[0] = 4
        o[1] = 2
    else:
        o[0] = o[1] = 1
    o += 2
    if s.flags & SNAP_TIMESTAMP:
        o[0] = 8
        o[1] = 10
        v = htonl(s.ts_recent)
        memcpy(o + 2, &v, 4)
        o += 10
    else:
        o[0] = o[1] = 1
        o += 2
    if s.flags & SNAP_WSCALE:
        o[0] = 1
        o[1] = 3
        o[2] = 3
        o[3] = s.snd_wscale
        o += 4
    tcp[12] = <uint8_t>(((o - tcp) // 4) << 4)
    w = htons(<uint16_t>(o - buf))
    memcpy(buf + 2, &w, 2)
    return _inject(d, buf, <uint32_t>(o - buf))


cdef be_flow *_being_adopted(be_nfqueue *d, const tcpha_flow *local,
                             const snapshot *s) noexcept nogil:
    """The entry of a connection that is being adopted. NULL: its name is a newer one's by now, or a
    direct one's. The lock is held."""
    cdef be_flow *f = <be_flow *>table_find(&d.flows, local)
    return f if f != NULL and f.state != B_DIRECT and f.asked == _start(s) else NULL


cdef int _await_answer(be_nfqueue *d, const tcpha_flow *local, const snapshot *s,
                       be_flow *copy) noexcept nogil:
    """Send the SYN and wait for the local server's SYN-ACK or RST. 0 or a refusal."""
    cdef uint64_t begin = now_ns(), asked = 0, now
    cdef uint32_t before
    cdef int rc
    cdef be_flow *f
    cdef diag_answer a
    while True:
        before = load32(&d.answers)
        pthread_rwlock_rdlock(&d.lock)
        f = _being_adopted(d, local, s)
        if f != NULL:
            copy[0] = f[0]
        pthread_rwlock_unlock(&d.lock)
        if f == NULL:
            return REFUSE_UNSUPPORTED
        if copy.state != B_SYN:
            return 0
        if not asked:      # not before it is known that the client has not been faster
            if _send_syn(d, local, s) != 0:
                return REFUSE_ERROR
            asked = begin
        pthread_mutex_lock(&d.wait_lock)
        if d.answers == before:
            cond_wait_ms(&d.answered, &d.wait_lock, 5)
        pthread_mutex_unlock(&d.wait_lock)
        now = now_ns()
        if now - begin > HANDSHAKE_NS:
            return REFUSE_BACKLOG
        if now - asked > SILENT_NS and diag_query(d.sockets, local, &a) == 0 and a.state == 0:
            # dropped, for want of room in the accept queue; or our stack is late: ask again
            rc = diag_refusal(d.sockets, d.listen_addr, d.listen_port)
            if rc != 0:
                return rc
            if _send_syn(d, local, s) != 0:
                return REFUSE_ERROR
            asked = now


cdef void _plan(be_nfqueue *d, be_flow *f, const snapshot *s) noexcept nogil:
    """How packets are rewritten from now on."""
    # The clock goes on one tick after the snapshot: the front end may have sent at that very tick.
    cdef uint32_t tick = s.tsval + (1000 if s.flags & SNAP_USEC_TS else 1)
    cdef bint scaled = f.wscale >= 0
    memset(&f.inward, 0, sizeof(translation))
    memset(&f.outward, 0, sizeof(translation))
    f.outward.seq = s.snd_nxt - (f.isn + 1)
    f.inward.ack = -f.outward.seq
    if s.flags & SNAP_TIMESTAMP:
        f.outward.tsval = tick - f.tsval
        f.inward.tsecr = -f.outward.tsval
    f.outward.window_left = f.wscale if scaled else 0
    f.outward.window_right = s.rcv_wscale if s.flags & SNAP_WSCALE else 0
    if s.flags & SNAP_WSCALE and not scaled:
        f.inward.window_left = s.snd_wscale
    if memcmp(s.flow.vaddr, d.listen_addr, 16) != 0 or s.flow.vport != d.listen_port:
        f.outward.source = True
        memcpy(&f.outward.addr, s.flow.vaddr + 12, 4)
        f.outward.port = s.flow.vport
        memcpy(&f.inward.addr, d.listen_addr + 12, 4)
        f.inward.port = d.listen_port


cdef void _drop_flow(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """Take back an adoption. What the server says of it is dropped from now on, a RST too. If the
    name is another connection's by now, that one goes on."""
    cdef diag_answer a
    cdef be_flow *f
    if diag_query(d.sockets, local, &a) < 0:
        a.state = 0
    pthread_rwlock_wrlock(&d.lock)
    f = _being_adopted(d, local, s)
    if f != NULL:
        # As long as no SYN-ACK was seen, the socket may come from the client's SYN instead of ours.
        if d.shared and f.state == B_SYN:
            a.state = 0
        table_remove(&d.flows, local)
    pthread_rwlock_unlock(&d.lock)
    if f != NULL:
        diag_destroy(d.sockets, local, &a)


cdef int _room(be_nfqueue *d, const tcpha_flow *local, const snapshot *s) noexcept nogil:
    """Enter a new flow, in place of an older one of the same name. 0 or a refusal."""
    cdef be_flow *f
    cdef diag_answer before, a
    cdef bint occupied, unknown, whole
    cdef int _tries
    # Whose this socket is, the entry says afterwards: a direct connection takes the name first.
    if not d.shared or diag_query(d.sockets, local, &before) < 0:
        before.state = 0
    pthread_rwlock_wrlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, local)
    unknown = f == NULL or f.state == B_DIRECT
    # a client with one port and two of the VIP's: the local server cannot tell them apart
    occupied = f != NULL and f.outside.vport != s.flow.vport and f.ended_ns == 0
    if not occupied:
        if f != NULL:
            table_remove(&d.flows, local)
        f = <be_flow *>table_add(&d.flows, local)
        if f == NULL and _evict(d):
            f = <be_flow *>table_add(&d.flows, local)
        if f != NULL:
            f.state = B_SYN
            f.outside = s.flow
            f.after_direct = d.shared and unknown
            f.asked = _start(s)
    pthread_rwlock_unlock(&d.lock)
    if occupied:
        return REFUSE_UNSUPPORTED
    if f == NULL:
        return REFUSE_FULL
    for _tries in range(4):
        if diag_query(d.sockets, local, &a) < 0 or a.state == 0:
            return 0
        whole = a.full or a.state == TCP_NEW_SYN_RECV or a.state == TCP_SYN_RECV
        if d.shared and whole and (unknown or before.state == 0 or
                                   memcmp(a.cookie, before.cookie, sizeof(a.cookie)) != 0):
            # the client talks to the local server directly
            pthread_rwlock_wrlock(&d.lock)
            if _being_adopted(d, local, s) != NULL:
                table_remove(&d.flows, local)
            pthread_rwlock_unlock(&d.lock)
            return REFUSE_UNSUPPORTED
        # A socket of an earlier connection owns the 4-tuple. The client has given that one up, or
        # the front end could not have accepted this one. If it is not there any more: look again.
        if diag_destroy(d.sockets, local, &a):
            add64(&d.killed, 1)
            return 0
    return 0


cdef int _settle(be_nfqueue *d, const tcpha_flow *local, const snapshot *s,
                 diag_answer *a) noexcept nogil:
    """After the ACK: wait until there is a socket. 0, or a refusal: the accept queue is full, or
    the name is another connection's by now."""
    cdef uint64_t begin = now_ns()
    cdef be_flow *f
    cdef uint64_t sent
    while True:
        if diag_query(d.sockets, local, a) < 0:
            return REFUSE_ERROR
        pthread_rwlock_rdlock(&d.lock)
        f = _being_adopted(d, local, s)
        sent = f.sent if f != NULL else 0
        pthread_rwlock_unlock(&d.lock)
        if f == NULL:
            return REFUSE_UNSUPPORTED
        if a.state != 0 and a.state != TCP_NEW_SYN_RECV and a.state != TCP_SYN_RECV:
            return 0
        if a.state == 0 and sent:
            return 0       # it has answered, and is over already
        if now_ns() - begin > SETTLE_NS:
            return REFUSE_BACKLOG
        pthread_mutex_lock(&d.wait_lock)
        cond_wait_ms(&d.answered, &d.wait_lock, 1)
        pthread_mutex_unlock(&d.wait_lock)


cdef int _adopt(void *self, uint32_t worker, const snapshot *s,
                const uint8_t *data) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef be_flow copy
    cdef be_flow *f
    cdef diag_answer a
    cdef segment g
    cdef uint64_t begin
    cdef int rc
    _local(d, &s.flow, &local)
    rc = _room(d, &local, s)
    if rc != 0:
        return rc
    rc = _await_answer(d, &local, s, &copy)
    if rc == 0 and copy.state == B_REFUSED:
        rc = REFUSE_LISTENER
    if rc == 0 and ((s.flags & SNAP_TIMESTAMP and not copy.ts_ok) or
                    (s.flags & SNAP_ECN and not copy.ecn_ok)):
        rc = REFUSE_UNSUPPORTED
    if rc != 0:
        _drop_flow(d, &local, s)
        return rc
    pthread_rwlock_wrlock(&d.lock)
    f = _being_adopted(d, &local, s)
    if f != NULL:
        _plan(d, f, s)
        f.high = f.isn + 1
        f.volume = 1
        f.state = B_LIVE   # before the request: it may be answered at once
    pthread_rwlock_unlock(&d.lock)
    if f == NULL:
        return REFUSE_UNSUPPORTED
    _segment(&g, s, &local, &copy)
    g.seq = _start(s)
    g.flags = TCP_ACK | TCP_PSH
    g.len = min(s.len, load32(&d.chunk))
    # Nothing after SETTLE_NS: the accept queue is full; or it was, or our stack is late, and then a
    # client would send again.
    begin = now_ns()
    while True:
        rc = REFUSE_ERROR if _send_segment(d, &g, data) != 0 else _settle(d, &local, s, &a)
        if rc != REFUSE_BACKLOG or now_ns() - begin > HANDSHAKE_NS:
            break
        rc = diag_refusal(d.sockets, d.listen_addr, d.listen_port)
        if rc != 0:
            break
    if rc != 0:
        _drop_flow(d, &local, s)
        return rc
    return _feed_from(d, s, data, &g, &a)


cdef void _segment(segment *g, const snapshot *s, const tcpha_flow *local,
                   const be_flow *f) noexcept nogil:
    """A segment of the client's as the local socket must see it."""
    segment_from(g, s)
    g.flow = local
    g.ack = f.isn + 1
    g.tsecr = f.tsval
    if f.wscale < 0:
        g.window = <uint16_t>min(s.snd_wnd, <uint32_t>0xffff)


cdef int _feed_from(be_nfqueue *d, const snapshot *s, const uint8_t *data, segment *g,
                    diag_answer *a) noexcept nogil:
    """Inject what the socket has not received. The front end has acknowledged these bytes: the
    client will never send them again."""
    cdef uint32_t fin = 1 if s.flags & SNAP_FIN else 0
    cdef uint32_t start = _start(s), have
    while a.full:
        have = <uint32_t>a.received
        if have >= s.len + fin:
            return 0
        g.seq = start + have
        g.len = min(s.len - have, load32(&d.chunk))
        g.flags = TCP_ACK | TCP_PSH
        if have + g.len == s.len and fin:
            g.flags |= TCP_FIN
        if _send_segment(d, g, data + have) != 0 or diag_query(d.sockets, g.flow, a) < 0 or \
                (a.full and <uint32_t>a.received == have):
            return DP_MORE
    return 0


cdef int _feed(void *self, uint32_t worker, const snapshot *s, const uint8_t *data) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef be_flow copy
    cdef be_flow *f
    cdef diag_answer a
    cdef segment g
    _local(d, &s.flow, &local)
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    if f != NULL:
        copy = f[0]
    pthread_rwlock_unlock(&d.lock)
    if f == NULL:
        return 0
    if diag_query(d.sockets, &local, &a) < 0:
        return DP_MORE
    _segment(&g, s, &local, &copy)
    return _feed_from(d, s, data, &g, &a)


# The end

cdef bint _position(void *self, uint32_t worker, const tcpha_flow *flow,
                    uint32_t *rcv_nxt) noexcept nogil:
    cdef be_nfqueue *d = <be_nfqueue *>self
    cdef tcpha_flow local
    cdef diag_answer a
    cdef be_flow *f
    cdef bint known
    _local(d, flow, &local)
    if diag_query(d.sockets, &local, &a) < 0 or a.state == 0 or not a.full:
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
    if diag_query(d.sockets, &local, &a) < 0:
        return DP_ALIVE
    pthread_rwlock_rdlock(&d.lock)
    f = <be_flow *>table_find(&d.flows, &local)
    known = f != NULL
    direct = known and f.state == B_DIRECT
    pthread_rwlock_unlock(&d.lock)
    if direct:
        return 0
    if a.state != 0 and not known:
        if not d.shared:   # or it may be one of those who talk to the local server directly
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
    if f != NULL and f.outside.vport == flow.vport:
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


cdef class BeNfqueue(BeDatapath):
    """capacity: connections in the table, those in TIME_WAIT included; mark: of packets that we
    inject; queues: Queue objects, started later; file: where the table lies, or None; devices: by
    which clients' packets may come; local: on the front end, for its Local Node."""

    def __cinit__(self, str vaddr, str listen_addr, int listen_port, uint32_t capacity,
                  uint32_t mark, list queues, file, list devices, bint local=False):
        cdef Queue q
        cdef bint kept
        self.d = <be_nfqueue *>calloc(1, sizeof(be_nfqueue))
        if self.d == NULL:
            raise MemoryError
        self.sockets = SockDiag()
        self.d.sockets = &self.sockets.d
        self.d.chunk = CHUNK
        rwlock_init(&self.d.lock)
        pthread_mutex_init(&self.d.wait_lock, NULL)
        pthread_cond_init(&self.d.answered, NULL)
        kept = table_open(&self.d.flows, capacity, sizeof(be_flow), LAYOUT, file)
        address_bytes(vaddr, self.d.vaddr)
        address_bytes(listen_addr, self.d.listen_addr)
        self.d.listen_port = self.table.listen_port = htons(listen_port)
        self.d.shared = local or vaddr != listen_addr
        self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                 socket.IPPROTO_RAW)
        self.raw.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
        self.d.raw_fd = self.raw.fileno()
        if kept:
            self._take_over(devices)
        self.queues = queues
        for q in queues:
            q.set_handler(_on_packet, NULL, self.d, &self.d.lock)
        self.table.self = self.d
        self.table.adopt = _adopt
        self.table.feed = _feed
        self.table.alive = _alive
        self.table.position = _position
        self.table.outside = _outside
        self.table.ended = _ended
        self.table.sweep = _sweep

    def __dealloc__(self):
        if self.d != NULL:
            table_close(&self.d.flows)
            pthread_rwlock_destroy(&self.d.lock)
            pthread_mutex_destroy(&self.d.wait_lock)
            pthread_cond_destroy(&self.d.answered)
            free(self.d)

    def _take_over(self, list devices):
        """Keep those flows of an earlier run whose sockets live. What they are bound to, the
        listener of now need not tell."""
        cdef uint32_t i
        cdef flow_cell *c
        cdef be_flow *f
        for i in range(self.d.flows.head.fresh):
            c = table_cell(&self.d.flows, i)
            f = <be_flow *>(c + 1)
            if c.used and (f.state != B_LIVE or f.ended_ns or
                           not self._has_socket(&c.key, devices)):
                table_remove(&self.d.flows, &c.key)

    cdef bint _has_socket(self, const tcpha_flow *local, list devices):
        cdef diag_answer a
        for device in devices:
            self.sockets.look_from(device)
            if diag_query(self.d.sockets, local, &a) == 0 and a.state != 0:
                return True
        return False

    def end_all(self):
        """Reset the connections that live: nobody will rewrite their packets any more."""
        cdef uint32_t i
        cdef flow_cell *c
        cdef diag_answer a
        with nogil:
            for i in range(self.d.flows.head.fresh):
                c = table_cell(&self.d.flows, i)
                if c.used and not (<be_flow *>(c + 1)).ended_ns and \
                        diag_query(self.d.sockets, &c.key, &a) == 0:
                    diag_destroy(self.d.sockets, &c.key, &a)

    def follow(self, uint32_t device, int mtu):
        """The listener is bound to a device, by which what we inject comes in: Linux before 5.12
        drops there what is longer than its MTU. See BeEbpf.follow()."""
        store32(&self.d.chunk, min(CHUNK, mtu - HEADERS))
        self.sockets.look_from(device)

    def close(self):
        """No queue may be served any more."""
        self.raw.close()
        self.sockets.close()

    def handshake(self, bytes payload):
        """A SYN for the local server's own address and port, or a SYN-ACK that wants to leave this
        host. True: it may pass, it is none of ours."""
        cdef bytearray copy = bytearray(payload)
        cdef tcp_view v
        cdef bint ours = False
        if tcp_parse(copy, <uint32_t>len(copy), &v) < 0:
            return bool(self.d.shared)
        with nogil:
            if v.flags & TCP_ACK:
                ours = _on_syn_ack(self.d, &v)
            else:
                _on_syn(self.d, &v)
        return not ours

    def allow(self, str address, bint allowed):
        """As BeEbpf.allow()."""
        cdef uint8_t addr[16]
        cdef uint32_t v, i
        address_bytes(address, addr)
        memcpy(&v, addr + 12, 4)
        with nogil:
            pthread_rwlock_wrlock(&self.d.lock)
            for i in range(self.d.nfrontends):
                if self.d.frontends[i] == v:
                    self.d.nfrontends -= 1
                    self.d.frontends[i] = self.d.frontends[self.d.nfrontends]
                    break
            if allowed and self.d.nfrontends < MAX_FRONTENDS:
                self.d.frontends[self.d.nfrontends] = v
                self.d.nfrontends += 1
            pthread_rwlock_unlock(&self.d.lock)

    def allowed(self):
        """As BeEbpf.allowed(): nobody, when it begins."""
        return []

    def counters(self):
        cdef tcpha_counters n
        read_counters(&n, &self.d.n, sizeof(n))
        return {"guarded": n.guarded, "foreign": n.foreign, "decapsulated": n.decapsulated,
                "not_ect": n.not_ect,
                "killed": load64(&self.d.killed), "unknown": load64(&self.d.unknown),
                "flows": load32(&self.d.flows.head.used)}
