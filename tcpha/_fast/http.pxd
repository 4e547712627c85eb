# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef enum http_result:
    HTTP_MORE = 0      # the head is not complete
    HTTP_DONE = 1
    HTTP_BAD = -1      # answer 400


cdef struct http_head:
    # Parser state: zero before the first byte.
    uint32_t pos           # bytes consumed; after HTTP_DONE the length of the head
    uint8_t state
    uint8_t minor          # HTTP/1.minor
    uint8_t header         # which header of interest is being read
    uint8_t flags
    uint32_t mark          # offset where the current token began
    uint32_t method_len    # the method begins at 'method'
    uint32_t method
    uint32_t target        # offset of the request-target
    uint32_t target_len
    uint32_t origin        # offset of path and query in it; of an asterisk or authority, its own
    uint8_t root           # what origin form begins with, if the target does not have it; or 0
    const char *error      # static text after HTTP_BAD


cdef bint http_begun(const http_head *h) noexcept nogil
cdef int http_parse(http_head *h, const uint8_t *buf, uint32_t length) noexcept nogil
