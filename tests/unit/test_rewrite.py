# SPDX-License-Identifier: GPL-2.0-or-later
"""Rewriting of TCP packets, against a model in plain Python that computes each checksum anew."""
from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpha._fast.rewrite import combined_ecn, parse_packet, translate_error, translate_packet
from tests.support.packets import ECN

SUM_UPDATE, SUM_FULL, SUM_LEAVE = range(3)
SYN, ACK = 2, 16
WORD = st.integers(0, 0xFFFFFFFF) | st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
PORT = st.integers(0, 0xFFFF)


def ones_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ip_header(p: dict[str, Any], protocol: int, length: int) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, p["tos"], 20 + length, p["id"], 0x4000, 64, protocol,
                       0, p["src"], p["dst"])
    return head[:10] + struct.pack("!H", 0xFFFF ^ ones_sum(head)) + head[12:]


def assemble(p: dict[str, Any]) -> bytes:
    """A whole IPv4 TCP packet, checksums right."""
    options = b"".join(
        option if isinstance(option, bytes) else
        b"\x08\x0a" + struct.pack("!II", *option[1]) if option[0] == "ts" else
        bytes([5, 2 + 8 * len(option[1])]) + b"".join(struct.pack("!II", *b) for b in option[1])
        for option in p["options"])
    options += b"\0" * (-len(options) % 4)
    doff = (20 + len(options)) // 4
    tcp = struct.pack("!HHIIBBHHH", p["sport"], p["dport"], p["seq"], p["ack"], doff << 4,
                      p["flags"], p["window"], 0, p["urgent"]) + options + p["data"]
    pseudo = p["src"] + p["dst"] + struct.pack("!BBH", 0, 6, len(tcp))
    check = 0xFFFF ^ ones_sum(pseudo + tcp)
    return ip_header(p, 6, len(tcp)) + tcp[:16] + struct.pack("!H", check) + tcp[18:]


def model(p: dict[str, Any], c: dict[str, Any]) -> dict[str, Any]:
    """What the packet must be afterwards."""
    def add(value: int, key: str) -> int:
        return (value + c[key]) % 2**32
    out = dict(p, seq=add(p["seq"], "seq"))
    acked = bool(p["flags"] & ACK)
    if acked:
        out["ack"] = add(p["ack"], "ack")
    out["options"] = [
        o if isinstance(o, bytes) else
        ("ts", (add(o[1][0], "tsval"), add(o[1][1], "tsecr") if acked else o[1][1]))
        if o[0] == "ts" else
        ("sack", [(add(a, "ack"), add(b, "ack")) for a, b in o[1]]) for o in p["options"]]
    if not p["flags"] & SYN:
        out["window"] = min(-(-(p["window"] << c["window_left"]) >> c["window_right"]), 0xFFFF)
    if "addr" in c:
        out["src" if c["source"] else "dst"] = c["addr"]
        out["sport" if c["source"] else "dport"] = c["port"]
    return out


# no option, NOPs that move the next one to an odd offset, a timestamp, one to three SACK blocks
OPTIONS = st.tuples(
    st.integers(0, 3).map(lambda n: [b"\1" * n]),
    st.one_of(st.just([]), st.tuples(WORD, WORD).map(lambda t: [("ts", t)])),
    st.integers(0, 1).map(lambda n: [b"\1" * n]),
    st.one_of(st.just([]), st.lists(st.tuples(WORD, WORD), min_size=1, max_size=2)
              .map(lambda b: [("sack", b)])),
).map(lambda parts: [o for part in parts for o in part])

ADDRESS = st.binary(min_size=4, max_size=4).filter(any)  # 0.0.0.0 means: none
PACKETS = st.fixed_dictionaries({
    "src": ADDRESS, "dst": ADDRESS,
    "sport": PORT, "dport": PORT, "seq": WORD, "ack": WORD,
    "flags": st.sampled_from([ACK, SYN, SYN | ACK, ACK | 8, ACK | 1, 4, ACK | 4, ACK | 0xC0]),
    "window": PORT, "urgent": PORT, "tos": st.integers(0, 255), "id": PORT, "options": OPTIONS,
    "data": st.binary(max_size=64)})
SHIFT = st.integers(0, 14)
CHANGES = st.fixed_dictionaries({
    "seq": WORD, "ack": WORD, "tsval": WORD, "tsecr": WORD, "window_left": SHIFT,
    "window_right": SHIFT}) | st.fixed_dictionaries({
        "seq": WORD, "ack": WORD, "tsval": WORD, "tsecr": WORD, "window_left": SHIFT,
        "window_right": SHIFT, "addr": ADDRESS, "port": PORT,
        "source": st.booleans()})

PLAIN = {"src": b"\x0a\0\0\1", "dst": b"\x0a\0\0\2", "sport": 1, "dport": 2, "seq": 0xFFFFFFFF,
         "ack": 0, "flags": ACK, "window": 0xFFFF, "urgent": 0, "tos": 0, "id": 0, "data": b"x",
         "options": [b"\1", ("ts", (0xFFFFFFFF, 0)), ("sack", [(0xFFFFFFFF, 1)])]}
WRAP = {"seq": 1, "ack": 0xFFFFFFFF, "tsval": 1, "tsecr": 0xFFFFFFFF, "window_left": 14,
        "window_right": 0}


