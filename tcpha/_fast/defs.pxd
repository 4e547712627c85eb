# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shared with the BPF programs: headers of tcpha/_bpf without .bpf in their names."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "frame.h" nogil:
    enum:
        TCPHA_ETH_OP
        TCPHA_MAC_MARK
        TCPHA_MAC_KEPT
        TCPHA_MAC_FAST
        TCPHA_MAC_ROOM
        TCPHA_MAC_ADOPT
        TCPHA_MAC_PLAIN
        TCPHA_FAST_FIRST
        TCPHA_FAST_LATER
        TCPHA_FAST_SEND
        TCPHA_FAST_SOCKET
        TCPHA_FAST_EARLY
        TCPHA_FAST_PASSED

    struct tcpha_frame:
        uint16_t mark
        uint32_t slot
        uint8_t full
        uint8_t kind
        uint16_t worker

cdef extern from "tcpha.h" nogil:
    enum:
        TCPHA_MAX_BACKENDS
        TCPHA_MAX_RULES
        TCPHA_MAX_SERVICES
        TCPHA_CLOSED
        TCPHA_MAX_ROUTES
        TCPHA_LOCAL_NODE
        TCPHA_MAX_OPS
        TCPHA_LOCKED_OP
        TCPHA_TARGET_MAX
        TCPHA_MARK_FORGED
        TCPHA_MARK_FRAGMENT
        TCPHA_MAX_FAST
        TCPHA_MAX_VIPS
        TCPHA_HEAD_MAX
        TCPHA_LINE_MAX
        TCPHA_CHOICES
        TCPHA_STATE_VERSION
        TCPHA_F_FIN
        TCPHA_F_RST
        TCPHA_F_ANSWERED
        TCPHA_GIVEN_UP
        TCPHA_F_FAST
        TCPHA_DIRECT
        TCPHA_TUNNEL
        TCPHA_LOCAL
        TCPHA_OP_QUERY
        TCPHA_OP_ADOPT
        TCPHA_OP_END
        TCPHA_OP_TAKE_BACK
        TCPHA_OP_DROP
        TCPHA_OP_HAND_OVER
        TCPHA_OP_LET_FLOW
        TCPHA_OP_GIVE_BACK
        TCPHA_FLOWING
        TCPHA_R_NONE
        TCPHA_R_OK
        TCPHA_R_NO_LISTENER
        TCPHA_R_ASSIGN
        TCPHA_R_NO_SOCKET
        TCPHA_R_TIME_WAIT
        TCPHA_R_LIVE
        TCPHA_R_BACKLOG
        TCPHA_R_FULL

    struct tcpha_flow:
        uint8_t caddr[16]
        uint8_t vaddr[16]
        uint16_t cport
        uint16_t vport

    struct tcpha_entry:
        uint64_t id
        uint64_t start_ns
        uint64_t last_ns
        uint64_t packets
        uint64_t bytes
        uint64_t phase
        uint32_t tag
        uint32_t backend
        uint32_t slot
        uint32_t flags
        uint32_t rule
        uint32_t end_seq
        uint32_t ahead_seq
        uint32_t ahead_end
        uint32_t syn_seq
        uint32_t first_seq
        uint32_t held
        uint32_t first_ack
        uint16_t rtt_ms
        uint16_t target_len
        char target[TCPHA_TARGET_MAX]

    struct tcpha_backend:
        uint32_t ifindex
        uint32_t mode
        uint32_t down
        uint32_t mtu
        uint8_t nexthop[16]
        uint8_t addr[16]
        uint8_t src[16]

    struct tcpha_op:
        tcpha_flow flow
        uint32_t kind
        uint32_t result
        int32_t error
        uint64_t id
        uint64_t phase
        uint32_t slot
        uint32_t keep
        uint32_t backend
        uint32_t rule
        uint32_t flags
        uint32_t end_seq
        uint32_t held
        uint32_t done
        uint16_t mss
        uint8_t snd_wscale
        uint8_t rcv_wscale
        uint8_t wscale_ok
        uint8_t sack_ok
        uint8_t tstamp_ok
        uint8_t usec_ts_ok
        uint8_t ecn_ok
        uint32_t tsval
        uint32_t ts_recent
        uint32_t state
        uint32_t snd_nxt
        uint32_t snd_wnd
        uint32_t rcv_nxt
        uint32_t rcv_wnd
        uint32_t copied_seq
        uint32_t srtt_us

    struct tcpha_counters:
        uint64_t forwarded
        uint64_t forwarded_bytes
        uint64_t held
        uint64_t live_syn
        uint64_t unreachable
        uint64_t guarded
        uint64_t foreign
        uint64_t decapsulated
        uint64_t cookies
        uint64_t requests
        uint64_t cached
        uint64_t forged
        uint64_t adopted
        uint64_t yielded
        uint64_t again
        uint64_t icmp
        uint64_t too_big
        uint64_t not_ect
        uint64_t wary

    struct tcpha_guesses:
        uint64_t until_ns

    struct tcpha_keys:
        uint64_t key[2][2]
        uint32_t current
        uint32_t used
        uint32_t wscale
        uint64_t clock
    uint64_t TCPHA_CLOCK(uint64_t ahead_ms, uint64_t slack_ms)

    struct tcpha_state:
        tcpha_keys keys
        uint64_t key_number
        uint32_t version
        uint32_t drop_unknown
        uint32_t mtu

    struct tcpha_service:
        uint8_t vaddr[16]
        uint16_t vport

    struct tcpha_adoption:
        uint64_t at_ns
        uint32_t isn
        uint32_t state

    struct tcpha_cache:
        uint64_t key[2]
        uint64_t generation
        uint32_t on

    struct tcpha_choice:
        uint32_t backend
        uint32_t rule

    struct tcpha_verdict:
        uint64_t key
        uint64_t generation
        uint64_t until_ns
        uint32_t count
        tcpha_choice choice[TCPHA_CHOICES]

    struct tcpha_route:
        uint32_t prefixlen
        uint32_t ifindex
        uint8_t addr[16]

    struct tcpha_load:
        uint64_t handed
        uint64_t closed
        uint32_t live

    struct tcpha_offer:
        uint64_t id
        uint64_t start_ns
        uint32_t backend
        uint32_t rule
        uint32_t target_len
        uint32_t result
        uint32_t old
        uint32_t alone
        uint32_t rtt_ms
        char target[TCPHA_TARGET_MAX]

    struct tcpha_shaken:
        uint64_t since_ns
        uint32_t isn
        uint32_t ours
        uint32_t rtt_ms
        uint32_t tsval
        uint32_t tsecr
        uint16_t window
        uint8_t timestamps

    struct tcpha_gate:
        uint32_t max
        uint32_t live
        uint32_t coming

    struct tcpha_place:
        uint8_t vaddr[16]
        uint16_t vport

    struct tcpha_listener:
        uint8_t addr[16]
        uint16_t port
        uint32_t device

    struct tcpha_event:
        uint64_t at_ns
        tcpha_flow flow
        uint32_t isn
        uint32_t ours
        uint32_t frontend
        uint32_t result
        uint32_t reused

    struct tcpha_fe_conf:
        uint32_t tap
        uint32_t fast_tap
        uint16_t headers
        uint16_t window
        uint8_t wscale
        uint8_t options

    struct tcpha_be_conf:
        uint8_t vips[TCPHA_MAX_VIPS][16]
        uint8_t raddr[16]
        uint32_t nvips
        uint32_t tap
        uint32_t fast


