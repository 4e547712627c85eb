# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from tcpha._fast.defs cimport tcpha_flow

cdef enum:  # snapshot.flags; on the wire too
    SNAP_TIMESTAMP = 1     # RFC 7323 timestamps are in use
    SNAP_SACK = 2
    SNAP_WSCALE = 4
    SNAP_ECN = 8
    SNAP_USEC_TS = 16      # our timestamp clock counts microseconds
    SNAP_FIN = 32          # the client has sent a FIN; rcv_nxt counts it
    SNAP_ALL = 63


# All that a kernel must know to go on with a connection. Host byte order; sequence numbers, windows
# (bytes, already scaled) and timestamps as in RFC 9293 and RFC 7323.
cdef struct snapshot:
    tcpha_flow flow
    uint32_t snd_nxt
    uint32_t rcv_nxt
    uint32_t snd_wnd
    uint32_t rcv_wnd
    uint32_t tsval         # our timestamp clock
    uint32_t ts_recent     # the client's latest TSval
    uint32_t srtt_us       # 0: not measured
    uint16_t mss           # the client's MSS option (RFC 6691)
    uint8_t snd_wscale
    uint8_t rcv_wscale
    uint16_t flags
    uint32_t len           # bytes of the request, which end at rcv_nxt (before a FIN)
