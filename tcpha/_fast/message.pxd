# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.defs cimport tcpha_flow
from tcpha._fast.snapshot cimport snapshot

cdef enum:
    MSG_MAGIC = 0x5443          # "TC"
    MSG_VERSION = 7             # changes with what cookies and tags are made of, too
    MSG_HEADER = 16
    MSG_HANDOFF_FIXED = MSG_HEADER + 8 + 36 + 7 * 4 + 2 + 2 + 2
    MSG_CLOSED_SIZE = MSG_HEADER + 36 + 4
    MSG_OWNED_SIZE = MSG_HEADER + 36
    MSG_REFUSED_SIZE = MSG_HEADER + 4
    MSG_KEYS_SIZE = MSG_HEADER + 16
    MSG_PONG_SIZE = MSG_HEADER + 8
    MSG_PLACE_SIZE = MSG_HEADER + 16 + 2 + 6
    MSG_MAX_DATA = 1 << 18
    MSG_MAX = MSG_HANDOFF_FIXED + MSG_MAX_DATA

cdef enum message_type:
    MSG_HELLO = 1      # both, first: body is JSON, see tcpha/control/hello.py; id: protocol version
    MSG_HANDOFF = 2    # FE: id: handoff id
    MSG_ADOPTED = 3    # BE: id: handoff id
    MSG_REFUSED = 4    # BE: id: handoff id; body: reason
    MSG_CLOSED = 5     # BE: id: handoff id; body: flow
    MSG_PING = 6       # both: id: sender's clock
    MSG_PONG = 7       # both: id: the ping's; body: sender's clock
    MSG_OWNED = 8      # FE, to a BE that was started anew: id: handoff id; body: flow
    MSG_KEYS = 10      # FE: id: number of the key << 8 | window scale; body: it
    MSG_KEYED = 11     # BE: id: the one of KEYS; from now on it knows cookies made with it. 0: none
    MSG_RETURN = 12    # BE: a request of the packet path, not taken: as CLOSED; body: flow, reason
    MSG_ASK = 17       # FE: tell what there is; id: a number of its own, which grows
    MSG_FLOW = 13      # BE, to an FE that may not know it: as CLOSED; body: flow, rcv_nxt
    MSG_TOLD = 14      # BE: that was all it has; id: the one of ASK
    MSG_DOUBT = 16     # FE: as OWNED, if nothing shows that the request arrived
    MSG_MISSED = 15    # BE: a control connection broke, and what it said there may be lost
    MSG_SERVER = 9     # BE: id: 2 * a growing number, + 1 if the application listens
    MSG_PLACE = 18     # BE, to an FE whose HELLO has ports: as SERVER, of one place; body: it

cdef enum refusal:
    REFUSE_FULL = 1         # maxclients reached
    REFUSE_BACKLOG = 2      # the application's accept queue is full
    REFUSE_LISTENER = 3     # nothing listens on redirectaddr:redirectport
    REFUSE_STALE = 4        # the message waited too long; the FE has given up by now
    REFUSE_UNSUPPORTED = 5  # the kernel refuses the connection's options (MSS below 536)
    REFUSE_ERROR = 6
    REFUSE_TIMEOUT = 7      # FE only: no answer
    REFUSE_LINK = 8         # FE only: the control connection broke
    REFUSE_LOST = 9         # the request did not arrive


cdef enum ending:
    END_GONE = 0            # nothing is left of the connection
    END_TIME_WAIT = 1       # a TIME_WAIT socket answers what the client may still send


# One decoded message; data points into the buffer.
cdef struct message:
    uint8_t type
    uint32_t length
    uint64_t id
    uint64_t sent_ns       # HANDOFF, PONG: the sender's CLOCK_MONOTONIC
    uint32_t reason        # REFUSED, RETURN: a refusal; CLOSED: an ending; FLOW: rcv_nxt
    # HANDOFF; CLOSED, OWNED, DOUBT, RETURN, FLOW: flow only; PLACE: of that, vaddr and vport only
    snapshot snap
    const uint8_t *data    # HANDOFF, HELLO, KEYS
    uint32_t data_len


cdef uint32_t message_handoff(uint8_t *to, uint64_t id, const snapshot *s) noexcept nogil
cdef uint32_t message_short(uint8_t *to, uint8_t kind, uint64_t id) noexcept nogil
cdef uint32_t message_pong(uint8_t *to, uint64_t id) noexcept nogil
cdef uint32_t message_refused(uint8_t *to, uint64_t id, uint32_t reason) noexcept nogil
cdef uint32_t message_closed(uint8_t *to, uint64_t id, const tcpha_flow *flow,
                             uint32_t reason) noexcept nogil
cdef uint32_t message_return(uint8_t *to, uint64_t id, const tcpha_flow *flow,
                             uint32_t reason) noexcept nogil
cdef uint32_t message_flow(uint8_t *to, uint64_t id, const tcpha_flow *flow,
                           uint32_t rcv_nxt) noexcept nogil
cdef uint32_t message_keys(uint8_t *to, uint64_t id, const uint64_t *key) noexcept nogil
cdef uint64_t fast_id(uint32_t isn, uint32_t ours) noexcept nogil
cdef uint32_t fast_isn(uint64_t id) noexcept nogil
cdef uint32_t message_owned(uint8_t *to, uint64_t id, const tcpha_flow *flow) noexcept nogil
cdef uint32_t message_doubt(uint8_t *to, uint64_t id, const tcpha_flow *flow) noexcept nogil
cdef uint32_t message_place(uint8_t *to, uint64_t said, const uint8_t *vaddr,
                            uint16_t vport) noexcept nogil
cdef const char *refusal_text(uint32_t reason) noexcept nogil
cdef int message_decode(const uint8_t *buf, uint32_t length, message *m) noexcept nogil
