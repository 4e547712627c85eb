# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of a peer's clock."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tcpha._fast.peerclock import PeerClock

SECOND = 1_000_000_000
MS = SECOND // 1000
HELLO = 3 * SECOND  # HELLO_NS in core.pyx
WEEK = 7 * 86400 * SECOND
times = st.integers(1000 * SECOND, 1 << 62)
delays = st.integers(0, 5 * SECOND)


@given(ours=times, theirs=times, hello=st.integers(0, HELLO), ppm=st.integers(-500, 500),
       exchanges=st.lists(st.tuples(delays, delays, st.integers(0, 600 * SECOND)), max_size=8),
       age=st.integers(0, 200 * SECOND))
def test_the_truth_lies_within_what_is_known(
        ours: int, theirs: int, hello: int, ppm: int, exchanges: list[tuple[int, int, int]],
        age: int) -> None:
    """Whatever messages take on the way, and however clocks drift."""
    begin, there = ours, theirs

    def peer(now: int) -> int:
        return there + (now - begin) * (1_000_000 + ppm) // 1_000_000
    p = PeerClock(peer(ours), HELLO, ours + hello)
    now = ours + hello
    for out, back, pause in exchanges:
        now += pause
        p.answered(now, peer(now + out), now + out + back)
        now += out + back
        ahead, slack = p.word()
        wrong = ((peer(now) - now) // MS - ahead + (1 << 31)) % (1 << 32) - (1 << 31)
        assert -1 <= wrong <= slack or slack == 30_000
        assert p.oldest(peer(now), now) >= 0
        assert p.youngest(peer(now) - age, now) <= age <= p.oldest(peer(now) - age, now)


@given(jump=st.integers(-WEEK, WEEK), trip=st.integers(0, 2 * SECOND))
def test_a_jump_is_healed_by_the_next_answer(jump: int, trip: int) -> None:
    ours, theirs = 2 * WEEK, 3 * WEEK
    p = PeerClock(theirs, HELLO, ours)
    p.answered(ours, theirs, ours + MS)
    now = ours + SECOND
    there = theirs + SECOND + jump
    p.answered(now, there + trip // 2, now + trip)
    age = p.oldest(there + trip // 2, now + trip)
    assert age >= trip - trip // 2 - abs(jump) * (abs(jump) <= trip + 2 * MS)
    assert age <= trip + 3 * MS or abs(jump) <= trip + 3 * MS


def test_an_answer_from_the_future_says_nothing() -> None:
    p = PeerClock(WEEK, HELLO, WEEK)
    before = p.state
    p.answered(2 * WEEK, 5, WEEK + MS)
    assert p.state == before
