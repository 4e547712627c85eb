# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of large tables, as text: made a piece at a time while somebody reads them, without the
GIL. A table never is in memory as a whole, and the control loop goes on beside.

A row is a JSON array and a newline; or, aligned, columns under their names.
"""
import json

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

from tcpha._fast.be_worker cimport BackEnd, adopted, backend_state
from tcpha._fast.datapath cimport FeDatapath
from tcpha._fast.defs cimport (
    TCPHA_F_FIN, TCPHA_F_RST, TCPHA_TARGET_MAX, tcpha_entry, tcpha_flow, tcpha_live)
from tcpha._fast.scan cimport Scan
from tcpha._fast.sys cimport now_ns, ntohs, pthread_mutex_lock, pthread_mutex_unlock

FLOWS = ("client", "vaddr", "target", "rule", "server", "state", "age", "idle", "packets", "bytes")
ADOPTED = ("client", "vaddr", "frontend", "age")

cdef enum:
    PIECE = 1 << 16        # bytes, and what is left of a row
    ROW_MOST = 512         # bytes of a row, without its texts
    BUCKETS = 1024         # that are read under one lock
    ENDPOINT = 21          # characters of the longest address and port
    TARGET_WIDTH = 32      # of columns; what is longer pushes the rest of its row
    TEXT_WIDTH = 40
    STATE_WIDTH = 7
    TIME_WIDTH = 11
    COUNT_WIDTH = 9


cdef class Texts:
    def __cinit__(self, list texts):
        cdef uint32_t i
        self.kept = [<bytes>t for t in texts]
        self.count = <uint32_t>len(texts)
        self.text = <const char **>calloc(self.count + 1, sizeof(char *))
        self.length = <int *>calloc(self.count + 1, sizeof(int))
        if self.text == NULL or self.length == NULL:
            raise MemoryError
        for i in range(self.count):
            self.text[i] = <bytes>self.kept[i]
            self.length[i] = <int>len(<bytes>self.kept[i])
            self.longest = max(self.longest, self.length[i])

    def __dealloc__(self):
        free(self.text)
        free(self.length)


cdef inline char *_put(char *to, const char *text, int length) noexcept nogil:
    memcpy(to, text, length)
    return to + length


cdef inline char *_put_text(char *to, Texts texts, uint32_t number) noexcept nogil:
    """The last text stands for all numbers that have none."""
    cdef uint32_t i = min(number, texts.count - 1)
    return _put(to, texts.text[i], texts.length[i])


cdef char *_put_endpoint(char *to, const uint8_t *address, uint16_t port) noexcept nogil:
    return to + snprintf(to, ENDPOINT + 1, b"%u.%u.%u.%u:%u", address[12], address[13],
                         address[14], address[15], <unsigned int>ntohs(port))


cdef char *_put_target(char *to, const tcpha_entry *e, bint quoted) noexcept nogil:
    """The parser lets visible characters of ASCII through, and no others."""
    cdef uint32_t i
    cdef char c
    for i in range(min(e.target_len, <uint32_t>TCPHA_TARGET_MAX)):
        c = e.target[i]
        if quoted and (c == c'"' or c == c'\\'):
            to[0] = c'\\'
            to += 1
        to[0] = c if c'!' <= c <= c'~' else c'?'
        to += 1
    return _put(to, b"...", 3) if e.target_len > TCPHA_TARGET_MAX else to


cdef inline char *_pad(char *to, const char *begin, int width) noexcept nogil:
    """The end of a column."""
    cdef char *end = <char *>begin + width
    if to < end:
        memset(to, c' ', end - to)
        to = end
    return _put(to, b"  ", 2)


cdef inline double _since(uint64_t now, uint64_t then) noexcept nogil:
    return max(<double><int64_t>(now - then), 0.0) / 1e9


cdef inline const char *_state(const tcpha_entry *e) noexcept nogil:
    return b"closing" if e.flags & (TCPHA_F_FIN | TCPHA_F_RST) else b"forward"


cdef class Rows:
    """Iterate over it: each item is bytes, whole rows."""

    cdef int _allow(self, int longest) except -1:
        """longest: of a row's texts, together."""
        self.size = PIECE + ROW_MOST + longest
        self.room = <char *>malloc(self.size)
        if self.room == NULL:
            raise MemoryError
        return 0

    def __dealloc__(self):
        free(self.room)

    def __iter__(self):
        return self


cdef char *_array(char *to, FlowRows r, const tcpha_flow *key, const tcpha_entry *e,
                  uint64_t now) noexcept nogil:
    to = _put_endpoint(_put(to, b'["', 2), key.caddr, key.cport)
    to = _put_endpoint(_put(to, b'", "', 4), key.vaddr, key.vport)
    to = _put_target(_put(to, b'", "', 4), e, True)
    to = _put_text(_put(to, b'", ', 3), r.rules, e.rule)
    to = _put_text(_put(to, b', ', 2), r.servers, e.backend)
    return to + snprintf(to, 128, b', "%s", %.3f, %.3f, %llu, %llu]\n', _state(e),
                         _since(now, e.start_ns), _since(now, e.last_ns),
                         <unsigned long long>e.packets, <unsigned long long>e.bytes)


