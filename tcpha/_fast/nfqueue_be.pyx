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
from tcpha._fast.defs cimport TCPHA_MARK_FRAGMENT, tcpha_counters, tcpha_flow, tcpha_listener
from tcpha._fast.diag cimport (
    TCP_CLOSE_WAIT, TCP_ESTABLISHED, TCP_NEW_SYN_RECV, TCP_SYN_RECV, TCP_TIME_WAIT, SockDiag,
    diag_answer, diag_destroy, diag_query, diag_refusal)
from tcpha._fast.message cimport (
    REFUSE_BACKLOG, REFUSE_ERROR, REFUSE_FULL, REFUSE_LISTENER, REFUSE_UNSUPPORTED)
from tcpha._fast.nfqueue cimport (
    HOOK_PREROUTING, SKB_CSUM_NOT_READY, SKB_GSO, V_ACCEPT, V_CHANGED, V_DROP, V_NUMBERS, V_WHOLE,
    Queue, packet, queue)
from tcpha._fast.packet cimport (
    ETH_SIZE, FRAME_HEAD, IP_SIZE, TCP_ACK, TCP_CWR, TCP_ECE, TCP_FIN, TCP_PSH, TCP_RST,
    TCP_SYN, VNET_SIZE, address_bytes, forge, ip_checksum, segment, segment_from,
    syn_from)
from tcpha._fast.places cimport Places, is_vip, listener_at, listener_of
from tcpha._fast.rewrite cimport (
    SUM_FULL, SUM_LEAVE, SUM_UPDATE, checksum_full, combine_ecn, get16, get32, icmp_parse,
    icmp_translate, icmp_view, tcp_parse, tcp_parse_head, tcp_view, translate, translation)
from tcpha._fast.snapshot cimport (
    SNAP_ECN, SNAP_FIN, SNAP_TIMESTAMP, SNAP_USEC_TS, SNAP_WSCALE, snapshot)
from tcpha._fast.sys cimport (
    AF_INET, EINTR, add64, cond_wait_ms, errno, htonl, htons, load32, load64, now_ns,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, pthread_rwlock_destroy,
    pthread_rwlock_rdlock, pthread_rwlock_unlock, pthread_rwlock_wrlock, raise64, read_counters,
    rwlock_init, sendto, sockaddr, sockaddr_in, store32)
from tcpha._fast.table cimport (
    flow_cell, table_add, table_cell, table_close, table_find, table_open, table_remove)

cdef enum:
    CHUNK = 60000          # payload of a forged segment; one skb, so that overhead is small
    HEADERS = 60           # of a forged segment, and some room
    LEAP = 1 << 24         # how far 'volume' may be behind, if the queue was full
    SWEEP = 512            # entries looked at by one call of sweep()
    LAYOUT = 3             # version of struct be_flow

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
    bint after_direct      # a direct connection had the 4-tuple; its last packets may still come
    translation inward
    translation outward
    uint64_t ended_ns      # 0: alive
    uint64_t volume        # sequence numbers that the socket has used, its SYN's too; 0: never LIVE
    uint64_t sent          # packets from the local socket


cdef void _local(const be_nfqueue *d, const tcpha_flow *outside, tcpha_flow *local) noexcept nogil:
    """The flow of the local socket, of one that the client sees."""
    cdef const tcpha_listener *to = listener_of(d.places, outside)
    local[0] = outside[0]
    memcpy(local.vaddr, to.addr, 16)
    local.vport = to.port


cdef void _flow_between(const uint8_t *client, const uint8_t *cport, const uint8_t *ours,
                        const uint8_t *port, tcpha_flow *flow) noexcept nogil:
    """By addresses and ports as they stand in a packet."""
    memset(flow, 0, sizeof(tcpha_flow))
    flow.caddr[10] = flow.caddr[11] = flow.vaddr[10] = flow.vaddr[11] = 0xff
    memcpy(flow.caddr + 12, client, 4)
    memcpy(flow.vaddr + 12, ours, 4)
    memcpy(&flow.cport, cport, 2)
    memcpy(&flow.vport, port, 2)


cdef inline bint _same(const tcpha_flow *a, const tcpha_flow *b) noexcept nogil:
    return memcmp(a, b, sizeof(tcpha_flow)) == 0


cdef inline bint _is_shared(const be_nfqueue *d, const tcpha_flow *local) noexcept nogil:
    """Whether others may talk to this local server directly."""
    return d.local or not is_vip(d.places, local.vaddr)


cdef int _query(be_nfqueue *d, const tcpha_flow *local, diag_answer *a) noexcept nogil:
    """As diag_query(), by the device that the listener is bound to."""
    cdef tcpha_listener *to = listener_at(d.places, local.vaddr, local.vport)
    return diag_query(d.sockets, local, load32(&to.device) if to != NULL else 0, a)


cdef int _refusal(be_nfqueue *d, const tcpha_flow *local) noexcept nogil:
    """As diag_refusal(), of the listener of a flow."""
    cdef tcpha_listener *to = listener_at(d.places, local.vaddr, local.vport)
    return diag_refusal(d.sockets, local.vaddr, local.vport, load32(&to.device))


cdef inline uint32_t _start(const snapshot *s) noexcept nogil:
    """The sequence number of the request's first byte."""
    return s.rcv_nxt - (1 if s.flags & SNAP_FIN else 0) - s.len


include "nfq_be/owner.pxi"
include "nfq_be/packets.pxi"
include "nfq_be/adoption.pxi"
include "nfq_be/ends.pxi"
include "nfq_be/api.pxi"
