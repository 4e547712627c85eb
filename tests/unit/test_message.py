# SPDX-License-Identifier: GPL-2.0-or-later
"""Control messages, there and back, and what claims to be one."""
from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpha._fast import message
from tests.support.tree import TOP

U8, U16, U32, U64 = (st.integers(0, 2 ** n - 1) for n in (8, 16, 32, 64))
FLOWS = st.binary(min_size=36, max_size=36)
SNAPSHOTS = st.fixed_dictionaries({
    "flow": FLOWS, "snd_nxt": U32, "rcv_nxt": U32, "snd_wnd": U32, "rcv_wnd": U32, "tsval": U32,
    "ts_recent": U32, "srtt_us": U32, "mss": U16, "snd_wscale": st.integers(0, 14),
    "rcv_wscale": st.integers(0, 14), "flags": st.integers(0, 63)})


@settings(deadline=None)
@given(U64, SNAPSHOTS, st.binary(min_size=1, max_size=300))
def test_handoff_round_trip(id: int, fields: dict[str, object], data: bytes) -> None:
    raw = message.encode(message.HANDOFF, id, fields, data)
    got = message.decode(raw + b"more")
    assert got["length"] == len(raw) and got["id"] == id and got["data"] == data
    assert {k: got[k] for k in fields} == fields
    for n in range(len(raw)):
        assert message.decode(raw[:n]) is None


@given(U64, FLOWS, U32)
def test_short_messages_round_trip(id: int, flow: bytes, reason: int) -> None:
    place = {"vaddr": flow[:16], "vport": reason & 0xffff}
    for kind, fields in ((message.ADOPTED, {}), (message.REFUSED, {"reason": reason}),
                         (message.CLOSED, {"flow": flow, "reason": reason}),
                         (message.OWNED, {"flow": flow}), (message.PLACE, place),
                         (message.PING, {})):
        raw = message.encode(kind, id, fields)
        got = message.decode(raw)
        assert (got.pop("type"), got.pop("length"), got.pop("id")) == (kind, len(raw), id)
        assert got == fields


def test_an_answer_bears_the_time() -> None:
    before = message.clock()
    got = message.decode(message.encode(message.PONG, 7))
    assert got["id"] == 7 and before <= got["sent_ns"] <= message.clock()


@pytest.mark.parametrize("body", [b"x" * 18, b"x" * 18 + bytes(5) + b"x", b"x" * 18 + bytes(7)])
def test_a_place_ends_with_zeros(body: bytes) -> None:
    raw = message.encode(message.PLACE, 3, {"vaddr": b"x" * 16, "vport": 0x7878})
    assert raw[16:] == b"x" * 18 + bytes(6)
    with pytest.raises(ValueError):
        message.decode(raw[:4] + struct.pack("!I", 16 + len(body)) + raw[8:16] + body)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 20), st.integers(0, 400))
def test_malformed_messages_are_refused(body: bytes, kind: int, length: int) -> None:
    """Any bytes behind a plausible header: decoded within their bounds, or refused."""
    raw = struct.pack("!HBBIQ", 0x5443, message.VERSION, kind, length, 1) + body
    try:
        got = message.decode(raw)
    except ValueError:
        return
    assert got is None or got["length"] == length <= len(raw)


@pytest.mark.parametrize("raw", [
    b"x" * 16, struct.pack("!HBBIQ", 0x5443, 99, message.ADOPTED, 16, 1),
    struct.pack("!HBBIQ", 0x5443, message.VERSION, message.ADOPTED, 15, 1),
    struct.pack("!HBBIQ", 0x5443, message.VERSION, message.ADOPTED, 20, 1) + b"    ",
    struct.pack("!HBBIQ", 0x5443, message.VERSION, message.HANDOFF, 0xffffffff, 1),
    struct.pack("!HBBIQ", 0x5443, message.VERSION, 77, 16, 1)])
def test_bad_headers_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        message.decode(raw)


def test_what_the_fuzzer_begins_with_is_of_this_version() -> None:
    for file in (TOP / "tests/fuzz/corpus/messages").iterdir():
        rest = file.read_bytes()
        while rest:
            got = message.decode(rest)
            assert got is not None, file
            rest = rest[got["length"]:]
