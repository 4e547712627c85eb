# SPDX-License-Identifier: GPL-2.0-or-later
"""Freezing a TCP socket and reading its state with socket options alone (TCP_REPAIR)."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from tcpha._fast.datapath cimport DP_GONE
from tcpha._fast.rewrite cimport get32, tcp_parse, tcp_view
from tcpha._fast.snapshot cimport (
    SNAP_ECN, SNAP_FIN, SNAP_SACK, SNAP_TIMESTAMP, SNAP_USEC_TS, SNAP_WSCALE, snapshot)
from tcpha._fast.sys cimport IPPROTO_TCP, errno, getsockopt, ioctl, setsockopt, socklen_t

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_repair_window:
        uint32_t snd_wl1
        uint32_t snd_wnd
        uint32_t max_window
        uint32_t rcv_wnd
        uint32_t rcv_wup
    struct tcp_info:
        uint8_t tcpi_state
        uint8_t tcpi_options
        uint8_t tcpi_snd_wscale
        uint8_t tcpi_rcv_wscale
        uint32_t tcpi_rtt

cdef enum:
    TCP_MAXSEG = 2
    TCP_INFO = 11
    TCP_REPAIR = 19
    TCP_REPAIR_QUEUE = 20
    TCP_QUEUE_SEQ = 21
    TCP_TIMESTAMP = 24
    TCP_SAVED_SYN = 28
    TCP_REPAIR_WINDOW = 29
    SIOCINQ = 0x541B
    TCP_ESTABLISHED = 1
    TCP_CLOSE_WAIT = 8
    OPT_TIMESTAMPS = 1     # tcpi_options
    OPT_SACK = 2
    OPT_WSCALE = 4
    OPT_ECN = 8
    OPT_USEC_TS = 64
    MSS_MIN = 536          # RFC 9293 section 3.7.1: what holds if none was offered


cdef uint16_t saved_syn_mss(int fd, uint16_t fallback, uint32_t *tsval) noexcept nogil:
    """The MSS option of the client's SYN (TCP_SAVE_SYN on the listener), and its TSval. A listener
    with TCP_MAXSEG clamps what the socket keeps, and what the back end sends need not be."""
    cdef uint8_t syn[128]
    cdef socklen_t n = sizeof(syn)
    cdef tcp_view v
    if getsockopt(fd, IPPROTO_TCP, TCP_SAVED_SYN, syn, &n) < 0 or n < 40 or \
            tcp_parse(syn, n, &v) < 0:
        return fallback
    if v.ts != NULL and tsval != NULL:
        tsval[0] = get32(v.ts)
    return v.mss if v.mss else MSS_MIN


cdef int _queue_seq(int fd, int queue, uint32_t *seq) noexcept nogil:
    cdef socklen_t n = sizeof(uint32_t)
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)) < 0:
        return -1
    return getsockopt(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, seq, &n)


cdef int repair_received(int fd, uint32_t *rcv_nxt) noexcept nogil:
    """rcv_nxt of a frozen socket, even if a RST has ended it since. 0 or -1."""
    return _queue_seq(fd, 1, rcv_nxt)


cdef int repair_freeze(int fd, snapshot *s) noexcept nogil:
    """Freeze and fill all of s but flow and ts_recent, which no option tells. 0, DP_GONE if the
    connection is no longer open, or -1."""
    cdef tcp_info info
    cdef tcp_repair_window w
    cdef socklen_t n = sizeof(info)
    cdef int one = 1, mss = 0, queued = 0, rc
    memset(&info, 0, sizeof(info))
    rc = setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &one, sizeof(one))
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) < 0:
        return -1
    if info.tcpi_state != TCP_ESTABLISHED and info.tcpi_state != TCP_CLOSE_WAIT:
        return DP_GONE     # EPERM stands for this too
    if rc < 0:
        return -1
    if _queue_seq(fd, 2, &s.snd_nxt) < 0 or _queue_seq(fd, 1, &s.rcv_nxt) < 0:
        return -1
    n = sizeof(w)
    if getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &w, &n) < 0:
        return -1
    n = sizeof(uint32_t)
    if getsockopt(fd, IPPROTO_TCP, TCP_TIMESTAMP, &s.tsval, &n) < 0:
        return -1
    n = sizeof(mss)
    if getsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &mss, &n) < 0 or ioctl(fd, SIOCINQ, &queued) < 0:
        return -1
    s.snd_wnd = w.snd_wnd
    s.rcv_wnd = w.rcv_wnd
    s.mss = <uint16_t>mss
    s.snd_wscale = info.tcpi_snd_wscale
    s.rcv_wscale = info.tcpi_rcv_wscale
    s.srtt_us = info.tcpi_rtt
    s.flags = ((SNAP_TIMESTAMP if info.tcpi_options & OPT_TIMESTAMPS else 0) |
               (SNAP_SACK if info.tcpi_options & OPT_SACK else 0) |
               (SNAP_WSCALE if info.tcpi_options & OPT_WSCALE else 0) |
               (SNAP_ECN if info.tcpi_options & OPT_ECN else 0) |
               (SNAP_USEC_TS if info.tcpi_options & OPT_USEC_TS else 0) |
               (SNAP_FIN if info.tcpi_state == TCP_CLOSE_WAIT else 0))
    s.len = <uint32_t>queued
    return 0


def freeze(int fd):
    """What repair_freeze() finds of a connection, which goes on afterwards; for benchmarks. Raises
    OSError."""
    cdef snapshot s
    cdef int off = -1      # TCP_REPAIR_OFF_NO_WP
    if repair_freeze(fd, &s) != 0 or \
            setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &off, sizeof(off)) < 0:
        raise OSError(errno, "cannot freeze the connection")
    return {"snd_nxt": s.snd_nxt, "rcv_nxt": s.rcv_nxt, "mss": s.mss}
