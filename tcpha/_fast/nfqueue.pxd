# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.sys cimport iovec, mmsghdr, pthread_rwlock_t

cdef enum:
    QUEUE_BATCH = 64       # packets read by one system call
    QUEUE_PACKET = 70000   # room for a message that holds a GSO packet of 64 KB
    QUEUE_HEAD = 128       # what is read where heads suffice: IP and TCP headers with all options
    HOOK_PREROUTING = 0    # NF_INET_*
    HOOK_POSTROUTING = 4

cdef enum verdict:
    V_DROP = 0             # NF_DROP
    V_ACCEPT = 1           # NF_ACCEPT
    V_KEEP = 2             # no verdict now: queue_verdict() later
    V_CHANGED = 3          # accept, with the payload that packet.data and .len say now
    V_NUMBERS = 4          # accept, with packet.mark and packet.priority for rules to write down
    V_WHOLE = 5            # of a packet whose head alone was read: to a queue that reads all of it


# A packet from the queue.
cdef struct packet:
    uint32_t id
    uint32_t hook
    uint32_t skb_info      # NFQA_SKB_*
    uint8_t *data          # from the IP header on
    uint32_t len           # of the packet
    uint32_t have          # how much of it was read; less only if the queue reads heads
    uint32_t mark          # of the skb
    uint32_t priority

cdef enum:
    SKB_CSUM_NOT_READY = 1
    SKB_GSO = 2

ctypedef int (*packet_handler)(void *self, queue *q, packet *p) noexcept nogil
ctypedef void (*batch_handler)(void *self, queue *q) noexcept nogil


cdef struct queue:
    int fd
    int stop_fd
    uint16_t num
    uint16_t whole         # the queue that reads the whole of packets; 0: this one does
    uint32_t room          # of a message
    packet_handler handle
    batch_handler done     # after each batch, or NULL
    void *self
    pthread_rwlock_t *lock  # read-locked while a batch is handled and its verdicts are sent
    uint8_t *buffers
    uint8_t *verdicts
    mmsghdr msgs[QUEUE_BATCH]
    iovec iov[QUEUE_BATCH]
    iovec out[QUEUE_BATCH * 3]
    uint64_t packets
    uint64_t bytes
    uint64_t gso           # packets that stand for several
    uint64_t overruns      # times that the socket had no room: packets were lost
    uint64_t failed        # verdicts that the kernel did not take
    uint64_t left          # packets whose head was not enough
    uint64_t cut           # packets that did not fit into a message: dropped


cdef int queue_verdict(queue *q, uint32_t id, uint32_t what) noexcept nogil


cdef class Queue:
    cdef queue *q
    cdef object sock
    cdef object stop
    cdef object thread
    cdef pthread_rwlock_t own_lock
    cdef void set_handler(self, packet_handler handle, batch_handler done, void *state,
                          pthread_rwlock_t *lock) noexcept
