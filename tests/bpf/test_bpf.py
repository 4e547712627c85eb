# SPDX-License-Identifier: GPL-2.0-or-later
"""The BPF programs, packet by packet (BPF_PROG_TEST_RUN): of running daemons, in their maps."""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tcpha.lab.bed import Cluster
from tests.support.bpf import (
    DROP,
    F_FIN,
    F_NEW_SYN,
    F_RST,
    FORWARD,
    GONE,
    HELD,
    LINGERING,
    PENDING,
    REDIRECT,
    REPLACING,
    STACK,
    Bpf,
    entry,
    flow,
    mapped,
    number,
    phase,
    state_of,
    tag,
)
from tests.support.packets import (
    ACK,
    BE,
    CLIENT,
    ECN,
    FE,
    FIN,
    FULL,
    IPIP,
    PSH,
    RST,
    SYN,
    VIP,
    Packet,
    ip_header,
)

OP_DROP, R_OK, R_NO_SOCKET = 5, 1, 4
DIRECT, TUNNEL, LOCAL = 1, 2, 3
LEAP = 1 << 24  # TCPHA_LEAP


def error(kind: int = 3, code: int = 4, quote: int = 28, source: str = VIP, sport: int = 80,
          dport: int = 4000, more: bytes = b"", **of: Any) -> Packet:
    """A router's ICMP error about a segment from the VIP, of which it quotes so many bytes."""
    about = Packet(source=source, destination=CLIENT, sport=sport, dport=dport, options=more, **of)
    return Packet(protocol=socket.IPPROTO_ICMP, source="192.168.1.200", body=struct.pack(
        "!BBHHH", kind, code, 0, 0, 1300) + about.ip()[:quote + len(more)])


@pytest.fixture(scope="module")
def daemons(root: None) -> Iterator[Cluster]:
    c = Cluster(1, datapath=("ebpf", "ebpf"), rules=[(0, ".*")], fastpath=False)
    try:
        c.nginx[0].file("index.html", b"x\n")
        c.get("/")  # both hosts know each other's MAC addresses
        yield c
    finally:
        c.close()


@pytest.fixture(scope="module")
def fe(daemons: Cluster) -> Bpf:
    return Bpf(daemons.fe_host, ("fe_ingress", "fe_tap"))


@pytest.fixture(scope="module")
def be(daemons: Cluster) -> Bpf:
    bpf = Bpf(daemons.be_hosts[0], ("be_ingress", "be_tap"))
    bpf.put("frontends", mapped(FE), number(1))  # as if it had said that it tunnels
    return bpf


# What is none of a front end's business goes to the stack, whatever it looks like.
OTHERS: dict[str, Packet] = {
    "ARP": Packet(ethertype=0x0806), "IPv6": Packet(ethertype=0x86DD), "UDP": Packet(protocol=17),
    "another address": Packet(destination=FE), "another port": Packet(dport=81),
    "an unknown flow": Packet(sport=4001), "a SYN of a new connection": Packet(SYN, sport=4001),
    "a first fragment": Packet(fragment=0x2000), "a last fragment": Packet(fragment=0x0005),
    "version 6 in an IPv4 frame": Packet(version=6), "ihl 4": Packet(ihl=4),
    "ihl beyond the packet": Packet(ihl=15),
    "a frame that ends behind the IP header": Packet(cut=34),
    "a frame that ends in the TCP header": Packet(cut=14 + 20 + 10),
    "a frame that ends behind the ports": Packet(cut=14 + 20 + 4),
}


@pytest.mark.parametrize("what", OTHERS)
def test_front_end_leaves_alone(fe: Bpf, what: str) -> None:
    fe.put("flows", flow(), entry(FORWARD))
    packet = OTHERS[what]
    verdict, out = fe.run("fe_ingress", packet)
    assert (verdict, out) == (STACK, packet.frame())
    assert state_of(fe.get("flows", flow()))["packets"] == 0