@given(PACKETS, CHANGES)
@example(PLAIN, WRAP)
@example(dict(PLAIN, options=[("ts", (0, 0xFFFFFFFF))], flags=SYN), WRAP)
def test_every_field_and_the_checksum(packet: dict[str, Any], changes: dict[str, Any]) -> None:
    wanted = assemble(model(packet, changes))
    assert translate_packet(assemble(packet), changes) == wanted
    broken = bytearray(assemble(packet))  # as a device finds it that is to complete the checksum
    broken[36:38] = b"\x12\x34"
    assert translate_packet(bytes(broken), changes, SUM_FULL) == wanted


@given(PACKETS, CHANGES)
def test_gso_packets_keep_their_checksum(packet: dict[str, Any], changes: dict[str, Any]) -> None:
    before = assemble(packet)
    after = translate_packet(before, changes, SUM_LEAVE)
    assert after[36:38] == before[36:38]
    wanted = assemble(model(packet, changes))
    assert after[:36] + after[38:] == wanted[:36] + wanted[38:]


@given(PACKETS, CHANGES)
def test_translating_back_restores(packet: dict[str, Any], changes: dict[str, Any]) -> None:
    """But for windows, which lose their low bits."""
    there = {k: v for k, v in changes.items() if not k.startswith("window")}
    back = {k: -there[k] % 2**32 for k in ("seq", "ack", "tsval", "tsecr")}
    if "addr" in there:
        side = "s" if there["source"] else "d"
        back |= {"source": there["source"], "port": packet[f"{side}port"],
                 "addr": packet["src" if there["source"] else "dst"]}
    before = assemble(packet)
    assert translate_packet(translate_packet(before, there), back) == before


@given(st.binary(max_size=120) | st.builds(
    lambda p, cut, junk: assemble(p)[:cut] + junk, PACKETS, st.integers(0, 120),
    st.binary(max_size=20)))
def test_any_bytes_can_be_parsed(data: bytes) -> None:
    found = parse_packet(data)
    if found is not None:
        assert len(found["data"]) <= len(data) - 40
        translate_packet(data, WRAP)


@pytest.mark.parametrize("options", [
    b"\x08", b"\x08\x00", b"\x08\x01", b"\x08\x0b" + b"\0" * 8, b"\x05\x0a\0\0", b"\x02\x04\x05"])
def test_options_that_run_over_the_end(options: bytes) -> None:
    packet = assemble(dict(PLAIN, options=[options.rjust(4 * -(-len(options) // 4), b"\1")]))
    assert parse_packet(packet) is None


def test_options_of_a_syn() -> None:
    packet = assemble(dict(PLAIN, flags=SYN, options=[
        b"\x02\x04\x05\xb4", b"\x04\x02", ("ts", (7, 0)), b"\1\x03\x03\x0f"]))
    found = parse_packet(packet)
    assert found["mss"] == 1460 and found["sack_ok"] and found["ts"] == (7, 0)
    assert found["wscale"] == 14  # RFC 7323 section 2.3: what is above counts as 14
    assert socket.inet_ntoa(packet[12:16]) == "10.0.0.1"


@given(PACKETS, st.integers(0, 63))
def test_the_head_of_a_packet_is_enough(packet: dict[str, Any], more: int) -> None:
    data = assemble(packet)
    head = len(data) - len(packet["data"])
    assert parse_packet(data, min(head + more, len(data))) == parse_packet(data)
    assert parse_packet(data, head - 1 - more % head) is None


def icmp_error(router: bytes, to: bytes, about: bytes) -> bytes:
    """Fragmentation needed, 1300 bytes at most; checksums right."""
    body = struct.pack("!BBHHH", 3, 4, 0, 0, 1300) + about
    body = body[:2] + struct.pack("!H", 0xFFFF ^ ones_sum(body)) + body[4:]
    return ip_header({"tos": 0xC0, "id": 7, "src": router, "dst": to}, 1, len(body)) + body


@given(PACKETS, WORD, ADDRESS, PORT, ADDRESS, st.integers(28, 80))
def test_errors_about_what_was_rewritten(packet: dict[str, Any], seq: int, vip: bytes, port: int,
                                         router: bytes, quoted: int) -> None:
    """A router quotes what the network saw; the local socket must read what it sent."""
    outward = {"seq": seq, "addr": vip, "port": port, "source": True}
    inward = {"addr": packet["src"], "port": packet["sport"]}
    sent = assemble(packet)
    seen = translate_packet(sent, outward)
    error = translate_error(icmp_error(router, vip, seen[:quoted]), outward, inward)
    # behind the sequence number nobody looks
    assert error == icmp_error(router, packet["src"], sent[:28] + seen[28:quoted])
    same = {"seq": seq}  # where the server listens at the VIP
    error = translate_error(
        icmp_error(router, packet["src"], translate_packet(sent, same)[:28]), same, {})
    assert error == icmp_error(router, packet["src"], sent[:28])


@given(PACKETS, st.integers(0, 255), st.integers(0, 255))
def test_ecn_of_a_tunnel(p: dict[str, Any], tos: int, outer: int) -> None:
    want = ECN[tos & 3, outer & 3]
    assert combined_ecn(assemble(p | {"tos": tos}), outer) == (
        None if want is None else assemble(p | {"tos": tos & ~3 | want}))


@given(st.binary(max_size=100) | st.builds(
    lambda p, cut, junk: icmp_error(b"rrrr", p["src"], assemble(p))[:cut] + junk, PACKETS,
    st.integers(0, 100), st.binary(max_size=20)))
def test_any_bytes_may_be_an_error(data: bytes) -> None:
    found = translate_error(data, WRAP, {"addr": b"abcd", "port": 1})
    assert found is None or len(found) == len(data) >= 56
