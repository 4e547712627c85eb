# SPDX-License-Identifier: GPL-2.0-or-later
"""Rule patterns, matched all at once by Hyperscan (or Vectorscan, which has the same interface).

A pattern is searched anywhere in path and query of the request-target, as sent. The scan takes no
lock, allocates nothing and its time depends little on the number of patterns, and never on
backtracking.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from tcpha._fast.sys cimport add32


class PatternError(ValueError):
    """A pattern does not compile. pattern: its index; the message holds the position."""

    def __init__(self, message, pattern):
        super().__init__(message)
        self.pattern = pattern


cdef int _on_match(unsigned int id, unsigned long long start, unsigned long long end,
                   unsigned int flags, void *ctx) noexcept nogil:
    cdef uint64_t *bits = <uint64_t *>ctx
    bits[id >> 6] |= <uint64_t>1 << (id & 63)
    return 0


cdef int match_scan(const compiled *patterns, hs_scratch_t *scratch, const uint8_t *target,
                    uint32_t length, uint64_t *bits) noexcept nogil:
    """Set in bits (patterns.words words) the patterns that occur in the target. 0, or -1."""
    memset(bits, 0, patterns.words * sizeof(uint64_t))
    if patterns.db == NULL:
        return 0
    if hs_scan(patterns.db, <const char *>target, length, 0, scratch, _on_match,
               bits) != HS_SUCCESS:
        return -1
    return 0


cdef int match_target(const ruleset *rules, hs_scratch_t *scratch, const http_head *h, uint8_t *buf,
                      uint64_t *bits) noexcept nogil:
    """match_scan() for the target of a head in buf, in origin form (RFC 9112 section 3.2.1). What
    that has more than the target takes the place of the last character of the host meanwhile."""
    cdef uint8_t *origin = buf + h.origin
    cdef uint32_t n = h.target + h.target_len - h.origin
    cdef uint8_t host
    cdef int rc
    if not h.root:
        return match_scan(rules.patterns, scratch, origin, n, bits)
    host = origin[-1]
    origin[-1] = h.root
    rc = match_scan(rules.patterns, scratch, origin - 1, n + 1, bits)
    origin[-1] = host
    return rc


cdef int _compile(list patterns, compiled *c) except -1:
    """Takes seconds if they are many. Other threads run Python meanwhile."""
    cdef unsigned int n = <unsigned int>len(patterns)
    cdef const char **exprs = <const char **>calloc(n, sizeof(char *))
    cdef unsigned int *flags = <unsigned int *>calloc(n, sizeof(unsigned int))
    cdef unsigned int *ids = <unsigned int *>calloc(n, sizeof(unsigned int))
    cdef hs_compile_error_t *error = NULL
    cdef list kept = [p.encode() for p in patterns]
    cdef unsigned int i
    cdef hs_error_t rc
    try:
        if exprs == NULL or flags == NULL or ids == NULL:
            raise MemoryError
        for i in range(n):
            exprs[i] = kept[i]
            flags[i] = HS_FLAG_SINGLEMATCH | HS_FLAG_ALLOWEMPTY
            ids[i] = i
        with nogil:
            rc = hs_compile_multi(exprs, flags, ids, n, HS_MODE_BLOCK, NULL, &c.db, &error)
        if rc != HS_SUCCESS:
            message = error.message.decode(errors="replace")
            index = error.expression
            hs_free_compile_error(error)
            raise PatternError(message, index)
        if hs_alloc_scratch(c.db, &c.scratch) != HS_SUCCESS:
            raise MemoryError
    finally:
        free(exprs)
        free(flags)
        free(ids)
    return 0


cdef void _let_go(compiled *c) noexcept nogil:
    if c == NULL or add32(&c.holders, -1):
        return
    if c.scratch != NULL:
        hs_free_scratch(c.scratch)
    if c.db != NULL:
        hs_free_database(c.db)
    free(c)


cdef class Matcher:
    """Patterns (str), compiled: for a rule list, or by themselves. Raises PatternError for the
    first that cannot be."""

    def __cinit__(self, list patterns):
        self.patterns = patterns
        self.c = <compiled *>calloc(1, sizeof(compiled))
        if self.c == NULL:
            raise MemoryError
        self.c.holders = 1
        self.c.words = <uint32_t>((len(patterns) + 63) // 64)
        self.bits = <uint64_t *>malloc((self.c.words + 1) * sizeof(uint64_t))
        if self.bits == NULL:
            raise MemoryError
        if patterns:
            _compile(patterns, self.c)

    def __dealloc__(self):
        _let_go(self.c)
        free(self.bits)

    def matches(self, bytes target):
        """Indexes of the patterns that occur in target, ascending."""
        match_scan(self.c, self.c.scratch, <const uint8_t *>target, <uint32_t>len(target),
                   self.bits)
        return [i for i in range(len(self.patterns))
                if self.bits[i >> 6] >> (i & 63) & 1]


cdef void ruleset_free(ruleset *rules) noexcept nogil:
    if rules == NULL:
        return
    _let_go(rules.patterns)
    free(rules.first)
    free(rules.services)
    free(rules.choices)
    free(rules)


cdef ruleset *ruleset_new(Matcher matcher, list groups, uint64_t generation) except NULL:
    """groups: [(bits of services, [(backend index, rule index), ...]), ...], by pattern."""
    cdef ruleset *r = <ruleset *>calloc(1, sizeof(ruleset))
    cdef uint32_t i, k = 0, total = sum([len(group) for _, group in groups])
    if r == NULL:
        raise MemoryError
    try:
        r.groups = <uint32_t>len(matcher.patterns)
        r.words = matcher.c.words
        r.generation = generation
        r.first = <uint32_t *>calloc(r.groups + 1, sizeof(uint32_t))
        r.services = <uint64_t *>calloc(r.groups + 1, sizeof(uint64_t))
        r.choices = <choice *>calloc(total + 1, sizeof(choice))
        if r.first == NULL or r.services == NULL or r.choices == NULL:
            raise MemoryError
        for i in range(r.groups):
            r.first[i] = k
            r.services[i], group = groups[i]
            for backend, rule in group:
                r.choices[k].backend = backend
                r.choices[k].rule = rule
                k += 1
        r.first[r.groups] = k
        add32(&matcher.c.holders, 1)
        r.patterns = matcher.c
    except BaseException:
        ruleset_free(r)
        raise
    return r
