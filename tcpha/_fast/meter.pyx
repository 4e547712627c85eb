# SPDX-License-Identifier: GPL-2.0-or-later
"""What workers measure: how long things take, and which took longest."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from tcpha._fast.defs cimport TCPHA_TARGET_MAX, tcpha_flow
from tcpha._fast.packet cimport address_text
from tcpha._fast.sys cimport (
    add64, load64, now_ns, ntohs, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_trylock, pthread_mutex_unlock, store64)

cdef extern from * nogil:
    int _leading "__builtin_clzll"(uint64_t v)


cdef void histogram_add(histogram *h, uint64_t ns) noexcept nogil:
    """Count a duration in the bucket of the least 2^i microseconds that it fits in."""
    cdef uint64_t us = (ns + 999) // 1000
    cdef int i = 0 if us <= 1 else 64 - _leading(us - 1)
    add64(&h.count[min(i, <int>BUCKETS - 1)], 1)
    add64(&h.sum_ns, ns)


cdef dict histogram_read(histogram *h):
    """{"buckets": [[seconds, how many took so long or less], ..., [None, all]], "sum": seconds}"""
    cdef int i
    cdef uint64_t total = 0
    buckets = []
    for i in range(BUCKETS):
        total += load64(&h.count[i])
        buckets.append([None if i == BUCKETS - 1 else (1 << i) / 1e6, total])
    return {"buckets": buckets, "sum": load64(&h.sum_ns) / 1e9}


cdef void slow_open(slow_ones *s) noexcept:
    pthread_mutex_init(&s.lock, NULL)


cdef void slow_close(slow_ones *s) noexcept:
    pthread_mutex_destroy(&s.lock)


cdef void _set_floor(slow_ones *s) noexcept nogil:
    cdef uint64_t least = <uint64_t>-1
    cdef int i
    for i in range(SLOWEST):
        least = min(least, s.row[i].took_ns if s.row[i].at_ns else 0)
    store64(&s.floor_ns, least)


cdef void slow_note(slow_ones *s, uint64_t took_ns, const tcpha_flow *flow, uint32_t backend,
                    uint32_t rule, const char *target, uint32_t target_len) noexcept nogil:
    """Remember a handoff, if it is one of the slowest. Where two come at once, one is left out.
    target: TCPHA_TARGET_MAX bytes, of which target_len count if it is no longer than that."""
    cdef slow_one *fastest = &s.row[0]
    cdef int i
    if took_ns <= load64(&s.floor_ns) or pthread_mutex_trylock(&s.lock) != 0:
        return
    for i in range(SLOWEST):
        if s.row[i].at_ns == 0:
            fastest = &s.row[i]
            break
        if s.row[i].took_ns < fastest.took_ns:
            fastest = &s.row[i]
    if fastest.at_ns == 0 or took_ns > fastest.took_ns:
        fastest.at_ns = now_ns()
        fastest.took_ns = took_ns
        fastest.flow = flow[0]
        fastest.backend = backend
        fastest.rule = rule
        fastest.target_len = target_len
        memcpy(fastest.target, target, TCPHA_TARGET_MAX)
        _set_floor(s)
    pthread_mutex_unlock(&s.lock)


cdef list slow_read(slow_ones *s, double seconds):
    """Those of the last so many seconds, slowest first; older ones are forgotten."""
    cdef slow_one row[SLOWEST]
    cdef uint64_t now = now_ns()
    cdef slow_one *r
    cdef int i
    with nogil:
        pthread_mutex_lock(&s.lock)
        for i in range(SLOWEST):
            if s.row[i].at_ns and now - s.row[i].at_ns > <uint64_t>(seconds * 1e9):
                memset(&s.row[i], 0, sizeof(slow_one))
        _set_floor(s)
        memcpy(row, s.row, sizeof(row))
        pthread_mutex_unlock(&s.lock)
    out = []
    for i in range(SLOWEST):
        r = &row[i]
        if r.at_ns:
            out.append({
                "ago": (now - r.at_ns) / 1e9, "seconds": r.took_ns / 1e9,
                "client": f"{address_text(r.flow.caddr)}:{ntohs(r.flow.cport)}",
                "backend": r.backend, "rule": r.rule,
                "target": r.target[:min(r.target_len, <uint32_t>TCPHA_TARGET_MAX)].decode(
                    "ascii", "replace")})
    out.sort(key=lambda x: -x["seconds"])
    return out
