# SPDX-License-Identifier: GPL-2.0-or-later
"""Looking up and destroying single sockets by their 4-tuple, listing all (NETLINK_SOCK_DIAG)."""
import os
import socket

from libc.errno cimport EPROTO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.defs cimport tcpha_flow
from tcpha._fast.message cimport REFUSE_BACKLOG, REFUSE_LISTENER
from tcpha._fast.packet cimport address_bytes
from tcpha._fast.sys cimport (
    EINTR, ENOENT, errno, htons, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, recv, send)

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info:
        uint64_t tcpi_bytes_received

cdef extern from "<linux/inet_diag.h>" nogil:
    struct inet_diag_req_v2:
        uint8_t sdiag_family
        uint8_t sdiag_protocol
        uint8_t idiag_ext
        uint32_t idiag_states
        inet_diag_sockid id
    enum:
        INET_DIAG_INFO
        INET_DIAG_ULP_INFO
        INET_ULP_INFO_NAME

cdef extern from "<linux/netlink.h>" nogil:
    struct nlmsghdr:
        uint32_t nlmsg_len
        uint16_t nlmsg_type
        uint16_t nlmsg_flags
        uint32_t nlmsg_seq
    enum:
        NLM_F_REQUEST
        NLM_F_ACK
        NLM_F_DUMP
        NLMSG_ERROR
        NLMSG_DONE
        NLA_F_NESTED

cdef enum:
    SOCK_DIAG_BY_FAMILY = 20
    SOCK_DESTROY = 21
    AF_INET = 2
    AF_INET6 = 10


cdef struct request:
    nlmsghdr head
    inet_diag_req_v2 body


cdef int _ask(diag *d, uint16_t kind, const tcpha_flow *flow, uint32_t device,
              const uint32_t *cookie, uint8_t *answer, uint32_t room) noexcept nogil:
    """Send a request and receive its answer. Its length, or a negative errno. device: a socket that
    is bound to another one is not found; cookie: NULL for any. d.lock is held."""
    cdef request r
    cdef ssize_t n
    cdef nlmsghdr *h = <nlmsghdr *>answer
    cdef int error
    d.seq += 1
    memset(&r, 0, sizeof(r))
    r.head.nlmsg_len = sizeof(r)
    r.head.nlmsg_type = kind
    r.head.nlmsg_flags = NLM_F_REQUEST | (NLM_F_ACK if kind == SOCK_DESTROY else 0)
    r.head.nlmsg_seq = d.seq
    r.body.sdiag_family = AF_INET
    r.body.sdiag_protocol = 6
    r.body.idiag_ext = 1 << (INET_DIAG_INFO - 1)
    r.body.idiag_states = <uint32_t>-1
    r.body.id.idiag_sport = flow.vport
    r.body.id.idiag_dport = flow.cport
    memcpy(r.body.id.idiag_src, flow.vaddr + 12, 4)
    memcpy(r.body.id.idiag_dst, flow.caddr + 12, 4)
    r.body.id.idiag_if = device
    r.body.id.idiag_cookie[0] = cookie[0] if cookie != NULL else <uint32_t>-1
    r.body.id.idiag_cookie[1] = cookie[1] if cookie != NULL else <uint32_t>-1
    while send(d.fd, &r, sizeof(r), 0) < 0:
        if errno != EINTR:
            return -errno
    while True:
        n = recv(d.fd, answer, room, 0)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return -errno
        if n >= <ssize_t>sizeof(nlmsghdr) and h.nlmsg_seq == d.seq:
            break
    if h.nlmsg_type == NLMSG_ERROR:
        memcpy(&error, answer + sizeof(nlmsghdr), 4)
        return error
    return <int>n


cdef int diag_query(diag *d, const tcpha_flow *flow, uint32_t device,
                    diag_answer *a) noexcept nogil:
    """Which socket owns the flow, seen from this host: vaddr and vport are local. Packets that come
    by a device (0: by none in particular) find one that is bound to it, or to none. 0 or -1."""
    cdef uint8_t buf[1024]
    cdef int n
    cdef uint32_t at = sizeof(nlmsghdr) + sizeof(inet_diag_msg)
    cdef uint16_t size, kind
    cdef tcp_info info
    cdef inet_diag_msg *answer
    memset(a, 0, sizeof(diag_answer))
    pthread_mutex_lock(&d.lock)
    n = _ask(d, SOCK_DIAG_BY_FAMILY, flow, device, NULL, buf, sizeof(buf))
    pthread_mutex_unlock(&d.lock)
    if n == -ENOENT:
        return 0
    if n < <int>at:
        return -1
    answer = <inet_diag_msg *>(buf + sizeof(nlmsghdr))
    a.state = answer.idiag_state
    a.device = answer.id.idiag_if
    memcpy(a.cookie, answer.id.idiag_cookie, sizeof(a.cookie))
    if a.state == TCP_LISTEN:
        a.state = 0
        a.listener = True
        a.queue_full = answer.idiag_rqueue > answer.idiag_wqueue  # sk_acceptq_is_full()
    while at + 4 <= <uint32_t>n:
        memcpy(&size, buf + at, 2)
        memcpy(&kind, buf + at + 2, 2)
        if size < 4 or at + size > <uint32_t>n:
            break
        if kind == INET_DIAG_INFO:
            memset(&info, 0, sizeof(info))
            memcpy(&info, buf + at + 4, min(<size_t>size - 4, sizeof(info)))
            a.full = not a.listener
            a.received = info.tcpi_bytes_received
        elif kind & ~NLA_F_NESTED == INET_DIAG_ULP_INFO and size >= 8:
            memcpy(&kind, buf + at + 6, 2)  # the first attribute within
            a.mptcp = kind == INET_ULP_INFO_NAME and size >= 8 + 6 and \
                memcmp(buf + at + 8, b"mptcp", 6) == 0
        at += (size + 3) & ~3u
    return 0


