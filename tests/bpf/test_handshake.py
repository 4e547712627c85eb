# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path's handshakes, packet by packet (BPF_PROG_TEST_RUN): SYNs, their answers, cookies,
and what stands in the way of a new connection."""
from __future__ import annotations

import struct
from typing import Any

import pytest

from tcpha.lab.bed import Cluster
from tests.support.bpf import (
    DROP,
    F_FAST,
    F_FIN,
    FORWARD,
    GONE,
    LINGERING,
    PENDING,
    REDIRECT,
    REPLACING,
    STACK,
    Bpf,
    answer,
    entry,
    flow,
    state_of,
)
from tests.support.packets import (
    ACK,
    CLIENT,
    FE,
    FIN,
    MSS,
    PSH,
    RST,
    SACK_TS,
    SYN,
    VIP,
    WSCALE,
    Packet,
    options,
    stamped,
)

ECE, CWR = 64, 128
# the SYN's options: the kinds of options that the answer must have, in order
SYNS = {
    "none": (b"", [2]), "MSS": (MSS, [2]), "all": (MSS + SACK_TS + WSCALE, [2, 4, 8, 3]),
    "no SACK": (MSS + b"\1\1\x08\x0a" + bytes(8) + WSCALE, [2, 8, 3]),
    "no window scale": (MSS + SACK_TS, [2, 4, 8]),
    "no timestamps": (MSS + b"\1\1\4\2" + WSCALE, [2, 4, 3]),
    "window scale alone": (WSCALE, [2, 3]), "behind the end": (MSS + b"\0" + SACK_TS[1:], [2]),
    "an unknown one": (MSS + b"\xfe\4\0\0" + WSCALE, [2, 3]),
}


@pytest.mark.parametrize("what", SYNS)
def test_syn_ack(lab: Cluster, what: str) -> None:
    given, want = SYNS[what]
    tcp = answer(Bpf(lab.fe_host, ("fe_ingress",)),
                 Packet(SYN, sport=4002, seq=2**32 - 1, tcp_options=given))
    assert tcp[13] == SYN | ACK
    got = options(tcp)
    assert sorted(got) == sorted(want) and got[2] == struct.pack("!H", 1460)
    if 8 in want:
        assert got[8][4:] == given[given.index(b"\x08\x0a") + 2:][:4]


def test_ecn_is_offered(lab: Cluster) -> None:
    bpf = Bpf(lab.fe_host, ("fe_ingress",))
    assert answer(bpf, Packet(SYN | ECE | CWR, sport=4002))[13] == SYN | ACK | ECE


# SYNs that are none of the packet path's, and their verdict
UNUSUAL = {
    "MSS below 536": (Packet(SYN, sport=4003, tcp_options=b"\2\4\1\0"), STACK),
    "IP options": (Packet(SYN, sport=4003, options=b"\1" * 4), STACK),
    "with FIN": (Packet(SYN | FIN, sport=4003), STACK),
    "SYN-ACK": (Packet(SYN | ACK, sport=4003), STACK),
    "an option of length 0": (Packet(SYN, sport=4003, tcp_options=b"\2\0\0\0"), DROP),
    "an option beyond the header": (Packet(SYN, sport=4003, tcp_options=b"\2\x09\0\0"), DROP),
    "a header beyond the packet": (Packet(SYN, sport=4003, doff=15), DROP),
    "a header too short": (Packet(SYN, sport=4003, doff=4), STACK),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_syns(lab: Cluster, what: str) -> None:
    packet, want = UNUSUAL[what]
    assert Bpf(lab.fe_host, ("fe_ingress",)).run("fe_ingress", packet)[0] == want


# of SYNs, and whether the packet path answers them: broadcast addresses, our own ones, and what the
# kernel calls martians are none of its business, nor is what has no route
SOURCES = {
    "192.168.1.99": True, "1.2.3.4": True, "223.1.2.3": True, "0.1.2.3": False, "127.0.0.1": False,
    "127.8.9.1": False, "224.0.0.1": False, "239.1.2.3": False, "240.0.0.1": False,
    "255.255.255.255": False, "192.168.1.255": False, VIP: False, FE: False, "203.0.113.9": False,
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources(lab: Cluster, source: str) -> None:
    for net in ("1.2.3.0/24", "223.1.2.0/24", "0.0.0.0/8", "240.0.0.0/8"):
        lab.fe_host.ip("route", "replace", net, "via", CLIENT)
    packet = Packet(SYN, source=source, sport=4004)
    assert Bpf(lab.fe_host, ("fe_ingress",)).run("fe_ingress", packet)[0] == \
        (REDIRECT if SOURCES[source] else STACK)


def test_segment_behind_one_that_yields(lab: Cluster) -> None:
    """An older socket on the tuple ends before the first segment becomes a new one; what came right
    behind waits in the same queue. So does what overtook the first one's last steps."""
    bpf = Bpf(lab.be_hosts[0], ("be_ingress",))
    cases = ((0, 1, 7101, REDIRECT), (0, 0, 7101, REDIRECT), (0, 1, 6990, DROP),
             (0, 1, 7000 + (1 << 25), DROP), (20_000_000, 1, 7101, DROP))
    for age, yields, seq, verdict in cases:
        bpf.put("adoptions", flow(4010),
                struct.pack("=QII", bpf.host.now_ns() + 5_000_000_000 * (age == 0) - age, 7000,
                            yields))
        packet = Packet(ACK | PSH, sport=4010, seq=seq, data=b"body")
        assert bpf.run("be_ingress", packet)[0] == verdict, (age, yields, seq)
    bpf.drop("adoptions", flow(4010))