cdef char *_line(char *to, FlowRows r, const tcpha_flow *key, const tcpha_entry *e,
                 uint64_t now) noexcept nogil:
    to = _pad(_put_endpoint(to, key.caddr, key.cport), to, ENDPOINT)
    to = _pad(_put_endpoint(to, key.vaddr, key.vport), to, ENDPOINT)
    to = _pad(_put_target(to, e, False), to, TARGET_WIDTH)
    to = _pad(_put_text(to, r.rules, e.rule), to, min(r.rules.longest, TEXT_WIDTH))
    to = _pad(_put_text(to, r.servers, e.backend), to, r.servers.longest)
    return to + snprintf(to, 128, b"%-*s  %-*.3f  %-*.3f  %-*llu  %llu\n", STATE_WIDTH, _state(e),
                         TIME_WIDTH, _since(now, e.start_ns), TIME_WIDTH, _since(now, e.last_ns),
                         COUNT_WIDTH, <unsigned long long>e.packets,
                         <unsigned long long>e.bytes)


cdef class FlowRows(Rows):
    """Handed-over connections: columns FLOWS. rules, servers: what stands for their numbers, and
    last for others; aligned: for people, the columns' names first."""

    def __cinit__(self, FeDatapath datapath, list rules, list servers, bint aligned=False):
        write = str.encode if aligned else _json
        self.scan = Scan(datapath)
        self.rules = Texts([write(t) for t in (*rules, "")])
        self.servers = Texts([write(t) for t in (*servers, "?")])
        self.aligned = aligned
        self.head = self._names() if aligned else b""
        self._allow(self.rules.longest + self.servers.longest)

    def _names(self):
        self.rules.longest = max(self.rules.longest, <int>len("rule"))
        self.servers.longest = max(self.servers.longest, <int>len("server"))
        widths = (ENDPOINT, ENDPOINT, TARGET_WIDTH, min(self.rules.longest, TEXT_WIDTH),
                  self.servers.longest, STATE_WIDTH, TIME_WIDTH, TIME_WIDTH, COUNT_WIDTH, 0)
        return "  ".join(n.ljust(w) for n, w in zip(FLOWS, widths, strict=True)).encode() + b"\n"

    cdef size_t _fill(self) noexcept nogil:
        cdef char *to = self.room
        cdef uint64_t now = now_ns()
        while to - self.room < PIECE and self.scan.next():
            if not tcpha_live(self.scan.entry):
                continue
            if self.aligned:
                to = _line(to, self, self.scan.key, self.scan.entry, now)
            else:
                to = _array(to, self, self.scan.key, self.scan.entry, now)
        return to - self.room

    def __next__(self):
        cdef size_t n
        if self.head:
            head, self.head = self.head, b""
            return head
        with nogil:
            n = self._fill()
        self.scan.check()
        if n == 0:
            raise StopIteration
        return self.room[:n]


cdef class AdoptedRows(Rows):
    """Adopted connections of a back end: columns ADOPTED. frontends: as in FlowRows."""

    def __cinit__(self, BackEnd core, list frontends):
        self.core = core
        self.frontends = Texts([_json(t) for t in (*frontends, "?")])
        self._allow(self.frontends.longest)

    def __dealloc__(self):
        free(self.copies)

    cdef bint _copy(self) noexcept nogil:
        """Copy what is in the buckets that follow. False: there are no more, or no memory."""
        cdef backend_state *b = self.core.b
        cdef uint32_t end
        self.count = self.done = 0
        while self.count == 0 and self.bucket <= b.mask and not self.failed:
            end = min(self.bucket + BUCKETS, b.mask + 1)
            pthread_mutex_lock(&b.lock)
            while self.bucket < end and not self.failed:
                self._copy_chain(b.buckets[self.bucket])
                self.bucket += 1
            pthread_mutex_unlock(&b.lock)
        return self.count != 0 and not self.failed

    cdef void _copy_chain(self, const adopted *a) noexcept nogil:
        cdef adopted *grown
        while a != NULL:
            if self.count == self.capacity:
                self.capacity = max(2 * self.capacity, <uint32_t>BUCKETS)
                grown = <adopted *>realloc(self.copies, self.capacity * sizeof(adopted))
                if grown == NULL:
                    self.failed = True
                    return
                self.copies = grown
            self.copies[self.count] = a[0]
            self.count += 1
            a = a.next

    cdef size_t _fill(self) noexcept nogil:
        cdef char *to = self.room
        cdef const adopted *a
        cdef uint64_t now = now_ns()
        while to - self.room < PIECE and (self.done < self.count or self._copy()):
            a = &self.copies[self.done]
            self.done += 1
            to = _put_endpoint(_put(to, b'["', 2), a.flow.caddr, a.flow.cport)
            to = _put_endpoint(_put(to, b'", "', 4), a.flow.vaddr, a.flow.vport)
            to = _put_text(_put(to, b'", ', 3), self.frontends, a.peer)
            to += snprintf(to, 64, b", %.3f]\n", _since(now, a.since_ns))
        return to - self.room

    def __next__(self):
        cdef size_t n
        with nogil:
            n = self._fill()
        if self.failed:
            raise MemoryError
        if n == 0:
            raise StopIteration
        return self.room[:n]


def _json(str text):
    return json.dumps(text).encode()
