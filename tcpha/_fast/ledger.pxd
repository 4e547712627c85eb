# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint32_t, uint64_t

from tcpha._fast.defs cimport tcpha_entry, tcpha_flow
from tcpha._fast.sys cimport pthread_mutex_t

cdef enum:
    STRIPES = 64

cdef enum put_flag:
    PUT_ANY = 0
    PUT_NEW = 1            # only if it is not there


# Where a datapath keeps the entries of diverted flows. Each returns 0 or a negative number.
cdef struct flow_store:
    void *self
    int (*find)(void *self, const tcpha_flow *flow, tcpha_entry *entry) noexcept nogil
    int (*put)(void *self, const tcpha_flow *flow, const tcpha_entry *entry,
               int how) noexcept nogil
    int (*remove)(void *self, const tcpha_flow *flow) noexcept nogil
    # If handoff 'id' is live at a back end, it no longer is: 1; else 0. Packets do not come in
    # between. keep: the entry stays.
    int (*end)(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, uint32_t backend,
               bint keep) noexcept nogil
    # Remove an entry that is not live, if it still is the one found, in the same phase: 1; else 0.
    # Packets do not come in between.
    int (*drop)(void *self, uint32_t worker, const tcpha_flow *flow,
                const tcpha_entry *found) noexcept nogil


# A flow whose connection is over but whose client may still send: its FIN, or that again.
cdef struct lingering:
    tcpha_flow flow
    uint64_t id
    uint64_t since_ns
    uint64_t check_ns
    uint32_t next          # an index + 1, 0: none


cdef enum:  # what ledger_restore() did
    RESTORED = 1
    RESTORED_OVER = 2

cdef struct ledger:
    flow_store store
    pthread_mutex_t lock
    # A queue of cells linked by index + 1. One that was given back is used before one that never
    # was, so that no more memory is touched than so many need at one time.
    lingering *linger
    uint32_t capacity
    uint32_t fresh         # how many cells were ever used
    uint32_t free
    uint32_t first
    uint32_t last
    pthread_mutex_t stripes[STRIPES]   # a flow's entry is replaced or removed under one of them


cdef int ledger_open(ledger *l, uint32_t capacity) except -1
cdef void ledger_close(ledger *l) noexcept
cdef int ledger_divert(ledger *l, uint32_t worker, const tcpha_flow *flow, tcpha_entry *entry,
                       tcpha_entry *old) noexcept nogil
cdef int ledger_restore(ledger *l, uint32_t worker, const tcpha_flow *flow,
                        const tcpha_entry *entry, uint64_t asked,
                        tcpha_entry *old) noexcept nogil
cdef void ledger_remove(ledger *l, const tcpha_flow *flow) noexcept nogil
cdef int ledger_forget(ledger *l, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                       uint32_t backend, bint linger, tcpha_entry *entry) noexcept nogil
cdef uint32_t ledger_drop_pending(ledger *l, uint32_t worker, const tcpha_flow *flow,
                                  uint64_t idle) noexcept nogil
cdef void ledger_linger(ledger *l, const tcpha_flow *flow, uint64_t id,
                        uint64_t since) noexcept nogil
cdef void ledger_sweep(ledger *l, uint32_t worker, uint64_t now) noexcept nogil
