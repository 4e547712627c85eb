# SPDX-License-Identifier: GPL-2.0-or-later
"""Rule matching, control messages, forged packets and control files."""
from __future__ import annotations

import asyncio
import os
import re
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpha._fast import message
from tcpha._fast.match import Matcher, PatternError
from tcpha._fast.packet import forge_segment
from tcpha.admin.files import ControlFiles
from tcpha.admin.server import Server, ask
from tcpha.net.routes import Line, told

# Matching

PATTERNS = ["jpg$", ".*", "^/a", r"\.(css|js)$", "x{2,3}", "[0-9]+", "^$", "a|b", "(?i)PNG"]


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
def test_matches_like_re(target: str) -> None:
    want = [n for n, p in enumerate(PATTERNS) if re.search(p, target)]
    assert MATCHER.matches(target.encode()) == want


MATCHER = Matcher(PATTERNS)


def test_many_patterns() -> None:
    matcher = Matcher([f"^/site{n}/" for n in range(5000)] + [".*"])
    assert matcher.matches(b"/site4321/x") == [4321, 5000]


def test_bad_pattern_names_its_position() -> None:
    with pytest.raises(PatternError, match="index 3") as error:
        Matcher(["ok", "jpg("])
    assert error.value.pattern == 1


# Messages

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
    for kind, fields in ((message.ADOPTED, {}), (message.REFUSED, {"reason": reason}),
                         (message.CLOSED, {"flow": flow, "reason": reason}),
                         (message.OWNED, {"flow": flow}), (message.PING, {})):
        raw = message.encode(kind, id, fields)
        got = message.decode(raw)
        assert (got.pop("type"), got.pop("length"), got.pop("id")) == (kind, len(raw), id)
        assert got == fields


def test_an_answer_bears_the_time() -> None:
    before = message.clock()
    got = message.decode(message.encode(message.PONG, 7))
    assert got["id"] == 7 and before <= got["sent_ns"] <= message.clock()


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 12), st.integers(0, 400))
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


# Packets

def checksum(data: bytes) -> int:
    """RFC 1071, plainly."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


@settings(deadline=None)
@given(U32, U32, U16, st.binary(max_size=100), st.one_of(st.none(), st.tuples(U32, U32)))
def test_forged_segments(seq: int, ack: int, window: int, data: bytes,
                         stamps: tuple[int, int] | None) -> None:
    fields = {"seq": seq, "ack": ack, "window": window, "flags": 0x18, "ip_id": 7}
    if stamps:
        fields |= {"tsval": stamps[0], "tsecr": stamps[1]}
    frame = forge_segment("10.1.2.3", 4567, "10.9.8.7", 80, fields, data)
    ip = frame[24:]
    assert checksum(ip[:20]) == 0
    assert struct.unpack("!HH", ip[2:6]) == (len(ip), 7)
    assert ip[12:20] == bytes([10, 1, 2, 3, 10, 9, 8, 7])
    tcp = ip[20:]
    assert struct.unpack("!HHII", tcp[:12]) == (4567, 80, seq, ack)
    size = (tcp[12] >> 4) * 4
    assert tcp[13] == 0x18 and struct.unpack("!H", tcp[14:16])[0] == window
    assert tcp[size:] == data
    if stamps:
        assert struct.unpack("!IHH", tcp[20:24] + tcp[24:28])[0] == 0x0101080a
        assert struct.unpack("!II", tcp[24:32]) == stamps
    else:
        assert size == 20
    # the virtio-net header asks for the checksum that completes the pseudo-header's sum
    assert frame[:10] == struct.pack("<BBHHHH", 1, 0, 0, 0, 34, 16)
    pseudo = ip[12:20] + struct.pack("!HH", 6, len(tcp))
    assert struct.unpack("!H", tcp[16:18])[0] == ~checksum(pseudo) & 0xffff


def test_a_command_under_way_is_answered_when_the_daemon_stops(tmp_path: Path) -> None:
    """'unload' of an idle daemon ends it at once; the sender is told nevertheless."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> int:
        asked.set()
        await go_on.wait()
        return 7

    async def daemon(pool: ThreadPoolExecutor) -> Future[Any]:
        server = Server({"slow": slow})
        await server.listen(tmp_path / "socket")
        answer = pool.submit(ask, tmp_path / "socket", "slow", [])
        await asked.wait()
        go_on.set()
        await server.close()
        return answer
    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(daemon(pool)).result() == 7


# Control files

