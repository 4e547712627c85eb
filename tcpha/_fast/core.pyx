# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop that the workers of both roles share, and the control connections.

All workers wait on one epoll instance, so that a slow client occupies none of them and any of them
may go. What has much to say gets a turn like all others: where more is left after one, rearm() puts
it at the end of the kernel's list. Memory that Python replaces (rules, links) is freed only after
each worker has passed a point where it holds nothing: see Core.later().
"""
import os
from collections import deque
from functools import partial

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove

from tcpha._fast.defs cimport TCPHA_LOCKED_OP, TCPHA_MAX_OPS, tcpha_flow
from tcpha._fast.message cimport (
    MSG_PING, MSG_PONG, MSG_PONG_SIZE, message, message_decode, message_pong, message_short)
from tcpha._fast.packet cimport flow_text
from tcpha._fast.peerclock cimport clock_answered, clock_told
from tcpha._fast.sys cimport (
    EAGAIN, ECONNRESET, EINTR, EOPNOTSUPP, EPIPE, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT,
    EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, IPPROTO_TCP, MSG_DONTWAIT,
    MSG_NOSIGNAL, SHUT_RDWR, add32, add64, epoll_ctl, epoll_event, epoll_wait, errno, getsockopt,
    load32, load64, now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, read, recv, send, set32, set64, shutdown, socklen_t, store32, store64,
    write, xchg32)
from tcpha._fast.tls cimport (
    TLS_BROKEN, TLS_CLOSED, TLS_RECORD, TLS_SEALED, Channel, tls_open, tls_received, tls_seal)

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info_head "tcp_info":
        uint8_t tcpi_state
        uint32_t tcpi_unacked

cdef uint64_t HELLO_NS = 3000000000  # that HELLO takes at most: PATIENCE in control/hello.py
MOST_LINKS = MAX_LINKS
cdef enum:
    EVENTS = 64
    TURN = 4               # reads of a control connection before it is others' turn
    LINK_OUT_MIN = 1 << 16  # bytes for the queue of a control connection; it grows,
    LINK_LONG = 1 << 20     # and shrinks again where it grew beyond these
    LINK_EVENTS = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET


cdef uint64_t event_data(int kind, uint32_t index, uint32_t gen) noexcept nogil:
    return (<uint64_t>kind << 56) | (<uint64_t>(gen & 0xffffff) << 32) | index


cdef int watch(core *c, int op, int fd, uint32_t events, int kind, uint32_t index,
               uint32_t gen) noexcept nogil:
    cdef epoll_event ev
    ev.events = events
    ev.data.u64 = event_data(kind, index, gen)
    return epoll_ctl(c.epfd, op, fd, &ev)


cdef void rearm(core *c, int fd, int kind, uint32_t index) noexcept nogil:
    """Have an edge-triggered descriptor that may still be readable wake a worker again."""
    watch(c, EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLET, kind, index, 0)


include "core/log.pxi"
include "core/links.pxi"
include "core/loop.pxi"
include "core/api.pxi"
