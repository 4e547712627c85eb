# SPDX-License-Identifier: GPL-2.0-or-later
"""Rule patterns, matched all at once by Hyperscan (or Vectorscan, which has the same interface).

A pattern is searched anywhere in path and query of the request-target, as sent. The scan takes no
lock, allocates nothing and its time depends little on the number of patterns, and never on
backtracking.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset


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


cdef int match_scan(const ruleset *rules, hs_scratch_t *scratch, const uint8_t *target,
                    uint32_t length, uint64_t *bits) noexcept nogil:
    """Set in bits (rules.words words) the groups whose pattern occurs in the target. 0, or -1."""
    memset(bits, 0, rules.words * sizeof(uint64_t))
    if rules.db == NULL:
        return 0
    if hs_scan(rules.db, <const char *>target, length, 0, scratch, _on_match, bits) != HS_SUCCESS:
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
        return match_scan(rules, scratch, origin, n, bits)
    host = origin[-1]
    origin[-1] = h.root
    rc = match_scan(rules, scratch, origin - 1, n + 1, bits)
    origin[-1] = host
    return rc


cdef hs_database_t *_compile(list patterns) except? NULL:
    cdef unsigned int n = <unsigned int>len(patterns)
    cdef const char **exprs = <const char **>calloc(n, sizeof(char *))
    cdef unsigned int *flags = <unsigned int *>calloc(n, sizeof(unsigned int))
    cdef unsigned int *ids = <unsigned int *>calloc(n, sizeof(unsigned int))
    cdef hs_database_t *db = NULL
    cdef hs_compile_error_t *error = NULL
    cdef list kept = [p.encode() for p in patterns]
    cdef unsigned int i
    try:
        if exprs == NULL or flags == NULL or ids == NULL:
            raise MemoryError
        for i in range(n):
            exprs[i] = kept[i]
            flags[i] = HS_FLAG_SINGLEMATCH | HS_FLAG_ALLOWEMPTY
            ids[i] = i
        if hs_compile_multi(exprs, flags, ids, n, HS_MODE_BLOCK, NULL, &db, &error) != HS_SUCCESS:
            message = error.message.decode(errors="replace")
            index = error.expression
            hs_free_compile_error(error)
            raise PatternError(message, index)
    finally:
        free(exprs)
        free(flags)
        free(ids)
    return db


def check_patterns(list patterns):
    """Compile the patterns (str), raise PatternError for the first that cannot be."""
    cdef hs_database_t *db
    if patterns:
        db = _compile(patterns)
        hs_free_database(db)


cdef void ruleset_free(ruleset *rules) noexcept nogil:
    if rules == NULL:
        return
    if rules.scratch != NULL:
        hs_free_scratch(rules.scratch)
    if rules.db != NULL:
        hs_free_database(rules.db)
    free(rules.first)
    free(rules.choices)
    free(rules)


cdef ruleset *ruleset_new(list groups, uint64_t generation) except NULL:
    """groups: [(pattern, [(backend index, rule index), ...]), ...] in matching order."""
    cdef ruleset *r = <ruleset *>calloc(1, sizeof(ruleset))
    cdef uint32_t i, k = 0, total = sum([len(g[1]) for g in groups])
    if r == NULL:
        raise MemoryError
    try:
        r.groups = <uint32_t>len(groups)
        r.words = (r.groups + 63) // 64
        r.generation = generation
        r.first = <uint32_t *>calloc(r.groups + 1, sizeof(uint32_t))
        r.choices = <choice *>calloc(total + 1, sizeof(choice))
        if r.first == NULL or r.choices == NULL:
            raise MemoryError
        for i in range(r.groups):
            r.first[i] = k
            for backend, rule in groups[i][1]:
                r.choices[k].backend = backend
                r.choices[k].rule = rule
                k += 1
        r.first[r.groups] = k
        if groups:
            r.db = _compile([g[0] for g in groups])
            if hs_alloc_scratch(r.db, &r.scratch) != HS_SUCCESS:
                raise MemoryError
    except BaseException:
        ruleset_free(r)
        raise
    return r


cdef class Matcher:
    """A compiled pattern list by itself, for tools, tests and benchmarks."""

    cdef ruleset *rules
    cdef uint64_t *bits

    def __cinit__(self, list patterns):
        self.rules = ruleset_new([(p, []) for p in patterns], 0)
        self.bits = <uint64_t *>malloc((self.rules.words + 1) * sizeof(uint64_t))
        if self.bits == NULL:
            raise MemoryError

    def __dealloc__(self):
        ruleset_free(self.rules)
        free(self.bits)

    def matches(self, bytes target):
        """Indexes of the patterns that occur in target, ascending."""
        cdef const uint8_t *p = target
        cdef uint32_t n = <uint32_t>len(target)
        with nogil:
            match_scan(self.rules, self.rules.scratch, p, n, self.bits)
        return [i for i in range(self.rules.groups)
                if self.bits[i >> 6] >> (i & 63) & 1]
