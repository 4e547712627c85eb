# SPDX-License-Identifier: GPL-2.0-or-later
# The table of adopted connections; b.lock is held.

cdef inline adopted **_bucket(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    cdef uint32_t h
    memcpy(&h, flow.caddr + 12, 4)
    h = (h ^ (<uint32_t>flow.cport << 16) ^ flow.cport) * 0x9e3779b1u
    return &b.buckets[(h >> 8) & b.mask]


cdef adopted *_find(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    cdef adopted *a = _bucket(b, flow)[0]
    while a != NULL and memcmp(&a.flow, flow, sizeof(tcpha_flow)) != 0:
        a = a.next
    return a


cdef inline void _tell_live(backend_state *b) noexcept nogil:
    """The packet path asks nobody: it reads how many there are, and may be."""
    store32(&b.dp.fast.gate.max,
            0 if b.unloading else min(b.max, b.opened + b.entries - b.live))
    store32(&b.dp.fast.gate.live, b.opened)


cdef inline void _set_open(backend_state *b, adopted *a, bint is_open) noexcept nogil:
    """Whether the application has it open, as far as is known. The one count of that stays exact
    while others come and go. b.lock is held."""
    if a.is_open != is_open:
        a.is_open = is_open
        set32(&b.opened, b.opened + (1 if is_open else -1))
        _tell_live(b)


cdef inline bint _is_full(backend_state *b) noexcept nogil:
    return load32(&b.opened) >= b.max or load32(&b.live) >= b.entries


cdef adopted *_insert(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    """NULL if maxclients is reached."""
    return NULL if _is_full(b) else _insert_any(b, flow)


cdef adopted *_insert_any(backend_state *b, const tcpha_flow *flow) noexcept nogil:
    """NULL if there is no memory left."""
    cdef adopted *a = b.free_list
    cdef adopted **head
    if a == NULL:
        return NULL
    b.free_list = a.next
    a.flow = flow[0]
    a.over = a.adopting = a.recheck = a.fast = a.found = a.is_open = a.shared = a.untold = False
    head = _bucket(b, flow)
    a.next = head[0]
    head[0] = a
    set32(&b.live, b.live + 1)
    _set_open(b, a, True)
    return a


cdef void _remove(backend_state *b, adopted *a) noexcept nogil:
    cdef adopted **at = _bucket(b, &a.flow)
    while at[0] != a:
        at = &at[0].next
    at[0] = a.next
    a.next = b.free_list
    b.free_list = a
    set32(&b.live, b.live - 1)
    _set_open(b, a, False)
    _tell_live(b)