def test_a_write_to_a_control_file_that_was_replaced_many_times_since(tmp_path: Path) -> None:
    """Its event waits while the value changes otherwise, again and again: it still counts. What
    was replaced is not kept open for ever."""
    value, taken = 0, []

    async def take(text: str) -> None:
        nonlocal value
        value = int(text)
        taken.append(value)

    async def daemon() -> int:
        nonlocal value
        files = ControlFiles(tmp_path / "control", {"level": (lambda: value, take)})
        present = tmp_path / "control" / "level"
        try:
            with present.open("a") as f:
                f.write("1000\n")
            for value in range(1, 100):
                files.refresh()
                assert present.read_text() == f"{value}\n"
            while present.read_text() != "1000\n":
                await asyncio.sleep(0.01)
            for value in range(100):
                files.refresh()
                assert present.read_text() == f"{value}\n"
                await asyncio.sleep(0)
            return len(os.listdir("/proc/self/fd"))
        finally:
            files.close()
    assert asyncio.run(asyncio.wait_for(daemon(), 30)) < len(os.listdir("/proc/self/fd")) + 40
    assert taken == [1000]
    assert not (tmp_path / "control").exists()


def test_writes_to_control_files_when_the_queue_of_events_is_full(tmp_path: Path) -> None:
    """The kernel keeps 16,384 events by default, and says when some were lost."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = ("a", "b", "c")
    taken: dict[str, list[str]] = {name: [] for name in names}

    async def daemon() -> None:
        def entry(name: str) -> Any:
            async def take(text: str) -> None:
                taken[name].append(text)
            return lambda: len(taken[name]), take
        files = ControlFiles(tmp_path / "control", {name: entry(name) for name in names})
        try:
            for n in range(most + 10):  # of equal events one behind the other, one is kept
                (tmp_path / "control" / names[n % 2]).open("a").close()
            with (tmp_path / "control" / "c").open("a") as f:
                f.write("7\n")
            while not taken["c"]:
                await asyncio.sleep(0.01)
        finally:
            files.close()
    asyncio.run(asyncio.wait_for(daemon(), 60))
    assert taken == {"a": [], "b": [], "c": ["7"]}


# Routes

def line(prefix: str, mss: int = 0, interfaces: tuple[int, ...] = (2,), table: int = 254) -> Line:
    network = IPv4Network(prefix)
    return Line(table, (network.prefixlen, int(network.network_address)), interfaces, mss)


def places(lines: list[Line], most: int = 100) -> dict[str, int]:
    return {f"{index} {IPv4Network((address, length))}": mss
            for (index, length, address), mss in told(lines, most).items()}


def test_what_routes_tell() -> None:
    everywhere = line("0.0.0.0/0", 1200)
    inner, inmost = line("10.0.0.0/8"), line("10.1.0.0/16", 900)
    assert places([inner, line("10.1.0.0/16")]) == {}
    assert places([everywhere]) == {"2 0.0.0.0/0": 1200}
    assert places([inmost, everywhere, inner]) == {
        "2 0.0.0.0/0": 1200, "2 10.0.0.0/8": 0, "2 10.1.0.0/16": 900}
    # one that says what the one around it says; the kernel prefers the first of a prefix
    assert places([everywhere, line("10.0.0.0/8", 1200)]) == {"2 0.0.0.0/0": 1200}
    assert places([everywhere, line("0.0.0.0/0", 700)]) == {"2 0.0.0.0/0": 1200}
    # each interface by itself
    assert places([everywhere, line("10.0.0.0/8", interfaces=(3,)),
                   line("10.1.0.0/16", 900, (3, 4))]) == {
        "2 0.0.0.0/0": 1200, "3 10.1.0.0/16": 900, "4 10.1.0.0/16": 900}
    # of several tables the smallest that any has for an address
    assert places([everywhere, line("0.0.0.0/0", 800, table=100), inner,
                   line("10.1.0.0/16", 1300)]) == {"2 0.0.0.0/0": 800}
    assert places([everywhere, line("10.0.0.0/8", 1300, table=100)]) == {"2 0.0.0.0/0": 1200}
    assert places([line("10.0.0.0/8", 1300, table=100), inner]) == {"2 10.0.0.0/8": 1300}


def test_more_routes_than_there_is_room_for() -> None:
    many = [line(f"10.{n}.0.0/16", 700 + n) for n in range(50)]
    assert len(places(many, 50)) == 50
    assert places([*many, line("10.99.0.0/16", 0, (3,)), line("10.99.0.0/16", 900, (4,))], 50) == {
        "2 0.0.0.0/0": 700, "4 0.0.0.0/0": 900}