# description: entry before, packet, verdict, and what must be in the entry then
FLOWS: dict[str, tuple[bytes, Packet, int, dict[str, int]]] = {
    "an ACK": (entry(FORWARD), Packet(), REDIRECT, {"packets": 1, "bytes": 40, "flags": 0}),
    "data": (entry(FORWARD), Packet(ACK | PSH, data=b"x" * 100), REDIRECT,
             {"packets": 1, "bytes": 140, "end_seq": 1100}),
    "data at the wrap": (entry(FORWARD, end_seq=0xFFFFFFF0),
                         Packet(seq=0xFFFFFFF0, data=b"x" * 100), REDIRECT, {"end_seq": 84}),
    "an old duplicate": (entry(FORWARD, end_seq=2000), Packet(data=b"x" * 100), REDIRECT,
                         {"end_seq": 2000}),
    "IP options": (entry(FORWARD), Packet(options=b"\1" * 4, data=b"y" * 10), REDIRECT,
                   {"packets": 1, "bytes": 54, "end_seq": 1010}),
    "a FIN": (entry(FORWARD), Packet(FIN | ACK), REDIRECT, {"flags": F_FIN, "end_seq": 1001}),
    "a RST": (entry(FORWARD), Packet(RST), REDIRECT, {"flags": F_RST}),
    "a SYN on a live flow": (entry(FORWARD), Packet(SYN, seq=5000), REDIRECT, {"flags": 0}),
    "a SYN behind a FIN": (entry(FORWARD, flags=F_FIN), Packet(SYN, seq=5000), STACK,
                           {"flags": F_FIN | F_NEW_SYN, "syn_seq": 5000}),
    "a SYN before what was sent": (entry(FORWARD, flags=F_FIN), Packet(SYN, seq=999), REDIRECT,
                                   {"flags": F_FIN}),
    "a SYN half the way round": (entry(FORWARD, flags=F_FIN), Packet(SYN, seq=1000 + 0x70000000),
                                 REDIRECT, {"flags": F_FIN}),
    "a SYN on a closed flow": (entry(LINGERING), Packet(SYN, seq=999), STACK,
                               {"flags": F_NEW_SYN, "syn_seq": 999}),
    "of the new connection": (entry(FORWARD, flags=F_FIN | F_NEW_SYN, syn_seq=5000),
                              Packet(seq=5001), STACK, {"packets": 0}),
    "of the old connection": (entry(FORWARD, flags=F_FIN | F_NEW_SYN, syn_seq=5000),
                              Packet(seq=1001), REDIRECT, {"packets": 1}),
    "more, after a forged RST and SYN": (
        entry(FORWARD, flags=F_RST | F_NEW_SYN, syn_seq=5000), Packet(seq=1000, data=b"x"),
        REDIRECT, {"flags": 0, "end_seq": 1001}),
    "a FIN that a SYN has overtaken": (
        entry(LINGERING, flags=F_NEW_SYN, syn_seq=5000), Packet(FIN | ACK),
        REDIRECT, {"flags": F_FIN | F_NEW_SYN, "end_seq": 1001}),
    "no more, after a FIN and a SYN": (
        entry(FORWARD, flags=F_FIN | F_NEW_SYN, syn_seq=5000), Packet(seq=900, data=b"x" * 100),
        REDIRECT, {"flags": F_FIN | F_NEW_SYN, "end_seq": 1000}),
    "a RST with a number that cannot be": (entry(FORWARD), Packet(RST, seq=1000 + LEAP), REDIRECT,
                                           {"flags": 0, "end_seq": 1000}),
    "a FIN with a number that cannot be": (
        entry(FORWARD), Packet(FIN, seq=(999 - LEAP) % 2**32), REDIRECT,
        {"flags": 0, "end_seq": 1000}),
    "data that cannot be": (entry(FORWARD), Packet(seq=1000 + LEAP, data=b"x"), REDIRECT,
                            {"end_seq": 1000, "ahead_seq": 0, "ahead_end": 0}),
    "data behind a gap": (entry(FORWARD), Packet(seq=1200, data=b"x" * 100), REDIRECT,
                          {"end_seq": 1000, "ahead_seq": 1200, "ahead_end": 1300}),
    "more behind a gap": (entry(FORWARD, ahead=(1200, 1300)), Packet(seq=1300, data=b"x" * 100),
                          REDIRECT, {"end_seq": 1000, "ahead_seq": 1200, "ahead_end": 1400}),
    "the gap half closed": (entry(FORWARD, ahead=(1200, 1300)), Packet(data=b"x" * 100), REDIRECT,
                            {"end_seq": 1100, "ahead_seq": 1200, "ahead_end": 1300}),
    "the gap closed": (entry(FORWARD, ahead=(1100, 1300)), Packet(data=b"x" * 100), REDIRECT,
                       {"end_seq": 1300, "ahead_seq": 0, "ahead_end": 0}),
    "a SYN-ACK": (entry(FORWARD, flags=F_FIN), Packet(SYN | ACK, seq=5000), REDIRECT,
                  {"packets": 1}),
    "of the Local Node": (entry(FORWARD, backend=255), Packet(data=b"z" * 9), STACK,
                          {"packets": 1, "bytes": 49}),
    "to nowhere": (entry(FORWARD, backend=77), Packet(), DROP, {"packets": 0}),
    "to an index beyond the table": (entry(FORWARD, backend=9999), Packet(), DROP, {"packets": 0}),
    "that is being handed over": (entry(HELD, slot=0x01020304), Packet(data=b"h"), REDIRECT,
                                  {"packets": 0, "end_seq": 1001}),
    "doff beyond the packet": (entry(FORWARD), Packet(doff=15), REDIRECT, {"packets": 1}),
}


