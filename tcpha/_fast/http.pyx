# SPDX-License-Identifier: GPL-2.0-or-later
"""A strict parser for HTTP/1.0 and HTTP/1.1 request heads (RFC 9112).

It exists to read the request-target before a connection is handed over. The back end parses the
same bytes again, so whatever two parsers may read differently is refused (request smuggling):
bare LF or CR, NUL and other controls, obs-fold, white space before the colon, Content-Length with
Transfer-Encoding, repeated or malformed Content-Length, Transfer-Encoding other than "chunked",
repeated or missing Host, a fragment in the target, an authority in the target that is none.

The parser allocates nothing and keeps offsets only, so it can be resumed on a buffer that was read
again from its start (MSG_PEEK).
"""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

cdef enum:
    S_START, S_START_LF, S_METHOD, S_TARGET, S_VERSION, S_LINE_LF, S_NAME_START, S_NAME
    S_OWS, S_VALUE, S_VALUE_LF, S_END_LF, S_DONE, S_BAD

cdef enum:  # headers of interest
    H_OTHER, H_HOST, H_LENGTH, H_ENCODING

cdef enum:  # flags
    F_HOST = 1
    F_LENGTH = 2
    F_ENCODING = 4

cdef enum:  # character classes
    C_TOKEN = 1    # tchar, RFC 9110 section 5.6.2
    C_TARGET = 2   # may stand in a request-target (visible ASCII without "#")
    C_VALUE = 4    # field-vchar, SP, HTAB
    C_HOST = 8     # may stand in host and port of an authority, RFC 3986 section 3.2 (no userinfo)

cdef uint8_t[256] CLASS
cdef const char *VERSION = b"HTTP/1."

cdef int _init() except -1:
    cdef int c
    for c in range(256):
        CLASS[c] = 0
        if c > 32 and c != 127:
            CLASS[c] |= C_VALUE
            if c < 128 and c != ord("#"):
                CLASS[c] |= C_TARGET
    CLASS[32] |= C_VALUE
    CLASS[9] |= C_VALUE
    for c in b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz":
        CLASS[c] |= C_TOKEN
    for c in b"!$%&'()*+,-.:;=[]_~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz":
        CLASS[c] |= C_HOST
    return 0

_init()


cdef bint _is(const uint8_t *p, uint32_t n, const char *lower, uint32_t m) noexcept nogil:
    """Compare n bytes with a lower-case name, ASCII case ignored."""
    cdef uint32_t i
    cdef uint8_t c
    if n != m:
        return False
    for i in range(n):
        c = p[i]
        if c'A' <= c <= c'Z':
            c |= 0x20
        if c != <uint8_t>lower[i]:
            return False
    return True


cdef int _bad(http_head *h, const char *why) noexcept nogil:
    h.state = S_BAD
    h.error = why
    return HTTP_BAD


cdef int _name(http_head *h, const uint8_t *name, uint32_t n) noexcept nogil:
    h.header = H_OTHER
    if _is(name, n, b"host", 4):
        if h.flags & F_HOST:
            return _bad(h, b"two Host fields")
        h.flags |= F_HOST
        h.header = H_HOST
    elif _is(name, n, b"content-length", 14):
        if h.flags & F_LENGTH:
            return _bad(h, b"two Content-Length fields")
        h.flags |= F_LENGTH
        h.header = H_LENGTH
    elif _is(name, n, b"transfer-encoding", 17):
        if h.flags & F_ENCODING:
            return _bad(h, b"two Transfer-Encoding fields")
        h.flags |= F_ENCODING
        h.header = H_ENCODING
    return HTTP_MORE


cdef int _value(http_head *h, const uint8_t *value, uint32_t n) noexcept nogil:
    cdef uint32_t i
    # a tab behind 'chunked' may be there (RFC 9110 section 5.6.3), and servers do not agree on it
    while n and (value[n - 1] == c' ' or value[n - 1] == c'\t' and h.header != H_ENCODING):
        n -= 1
    if h.header == H_LENGTH:
        if n == 0 or n > 18:  # 18 digits fit 63 bits
            return _bad(h, b"Content-Length is not a number")
        for i in range(n):
            if not c'0' <= value[i] <= c'9':
                return _bad(h, b"Content-Length is not a number")
    elif h.header == H_ENCODING:
        if not _is(value, n, b"chunked", 7):
            return _bad(h, b"Transfer-Encoding is not chunked")
    elif h.header == H_HOST:
        for i in range(n):
            if value[i] == c' ' or value[i] == c'\t' or value[i] == c',' or value[i] == c'/' \
                    or value[i] == c'@':
                return _bad(h, b"Host is not one host")
    return HTTP_MORE


cdef uint32_t _authority(const uint8_t *p, uint32_t n) noexcept nogil:
    """How many of n bytes are host and port; the bytes themselves are the back end's matter."""
    cdef uint32_t i = 0
    while i < n and CLASS[p[i]] & C_HOST:
        i += 1
    return i


