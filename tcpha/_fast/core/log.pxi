# SPDX-License-Identifier: GPL-2.0-or-later
# What is said: see core.pxd.

cdef void say(core *c, uint32_t level, const char *text) noexcept nogil:
    """Log a line if dbglevel is at least level. Never blocks: a full pipe loses the line."""
    cdef char line[512]
    cdef int n
    if level > load32(&c.dbglevel):
        return
    n = snprintf(line, sizeof(line), b"%u%s\n", level, text)
    if n >= <int>sizeof(line):
        n = sizeof(line)
        line[n - 1] = c'\n'
    if write(c.log_fd, line, n) < 0:
        add32(&c.log_lost, 1)


cdef void say_flow(core *c, uint32_t level, const tcpha_flow *flow,
                   const char *text) noexcept nogil:
    cdef char line[320]
    cdef int n
    if level > load32(&c.dbglevel):
        return
    n = flow_text(flow, line, sizeof(line))
    snprintf(line + n, sizeof(line) - n, b": %s", text)
    say(c, level, line)


cdef void say_more(core *c, uint32_t level, const tcpha_flow *flow, const char *fmt, const char *a,
                   long b) noexcept nogil:
    """As say_flow(). fmt takes a text (%s), or a text and a long (%ld)."""
    cdef char line[256]
    if level > load32(&c.dbglevel):
        return
    snprintf(line, sizeof(line), fmt, a, b)
    say_flow(c, level, flow, line)


cdef void say_number(core *c, uint32_t level, const tcpha_flow *flow, const char *fmt,
                     long a) noexcept nogil:
    """As say_flow(). fmt takes a long (%ld)."""
    cdef char line[160]
    if level > load32(&c.dbglevel):
        return
    snprintf(line, sizeof(line), fmt, a)
    say_flow(c, level, flow, line)


cdef void notice(core *c) noexcept nogil:
    """Wake Python's supervisor."""
    cdef uint64_t one = 1
    write(c.notice_fd, &one, 8)


cdef bint half_closed(int fd) noexcept nogil:
    """True if the peer has sent a FIN, seen before what it stands behind is read. Never true of the
    pair of sockets that leads to the Local Node."""
    cdef tcp_info_head info
    cdef socklen_t n = sizeof(info)
    if getsockopt(fd, IPPROTO_TCP, 11, &info, &n) < 0:  # TCP_INFO
        return errno != EOPNOTSUPP
    return info.tcpi_state != 1  # TCP_ESTABLISHED