# description: ICMP error, and whether it is forwarded
ERRORS: dict[str, tuple[Packet, bool]] = {
    "fragmentation needed": (error(), True), "host unreachable": (error(code=1), True),
    "time exceeded": (error(11, 0), True), "parameter problem": (error(12, 0), True),
    "the whole segment quoted": (error(quote=40), True),
    "about a segment with IP options": (error(more=b"\1" * 8), True),
    "an echo request": (error(8, 0), False), "a redirect": (error(5), False),
    "about an unknown flow": (error(dport=4001), False),
    "about another port": (error(sport=81), False),
    "about another address": (error(source=FE), False),
    "about UDP": (error(protocol=17), False), "about a later fragment": (error(fragment=5), False),
    "about IPv6": (error(version=6), False), "about a header of 16 bytes": (error(ihl=4), False),
    "about options beyond the end": (error(ihl=15), False),
    "no port quoted": (error(quote=22), False), "nothing quoted": (error(quote=0), False),
    "cut off": (replace(error(), cut=14 + 20 + 4), False),
    "a fragment": (replace(error(), fragment=0x2000), False),
    "for another address": (replace(error(), destination=FE), False),
}


@pytest.mark.parametrize("what", ERRORS)
def test_front_end_forwards_errors(fe: Bpf, what: str) -> None:
    packet, forwarded = ERRORS[what]
    fe.put("flows", flow(), entry(FORWARD))
    verdict, out = fe.run("fe_ingress", packet)
    assert (verdict, out[14:]) == (REDIRECT if forwarded else STACK, packet.frame()[14:])
    assert state_of(fe.get("flows", flow()))["packets"] == 0  # it is none of the client's
    fe.put("flows", flow(), entry(HELD))
    assert fe.run("fe_ingress", packet) == (STACK, packet.frame())
    fe.drop("flows", flow())


@pytest.mark.parametrize("what", FLOWS)
def test_front_end_flow(fe: Bpf, what: str) -> None:
    before, packet, want, after = FLOWS[what]
    fe.put("flows", flow(), before)
    try:
        verdict, out = fe.run("fe_ingress", packet)
        now = state_of(fe.get("flows", flow()))
    finally:
        fe.drop("flows", flow())
    assert verdict == want
    assert {key: now[key] for key in after} == after
    assert out[14:] == packet.frame()[14:]  # not a byte of the packet changes
    if state_of(before)["state"] == HELD:
        assert out[:6] == b"\x02\x74" + struct.pack("=I", 0x01020304)
    elif want == STACK and state_of(before)["backend"] != 255:
        assert out == packet.frame()


def test_front_end_tunnel(fe: Bpf, daemons: Cluster) -> None:
    own = fe.get("backends", number(0))
    ifindex = struct.unpack("=I", own[:4])[0]
    fe.put("backends", number(9), struct.pack("=IIII", ifindex, TUNNEL, 0, 0) + mapped(BE) * 2
           + mapped(FE))
    names = []
    for fragment in (FULL, 0, 0):
        fe.put("flows", flow(), entry(FORWARD, backend=9))
        packet = Packet(ACK | PSH, data=b"x" * 100, fragment=fragment)
        verdict, out = fe.run("fe_ingress", packet)
        assert verdict == REDIRECT
        outer, inner = out[14:34], out[34:]
        assert inner == packet.ip()
        head = ip_header(4, 5, 20 + len(inner), fragment, IPIP, FE, BE)
        # all but the identification, and the checksum that goes with it
        assert outer[:4] + outer[6:10] + outer[12:] == head[:4] + head[6:10] + head[12:]
        assert is_summed(outer)
        names.append(outer[4:6])
    assert names[1] != names[2]  # routers may cut these
    fe.put("backends", number(9), bytes(64))
    fe.drop("flows", flow())


