# SPDX-License-Identifier: GPL-2.0-or-later
"""Netfilter queues, read and answered in batches without the GIL.

The netlink socket itself is used (linux/netfilter/nfnetlink_queue.h), since GSO packets must come
whole (NFQA_CFG_F_GSO) and many verdicts must share a system call.
"""
import errno as errors
import os
import socket
import struct
import threading

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from tcpha._fast.rewrite cimport checksum_full, get32, tcp_parse, tcp_view
from tcpha._fast.sys cimport (
    EINTR, ENOBUFS, MSG_DONTWAIT, POLLIN, add64, errno, htonl, htons, iovec, load64, msghdr,
    poll, pollfd, pthread_rwlock_rdlock, pthread_rwlock_t, pthread_rwlock_unlock, recvmmsg,
    rwlock_init, sched_yield, sendmsg, set64)

cdef enum:
    NETLINK_NETFILTER = 12
    SUBSYS_QUEUE = 3       # NFNL_SUBSYS_QUEUE
    MSG_PACKET = 0         # NFQNL_MSG_*
    MSG_VERDICT = 1
    MSG_CONFIG = 2
    CFG_CMD = 1            # NFQA_CFG_*
    CFG_PARAMS = 2
    CFG_QUEUE_MAXLEN = 3
    CFG_MASK = 4
    CFG_FLAGS = 5
    CMD_BIND = 1
    CFG_F_GSO = 4
    COPY_PACKET = 2
    ATTR_PACKET_HDR = 1    # NFQA_*
    ATTR_VERDICT_HDR = 2
    ATTR_MARK = 3
    ATTR_PAYLOAD = 10
    ATTR_CAP_LEN = 13
    ATTR_SKB_INFO = 14
    ATTR_PRIORITY = 21     # read since Linux 5.18; unknown attributes are ignored
    NF_QUEUE = 3
    NLMSG_ERROR = 2
    NLM_F_REQUEST = 1
    NLM_F_ACK = 4
    VERDICT_SIZE = 48      # of a verdict message without the payload, at most
    ROOM_FOR_HEAD = 1024   # of a message without the payload, and QUEUE_HEAD bytes of that
    A_MARK = 0x10203040    # any numbers, to try whether they reach rules
    A_PRIORITY = 0x50607080
    YIELDS = 4             # chances for others to run before we sleep: waking us costs them more
    FLUSH_BYTES = 1 << 18  # verdicts sent in one go
    BUFFER = 16 << 20      # of the socket
    MAXLEN = 8192          # packets that may wait in the kernel


PROBE_MARK, PROBE_PRIORITY = A_MARK, A_PRIORITY


cdef uint32_t _attr32(uint8_t *to, uint16_t kind, uint32_t value) noexcept nogil:
    """An attribute of one number, in network byte order."""
    cdef uint16_t size = 8
    value = htonl(value)
    memcpy(to, &size, 2)
    memcpy(to + 2, &kind, 2)
    memcpy(to + 4, &value, 4)
    return 8


cdef uint32_t _verdict(uint8_t *to, uint16_t num, const packet *p, int what,
                       uint16_t whole) noexcept nogil:
    """Write a verdict message, up to where the payload begins. Returns the size of what was
    written; the payload and its padding follow, if 'what' is V_CHANGED."""
    cdef uint32_t v, n = 32
    cdef uint16_t w
    memset(to, 0, VERDICT_SIZE)
    w = (SUBSYS_QUEUE << 8) | MSG_VERDICT
    memcpy(to + 4, &w, 2)
    w = NLM_F_REQUEST
    memcpy(to + 6, &w, 2)
    w = htons(num)         # struct nfgenmsg: family and version 0, the queue's number
    memcpy(to + 18, &w, 2)
    w = 12
    memcpy(to + 20, &w, 2)
    w = ATTR_VERDICT_HDR
    memcpy(to + 22, &w, 2)
    v = htonl(V_DROP if what == V_DROP else
              NF_QUEUE | (<uint32_t>whole << 16) if what == V_WHOLE else V_ACCEPT)
    memcpy(to + 24, &v, 4)
    v = htonl(p.id)
    memcpy(to + 28, &v, 4)
    if what == V_NUMBERS:
        n += _attr32(to + n, ATTR_MARK, p.mark)
        n += _attr32(to + n, ATTR_PRIORITY, p.priority)
    elif what != V_DROP and p.mark and p.hook == HOOK_POSTROUTING:
        n += _attr32(to + n, ATTR_MARK, 0)  # or rules would take it for a number of ours
    v = n
    if what == V_CHANGED:
        v = n + 4 + p.len
        w = <uint16_t>(4 + p.len)
        memcpy(to + n, &w, 2)
        w = ATTR_PAYLOAD
        memcpy(to + n + 2, &w, 2)
        n += 4
    memcpy(to, &v, 4)
    return n


