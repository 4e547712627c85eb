# SPDX-License-Identifier: GPL-2.0-or-later
"""Flow tables in user space, for the datapath that has none in the kernel."""
import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from tcpha._fast.defs cimport tcpha_flow
from tcpha._fast.sys cimport set32, store32

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
    void *MAP_FAILED

cdef enum:
    HEAD_SIZE = 64

cdef uint64_t MAGIC = 0x31776f6c66616874  # "thaflow1"


cdef int table_open(flow_table *t, uint32_t capacity, uint32_t value_size, uint32_t version,
                    path) except -1:
    """Make room for 'capacity' flows, in a file if 'path' says so. 1: the file held a table of the
    same layout, and its flows are there; else 0. Raises OSError or MemoryError."""
    cdef uint32_t size = 16
    cdef int fd = -1, kept = 0
    cdef void *memory
    cdef table_head *h
    while size < capacity:
        size *= 2
    memset(t, 0, sizeof(flow_table))
    t.capacity = capacity
    t.mask = size - 1
    t.stride = (<uint32_t>sizeof(flow_cell) + value_size + 7) & ~7u
    t.seed = <uint64_t>int.from_bytes(os.urandom(8), "little") | 1
    t.size = HEAD_SIZE + <size_t>capacity * t.stride
    if path is not None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if fd >= 0 and os.fstat(fd).st_size != t.size:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, t.size)
        memory = mmap(NULL, t.size, PROT_READ | PROT_WRITE,
                      MAP_SHARED if fd >= 0 else MAP_PRIVATE | MAP_ANONYMOUS, fd, 0)
    finally:
        if fd >= 0:
            os.close(fd)
    if memory == MAP_FAILED:
        raise MemoryError
    t.head = h = <table_head *>memory
    t.cells = <uint8_t *>memory + HEAD_SIZE
    t.buckets = <uint32_t *>calloc(size, sizeof(uint32_t))
    if t.buckets == NULL:
        table_close(t)
        raise MemoryError
    if h.magic == MAGIC and h.version == version and h.capacity == capacity and \
            h.value_size == value_size:
        kept = 1
    elif h.magic != 0:
        memset(memory, 0, t.size)  # of an earlier layout
    h.magic = MAGIC
    h.version = version
    h.capacity = capacity
    h.value_size = value_size
    _chain(t)
    return kept


cdef void _chain(flow_table *t) noexcept:
    """Make the chains from the cells, which alone are to be trusted after a crash. Cells that were
    never used are not touched, so that a large table takes no more memory than it needs."""
    cdef uint32_t i
    cdef uint32_t *head
    cdef flow_cell *c
    t.head.fresh = min(t.head.fresh, t.capacity)
    t.head.used = 0
    t.head.free = 0
    for i in range(t.head.fresh):
        c = table_cell(t, i)
        head = _bucket(t, &c.key) if c.used else &t.head.free
        t.head.used += 1 if c.used else 0
        c.next = head[0]
        head[0] = i + 1


cdef void table_close(flow_table *t) noexcept:
    if t.head != NULL:
        munmap(t.head, t.size)
    free(t.buckets)
    t.head = NULL
    t.buckets = NULL


cdef flow_cell *table_cell(flow_table *t, uint32_t index) noexcept nogil:
    return <flow_cell *>(t.cells + <uint64_t>index * t.stride)


cdef inline uint32_t *_bucket(flow_table *t, const tcpha_flow *key) noexcept nogil:
    cdef uint64_t words[4]
    cdef uint64_t h = t.seed
    cdef uint32_t ports
    cdef int i
    memcpy(words, key, 32)
    memcpy(&ports, <const uint8_t *>key + 32, 4)
    for i in range(4):
        h = (h ^ words[i]) * <uint64_t>0x9e3779b97f4a7c15u
        h ^= h >> 29
    h = (h ^ ports) * <uint64_t>0x9e3779b97f4a7c15u
    return &t.buckets[(h >> 32) & t.mask]


cdef void *table_find(flow_table *t, const tcpha_flow *key) noexcept nogil:
    cdef uint32_t at = _bucket(t, key)[0]
    cdef flow_cell *c
    while at:
        c = table_cell(t, at - 1)
        if memcmp(&c.key, key, sizeof(tcpha_flow)) == 0:
            return c + 1
        at = c.next
    return NULL


cdef void *table_add(flow_table *t, const tcpha_flow *key) noexcept nogil:
    """A zeroed value for a key that is not there. NULL: the table is full."""
    cdef uint32_t *head = _bucket(t, key)
    cdef uint32_t at = t.head.free
    cdef flow_cell *c
    if at:
        c = table_cell(t, at - 1)
        t.head.free = c.next
    elif t.head.fresh < t.capacity:
        set32(&t.head.fresh, t.head.fresh + 1)
        at = t.head.fresh
        c = table_cell(t, at - 1)
    else:
        return NULL
    memset(c + 1, 0, t.head.value_size)
    c.key = key[0]
    c.next = head[0]
    head[0] = at
    set32(&t.head.used, t.head.used + 1)
    store32(&c.used, 1)    # last: a crash before leaves a free cell
    return c + 1


cdef bint table_remove(flow_table *t, const tcpha_flow *key) noexcept nogil:
    cdef uint32_t *link = _bucket(t, key)
    cdef uint32_t at
    cdef flow_cell *c
    while link[0]:
        at = link[0]
        c = table_cell(t, at - 1)
        if memcmp(&c.key, key, sizeof(tcpha_flow)) == 0:
            store32(&c.used, 0)
            link[0] = c.next
            c.next = t.head.free
            t.head.free = at
            set32(&t.head.used, t.head.used - 1)
            return True
        link = &c.next
    return False
