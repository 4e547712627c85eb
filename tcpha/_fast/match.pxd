# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.http cimport http_head


cdef extern from "hs.h" nogil:
    ctypedef struct hs_database_t:
        pass
    ctypedef struct hs_scratch_t:
        pass
    ctypedef int hs_error_t
    ctypedef struct hs_compile_error_t:
        char *message
        int expression
    enum:
        HS_SUCCESS
        HS_MODE_BLOCK
        HS_FLAG_SINGLEMATCH
        HS_FLAG_ALLOWEMPTY
    hs_error_t hs_compile_multi(const char **exprs, const unsigned int *flags,
                                const unsigned int *ids, unsigned int n, unsigned int mode,
                                const void *platform, hs_database_t **db,
                                hs_compile_error_t **error)
    hs_error_t hs_free_compile_error(hs_compile_error_t *error)
    hs_error_t hs_free_database(hs_database_t *db)
    hs_error_t hs_alloc_scratch(const hs_database_t *db, hs_scratch_t **scratch)
    hs_error_t hs_clone_scratch(const hs_scratch_t *src, hs_scratch_t **dest)
    hs_error_t hs_free_scratch(hs_scratch_t *scratch)
    ctypedef int (*match_event_handler)(unsigned int id, unsigned long long start,
                                        unsigned long long end, unsigned int flags, void *ctx)
    hs_error_t hs_scan(const hs_database_t *db, const char *data, unsigned int length,
                       unsigned int flags, hs_scratch_t *scratch, match_event_handler on_event,
                       void *ctx)


cdef struct choice:
    uint32_t backend
    uint32_t rule


# Patterns, ready to be searched for. There are as long as somebody holds them.
cdef struct compiled:
    hs_database_t *db
    hs_scratch_t *scratch      # cloned by each worker
    uint32_t words             # of 64 bits, in a bit set of all
    uint32_t holders


# Rules with the same pattern and conditions make a group. Group i has pattern i, and is for the
# services whose bits are in services[i]; its rules, if there are any, are choices[first[i]] ..
# choices[first[i + 1] - 1], in file order.
cdef struct ruleset:
    compiled *patterns
    uint32_t groups
    uint32_t words             # as its patterns have
    uint32_t *first
    uint64_t *services
    choice *choices
    uint64_t generation


cdef class Matcher:
    cdef readonly list patterns
    cdef compiled *c
    cdef uint64_t *bits


cdef int match_scan(const compiled *patterns, hs_scratch_t *scratch, const uint8_t *target,
                    uint32_t length, uint64_t *bits) noexcept nogil
cdef int match_target(const ruleset *rules, hs_scratch_t *scratch, const http_head *h, uint8_t *buf,
                      uint64_t *bits) noexcept nogil
cdef ruleset *ruleset_new(Matcher matcher, list groups, uint64_t generation) except NULL
cdef void ruleset_free(ruleset *rules) noexcept nogil