cdef extern from "siphash.h" nogil:
    uint64_t tcpha_siphash(const uint8_t *p, uint32_t n, uint64_t k0, uint64_t k1)


cdef extern from "flow.h" nogil:
    enum:
        TCPHA_TO_STACK
        TCPHA_TO_LIVE
        TCPHA_LINGERING
    uint32_t tcpha_tag(const tcpha_flow *flow)
    uint32_t tcpha_state_of(const tcpha_entry *e)
    int tcpha_is_pending(uint32_t state)
    int tcpha_is_forwarded(uint32_t state)
    uint32_t tcpha_owed(uint64_t phase, uint32_t backend)
    uint64_t tcpha_live(const tcpha_entry *e)
    void tcpha_hold(tcpha_entry *e, uint32_t slot)
    void tcpha_forward(tcpha_entry *e, uint64_t id)
    int tcpha_end(tcpha_entry *e, uint64_t id, int keep)
    int tcpha_drop(tcpha_entry *e, uint64_t found)
    int tcpha_classify(tcpha_entry *e, uint8_t flags, uint32_t seq, uint32_t length, uint64_t now)


cdef extern from "choose.h" nogil:
    enum:
        TCPHA_MAY
        TCPHA_AWAY
        TCPHA_DEAD
        TCPHA_DRAINED
        TCPHA_DEAF
        TCPHA_FULL

    struct tcpha_member:
        uint32_t used
        uint32_t links
        uint32_t dead
        uint32_t full_live
        uint64_t full_until_ns
        uint64_t draining
        uint64_t app_down
        uint64_t lacking

    uint64_t tcpha_service_word(const tcpha_flow *flow)
    uint32_t tcpha_refusal(const tcpha_member *m, uint64_t service, uint32_t live, int tried,
                           int desperate, uint64_t now)
    int tcpha_choose(const tcpha_choice *of, uint32_t count, uint32_t room, uint64_t number,
                     void *loads)
