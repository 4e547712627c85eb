# SPDX-License-Identifier: GPL-2.0-or-later
# The access log.

cdef void _log_access(frontend *f, const request *r, const uint8_t *head_bytes) noexcept nogil:
    """One line: time, client, request-target, number of the rule (or -), back end, microseconds in
    the front end. What a full disk had room for of one is taken back: only whole lines stay."""
    cdef char head[96]
    cdef char tail[96]
    cdef char rule[12]
    cdef iovec iov[3]
    cdef size_t size
    cdef ssize_t written
    cdef uint64_t now = realtime_ns()
    cdef time_t seconds = <time_t>(now // 1000000000)
    cdef tm at
    cdef int n
    memcpy(rule, b"-", 2)
    gmtime_r(&seconds, &at)
    n = <int>strftime(head, sizeof(head), b"%Y-%m-%dT%H:%M:%S", &at)
    n += snprintf(head + n, sizeof(head) - n, b".%06uZ ",
                  <unsigned int>(now // 1000 % 1000000))
    n += flow_text(&r.flow, head + n, <int>sizeof(head) - n)
    head[n] = c" "
    iov[0].iov_base = head
    iov[0].iov_len = n + 1
    iov[1].iov_base = <uint8_t *>head_bytes + r.head.target
    iov[1].iov_len = r.head.target_len
    if r.rule != <uint32_t>NO_RULE:
        snprintf(rule, sizeof(rule), b"%u", r.rule)
    iov[2].iov_base = tail
    iov[2].iov_len = snprintf(tail, sizeof(tail), b" %s %s %lu\n", rule,
                              f.backends[r.backend].name,
                              <unsigned long>((now_ns() - r.began_ns) // 1000))
    size = iov[0].iov_len + iov[1].iov_len + iov[2].iov_len
    pthread_mutex_lock(&f.access_lock)  # for the position, which is then the end of our line
    written = writev(f.access_fd, iov, 3)
    if 0 <= written < <ssize_t>size:
        written = ftruncate(f.access_fd, lseek(f.access_fd, 0, SEEK_CUR) - written)
    pthread_mutex_unlock(&f.access_lock)
    if written != <ssize_t>size:
        add64(&f.n.access_lost, 1)