def test_front_end_tap(fe: Bpf) -> None:
    """What was held comes back by the TAP, for whoever the entry says by then."""
    mark = Packet(data=b"held")
    for state, want in ((entry(FORWARD), REDIRECT), (entry(HELD, slot=1), REDIRECT),
                        (entry(FORWARD, backend=255), STACK), (entry(FORWARD, backend=77), DROP)):
        fe.put("flows", flow(), state)
        assert fe.run("fe_tap", mark)[0] == want
    fe.drop("flows", flow())
    assert fe.run("fe_tap", mark)[0] == STACK  # given back
    for packet in (Packet(ethertype=0x0806), Packet(protocol=17), Packet(cut=34), Packet(ihl=3),
                   Packet(ethertype=0x88B5)):  # the last: an operation of no slot
        assert fe.run("fe_tap", packet)[0] == DROP


@dataclass(frozen=True)
class Operation(Packet):
    """The frame of an operation slot."""

    slot: int = 20  # of no worker: a test cluster has fewer

    def frame(self) -> bytes:
        return bytes(12) + b"\x88\xb5" + number(self.slot) + bytes(42)


def test_an_entry_whose_memory_is_another_flows(fe: Bpf) -> None:
    """It was removed, and its memory used anew, since it was looked up. Nothing is done by it."""
    fe.put("flows", flow(), entry(FORWARD), tag(flow(4001)))
    before = fe.get("flows", flow())
    try:
        assert fe.run("fe_ingress", Packet(FIN | ACK, data=b"x" * 10))[0] == STACK
        assert fe.get("flows", flow()) == before
    finally:
        fe.drop("flows", flow())


# What stands in the place of an entry that was found over, and whether it is removed.
INSTEAD: dict[str, tuple[dict[str, int], bool]] = {
    "the same": ({}, True), "of a new connection": ({"state": FORWARD, "which": 2}, False),
    "of a new one, not decided": ({"state": PENDING, "which": 8}, False),
    "another's in the same state": ({"which": 2}, False), "live again": ({"state": FORWARD}, False),
    "on its way to be replaced": ({"state": GONE}, False),
}


@pytest.mark.parametrize("state", (LINGERING, PENDING, REPLACING))
@pytest.mark.parametrize("what", INSTEAD)
def test_only_what_was_found_is_removed(fe: Bpf, what: str, state: int) -> None:
    changed, gone = INSTEAD[what]
    found = {"state": state, "older": 3 * (state == REPLACING), "which": 1}
    value = bytearray(entry(state))
    struct.pack_into("=Q", value, 40, phase(**found | changed))
    fe.put("flows", flow(), bytes(value))
    before = fe.get("flows", flow())
    op = bytearray(fe.get("ops", number(20)))
    op[:36] = flow()
    struct.pack_into("=I", op, 36, OP_DROP)
    struct.pack_into("=QQ", op, 48, 1, phase(**found))
    fe.put("ops", number(20), bytes(op))
    try:
        assert fe.run("fe_tap", Operation())[0] == DROP
        op = bytearray(fe.get("ops", number(20)))
        result, = struct.unpack_from("=I", op, 40)
        left = fe.host.run("bpftool", "map", "lookup", "id", fe.maps["flows"], "key",
                           *map(str, flow()), check=False)
        assert result == (R_OK if gone else R_NO_SOCKET)
        assert (left.returncode != 0) == gone
        assert gone or fe.get("flows", flow()) == before
    finally:
        fe.drop("flows", flow())


