# SPDX-License-Identifier: GPL-2.0-or-later
"""The back end's work: adopt what front ends hand over, and tell them when a connection ends.

The kernel reports the end of each TCP socket (NETLINK_SOCK_DIAG, groups SKNLGRP_INET_TCP_DESTROY
and SKNLGRP_INET6_TCP_DESTROY: a listener for both families has IPv6 children). A report may come
late, when the 4-tuple belongs to a newer connection already; so it only makes us look whether a
socket owns it.
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
    DP_ALIVE, DP_CLOSING, DP_MORE, DP_TIME_WAIT, BeDatapath, cookie_adoption)
from tcpha._fast.defs cimport (
    TCPHA_MAX_FAST, TCPHA_MAX_OPS, TCPHA_R_ASSIGN, TCPHA_R_BACKLOG, TCPHA_R_FULL,
    TCPHA_R_NO_LISTENER, TCPHA_R_OK, tcpha_event, tcpha_flow)
from tcpha._fast.diag cimport (
    TCP_CLOSE_WAIT, TCP_CLOSING, TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LAST_ACK,
    SockList, inet_diag_msg)
from tcpha._fast.message cimport (
    END_GONE, END_TIME_WAIT, MSG_ADOPTED, MSG_ASK, MSG_CLOSED_SIZE, MSG_DOUBT, MSG_HANDOFF,
    MSG_HEADER, MSG_KEYED, MSG_KEYS, MSG_MISSED, MSG_OWNED, MSG_PLACE_SIZE, MSG_PONG,
    MSG_REFUSED_SIZE, MSG_SERVER, MSG_TOLD,
    REFUSE_BACKLOG, REFUSE_FULL, REFUSE_LISTENER, REFUSE_LOST, REFUSE_STALE, REFUSE_UNSUPPORTED,
    fast_id, fast_isn, message, message_closed, message_flow, message_place, message_refused,
    message_return, message_short, refusal_text)
from tcpha._fast.packet cimport address_bytes
from tcpha._fast.peerclock cimport clock_oldest, clock_word, clock_youngest
from tcpha._fast.places cimport is_listened_on
from tcpha._fast.sys cimport (
    EINTR, ENOBUFS, EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLL_CTL_ADD, EPOLL_CTL_MOD, MSG_DONTWAIT,
    add32, add64, errno, htons, load32, now_ns, or32, pthread_mutex_destroy,
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


include "be/adopted.pxi"
include "be/owners.pxi"
include "be/ends.pxi"
include "be/handoff.pxi"
include "be/packet_path.pxi"
include "be/messages.pxi"
include "be/api.pxi"
