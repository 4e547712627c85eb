# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface behind which the datapaths stand, as the worker loops call it: without the GIL,
from any worker at once, each with its own index (below TCPHA_MAX_OPS). 'self' comes first.
All functions return 0 or a negative number unless said otherwise.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.defs cimport (
    tcpha_cache, tcpha_entry, tcpha_event, tcpha_flow, tcpha_gate, tcpha_keys, tcpha_load,
    tcpha_offer, tcpha_state, tcpha_verdict)
from tcpha._fast.places cimport places
from tcpha._fast.rewrite cimport tcp_view
from tcpha._fast.snapshot cimport snapshot


cdef enum:
    DP_GONE = -2           # freeze: the connection is no longer open
    DP_ALIVE = 1
    DP_TIME_WAIT = 2
    DP_CLOSING = 3         # the application has closed it, the kernel not yet
    DP_MORE = -3           # adopt, feed: the socket has not taken all bytes yet
    FAST_QUEUES = 4        # of the packet path, at most
    TABLE_PIECE = 4096     # entries that are read at one time


# A place in a table of flows; all zero: its beginning.
cdef struct table_place:
    uint32_t at
    bint begun
    bint ended


# The front end's packet path. Functions get the datapath's 'self'.
cdef struct packet_path:
    uint32_t queues        # of requests; each has one reader at a time, and a descriptor
    int fd[FAST_QUEUES]
    tcpha_keys *keys       # of cookies
    tcpha_offer *offers    # by worker: see tcpha.h
    # The next frame: TCPHA_FAST_FIRST, a request, TCPHA_FAST_LATER or _EARLY; 0: there is none.
    int (*next)(void *self, uint32_t queue, uint8_t *frame, uint32_t *length,
                tcp_view *v) noexcept nogil
    # Send a request on, as the worker's offer says.
    void (*send)(void *self, uint32_t queue, uint32_t worker, uint8_t *frame,
                 uint32_t length) noexcept nogil
    # Send on what has followed a request, in its order.
    void (*later)(void *self, uint32_t queue, uint32_t worker, uint8_t *frame,
                  uint32_t length) noexcept nogil
    # A request becomes a socket of ours.
    void (*to_socket)(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                      const tcpha_flow *flow) noexcept nogil
    # A later segment has come first: its connection becomes a socket of ours, to which it goes.
    void (*early)(void *self, uint32_t queue, uint32_t worker, uint8_t *frame, uint32_t length,
                  const tcpha_flow *flow) noexcept nogil
    # This back end did not take it: the client's next attempt is a request again. As forget().
    int (*take_back)(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                     uint32_t backend, tcpha_entry *entry) noexcept nogil
    # As ledger_drop_pending().
    uint32_t (*drop_pending)(void *self, uint32_t worker, const tcpha_flow *flow,
                             uint64_t idle) noexcept nogil
    # Verdicts that need no worker, by hash.
    tcpha_cache *cache
    void (*keep_verdict)(void *self, uint64_t key, const tcpha_verdict *verdict) noexcept nogil
    tcpha_load *loads      # by back end
    uint64_t *rule_hits    # by rule
    uint64_t *service_hits  # by number: connections that needed no worker


