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
from tcpha._fast.datapath cimport DP_GONE, FeDatapath, packet_path
from tcpha._fast.defs cimport (
    TCPHA_AWAY, TCPHA_CHOICES, TCPHA_DEAD, TCPHA_DEAF, TCPHA_DRAINED, TCPHA_FAST_EARLY,
    TCPHA_FAST_FIRST, TCPHA_FULL, TCPHA_F_FIN, TCPHA_HEAD_MAX, TCPHA_LINE_MAX,
    TCPHA_LOCAL_NODE, TCPHA_MAX_BACKENDS, TCPHA_MAX_OPS, TCPHA_MAX_RULES, TCPHA_MAX_SERVICES,
    TCPHA_MAY,
    TCPHA_TARGET_MAX, tcpha_cache, tcpha_choice, tcpha_choose, tcpha_entry, tcpha_flow,
    tcpha_forward, tcpha_hold, tcpha_is_pending, tcpha_live, tcpha_load, tcpha_offer,
    tcpha_refusal, tcpha_service_word, tcpha_siphash, tcpha_state_of, tcpha_verdict)
from tcpha._fast.http cimport HTTP_BAD, HTTP_DONE, HTTP_MORE, http_begun, http_head, http_parse
from tcpha._fast.ledger cimport RESTORED, RESTORED_OVER
from tcpha._fast.match cimport (
    HS_SUCCESS, Matcher, choice, hs_clone_scratch, hs_free_scratch, hs_scratch_t, match_target,
    ruleset, ruleset_free, ruleset_new)
from tcpha._fast.message cimport (
    END_TIME_WAIT, MSG_ADOPTED, MSG_ASK, MSG_CLOSED, MSG_FLOW, MSG_HANDOFF_FIXED, MSG_HEADER,
    MSG_KEYED, MSG_KEYS_SIZE, MSG_MISSED, MSG_OWNED_SIZE, MSG_PLACE, MSG_PONG, MSG_REFUSED,
    MSG_RETURN, MSG_SERVER, MSG_TOLD,
    REFUSE_BACKLOG, REFUSE_FULL, REFUSE_LINK, REFUSE_LOST, REFUSE_STALE, REFUSE_TIMEOUT,
    REFUSE_UNSUPPORTED,
    fast_id, message, message_doubt, message_handoff, message_keys, message_owned, message_short,
    refusal_text)
from tcpha._fast.meter cimport (
    histogram_add, histogram_read, slow_close, slow_note, slow_open, slow_read)
from tcpha._fast.packet cimport TCP_URG, address_bytes, address_text, flow_text
from tcpha._fast.repair cimport repair_received
from tcpha._fast.rewrite cimport get32, tcp_view
from tcpha._fast.scan cimport Questions, Scan, question
from tcpha._fast.snapshot cimport SNAP_FIN, snapshot
from tcpha._fast.sys cimport (
    EAGAIN, EINTR, EMFILE, ENFILE, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLRDHUP, EPOLL_CTL_ADD,
    EPOLL_CTL_DEL, EPOLL_CTL_MOD, IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, MSG_TRUNC,
    SEEK_CUR, SHUT_RDWR, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, accept4, add32, add64, cas32, close,
    errno, ftruncate, getsockopt, htons, iovec, load32, load64, loadp, lseek, now_ns,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock,
    pthread_mutex_unlock, raise64, read_counters, realtime_ns, recv, send, set32, set64, setsockopt,
    shutdown, sockaddr, sockaddr_in, socklen_t, store32, store64, storep, writev, xchg32)

# for Python
ALL_SERVICES = <uint64_t>-1
# see choose.h
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
    NO_SERVICE = 0xffffffff
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


include "fe/services.pxi"
include "fe/slots.pxi"
include "fe/choice.pxi"
include "fe/explain.pxi"
include "fe/request.pxi"
include "fe/access_log.pxi"
include "fe/socket_path.pxi"
include "fe/packet_path.pxi"
include "fe/recovery.pxi"
include "fe/events.pxi"
include "fe/api.pxi"
