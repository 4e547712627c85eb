# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a flow (tcpha/_bpf/flow.h), by itself: its table of transitions, random orders of
events, and threads that are at it at the same time."""
from __future__ import annotations

import ctypes
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.tree import TOP

HERE = Path(__file__).parent
HEADER = TOP / "tcpha" / "_bpf" / "flow.h"
STATES = ("NEW", "HELD", "DRAINING", "FORWARD", "PENDING", "REPLACING", "LINGERING", "GONE")
OWN, OLDER = 5, 9  # back ends


class Flow:
    """An entry, and what may happen to it. The id of its connection is what it had last."""

    def __init__(self, lib: ctypes.CDLL):
        self.lib = lib
        self.entry = ctypes.create_string_buffer(lib.size_of_entry())
        self.id = 0

    def phase(self) -> int:
        return int(self.lib.phase(self.entry))

    def state(self) -> str:
        return STATES[self.lib.state(ctypes.c_uint64(self.phase()))]

    def owed(self, phase: int) -> int:
        """The back end whose end the caller counts, or -1."""
        return int(self.lib.owed(ctypes.c_uint64(phase), OWN)) - 1

    def new_id(self) -> ctypes.c_uint64:
        self.id += 1
        return ctypes.c_uint64(self.id)

    def apply(self, event: str) -> tuple[bool, int]:
        """Whether it took place; and whose end the caller counts, or -1."""
        was, id_ = self.phase(), ctypes.c_uint64(self.id)
        e, lib = self.entry, self.lib
        plain: dict[str, Callable[[], int]] = {
            "let_flow": lambda: lib.let_flow(e, id_), "give_back": lambda: lib.give_back(e),
            "hand_over": lambda: lib.hand_over(e, self.new_id()),
            "retry": lambda: lib.retry(e, id_, OWN)}
        own: dict[str, Callable[[], int]] = {
            "take_back": lambda: lib.take_back(e, id_),
            "end, and the client may send": lambda: lib.end(e, id_, 1),
            "end": lambda: lib.end(e, id_, 0)}
        if event in plain:
            return bool(plain[event]()), -1
        if event in own:
            done = bool(own[event]())
            return done, OWN if done else -1
        if event == "settle":
            older = int(lib.settle(e)) - 1
            return older >= 0, older
        if event == "offer":
            done = bool(lib.offer(e, ctypes.c_uint64(was), self.new_id()))
            if not done:
                self.id -= 1
            return done, self.owed(was) if done else -1
        if event == "drop":
            done = bool(lib.drop(e, ctypes.c_uint64(was)))
            return done, self.owed(was) if done else -1
        assert event == "claim"
        found = int(lib.claim(e))
        return STATES[lib.state(ctypes.c_uint64(found))] != "GONE", self.owed(found)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    out = tmp_path_factory.mktemp("flow") / "flow.so"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC",
                    "-I", HEADER.parent, "-o", out, HERE / "flow.c"], check=True)
    lib = ctypes.CDLL(str(out))
    for name in ("phase", "claim"):
        getattr(lib, name).restype = ctypes.c_uint64
    lib.run.restype = ctypes.c_long
    yield lib


def make(lib: ctypes.CDLL, state: str) -> Flow:
    """A flow in a state, by the way that it comes there."""
    flow = Flow(lib)
    lib.forward(flow.entry, flow.new_id()) if state in ("FORWARD", "LINGERING") else \
        lib.begin(flow.entry, OLDER + 1 if state == "REPLACING" else 0)
    if state in ("HELD", "DRAINING"):
        lib.hold(flow.entry, 3)
    for event in {"DRAINING": ["hand_over"], "LINGERING": ["end, and the client may send"],
                  "GONE": ["claim"]}.get(state, []):
        assert flow.apply(event)[0]
    assert flow.state() == state
    return flow


def table() -> dict[str, dict[str, tuple[str, str]]]:
    """{event: {from: (to, whose)}}, as drawn in the header."""
    drawn: dict[str, dict[str, tuple[str, str]]] = {}
    lines = HEADER.read_text().splitlines()
    head = next(n for n, line in enumerate(lines) if re.search(r"\bevent +from +to +whose", line))
    starts = [lines[head].index(word) for word in ("event", "from", "to  ", "whose")]
    for line in lines[head + 2:]:
        if line.strip() == "*":
            continue
        if not line.startswith(" *      "):
            return drawn
        said, states, *rest = (line[a:b].strip() for a, b in
                               zip(starts, [*starts[1:], None], strict=True))
        if said:
            event, (to, whose) = said.partition(":")[0], rest
        every = set(STATES[1:]) - {"GONE"} if states == "all but GONE" else states.split(", ")
        for state in every:
            drawn.setdefault(event, {})[state.strip(",")] = to, whose
    raise ValueError("the table has no end")


EVENTS = ("hand_over", "let_flow", "give_back", "offer", "take_back", "retry", "settle",
          "end, and the client may send", "end", "claim", "drop")


def test_the_table_is_what_happens(lib: ctypes.CDLL) -> None:
    """Each event in each state."""
    drawn = table()
    assert set(EVENTS) <= set(drawn)
    for event in EVENTS:
        for state in STATES[1:]:
            flow = make(lib, state)
            done, whose = flow.apply(event)
            if state not in drawn[event]:
                # it may be said again, and what ended meanwhile has nothing left to wait for
                assert done == (event == "let_flow" and state in ("FORWARD", "LINGERING"))
                assert flow.state() == state and whose == -1
                continue
            to, said = drawn[event][state]
            assert done and flow.state() == to, (event, state)
            want = OLDER if state == "REPLACING" and "older one's" in said else \
                OWN if said.startswith("its own") and state in ("FORWARD", "DRAINING") else -1
            assert whose == want, (event, state)


@pytest.mark.parametrize("seed", range(20))
def test_each_connection_is_counted_once(lib: ctypes.CDLL, seed: int) -> None:
    """Random orders of events; when all are over, no back end has any."""
    rnd, live = random.Random(seed), 0
    flow = make(lib, "PENDING")
    for _ in range(2000):
        event = rnd.choice(EVENTS)
        done, whose = flow.apply(event)
        if done and event in ("offer", "hand_over"):
            live += 1
        if event == "claim" and whose >= 0 and rnd.random() < 0.5:
            lib.begin(flow.entry, whose + 1)  # the next one's offer counts it
            continue
        live -= whose >= 0
        if flow.state() == "GONE":
            rnd.choice((lambda: lib.begin(flow.entry, 0), lambda: lib.hold(flow.entry, 0)))()
    live -= flow.apply("claim")[1] >= 0
    assert live == 0


@pytest.mark.parametrize("threads", (2, 8))
def test_threads_count_each_connection_once(lib: ctypes.CDLL, threads: int) -> None:
    for seed in range(5):
        assert lib.run(threads, 100_000, seed * 64) == 0


@pytest.mark.parametrize("nth", [1, 2])
def test_an_end_is_not_missed_while_packets_are_drained(lib: ctypes.CDLL, nth: int) -> None:
    flow = make(lib, "DRAINING")
    assert lib.end_beside_let_flow(flow.entry, ctypes.c_uint64(flow.id), nth)
    assert flow.state() == "LINGERING"


def test_what_was_handed_over_may_be_so_again(lib: ctypes.CDLL) -> None:
    """Memory was short behind the first time. What was handed over is not anew."""
    for state in ("DRAINING", "FORWARD", "LINGERING"):
        flow = make(lib, state)
        assert lib.was_handed(flow.entry, ctypes.c_uint64(flow.id))
        assert not lib.was_handed(flow.entry, ctypes.c_uint64(flow.id + 1))
        assert lib.let_flow(flow.entry, ctypes.c_uint64(flow.id))
    assert not any(lib.was_handed(make(lib, state).entry, ctypes.c_uint64(1))
                   for state in ("HELD", "PENDING", "REPLACING", "GONE"))