GUARDED: dict[str, tuple[Packet, int]] = {
    "ARP": (Packet(ethertype=0x0806), STACK), "UDP to the VIP": (Packet(protocol=17), STACK),
    "to its own address": (Packet(destination=BE), STACK),
    "a SYN to the VIP": (Packet(SYN), DROP), "an ACK of no socket": (Packet(ACK), DROP),
    "a RST of no socket": (Packet(RST), DROP), "another port of the VIP": (Packet(dport=22), DROP),
    "IP options": (Packet(options=b"\1" * 8), DROP), "doff 0": (Packet(doff=0), DROP),
    "a fragment to the VIP": (Packet(fragment=0x2000), DROP),
    "a later fragment to the VIP": (Packet(fragment=0x0005), DROP),
    "a fragment of UDP to the VIP": (Packet(protocol=17, fragment=0x2000), STACK),
    "a fragment to its own address": (Packet(destination=BE, fragment=0x2000), STACK),
    "ihl 3": (Packet(ihl=3), DROP), "cut in the TCP header": (Packet(cut=44), DROP),
    "a tunnel of a stranger": (Packet(tunnel=("10.9.9.9", BE)), DROP),
    "a tunnel of the front end, no socket": (Packet(tunnel=(FE, BE)), DROP),
    "a tunnel, not for the VIP": (Packet(destination="10.0.0.1", tunnel=(FE, BE)), STACK),
    "a tunnel to another address": (Packet(tunnel=(FE, "10.0.0.2")), STACK),
    "a tunnel in fragments": (Packet(tunnel=(FE, BE), outer_fragment=0x2000), STACK),
    "its later fragments": (Packet(tunnel=("10.9.9.9", BE), outer_fragment=0x0005), STACK),
    "a tunnel of a stranger in fragments": (
        Packet(tunnel=("10.9.9.9", BE), outer_fragment=0x2000), DROP),
    "a tunnel in fragments that hide what for": (
        Packet(tunnel=(FE, BE), outer_fragment=0x2000, cut=14 + 20 + 12), DROP),
    "a tunnel in fragments that hide the ports": (
        Packet(tunnel=(FE, BE), outer_fragment=0x2000, cut=14 + 40 + 12), DROP),
    "a tunnel with a fragment": (Packet(tunnel=(FE, BE), fragment=0x2000), DROP),
    "a tunnel with a later fragment": (Packet(tunnel=(FE, BE), fragment=0x0005), DROP),
    "a tunnel with options": (Packet(tunnel=(FE, BE), outer_options=b"\1" * 4), DROP),
    "a tunnel with options, not for the VIP": (
        Packet(destination="10.0.0.1", tunnel=(FE, BE), outer_options=b"\1" * 4), STACK),
    "a tunnel that ends in the inner header": (Packet(tunnel=(FE, BE), cut=14 + 20 + 12), STACK),
    "a tunnel that ends in the TCP header": (Packet(tunnel=(FE, BE), cut=14 + 40 + 12), DROP),
    "a tunnel with inner ihl 15": (Packet(tunnel=(FE, BE), ihl=15), DROP),
}


@pytest.mark.parametrize("what", GUARDED)
def test_back_end_guard(be: Bpf, what: str) -> None:
    packet, want = GUARDED[what]
    verdict, out = be.run("be_ingress", packet)
    assert verdict == want
    if want == STACK:
        assert out == packet.frame()