cdef void _send(queue *q, const iovec *iov, uint32_t n) noexcept nogil:
    cdef msghdr m
    memset(&m, 0, sizeof(m))
    m.msg_iov = <iovec *>iov
    m.msg_iovlen = n
    while sendmsg(q.fd, &m, 0) < 0:
        if errno != EINTR:
            add64(&q.failed, 1)
            return


cdef int queue_verdict(queue *q, uint32_t id, uint32_t what) noexcept nogil:
    """The verdict on a packet that was kept, V_DROP or V_ACCEPT. From any thread."""
    cdef uint8_t buf[VERDICT_SIZE]
    cdef iovec iov
    cdef packet p
    memset(&p, 0, sizeof(p))
    p.id = id
    iov.iov_base = buf
    iov.iov_len = _verdict(buf, q.num, &p, what, 0)
    _send(q, &iov, 1)
    return 0


cdef bint _decode(uint8_t *p, uint32_t length, packet *out) noexcept nogil:
    """One netlink message. False: no packet."""
    cdef uint32_t at = 20, size, total
    cdef uint16_t kind
    memset(out, 0, sizeof(packet))
    if length < 20:
        return False
    memcpy(&total, p, 4)
    memcpy(&kind, p + 4, 2)
    if kind != ((SUBSYS_QUEUE << 8) | MSG_PACKET) or total > length:
        return False
    while at + 4 <= total:
        memcpy(&kind, p + at, 2)
        size = kind
        memcpy(&kind, p + at + 2, 2)
        if size < 4 or at + size > total:
            return False
        kind &= 0x3fff     # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
        if kind == ATTR_PACKET_HDR and size >= 11:
            out.id = get32(p + at + 4)
            out.hook = p[at + 10]
        elif kind == ATTR_SKB_INFO and size >= 8:
            out.skb_info = get32(p + at + 4)
        elif kind == ATTR_MARK and size >= 8:
            out.mark = get32(p + at + 4)
        elif kind == ATTR_PRIORITY and size >= 8:
            out.priority = get32(p + at + 4)
        elif kind == ATTR_CAP_LEN and size >= 8:
            out.len = get32(p + at + 4)
        elif kind == ATTR_PAYLOAD:
            out.data = p + at + 4
            out.have = size - 4
        at += (size + 3) & ~3u
    out.len = max(out.len, out.have)  # CAP_LEN is there only if the packet was cut short
    return out.data != NULL


