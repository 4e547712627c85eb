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
    TCP_SYN, VNET_SIZE, address_bytes, forge, ip_checksum, ip_header, segment,
    segment_from)
from tcpha._fast.repair cimport repair_freeze, saved_syn_mss
from tcpha._fast.rewrite cimport (
    acks_beyond, ask_offload, get16, get32, icmp_parse, icmp_view, pseudo_sum, sum_bytes, tcp_parse,
    tcp_view)
from tcpha._fast.snapshot cimport SNAP_FIN, snapshot
from tcpha._fast.sys cimport (
    AF_PACKET, EINTR, MSG_DONTWAIT, add64, errno, htonl, htons, iovec, load32, load64, msghdr,
    now_ns, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
    pthread_rwlock_destroy, pthread_rwlock_rdlock, pthread_rwlock_t, pthread_rwlock_unlock,
    pthread_rwlock_wrlock, read_counters, rwlock_init, sendmsg, store32, store64)
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
# The queues' threads share these without a lock. An entry that two of them have mixed up has a seq
# that does not fit; then the TSval of the SYN is used.
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
    uint32_t drop_unknown  # see datapath.pxd
    recent *seen
    waiting_ack waiting[MAX_QUEUES][ACKS]
    uint64_t thinned
    uint64_t outer_id      # of the latest outer packet that routers may cut
    uint16_t first_queue
    int packet_fd
    bint tunnel
    tcpha_counters n


include "nfq_fe/store.pxi"
include "nfq_fe/sending.pxi"
include "nfq_fe/receiving.pxi"
include "nfq_fe/flows.pxi"
include "nfq_fe/api.pxi"
