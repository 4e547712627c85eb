# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.defs cimport tcpha_flow
from tcpha._fast.sys cimport pthread_mutex_t

cdef extern from "<linux/inet_diag.h>" nogil:
    struct inet_diag_sockid:
        uint16_t idiag_sport
        uint16_t idiag_dport
        uint32_t idiag_src[4]
        uint32_t idiag_dst[4]
        uint32_t idiag_if
        uint32_t idiag_cookie[2]
    struct inet_diag_msg:
        uint8_t idiag_family
        uint8_t idiag_state
        inet_diag_sockid id
        uint32_t idiag_rqueue
        uint32_t idiag_wqueue

cdef enum tcp_state:       # as in include/net/tcp_states.h
    TCP_ESTABLISHED = 1
    TCP_SYN_RECV = 3
    TCP_FIN_WAIT1 = 4
    TCP_FIN_WAIT2 = 5
    TCP_TIME_WAIT = 6
    TCP_CLOSE_WAIT = 8
    TCP_LAST_ACK = 9
    TCP_LISTEN = 10
    TCP_CLOSING = 11
    TCP_NEW_SYN_RECV = 12


cdef struct diag:
    int fd
    pthread_mutex_t lock
    uint32_t seq


# The socket that owns a flow. state 0: none, or a listener only.
cdef struct diag_answer:
    uint32_t state
    bint full              # a whole socket, no mini-socket (TIME_WAIT, FIN-WAIT-2 after close())
    uint32_t cookie[2]     # names this very socket
    uint64_t received      # tcpi_bytes_received, a FIN included
    bint listener          # state 0, and a SYN would find somebody who listens
    bint queue_full        # whose accept queue is full
    uint32_t device        # that the socket is bound to (SO_BINDTODEVICE); 0: to none
    bint mptcp             # it is a subflow of MPTCP's, or such a listener


cdef int diag_query(diag *d, const tcpha_flow *flow, uint32_t device, diag_answer *a) noexcept nogil
cdef int diag_refusal(diag *d, const uint8_t *addr, uint16_t port, uint32_t device) noexcept nogil
cdef bint diag_destroy(diag *d, const tcpha_flow *flow, const diag_answer *a) noexcept nogil


cdef class SockDiag:
    cdef diag d
    cdef object netlink


cdef class SockList:
    cdef object netlink
    cdef int fd
    cdef uint32_t states
    cdef int family        # that is asked for, or was
    cdef bint asked        # and not all of the answer has come
    cdef int error         # errno
    cdef uint32_t at       # in what was received last
    cdef uint32_t have
    cdef uint8_t buf[32768]
    cdef const inet_diag_msg *next(self) noexcept nogil
    cdef bint _more(self) noexcept nogil
    cdef bint _ask(self) noexcept nogil
    cdef int check(self) except -1
