# SPDX-License-Identifier: GPL-2.0-or-later
"""Another host's clock, as far as it can be known.

Hosts were booted at different times, their clocks run at slightly different rates, and a virtual
machine that is paused finds its clock behind. So no host compares its clock with another one's: it
asks (PING) and is answered with the time there (PONG). That time was read between question and
answer, whatever either of them took on the way; which gives bounds for the difference, and each
further answer makes them closer. Bounds that contradict what was known mean that a clock has
jumped: then only the newest ones count.
"""
from libc.stdint cimport int64_t, uint64_t

from tcpha._fast.defs cimport TCPHA_CLOCK

cdef int64_t DRIFT_PPM = 1000      # two clocks, each twice as bad as NTP allows (500 ppm)
cdef int64_t MS = 1000000
cdef int64_t SLACK_MS = 1000       # a jump that nobody needs to notice, and what divisions cut off
cdef int64_t SLACK_MAX_MS = 30000


cdef inline int64_t _drift(uint64_t time) noexcept nogil:
    """How far clocks may drift apart, rounded up."""
    return (<int64_t>(time // 1000000) + 1) * DRIFT_PPM


cdef void clock_told(peer_clock *p, uint64_t theirs, uint64_t on_the_way,
                     uint64_t now) noexcept nogil:
    """Begin anew: the peer's time was 'theirs' when it sent what has come now, and was at most so
    long on the way."""
    p.at = now
    p.low = <int64_t>(theirs - now)
    p.high = p.low + <int64_t>on_the_way + _drift(on_the_way)


cdef void clock_answered(peer_clock *p, uint64_t asked, uint64_t theirs,
                         uint64_t now) noexcept nogil:
    """The peer's time was 'theirs' some time between 'asked' and 'now' of ours."""
    cdef int64_t drift, low, high
    if asked > now:
        return
    low = <int64_t>(theirs - now) - _drift(now - asked)
    high = <int64_t>(theirs - asked) + _drift(now - asked)
    drift = _drift(now - p.at)
    p.at = now
    p.low = max(p.low - drift, low)
    p.high = min(p.high + drift, high)
    if p.low > p.high:
        p.low = low
        p.high = high


cdef int64_t clock_youngest(const peer_clock *p, uint64_t sent, uint64_t now) noexcept nogil:
    """How old a message is, at least, that the peer sent when its clock said 'sent'."""
    return <int64_t>(now - sent) + p.low


cdef int64_t clock_oldest(const peer_clock *p, uint64_t sent, uint64_t now) noexcept nogil:
    """How old it is at most."""
    return <int64_t>(now - sent) + p.high


cdef uint64_t clock_word(const peer_clock *p) noexcept nogil:
    """The same for the BPF program."""
    return TCPHA_CLOCK(<uint64_t>(p.low // MS),
                       <uint64_t>min((p.high - p.low) // MS + SLACK_MS, SLACK_MAX_MS))


class PeerClock:
    """For tests: a clock that has been told 'theirs' when ours said 'now'."""

    def __init__(self, uint64_t theirs, uint64_t on_the_way, uint64_t now):
        cdef peer_clock p
        clock_told(&p, theirs, on_the_way, now)
        self.state = p

    def answered(self, uint64_t asked, uint64_t theirs, uint64_t now):
        cdef peer_clock p = self.state
        clock_answered(&p, asked, theirs, now)
        self.state = p

    def youngest(self, uint64_t sent, uint64_t now):
        cdef peer_clock p = self.state
        return clock_youngest(&p, sent, now)

    def oldest(self, uint64_t sent, uint64_t now):
        cdef peer_clock p = self.state
        return clock_oldest(&p, sent, now)

    def word(self):
        """(how far the peer's clock is ahead in ms, modulo 2^32, slack in ms)."""
        cdef peer_clock p = self.state
        cdef uint64_t w = clock_word(&p)
        return w >> 32, w & 0xffffffff