cdef void _handle(queue *q, int count) noexcept nogil:
    cdef int i, what
    cdef uint32_t n = 0, total = 0, size, pad
    cdef packet p
    cdef uint8_t *head
    cdef uint8_t zero[4]
    memset(zero, 0, 4)
    pthread_rwlock_rdlock(q.lock)
    for i in range(count):
        if not _decode(q.buffers + <size_t>i * q.room, q.msgs[i].msg_len, &p):
            add64(&q.failed, 1)  # the kernel's complaint about a verdict
            continue
        set64(&q.packets, q.packets + 1)
        set64(&q.bytes, q.bytes + p.len)
        if p.skb_info & SKB_GSO:
            set64(&q.gso, q.gso + 1)
        if p.have < p.len and not q.whole:
            # 4 bytes short of 64 KB is the most that the kernel copies; GRO may make more. It comes
            # again in smaller packets; a part of it must not pass for the whole.
            set64(&q.cut, q.cut + 1)
            what = V_DROP
        else:
            what = q.handle(q.self, q, &p)
        if what == V_KEEP:
            continue
        if what == V_WHOLE:
            set64(&q.left, q.left + 1)
        head = q.verdicts + i * VERDICT_SIZE
        size = p.len if what == V_CHANGED else 0
        q.out[n].iov_base = head
        q.out[n].iov_len = _verdict(head, q.num, &p, what, q.whole)
        n += 1
        if size:
            q.out[n].iov_base = p.data
            q.out[n].iov_len = size
            n += 1
            pad = -size & 3
            if pad:
                q.out[n].iov_base = zero
                q.out[n].iov_len = pad
                n += 1
        total += size + VERDICT_SIZE
        if total > FLUSH_BYTES:
            _send(q, q.out, n)
            n = total = 0
    if n:
        _send(q, q.out, n)
    if q.done != NULL:
        q.done(q.self, q)
    pthread_rwlock_unlock(q.lock)


cdef void _loop(queue *q) noexcept nogil:
    cdef pollfd fds[2]
    cdef int n, idle = 0
    fds[0].fd = q.fd
    fds[1].fd = q.stop_fd
    fds[0].events = fds[1].events = POLLIN
    while True:
        n = recvmmsg(q.fd, q.msgs, QUEUE_BATCH, MSG_DONTWAIT, NULL)
        if n > 0:
            _handle(q, n)
            idle = 0
            continue
        if errno == ENOBUFS:
            add64(&q.overruns, 1)
            continue
        idle += 1
        if idle <= YIELDS:
            sched_yield()
            continue
        fds[0].revents = fds[1].revents = 0
        poll(fds, 2, -1)
        if fds[1].revents:
            return


def _attribute(int kind, bytes data):
    return struct.pack("=HH", 4 + len(data), kind) + data.ljust((len(data) + 3) & ~3, b"\0")


cdef int _pass(void *self, queue *q, packet *p) noexcept nogil:
    cdef tcp_view v
    if p.skb_info & (SKB_CSUM_NOT_READY | SKB_GSO) == SKB_CSUM_NOT_READY and \
            tcp_parse(p.data, p.len, &v) == 0:
        checksum_full(&v)  # the device that was to do it does not, once the packet is replaced
    return V_CHANGED


cdef int _number(void *self, queue *q, packet *p) noexcept nogil:
    p.mark = A_MARK
    p.priority = A_PRIORITY
    return V_NUMBERS


