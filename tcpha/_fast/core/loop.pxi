# SPDX-License-Identifier: GPL-2.0-or-later
# The loop of a worker.

cdef void _loop(core *c, worker *w) noexcept nogil:
    cdef epoll_event ev[EVENTS]
    cdef uint64_t data, count
    cdef int n, i, kind
    cdef bint retire = False
    while not retire:
        n = epoll_wait(c.epfd, ev, EVENTS, -1)
        store64(&w.epoch, load64(&c.epoch))
        set32(&w.busy, 1)
        for i in range(n):
            data = ev[i].data.u64
            kind = <int>(data >> 56)
            if kind == EV_LINK:
                _on_link(c, w, <uint32_t>data, <uint32_t>(data >> 32) & 0xffffff, ev[i].events)
            elif kind == EV_WAKE:
                if load32(&c.stopping) or read(c.wake_fd, &count, 8) == 8:
                    retire = True  # after this batch
            elif kind == EV_TIMER:
                if read(c.timer_fd, &count, 8) == 8:
                    c.on_timer(c, w, now_ns())
            else:
                c.on_event(c, w, kind, <uint32_t>data, <uint32_t>(data >> 32) & 0xffffff,
                           ev[i].events)
        _flush_dirty(c, w)
        set32(&w.busy, 0)
        store64(&w.epoch, 0)