def test_cookie(lab: Cluster) -> None:
    """What a client with a cookie may send, and what with another one."""
    bpf = Bpf(lab.fe_host, ("fe_ingress",))
    port = 4004
    tcp = answer(bpf, Packet(SYN, sport=port, seq=7000, tcp_options=MSS + SACK_TS + WSCALE))
    ours, = struct.unpack("!I", tcp[4:8])
    tsval, = struct.unpack("!I", options(tcp)[8][:4])
    good: dict[str, Any] = {"sport": port, "seq": 7001, "ack": (ours + 1) % 2**32,
                            "tcp_options": stamped(0x01020305, tsval)}
    wrong = [{"ack": ours}, {"ack": (ours + 1 + (1 << 10)) % 2**32}, {"seq": 7002}, {"sport": 4005},
             {"tcp_options": stamped(5, tsval - 200_000)},  # older than any key
             {"tcp_options": stamped(5, tsval + 60_000)}]   # of the future
    for other in wrong:
        values = {**good, **other}
        assert bpf.run("fe_ingress", Packet(ACK, **values))[0] == STACK, other
        # data may have overtaken what proves its cookie, but not for longer than a second
        packet = Packet(ACK | PSH, data=b"GET", **values)
        for first, verdict in ((0, DROP), (500, DROP), (1500, STACK), (70_000, DROP)):
            bpf.drop("unknown_flows", flow(values["sport"]))
            if first:
                bpf.put("unknown_flows", flow(values["sport"]),
                        struct.pack("=Q", bpf.host.now_ns() - first * 1_000_000))
            assert bpf.run("fe_ingress", packet)[0] == verdict, (other, first)
    assert bpf.run("fe_ingress", Packet(RST | ACK, **good))[0] == DROP
    assert bpf.run("fe_ingress", Packet(ACK, **good))[0] == DROP
    # a later segment that comes first, and a keep-alive probe
    verdict, out = bpf.run("fe_ingress", Packet(ACK, data=b"x", **{**good, "seq": 8000}))
    assert verdict == REDIRECT and out[:3] == b"\x02\x76\x05"
    assert bpf.run("fe_ingress", Packet(ACK, **{**good, "seq": 7000}))[0] == DROP
    try:
        for _ in range(2):  # the second one is the client's retransmission
            packet = Packet(ACK | PSH, data=b"GET / HTTP/1.1\r\n\r\n", **good)
            verdict, out = bpf.run("fe_ingress", packet)
            assert verdict == REDIRECT and out[:3] == b"\x02\x76\x01"
            assert out[14:] == packet.frame()[14:]
            state = state_of(bpf.get("flows", flow(port)))["state"]
            assert state == PENDING
        verdict, out = bpf.run("fe_ingress", Packet(ACK, data=b"more", **{**good, "seq": 7500}))
        assert verdict == REDIRECT and out[:3] == b"\x02\x76\x02"
    finally:
        bpf.drop("flows", flow(port))


# What stands in the way of a new connection, and what of it the new one's entry must tell.
OLDER = {
    "nothing": (None, 0), "one that is over": (entry(LINGERING, flags=F_FAST), 0),
    "one that is live, and its client has closed":
        (entry(FORWARD, backend=4, flags=F_FAST | F_FIN), 5),
    "a request that came to nothing": (entry(PENDING, flags=F_FAST), 0),
    "one that had taken the place of a live one":
        (entry(REPLACING, older=7, flags=F_FAST), 7),
}


@pytest.mark.parametrize("what", OLDER)
def test_in_the_place_of_an_older_one(lab: Cluster, what: str) -> None:
    """What the front end counts when an older connection is over is not forgotten."""
    older, told = OLDER[what]
    bpf = Bpf(lab.fe_host, ("fe_ingress",))
    port = 4007
    if older is not None:
        bpf.put("flows", flow(port), older)
    try:
        tcp = answer(bpf, Packet(SYN, sport=port, seq=7000))
        ours, = struct.unpack("!I", tcp[4:8])
        request = Packet(ACK | PSH, sport=port, seq=7001, ack=(ours + 1) % 2**32,
                         data=b"GET /older HTTP/1.1\r\n\r\n")
        verdict, out = bpf.run("fe_ingress", request)
        assert verdict == REDIRECT and out[:3] == b"\x02\x76\x01"
        now = state_of(bpf.get("flows", flow(port)))
        assert (now["state"], now["older"]) == (REPLACING if told else PENDING, told)
    finally:
        bpf.drop("flows", flow(port))


def test_while_an_older_one_is_removed(lab: Cluster) -> None:
    """Another CPU is between the two steps of that: a SYN is answered all the same; a request would
    wait for the second step, which does not come here."""
    bpf = Bpf(lab.fe_host, ("fe_ingress",))
    port = 4008
    bpf.put("flows", flow(port), entry(GONE, flags=F_FAST))
    try:
        tcp = answer(bpf, Packet(SYN, sport=port, seq=7000))
        ours, = struct.unpack("!I", tcp[4:8])
        request = Packet(ACK | PSH, sport=port, seq=7001, ack=(ours + 1) % 2**32,
                         data=b"GET /older HTTP/1.1\r\n\r\n")
        assert bpf.run("fe_ingress", request)[0] == DROP
        bpf.drop("flows", flow(port))
        assert bpf.run("fe_ingress", request)[0] == REDIRECT
    finally:
        bpf.drop("flows", flow(port))
