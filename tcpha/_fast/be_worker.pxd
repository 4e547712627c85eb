# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from tcpha._fast.core cimport Core, core
from tcpha._fast.datapath cimport be_datapath, cookie_adoption
from tcpha._fast.defs cimport TCPHA_MAX_FAST, tcpha_flow, tcpha_gate, tcpha_keys
from tcpha._fast.snapshot cimport snapshot
from tcpha._fast.sys cimport pthread_mutex_t


# Request bytes that an adopted socket had no room for.
cdef struct leftover:
    leftover *next
    snapshot snap
    uint8_t data[1]


cdef enum:
    AGAIN = 1024
    OVER = 4096


# A handoff whose connection is over.
cdef struct finished:
    uint64_t id
    tcpha_flow flow


# An adopted connection.
cdef struct adopted:
    adopted *next          # in its hash chain, or in the free list
    tcpha_flow flow
    uint64_t id            # the front end's
    uint64_t since_ns
    uint32_t link          # where it came from
    uint32_t link_gen
    uint32_t peer          # index of the front end that is told of its end first,
    bint shared            # and others know it, too
    bint untold            # who has the virtual address is to know it, and could not be told yet
    bint adopting          # its socket may not exist yet
    bint recheck           # a report came meanwhile: look again afterwards
    bint over              # closed, but the front end could not be told
    bint fast              # by the packet path: nobody waited for its socket
    bint reused            # and a report may be of an earlier one
    bint found             # in the kernel: the id is ours, until a front end knows better
    bint is_open           # nobody has seen the application close it


cdef struct be_counters:
    uint64_t adopted
    uint64_t fast          # of those: by the packet path
    uint64_t closed
    uint64_t refused[16]   # by reason
    uint64_t late          # adopted with bytes fed afterwards
    uint64_t resyncs       # end-of-connection events were lost; the table was checked


cdef struct backend_state:
    core *c
    be_datapath dp
    int netlink_fd
    uint32_t ends          # reports since the timer's last turn
    uint32_t lazy          # reports wait for the timer
    uint64_t stale_ns
    uint64_t claimed       # the newest id of our own making
    uint32_t holder        # index + 1 of the front end that has the VIP: who asked last; or 0
    uint32_t max
    uint32_t mask
    pthread_mutex_t lock   # the table
    adopted *pool
    adopted *free_list
    adopted **buckets
    uint32_t entries       # that there is room for in the table
    uint32_t live          # entries in the table,
    uint32_t opened        # and those that count for max: is_open
    pthread_mutex_t reap_lock
    uint64_t looked_ns     # when the last look for room through the whole table began
    uint32_t unloading     # refuse what comes
    cookie_adoption no_path  # in place of a datapath's that has none: it adopts nothing
    tcpha_gate no_gate
    tcpha_keys no_keys[TCPHA_MAX_FAST]
    pthread_mutex_t ring_lock  # the packet path's events
    uint32_t swept         # bucket that _sweep() has come to
    tcpha_flow again[AGAIN]  # to look at once more, at the timer's next turn; guarded by the lock
    uint32_t nagain
    finished over[OVER]    # of late, each in the place that its id says; guarded by the lock
    pthread_mutex_t feed_lock
    leftover *leftovers
    be_counters n


cdef class BackEnd(Core):
    cdef backend_state *b
    cdef object datapath
    cdef void _tell(self, const uint8_t *message, uint32_t length, links=*)
