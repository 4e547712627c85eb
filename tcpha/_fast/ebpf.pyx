# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'ebpf': packets stay in the kernel, nothing is rewritten.

Both sides own a TAP device. A frame written to it has been handled by the BPF program, and if it
passed by the network stack, when write() returns; that makes it a synchronous call into the kernel
for look-ups (operation frames) and for adoption (forged segments).
"""
import os

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.bpf cimport (
    BPF_ANY, BPF_EXIST, BPF_NOEXIST, Object, __sk_buff, bpf_map_delete_elem, bpf_map_get_next_key,
    bpf_map_lookup_batch, bpf_map_lookup_elem, bpf_map_update_elem, bpf_prog_test_run_opts,
    bpf_test_run_opts)
from tcpha._fast.bpf import possible_cpus
from tcpha._fast.core cimport SCRATCH
from tcpha._fast.datapath cimport (
    DP_ALIVE, DP_CLOSING, DP_GONE, DP_MORE, DP_TIME_WAIT, FAST_QUEUES, TABLE_PIECE, BeDatapath,
    FeDatapath, cookie_adoption, packet_path, table_place)
from tcpha._fast.defs cimport (
    TCPHA_DIRECT, TCPHA_ETH_OP, TCPHA_FAST_EARLY, TCPHA_FAST_FIRST, TCPHA_FAST_LATER,
    TCPHA_FAST_PASSED, TCPHA_FAST_SEND, TCPHA_FAST_SOCKET, TCPHA_FLOWING, TCPHA_GIVEN_UP,
    TCPHA_LOCAL, TCPHA_LOCAL_NODE, TCPHA_LOCKED_OP, TCPHA_MAC_ADOPT, TCPHA_MAC_FAST,
    TCPHA_MAC_KEPT, TCPHA_MAC_MARK, TCPHA_MAC_PLAIN, TCPHA_MAC_ROOM, TCPHA_MARK_FORGED,
    TCPHA_MAX_BACKENDS, TCPHA_MAX_FAST, TCPHA_MAX_OPS, TCPHA_MAX_ROUTES, TCPHA_MAX_RULES,
    TCPHA_CLOSED, TCPHA_MAX_SERVICES, TCPHA_OP_ADOPT,
    TCPHA_OP_DROP, TCPHA_OP_END, TCPHA_OP_GIVE_BACK, TCPHA_OP_HAND_OVER, TCPHA_OP_LET_FLOW,
    TCPHA_OP_QUERY, TCPHA_OP_TAKE_BACK, TCPHA_R_ASSIGN, TCPHA_R_BACKLOG, TCPHA_R_LIVE,
    TCPHA_R_NONE, TCPHA_R_NO_LISTENER, TCPHA_R_NO_SOCKET, TCPHA_R_OK, TCPHA_R_TIME_WAIT,
    TCPHA_STATE_VERSION, TCPHA_TUNNEL, tcpha_adoption, tcpha_backend, tcpha_be_conf, tcpha_cache,
    tcpha_counters, tcpha_entry, tcpha_event, tcpha_fe_conf, tcpha_flow, tcpha_gate, tcpha_guesses,
    tcpha_is_forwarded, tcpha_keys, tcpha_listener, tcpha_live, tcpha_load, tcpha_offer, tcpha_op,
    tcpha_route, tcpha_service, tcpha_shaken, tcpha_state, tcpha_state_of, tcpha_tag, tcpha_verdict)
from tcpha._fast.diag cimport SockDiag, diag, diag_refusal
from tcpha._fast.ledger cimport (
    PUT_NEW, ledger, ledger_close, ledger_divert, ledger_drop_pending, ledger_forget,
    ledger_linger, ledger_open, ledger_remove, ledger_restore, ledger_sweep)
from tcpha._fast.message cimport (
    REFUSE_BACKLOG, REFUSE_ERROR, REFUSE_LISTENER, REFUSE_UNSUPPORTED)
from tcpha._fast.packet cimport (
    ETH_SIZE, FRAME_HEAD, IP_SIZE, TCP_ACK, TCP_FIN, TCP_PSH, TCP_RST, VNET_SIZE, address_bytes,
    address_text, forge, frame_of, segment, segment_from, tap_send)
from tcpha._fast.places cimport Places, is_vip, listener_of, places
from tcpha._fast.repair cimport saved_syn_mss
from tcpha._fast.rewrite cimport acks_beyond, get16, is_sound, tcp_parse_head, tcp_view
from tcpha._fast.snapshot cimport (
    SNAP_ECN, SNAP_FIN, SNAP_SACK, SNAP_TIMESTAMP, SNAP_USEC_TS, SNAP_WSCALE, snapshot)
from tcpha._fast.sys cimport (
    EINTR, ENOENT, IPPROTO_TCP, add64, errno, htons, load32, load64, now_ns, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_rwlock_destroy,
    pthread_rwlock_rdlock, pthread_rwlock_t, pthread_rwlock_unlock, pthread_rwlock_wrlock, read,
    rwlock_init, setsockopt, store64, xchg32)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int usec)

MAX_ROUTES = TCPHA_MAX_ROUTES

cdef enum:
    TCP_REPAIR = 19
    TCP_ESTABLISHED = 1
    TCP_CLOSE_WAIT = 8
    CHUNK = 60000          # payload of a forged segment; one skb, so that overhead is small
    ADMIT = 64             # requests that one look for room is for
    TURN = 1024            # packets that are kept before others get the lock
    NEAR = 1 << 24         # a socket with numbers so little ahead is no other connection's
    HEAD_MOST = 10 + 14 + 60 + 20  # of a frame, to the ports and flags of its segment
    CHECKED = 3            # virtio-net: the checksum is not made yet, or was verified
    MSS_MIN = 536          # the kernel adopts nothing below (RFC 9293 section 3.7.1)
    HEADERS = 40           # of IP and TCP, as an MSS deducts them
    TIMESTAMPS = 12        # bytes of a forged segment's options
    WINDOW = 64240         # of a SYN-ACK: 44 segments of 1460 bytes, as Linux offers
    RING = 1 << 22         # bytes in the events' ring buffer
    FRONTENDS = 256        # that may tunnel to a back end: max_entries in be_maps.bpf.h
    RING_HEAD = 8          # before each record: length and flags (struct bpf_ringbuf_hdr)
    RING_BUSY = 1u << 31
    RING_DISCARD = 1u << 30

# for the kernel to take in what passes from the TAP to another device
cdef uint64_t DETOUR_NS = 20000000
cdef uint64_t ARRIVAL_NS = 5000000       # until what another CPU has counted must have come
cdef uint64_t PATIENCE_NS = 1000000000   # of the Local Node, for its server's accept queue


include "ebpf/calls.pxi"
include "ebpf/divert.pxi"
include "ebpf/packet_path.pxi"
include "ebpf/tables.pxi"
include "ebpf/frontend.pxi"
include "ebpf/adopt.pxi"
include "ebpf/backend.pxi"