cdef class Queue:
    """One queue and the thread that serves it.

    num: the queue's number; maxlen: the most packets that wait in the kernel; gso: take packets
    larger than the MTU as they are, instead of their segments; whole: read heads only, and leave
    what needs more to the queue of that number. Raises OSError; EBUSY, or EPERM as some kernels
    say, if somebody else has the number.
    """

    def __cinit__(self, int num, int maxlen=MAXLEN, bint gso=True, int whole=0):
        cdef int i, flags = CFG_F_GSO if gso else 0
        self.q = <queue *>calloc(1, sizeof(queue))
        if self.q == NULL:
            raise MemoryError
        self.q.num = num
        self.q.whole = whole
        self.q.room = ROOM_FOR_HEAD if whole else QUEUE_PACKET
        self.q.buffers = <uint8_t *>malloc(QUEUE_BATCH * <size_t>self.q.room)
        self.q.verdicts = <uint8_t *>malloc(QUEUE_BATCH * VERDICT_SIZE)
        if self.q.buffers == NULL or self.q.verdicts == NULL:
            raise MemoryError
        for i in range(QUEUE_BATCH):
            self.q.iov[i].iov_base = self.q.buffers + <size_t>i * self.q.room
            self.q.iov[i].iov_len = self.q.room
            self.q.msgs[i].msg_hdr.msg_iov = &self.q.iov[i]
            self.q.msgs[i].msg_hdr.msg_iovlen = 1
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                  NETLINK_NETFILTER)
        try:
            self.sock.bind((0, 0))
            self.sock.setsockopt(socket.SOL_SOCKET, 33, BUFFER)  # SO_RCVBUFFORCE
            self.sock.setsockopt(socket.SOL_SOCKET, 32, BUFFER)  # SO_SNDBUFFORCE
            self._configure(_attribute(CFG_CMD, struct.pack("!BBH", CMD_BIND, 0, 0)))
            self._configure(_attribute(CFG_PARAMS, struct.pack(
                "!IB", QUEUE_HEAD if whole else 0xffff, COPY_PACKET))
                            + _attribute(CFG_FLAGS, struct.pack("!I", flags))
                            + _attribute(CFG_MASK, struct.pack("!I", CFG_F_GSO))
                            + _attribute(CFG_QUEUE_MAXLEN, struct.pack("!I", maxlen)))
        except BaseException:
            self.sock.close()
            raise
        self.stop = os.eventfd(0, os.EFD_CLOEXEC)
        self.q.fd = self.sock.fileno()
        self.q.stop_fd = self.stop

    def __dealloc__(self):
        if self.q != NULL:
            free(self.q.buffers)
            free(self.q.verdicts)
            free(self.q)

    def _configure(self, bytes attributes):
        self.sock.send(struct.pack("=IHHIIBBH", 20 + len(attributes),
                                   SUBSYS_QUEUE << 8 | MSG_CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, 0,
                                   0, 0, socket.htons(self.q.num)) + attributes)
        while True:
            answer = self.sock.recv(1 << 17)
            if struct.unpack_from("=H", answer, 4)[0] == NLMSG_ERROR:
                break
        error = -struct.unpack_from("=i", answer, 16)[0]
        if error:
            raise OSError(error, f"netfilter queue {self.q.num}: {os.strerror(error)}")

    cdef void set_handler(self, packet_handler handle, batch_handler done, void *state,
                          pthread_rwlock_t *lock) noexcept:
        self.q.handle = handle
        self.q.done = done
        self.q.self = state
        self.q.lock = lock

    @property
    def num(self):
        return self.q.num

    def pass_all(self):
        """Give back each packet whole, as it came; for benchmarks."""
        rwlock_init(&self.own_lock)
        self.set_handler(_pass, NULL, NULL, &self.own_lock)

    def pass_numbers(self):
        """Give each packet PROBE_MARK and PROBE_PRIORITY."""
        rwlock_init(&self.own_lock)
        self.set_handler(_number, NULL, NULL, &self.own_lock)

    def start(self):
        """Serve the queue in a thread of its own."""
        self.thread = threading.Thread(target=self._run, name=f"queue {self.q.num}", daemon=True)
        self.thread.start()

    def _run(self):
        with nogil:
            _loop(self.q)

    def close(self):
        """Stop the thread and leave the queue."""
        os.eventfd_write(self.stop, 1)
        if self.thread is not None:
            self.thread.join()
        self.sock.close()
        os.close(self.stop)

    def counters(self):
        return {"packets": load64(&self.q.packets), "bytes": load64(&self.q.bytes),
                "gso": load64(&self.q.gso), "overruns": load64(&self.q.overruns),
                "failed": load64(&self.q.failed), "left": load64(&self.q.left),
                "cut": load64(&self.q.cut)}


def open_queues(int count, int first=1, int maxlen=MAXLEN, bint heads=False):
    """'count' queues with consecutive numbers that nobody uses, from 'first' on; heads: and as many
    again that read heads only. Raises OSError."""
    cdef list queues = []
    num = first
    while len(queues) < (2 * count if heads else count):
        if num > 65535:
            raise OSError(errors.EBUSY, "no free netfilter queues")
        try:
            queues.append(Queue(num, maxlen, True, num - count if len(queues) >= count else 0))
        except OSError as error:
            for q in queues:
                q.close()
            queues.clear()
            if error.errno not in (errors.EBUSY, errors.EPERM):
                raise
        num += 1
    return queues