cdef struct fe_datapath:
    void *self
    # From now on the flow's packets are kept in user space instead of reaching our stack. 1: an
    # older flow of the same 4-tuple, of back end old.backend, is over by this.
    int (*divert)(void *self, uint32_t worker, const tcpha_flow *flow, tcpha_entry *entry,
                  tcpha_entry *old) noexcept nogil
    # Freeze the socket (idempotent) and read its state. s.flow is given; s.len becomes the number
    # of bytes in the receive queue.
    int (*freeze)(void *self, uint32_t worker, int fd, snapshot *s) noexcept nogil
    # Hand the flow to its back end, kept packets first; no packet overtakes another one. extra:
    # bytes that our stack took after the snapshot s, which end at 'now'; they are forged anew for
    # the back end. -1: there is no memory for it at present, and packets are still kept.
    int (*forward)(void *self, uint32_t worker, tcpha_entry *entry, const snapshot *now,
                   const uint8_t *extra, uint32_t extra_len, bint extra_fin) noexcept nogil
    # Whether a kept packet acknowledges what our socket has never sent: a back end has answered.
    bint (*answered)(void *self, uint32_t slot, uint32_t snd_nxt) noexcept nogil
    # Give the flow back to our own stack, kept packets too.
    int (*give_back)(void *self, const tcpha_flow *flow, uint32_t slot) noexcept nogil
    # The back end says that the connection ended. 1: it was this handoff's, and its; entry holds
    # the last state. 0: not known. linger: what the client still sends belongs to a TIME_WAIT
    # socket there.
    int (*forget)(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id,
                  uint32_t backend, bint linger, tcpha_entry *entry) noexcept nogil
    # Enter a flow that an earlier run or another front end handed over: see ledger_restore().
    int (*restore)(void *self, uint32_t worker, const tcpha_flow *flow, const tcpha_entry *entry,
                   uint64_t asked, tcpha_entry *old) noexcept nogil
    # Whether packets of unknown connections are dropped: they may be of flows not restored yet, and
    # our stack would answer them with a RST.
    void (*drop_unknown)(void *self, bint drop) noexcept nogil
    # Remove entries whose lingering is over. Called now and then.
    void (*sweep)(void *self, uint32_t worker, uint64_t now) noexcept nogil
    # Packets of diverted flows wait on the event descriptor (-1: there is none). True: there may be
    # more.
    int event_fd
    bint (*on_packets)(void *self) noexcept nogil
    tcpha_state *state     # what outlives us; NULL: nothing does
    # Copy the entries that follow a place in the table, TABLE_PIECE at most, and go there. Returns
    # how many; 0: there are no more. What comes or goes meanwhile may be among them, or not.
    int (*next_entries)(void *self, table_place *place, tcpha_flow *keys,
                        tcpha_entry *entries) noexcept nogil
    packet_path *fast      # NULL: there is none


# The back end's packet path: what the program has adopted or refused is read from its events, by
# one reader at a time. Functions get the datapath's 'self'.
cdef struct cookie_adoption:
    tcpha_gate *gate
    tcpha_keys *keys       # by front end: TCPHA_MAX_FAST
    int event_fd           # readable when an event cannot wait
    bint (*next_event)(void *self, tcpha_event *event) noexcept nogil
    # Requests that found no room wait on tap_fd: let the program have them once more. refuse: what
    # finds none then, instead of letting it wait. scratch: SCRATCH bytes. True: more may wait.
    int tap_fd
    bint (*admit)(void *self, uint8_t *scratch, bint refuse) noexcept nogil
    # Do not adopt a request with this initial sequence number for the next second.
    void (*give_up)(void *self, const tcpha_flow *flow, uint32_t isn) noexcept nogil


cdef struct be_datapath:
    void *self
    const places *places   # where connections go
    # Make the connection a socket in the application's accept queue. 0; DP_MORE: done, but the
    # socket's receive buffer is full, call feed() later; or a refusal (message.pxd).
    int (*adopt)(void *self, uint32_t worker, const snapshot *s,
                 const uint8_t *data) noexcept nogil
    # Give an adopted socket the bytes that it has not taken. 0: it has all (or is gone), DP_MORE.
    int (*feed)(void *self, uint32_t worker, const snapshot *s,
                const uint8_t *data) noexcept nogil
    # Which socket owns the flow: DP_ALIVE, DP_CLOSING, DP_TIME_WAIT, or 0 for none.
    int (*alive)(void *self, uint32_t worker, const tcpha_flow *flow) noexcept nogil
    # rcv_nxt of the socket that owns the flow. False: it is over.
    bint (*position)(void *self, uint32_t worker, const tcpha_flow *flow,
                     uint32_t *rcv_nxt) noexcept nogil
    # Turn the flow of a local socket into the one that the client sees. False: none of ours.
    bint (*outside)(void *self, tcpha_flow *flow) noexcept nogil
    # The connection is over, but for what a TIME_WAIT socket may still say.
    void (*ended)(void *self, const tcpha_flow *flow) noexcept nogil
    # Called now and then.
    void (*sweep)(void *self, uint64_t now) noexcept nogil
    cookie_adoption *fast  # NULL: there is no packet path


cdef class FeDatapath:
    """An opened front-end datapath; the base of each kind."""
    cdef fe_datapath table
    cdef packet_path path  # table.fast, where there is one


cdef class BeDatapath:
    cdef be_datapath table
    cdef cookie_adoption adoption  # table.fast, where there is one