cdef int diag_refusal(diag *d, const uint8_t *addr, uint16_t port, uint32_t device) noexcept nogil:
    """Why a SYN to an address of this host (v4-mapped) and a port (network byte order) would not be
    answered if it came by a device: a refusal; or 0 if it would. If the kernel does not say: the
    accept queue is full."""
    cdef tcpha_flow anybody
    cdef diag_answer a
    memset(&anybody, 0, sizeof(anybody))
    memcpy(anybody.vaddr, addr, 16)
    anybody.vport = port
    if diag_query(d, &anybody, device, &a) < 0 or (a.listener and a.queue_full):
        return REFUSE_BACKLOG
    return 0 if a.listener else REFUSE_LISTENER


cdef bint diag_destroy(diag *d, const tcpha_flow *flow, const diag_answer *a) noexcept nogil:
    """End the socket of the flow that an answer was about (CONFIG_INET_DIAG_DESTROY). False: it is
    gone, or the kernel refuses. It is named by its cookie: without, the kernel would take whichever
    socket has the flow by now, a newer connection's or the listener."""
    cdef uint8_t buf[1024]
    cdef int rc
    if a.state == 0:
        return False
    pthread_mutex_lock(&d.lock)
    rc = _ask(d, SOCK_DESTROY, flow, a.device, a.cookie, buf, sizeof(buf))
    pthread_mutex_unlock(&d.lock)
    return rc == 0


cdef class SockDiag:
    """A netlink socket for these questions."""

    def __cinit__(self):
        pthread_mutex_init(&self.d.lock, NULL)
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                     4)  # NETLINK_SOCK_DIAG
        self.netlink.bind((0, 0))
        self.d.fd = self.netlink.fileno()

    def __dealloc__(self):
        pthread_mutex_destroy(&self.d.lock)

    def listener(self, str address, int port, list devices):
        """The listener that a SYN to an address of this host and a port would find, if it came by
        one of these devices: (index of the one that it is bound to, or 0; whether it is MPTCP's);
        None if there is none. One that is bound takes precedence, as in the kernel. If the kernel
        does not say: (0, False)."""
        cdef tcpha_flow flow
        cdef diag_answer a
        memset(&flow, 0, sizeof(flow))
        address_bytes(address, flow.vaddr)
        flow.vport = htons(port)
        found = None
        for device in devices:
            if diag_query(&self.d, &flow, device, &a) < 0:
                return 0, False
            if a.listener and (a.device or found is None):
                found = a.device, bool(a.mptcp)
        return found

    def close(self):
        self.netlink.close()


cdef class SockList:
    """TCP sockets of this host, IPv4's and then IPv6's. states: a bit for each, 1 << TCP_*. Raises
    OSError."""

    def __cinit__(self, uint32_t states):
        self.states = states
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                     4)  # NETLINK_SOCK_DIAG
        self.netlink.bind((0, 0))
        self.fd = self.netlink.fileno()

    cdef const inet_diag_msg *next(self) noexcept nogil:
        """The next one. NULL: that were all, or it went wrong, see check()."""
        cdef nlmsghdr *h
        cdef const uint8_t *body
        while self.error == 0:
            if self.at == self.have and not self._more():
                break
            h = <nlmsghdr *>(self.buf + self.at)
            body = self.buf + self.at + sizeof(nlmsghdr)
            if self.have - self.at < sizeof(nlmsghdr) or h.nlmsg_len > self.have - self.at or \
                    h.nlmsg_len < sizeof(nlmsghdr) + (
                        sizeof(inet_diag_msg) if h.nlmsg_type == SOCK_DIAG_BY_FAMILY else
                        sizeof(int)):
                self.error = EPROTO
                break
            self.at = min(self.at + ((h.nlmsg_len + 3) & ~3u), self.have)
            if h.nlmsg_type == SOCK_DIAG_BY_FAMILY:
                return <const inet_diag_msg *>body
            if h.nlmsg_type == NLMSG_DONE or h.nlmsg_type == NLMSG_ERROR:
                self.asked = False
                memcpy(&self.error, body, sizeof(int))
                self.error = -self.error
        return NULL

    cdef bint _more(self) noexcept nogil:
        """Receive what follows. False: there is nothing, or it went wrong."""
        cdef ssize_t n
        if not self.asked and not self._ask():
            return False
        n = recv(self.fd, self.buf, sizeof(self.buf), 0)
        while n < 0 and errno == EINTR:
            n = recv(self.fd, self.buf, sizeof(self.buf), 0)
        if n < 0:
            self.error = errno
        self.at = 0
        self.have = <uint32_t>max(n, <ssize_t>0)
        return n > 0

    cdef bint _ask(self) noexcept nogil:
        """Ask for the sockets of the next family. False: that were both, or it went wrong."""
        cdef request r
        if self.family == AF_INET6:
            return False
        self.family = AF_INET6 if self.family == AF_INET else AF_INET
        memset(&r, 0, sizeof(r))
        r.head.nlmsg_len = sizeof(r)
        r.head.nlmsg_type = SOCK_DIAG_BY_FAMILY
        r.head.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP
        r.body.sdiag_family = <uint8_t>self.family
        r.body.sdiag_protocol = 6
        r.body.idiag_states = self.states
        self.asked = True
        if send(self.fd, &r, sizeof(r), 0) < 0:
            self.error = errno
            return False
        return True

    cdef int check(self) except -1:
        self.netlink.close()
        if self.error:
            raise OSError(self.error, f"cannot list sockets: {os.strerror(self.error)}")
        return 0
