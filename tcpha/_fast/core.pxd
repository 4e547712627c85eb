# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from tcpha._fast.defs cimport TCPHA_MAX_OPS, tcpha_flow
from tcpha._fast.message cimport message
from tcpha._fast.peerclock cimport peer_clock
from tcpha._fast.sys cimport pthread_mutex_t
from tcpha._fast.tls cimport tls

cdef enum:
    MAX_LINKS = 1024
    MAX_DIRTY = 64
    SCRATCH = 1 << 18      # bytes of each worker's scratch buffer
    LINK_IN = 1 << 19      # receive buffer of a control connection: holds any message
    LINK_OUT_MAX = 1 << 30  # bytes that may wait to be sent: some for each of a million flows
    LINK_BUSY = 1 << 18    # with more than so many, nothing is put there that can wait,
    LINK_FULL = 1 << 23    # nor, with so many, what can go elsewhere,
    LINK_PAUSE = 1 << 24   # and then nothing is read that would be answered,
    LINK_RESUME = 3 << 22  # until no more than these are left

cdef enum event_kind:      # top byte of epoll's data
    EV_WAKE = 1
    EV_TIMER = 2
    EV_LINK = 3
    EV_LISTENER = 4
    EV_CLIENT = 5
    EV_TAP = 6
    EV_NETLINK = 7
    EV_FAST = 8            # requests of the packet path
    EV_RING = 9            # adoptions by the packet path

cdef enum link_state:
    LINK_FREE = 0
    LINK_UP = 1
    LINK_DOWN = 2          # broken
    LINK_LEFT = 3          # Python knows, and closes it once no worker can be using it


# A control connection. 'out' is guarded by the lock; 'in' belongs to whoever holds 'readers'.
cdef struct link:
    int fd
    uint32_t state
    uint32_t gen
    uint32_t peer          # FE: index of the back end; BE: index of the front end
    uint32_t readers
    bint gone              # when it is down: the peer had closed it,
    int error              # or what the kernel says (errno)
    uint32_t asked         # BE: number of the ASK that waits for its answer
    pthread_mutex_t lock
    uint8_t *out
    uint32_t out_len
    uint32_t out_sent
    uint32_t out_cap
    bint paused            # not read until some of it is sent
    tls *tls               # or NULL: no shared secret. Guarded by the lock
    uint8_t *sealed        # what it made of the next bytes of 'out'
    uint32_t sealed_len
    uint32_t sealed_sent
    uint8_t *buf
    uint32_t buf_len
    uint64_t last_rx_ns
    uint64_t ponged        # of the latest PONG: when its PING was sent
    uint64_t since_ns
    peer_clock clock


cdef struct worker:
    uint32_t state         # 0 free, 1 running
    uint32_t busy
    uint64_t epoch         # core.epoch when the worker woke; 0 while it waits and holds nothing
    uint32_t index         # its operation slot too
    uint8_t *scratch
    link *dirty[MAX_DIRTY]
    uint32_t ndirty
    void *role             # what the role keeps for each worker


cdef struct core:
    int epfd
    int wake_fd            # semaphore eventfd: one count retires one worker
    int timer_fd
    int log_fd
    int notice_fd          # eventfd: something for Python to look at
    uint32_t stopping
    uint32_t dbglevel
    uint32_t log_lost
    uint64_t epoch
    worker workers[TCPHA_MAX_OPS]
    link links[MAX_LINKS]
    worker outside
    void *role
    void (*on_event)(core *c, worker *w, int kind, uint32_t index, uint32_t gen,
                     uint32_t events) noexcept nogil
    int (*on_message)(core *c, worker *w, link *l, message *m) noexcept nogil
    void (*on_link_down)(core *c, worker *w, link *l) noexcept nogil
    void (*on_timer)(core *c, worker *w, uint64_t now) noexcept nogil
    void (*on_retire)(core *c, worker *w) noexcept nogil


cdef uint64_t event_data(int kind, uint32_t index, uint32_t gen) noexcept nogil
cdef int watch(core *c, int op, int fd, uint32_t events, int kind, uint32_t index,
               uint32_t gen) noexcept nogil
cdef void say(core *c, uint32_t level, const char *text) noexcept nogil
cdef void say_flow(core *c, uint32_t level, const tcpha_flow *flow, const char *text) noexcept nogil
cdef void say_more(core *c, uint32_t level, const tcpha_flow *flow, const char *fmt, const char *a,
                   long b) noexcept nogil
cdef void say_number(core *c, uint32_t level, const tcpha_flow *flow, const char *fmt,
                     long a) noexcept nogil
cdef void notice(core *c) noexcept nogil
cdef bint half_closed(int fd) noexcept nogil
cdef void rearm(core *c, int fd, int kind, uint32_t index) noexcept nogil
cdef uint32_t link_queued(link *l) noexcept nogil
cdef int link_put(core *c, worker *w, link *l, const uint8_t *a, uint32_t an, const uint8_t *b,
                  uint32_t bn) noexcept nogil
cdef void link_break(core *c, worker *w, link *l, int error, bint gone) noexcept nogil


cdef class Core:
    cdef core *c
    cdef object log_file
    cdef dict fds
    cdef dict channels     # by link
    cdef object late       # what waits for workers: see later()
    cdef worker *outsider(self) except NULL
    cdef void flush_outsider(self) noexcept nogil
