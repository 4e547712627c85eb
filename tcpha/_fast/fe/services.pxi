# SPDX-License-Identifier: GPL-2.0-or-later
# Services: the addresses and ports that clients connect to. Each has a listener until it is closed.

cdef uint32_t _service_of(frontend *f, const tcpha_flow *flow) noexcept nogil:
    """Its number, or NO_SERVICE."""
    cdef uint32_t i
    for i in range(load32(&f.nservices)):
        if f.services[i].vport == flow.vport and memcmp(f.services[i].vaddr, flow.vaddr, 16) == 0:
            return i
    return NO_SERVICE


cdef inline int _listener(service *s) noexcept nogil:
    """Its descriptor, or -1."""
    return <int>load32(<uint32_t *>&s.fd)


cdef void _await_clients(frontend *f, uint32_t number, int op) noexcept nogil:
    """Be woken for connections to a service. Those that wait already are reported, too."""
    cdef int fd = _listener(&f.services[number])
    if fd >= 0:
        watch(f.c, op, fd, EPOLLIN | EPOLLET, EV_LISTENER, number, 0)


cdef void _await_all(frontend *f) noexcept nogil:
    cdef uint32_t i
    for i in range(load32(&f.nservices)):
        _await_clients(f, i, EPOLL_CTL_MOD)


cdef uint64_t _said_of(backend *be, const service *s) noexcept:
    """What a back end has said of the place that a service's connections go to. place_lock is
    held."""
    cdef place_said *any_port = NULL
    cdef uint32_t i
    for i in range(be.nplaces):
        if memcmp(be.places[i].vaddr, s.vaddr, 16) != 0:
            continue
        if be.places[i].vport == s.vport:
            return be.places[i].said
        if be.places[i].vport == 0:
            any_port = &be.places[i]
    return any_port.said if any_port != NULL else load64(&be.server_said)


cdef int _refuse_syns(int fd) noexcept nogil:
    cdef sock_filter program[4]
    cdef sock_fprog filter
    program[0] = sock_filter(code=BPF_LD | BPF_B | BPF_ABS, jt=0, jf=0, k=13)  # TCP's flags
    program[1] = sock_filter(code=BPF_JMP | BPF_JSET | BPF_K, jt=0, jf=1, k=2)  # SYN
    program[2] = sock_filter(code=BPF_RET | BPF_K, jt=0, jf=0, k=0)
    program[3] = sock_filter(code=BPF_RET | BPF_K, jt=0, jf=0, k=<uint32_t>-1)
    filter.len = 4
    filter.filter = program
    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter))