cdef int _target(http_head *h, const uint8_t *buf) noexcept nogil:
    """The four forms of RFC 9112 section 3.2, and where origin form begins in them."""
    cdef const uint8_t *t = buf + h.target
    cdef const uint8_t *m = buf + h.method
    cdef uint32_t n = h.target_len, scheme = 0, end
    cdef bint connect = h.method_len == 7 and _is(m, 7, b"connect", 7)
    cdef bint options = h.method_len == 7 and _is(m, 7, b"options", 7)
    h.origin = h.target
    if n == 0:
        return _bad(h, b"no request-target")
    if connect:
        if _authority(t, n) < n:
            return _bad(h, b"CONNECT without an authority")
        return HTTP_MORE
    if t[0] == c'/':
        return HTTP_MORE
    if n == 1 and t[0] == c'*' and options:
        return HTTP_MORE
    if n > 7 and _is(t, 7, b"http://", 7):
        scheme = 7
    elif n > 8 and _is(t, 8, b"https://", 8):
        scheme = 8
    if scheme:
        end = scheme + _authority(t + scheme, n - scheme)
        if end == scheme or (end < n and t[end] != c'/' and t[end] != c'?'):
            return _bad(h, b"no host in the request-target")
        h.origin += end
        if end == n:  # of the whole server, for OPTIONS (section 3.2.4)
            h.root = c'*' if options else c'/'
        elif t[end] == c'?':
            h.root = c'/'
        return HTTP_MORE
    return _bad(h, b"request-target is of no known form")


cdef bint http_begun(const http_head *h) noexcept nogil:
    """Whether more than empty lines were parsed (RFC 9112 section 2.2)."""
    return h.state > S_START_LF


cdef int http_parse(http_head *h, const uint8_t *buf, uint32_t length) noexcept nogil:
    """Parse buf[h.pos:length]. buf holds the connection's bytes from the first one.

    Returns an http_result. HTTP_BAD is final and h.error says why.
    """
    cdef uint32_t i = h.pos
    cdef uint8_t c
    if h.state == S_DONE:
        return HTTP_DONE
    if h.state == S_BAD:
        return HTTP_BAD
    while i < length:
        c = buf[i]
        if h.state == S_VALUE:
            while CLASS[c] & C_VALUE:
                i += 1
                if i == length:
                    h.pos = i
                    return HTTP_MORE
                c = buf[i]
            if c != c'\r':
                return _bad(h, b"control character in a field value")
            if _value(h, buf + h.mark, i - h.mark) < 0:
                return HTTP_BAD
            h.state = S_VALUE_LF
        elif h.state == S_OWS:
            if c != c' ' and c != c'\t':
                h.mark = i
                h.state = S_VALUE
                continue
        elif h.state == S_NAME:
            if c == c':':
                if _name(h, buf + h.mark, i - h.mark) < 0:
                    return HTTP_BAD
                h.state = S_OWS
            elif not CLASS[c] & C_TOKEN:
                return _bad(h, b"bad character in a field name")
        elif h.state == S_NAME_START:
            if c == c'\r':
                h.state = S_END_LF
            elif CLASS[c] & C_TOKEN:
                h.mark = i
                h.state = S_NAME
            else:
                return _bad(h, b"a line that is no field (folded lines are refused)")
        elif h.state == S_TARGET:
            if c == c' ':
                h.target_len = i - h.target
                if _target(h, buf) < 0:
                    return HTTP_BAD
                h.mark = i + 1
                h.state = S_VERSION
            elif not CLASS[c] & C_TARGET:
                return _bad(h, b"bad character in the request-target")
        elif h.state == S_METHOD:
            if c == c' ':
                h.method_len = i - h.method
                h.target = i + 1
                h.state = S_TARGET
            elif not CLASS[c] & C_TOKEN:
                return _bad(h, b"bad character in the method")
        elif h.state == S_VERSION:
            if i - h.mark < 7:
                if c != <uint8_t>VERSION[i - h.mark]:
                    return _bad(h, b"not HTTP/1.0 or HTTP/1.1")
            elif i - h.mark == 7:
                if c != c'0' and c != c'1':
                    return _bad(h, b"not HTTP/1.0 or HTTP/1.1")
                h.minor = c - c'0'
            elif c == c'\r':
                h.state = S_LINE_LF
            else:
                return _bad(h, b"text after the HTTP version")
        elif h.state == S_START:
            if c == c'\r':
                h.state = S_START_LF
            elif CLASS[c] & C_TOKEN:
                h.method = i
                h.state = S_METHOD
            else:
                return _bad(h, b"not an HTTP request")
        else:  # the states that want exactly LF
            if c != c'\n':
                return _bad(h, b"CR without LF")
            if h.state == S_END_LF:
                h.pos = i + 1
                if h.flags & F_LENGTH and h.flags & F_ENCODING:
                    return _bad(h, b"Content-Length with Transfer-Encoding")
                if h.minor == 0 and h.flags & F_ENCODING:
                    return _bad(h, b"Transfer-Encoding in HTTP/1.0")
                if h.minor == 1 and not h.flags & F_HOST:
                    return _bad(h, b"HTTP/1.1 without Host")
                h.state = S_DONE
                return HTTP_DONE
            h.state = S_START if h.state == S_START_LF else S_NAME_START
        i += 1
    h.pos = i
    return HTTP_MORE


class BadRequest(ValueError):
    """The head is malformed or could be read in two ways."""


def parse_head(bytes data, chunk=None):
    """Parse a request head; for tests, tools and benchmarks.

    chunk: feed the head in pieces of that many bytes. Returns (method, target, minor, length of the
    head), or None if it is incomplete. Raises BadRequest.
    """
    cdef http_head h
    cdef const uint8_t *p = data
    cdef uint32_t n = <uint32_t>len(data), step = chunk or n, end = 0
    cdef int rc = HTTP_MORE
    memset(&h, 0, sizeof(h))
    while rc == HTTP_MORE and end < n:
        end = min(n, end + step)
        with nogil:
            rc = http_parse(&h, p, end)
    if rc == HTTP_BAD:
        raise BadRequest(h.error.decode())
    if rc == HTTP_MORE:
        return None
    return (data[h.method:h.method + h.method_len], data[h.target:h.target + h.target_len],
            h.minor, h.pos)