def is_summed(data: bytes) -> bool:
    """Whether the Internet checksum in it is right (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16) == 0xFFFF


# description: mode and MTU of the way to a back end, packet, and the MTU that the client is told
TOO_BIG: dict[str, tuple[int, int, Packet, int]] = {
    "just fits": (DIRECT, 700, Packet(data=b"x" * 660), 0),
    "a byte more": (DIRECT, 700, Packet(data=b"x" * 661), 700),
    "just fits a tunnel": (TUNNEL, 700, Packet(data=b"x" * 640), 0),
    "a byte more for a tunnel": (TUNNEL, 700, Packet(data=b"x" * 641), 680),
    "TCP options": (TUNNEL, 700, Packet(data=b"x" * 641, tcp_options=b"\1" * 12), 680),
    "IP options": (TUNNEL, 700, Packet(data=b"x" * 641, options=bytes(8)), 680),
    "without DF": (TUNNEL, 700, Packet(data=b"x" * 641, fragment=0), 0),
    "a way that nobody knows": (TUNNEL, 0, Packet(data=b"x" * 1600), 0)}


@pytest.mark.parametrize("what", TOO_BIG)
def test_front_end_tells_what_is_too_big(fe: Bpf, what: str) -> None:
    mode, mtu, packet, told = TOO_BIG[what]
    ifindex = struct.unpack("=I", fe.get("backends", number(0))[:4])[0]
    fe.put("backends", number(9), struct.pack("=IIII", ifindex, mode, 0, mtu) + mapped(BE) * 2
           + mapped(FE))
    fe.put("flows", flow(), entry(FORWARD, backend=9))
    try:
        verdict, out = fe.run("fe_ingress", packet)
        sent = state_of(fe.get("flows", flow()))["packets"]
    finally:
        fe.put("backends", number(9), bytes(64))
        fe.drop("flows", flow())
    assert verdict == REDIRECT
    assert sent == (not told)
    if not told:
        assert out[-len(packet.ip()):] == packet.ip()
        return
    ip, icmp = out[14:34], out[34:]
    assert ip == ip_header(4, 5, len(ip + icmp), FULL, socket.IPPROTO_ICMP, VIP, CLIENT, tos=0xC0,
                           number=0)
    assert struct.unpack("!BB2xHH", icmp[:8]) == (3, 4, 0, told)
    assert is_summed(icmp)
    assert packet.ip().startswith(icmp[8:])
    assert len(icmp[8:]) >= 20 + len(packet.options) + 8


def test_back_end_lets_pass_what_has_a_socket(be: Bpf, daemons: Cluster) -> None:
    with daemons.client.connect(VIP) as s:
        s.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
        assert s.recv(65536).startswith(b"HTTP/1.1 200")
        mine = Packet(sport=s.getsockname()[1])
        assert be.run("be_ingress", mine)[0] == STACK
        assert be.run("be_ingress", replace(mine, flags=SYN))[0] == STACK  # a challenge ACK's case
        verdict, out = be.run("be_ingress", replace(mine, tunnel=(FE, BE)))
        assert (verdict, out[14:]) == (STACK, mine.ip())
        assert be.run("be_ingress", replace(mine, tunnel=("10.9.9.9", BE)))[0] == DROP
        assert be.run("be_ingress", replace(mine, dport=81))[0] == DROP


def test_back_end_unwraps_errors(be: Bpf) -> None:
    mine = error()
    assert be.run("be_ingress", mine) == (STACK, mine.frame())
    verdict, out = be.run("be_ingress", replace(mine, tunnel=(FE, BE)))
    assert (verdict, out[14:]) == (STACK, mine.ip())
    assert be.run("be_ingress", replace(mine, tunnel=("10.9.9.9", BE)))[0] == DROP
    for other in (error(8, 0), error(source=CLIENT), Packet(protocol=17)):
        other = replace(other, tunnel=(FE, BE))
        assert be.run("be_ingress", other) == (STACK, other.frame())


@pytest.mark.parametrize("inner", range(4))
@pytest.mark.parametrize("outer", range(4))
def test_back_end_combines_ecn(be: Bpf, inner: int, outer: int) -> None:
    packet = replace(error(), tos=0xA8 | inner)
    verdict, out = be.run("be_ingress", replace(packet, tunnel=(FE, BE), outer_tos=0xA8 | outer))
    want = ECN[inner, outer]
    if want is None:
        assert verdict == DROP
    else:
        assert (verdict, out[14:]) == (STACK, replace(packet, tos=0xA8 | want).ip())


def test_back_end_tap(be: Bpf) -> None:
    for packet in (Packet(ethertype=0x0806), Packet(protocol=17), Packet(cut=34), Packet(ihl=3),
                   Packet(ethertype=0x88B5), Packet(data=b"id 7 is no operation")):
        assert be.run("be_tap", packet)[0] == DROP


def test_counters(fe: Bpf, daemons: Cluster) -> None:
    """What user space shows is what the programs count."""
    def packets() -> dict[str, Any]:
        assert daemons.fe
        answer: dict[str, Any] = daemons.fe.ctl("status")["packets"]
        return answer
    before = packets()
    fe.put("flows", flow(), entry(FORWARD))
    for flags in (ACK, SYN, ACK):
        fe.run("fe_ingress", Packet(flags))
    fe.put("flows", flow(), entry(HELD, slot=60000))
    fe.run("fe_ingress", Packet())
    fe.put("flows", flow(), entry(FORWARD, backend=77))
    fe.run("fe_ingress", Packet())
    fe.drop("flows", flow())
    after = packets()
    assert {key: after[key] - before[key] for key in ("forwarded", "live_syn", "held",
                                                      "unreachable", "forwarded_bytes")} == {
        "forwarded": 3, "live_syn": 1, "held": 1, "unreachable": 1, "forwarded_bytes": 120}
