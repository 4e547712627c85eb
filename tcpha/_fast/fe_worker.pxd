# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.core cimport Core, core, worker
from tcpha._fast.datapath cimport FAST_QUEUES, fe_datapath, packet_path
from tcpha._fast.defs cimport (
    TCPHA_MAX_BACKENDS, TCPHA_MAX_SERVICES, tcpha_cache, tcpha_entry, tcpha_flow, tcpha_keys,
    tcpha_load, tcpha_member)
from tcpha._fast.http cimport http_head
from tcpha._fast.match cimport hs_scratch_t, ruleset
from tcpha._fast.meter cimport histogram, slow_ones
from tcpha._fast.scan cimport question
from tcpha._fast.snapshot cimport snapshot
from tcpha._fast.sys cimport pthread_mutex_t

cdef enum:
    TRIED_WORDS = 4        # TCPHA_MAX_BACKENDS bits
    LINKS_MAX = 16         # control connections to one back end
    RETURNED = 1024        # requests that are remembered
    SIGHTED = 4096         # strings of which the verdict cache has seen one

cdef enum conn_state:
    CONN_FREE = 0
    CONN_READ = 1          # waiting for the request head
    CONN_SENT = 2          # offered to a back end, waiting for its answer
    CONN_LINGER = 3        # answered by ourselves, waiting for the client to close
    CONN_TAKEN = 4         # a back end has it, and the kernel no memory to let its packets go there
    CONN_WAIT = 5          # to be offered again, since accept queues were full

cdef enum:                 # stages of a handoff, as measured
    STAGE_HEAD = 0         # from accept() until the request head is whole
    STAGE_OFFER = 1        # from the last offer to its ADOPTED
    STAGE_TOTAL = 2        # from accept() until the connection is the back end's
    STAGE_FAST = 3         # packet path, through a worker: from the request's arrival until sent on
    STAGES = 4


# A request in the front end's hands, whatever path it has come by. It is offered to a back end,
# which has it then, or has refused it. What nobody has may be offered again.
cdef struct request:
    tcpha_flow flow
    uint32_t service       # its number
    http_head head
    uint64_t id            # of the last offer,
    uint32_t backend       # to whom,
    uint32_t rule          # and by which rule
    uint64_t began_ns      # accepted, or arrived by the packet path
    uint64_t offered_ns
    uint64_t tried[TRIED_WORDS]    # who has refused it
    uint64_t crowded[TRIED_WORDS]  # those of them whose accept queue was full


# A connection whose request comes by a socket. Guarded by its lock.
cdef struct conn:
    pthread_mutex_t lock
    uint32_t index
    uint32_t gen
    uint32_t state
    int fd
    bint frozen
    bint diverted
    bint watched
    bint method_head       # the request is a HEAD
    bint local             # the client is on our own host
    bint ended             # while in CONN_TAKEN: the back end has said CLOSED,
    bint linger            # and has a TIME_WAIT socket
    uint32_t seen          # bytes peeked so far
    uint64_t deadline_ns
    uint64_t crowded_ns    # since when it waits for room in an accept queue; or 0
    uint32_t link
    uint32_t link_gen
    request req
    snapshot snap
    tcpha_entry entry      # as the flow table has it, or will


# What a back end says of one place: see PLACE.
cdef struct place_said:
    uint8_t vaddr[16]
    uint16_t vport         # network byte order; 0: any other port
    uint64_t said


cdef struct backend:
    tcpha_member may       # take requests, or not, by this
    uint32_t missed        # what it said of ended connections may be lost
    uint32_t asked         # how often it was asked what it has,
    uint64_t asked_ns      # what began before is older than what it tells
    uint32_t told          # number of the last question that it has answered
    uint64_t server_said   # the newest SERVER
    uint32_t nplaces       # of which it has said more; guarded by place_lock
    place_said places[TCPHA_MAX_SERVICES]
    uint64_t keyed         # number of the newest cookie key that it has
    char name[48]          # its address, for messages
    uint32_t next_link
    uint32_t link[LINKS_MAX]      # indexes into core.links
    uint64_t handed
    uint64_t refused
    uint64_t returned
    uint64_t closed


cdef struct fe_counters:
    uint64_t accepted
    uint64_t handed
    uint64_t returned      # of those handed over: by the packet path, and refused; they come again
    uint64_t closed
    uint64_t refused       # offers that came to nothing; the connection went elsewhere
    uint64_t lost          # connections that ended in our hands: reset or closed by the client
    uint64_t silent        # closed by us, as no request had begun within headtimeout
    uint64_t expired
    uint64_t answered_400
    uint64_t answered_408
    uint64_t answered_431
    uint64_t answered_503
    uint64_t fast          # of those handed over: by the packet path
    uint64_t restored      # of an earlier run or another front end, and found at their back ends
    uint64_t no_descriptors  # attempts to accept without a free file descriptor
    uint64_t table_full    # connections that found no place in the flow table
    uint64_t access_lost   # lines of the access log that could not be written
    uint64_t late_bytes    # our stack took them after the snapshot; shipped behind it


cdef struct fe_worker:
    hs_scratch_t *scratch
    uint64_t scratch_of    # generation of the rules
    uint64_t *bits         # what matched last,
    uint32_t words
    ruleset *rules         # of these
    request req            # the one of the packet path that it dispatches


# A request of the packet path that back ends have returned: who has. The client sends it again.
cdef struct returned:
    uint64_t id
    uint64_t tried[TRIED_WORDS]


# A service has a number for the life of the front end: bits of masks stand for them.
cdef struct service:
    uint8_t vaddr[16]
    uint16_t vport         # network byte order
    int fd                 # its listener; -1: closed
    uint32_t open          # new connections are wanted
    uint64_t accepted      # connections that a worker has had; others the program counts


cdef struct frontend:
    core *c
    fe_datapath dp
    service services[TCPHA_MAX_SERVICES]
    uint32_t nservices     # ever: a number keeps its service, open or closed
    uint32_t headlimit
    uint64_t headtimeout_ns
    uint64_t offer_ns      # patience with a back end
    uint32_t nconns
    conn *conns
    pthread_mutex_t pool_lock
    uint32_t *pool         # free slots
    uint32_t pool_len
    uint32_t starved       # accepting waits for a free slot
    uint32_t accept_failed  # for want of descriptors, or of memory
    int access_fd          # of the access log; -1: none
    pthread_mutex_t access_lock
    uint64_t next_id
    ruleset *rules
    uint64_t key           # number of the cookie key in use
    uint32_t fast_readers[FAST_QUEUES]
    pthread_mutex_t return_lock
    uint32_t returns       # ever
    returned back[RETURNED]
    pthread_mutex_t restore_lock
    pthread_mutex_t place_lock
    backend backends[TCPHA_MAX_BACKENDS]
    packet_path no_path    # in place of a datapath's that has none: nothing comes by it
    tcpha_keys no_keys
    tcpha_cache no_cache
    uint64_t no_hits[TCPHA_MAX_SERVICES]
    tcpha_load *loads      # by back end; the packet path's
    uint64_t *rule_hits    # by rule; the packet path's
    uint64_t sighted[SIGHTED]  # hashes
    histogram stages[STAGES]
    slow_ones slow
    fe_counters n


cdef class FrontEnd(Core):
    cdef frontend *f
    cdef object datapath
    cdef uint64_t generation
    cdef int mss           # that clients are offered; 0: their interface decides
    cdef void _ask(self, worker *w, const question *q) noexcept nogil
    cdef void _offer_mss(self, uint32_t number)
