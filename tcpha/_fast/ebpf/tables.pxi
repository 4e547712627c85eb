# SPDX-License-Identifier: GPL-2.0-or-later
# Maps as a whole: counters, flows piece by piece, what an earlier run left.

cdef dict _counters(Object obj):
    """The per-CPU counters of an object, summed."""
    cdef uint32_t zero = 0
    cdef int i, cpus = possible_cpus()
    cdef tcpha_counters *c = <tcpha_counters *>malloc(cpus * sizeof(tcpha_counters))
    if c == NULL:
        raise MemoryError
    total = dict.fromkeys(("forwarded", "forwarded_bytes", "held", "live_syn", "unreachable",
                           "guarded", "foreign", "decapsulated", "cookies", "requests", "cached",
                           "forged", "adopted", "yielded", "again", "icmp",
                           "too_big", "not_ect", "wary"), 0)
    if bpf_map_lookup_elem(obj.map_fd("counters"), &zero, c) == 0:
        for i in range(cpus):
            total["forwarded"] += c[i].forwarded
            total["forwarded_bytes"] += c[i].forwarded_bytes
            total["held"] += c[i].held
            total["live_syn"] += c[i].live_syn
            total["unreachable"] += c[i].unreachable
            total["guarded"] += c[i].guarded
            total["foreign"] += c[i].foreign
            total["decapsulated"] += c[i].decapsulated
            total["cookies"] += c[i].cookies
            total["requests"] += c[i].requests
            total["cached"] += c[i].cached
            total["forged"] += c[i].forged
            total["adopted"] += c[i].adopted
            total["yielded"] += c[i].yielded
            total["again"] += c[i].again
            total["too_big"] += c[i].too_big
            total["not_ect"] += c[i].not_ect
            total["wary"] += c[i].wary
            total["icmp"] += c[i].icmp
    free(c)
    return total


cdef int _next_batch(int fd, table_place *place, tcpha_flow *keys, void *values) noexcept nogil:
    """How many elements of a map whose keys are flows came into keys and values, TABLE_PIECE at
    most; 0: there are no more; or -errno."""
    cdef uint32_t count = 0
    cdef int rc = 0
    while count == 0 and rc == 0 and not place.ended:
        count = TABLE_PIECE
        rc = bpf_map_lookup_batch(fd, &place.at if place.begun else NULL, &place.at, keys, values,
                                  &count, NULL)
        place.begun = True
        place.ended = rc < 0
    return rc if rc < 0 and rc != -ENOENT else <int>count  # ENOENT: the last batch


cdef int _next_entries(void *self, table_place *place, tcpha_flow *keys,
                       tcpha_entry *entries) noexcept nogil:
    return _next_batch((<fe_ebpf *>self).flows, place, keys, entries)


cdef class Batches:
    """The elements of a map whose keys are flows, piece by piece. size: of a value."""

    cdef int fd
    cdef tcpha_flow *keys
    cdef void *values
    cdef table_place place

    def __cinit__(self, int fd, size_t size):
        self.fd = fd
        self.keys = <tcpha_flow *>malloc(TABLE_PIECE * sizeof(tcpha_flow))
        self.values = malloc(TABLE_PIECE * size)
        if self.keys == NULL or self.values == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.keys)
        free(self.values)

    cdef int more(self) except -1:
        """How many came into keys and values; 0: that was all. Raises OSError."""
        cdef int count
        with nogil:
            count = _next_batch(self.fd, &self.place, self.keys, self.values)
        if count < 0:
            raise OSError(-count, "cannot read the flow table")
        return count


cdef dict _fitting(dict left, dict sizes):
    """Of the maps that an earlier run left, {name: descriptor} of those in sizes ({name: (size of a
    key, of a value)}); {} if one is missing or different, or there was no such run."""
    out = {}
    for name, (key, value) in sizes.items() if left else ():
        fd, *found = left.get(name, (-1, 0, 0))
        if found != [key, value]:
            return {}
        out[name] = fd
    return out
