# SPDX-License-Identifier: GPL-2.0-or-later
"""Who guesses the packet path's cookies, and those who must not suffer from that."""
from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tests.support.bpf import DROP, REDIRECT, STACK, Bpf, answer, calm_down, flow
from tests.support.client import ask
from tests.support.packets import ACK, MSS, PSH, RST, SACK_TS, SYN, Packet, options, stamped
from tests.support.state import fast, settle
from tests.support.wire import Forger, first_frame

pytestmark = pytest.mark.modes("fast-direct")
GUESSES = 300  # more than TCPHA_GUESSES
GET = b"GET /guessed HTTP/1.1\r\n\r\n"


@pytest.fixture
def c(mode: dict[str, Any]) -> Iterator[Cluster]:
    cluster = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        cluster.nginx[0].file("1k", size=1024)
        yield cluster
    finally:
        cluster.close()


def timestamps(c: Cluster, on: bool) -> None:
    c.client.sysctl("net.ipv4.tcp_timestamps", str(int(on)))


def wary(c: Cluster) -> bool:
    assert c.fe
    return bool(c.fe.ctl("status")["wary"])


def guess(c: Cluster, bpf: Bpf) -> None:
    """As many times in a second as it takes, however slow this host is."""
    with bpf.memory("guesses") as memory:
        forger = Forger(c.client, c, 61000)
        for _ in range(GUESSES):
            memory[:8] = struct.pack("=Q", c.fe_host.now_ns())  # the second has just begun
            forger.send(ACK | PSH, random.getrandbits(32), GET)


def cookie(bpf: Bpf, port: int) -> int:
    """What acknowledges the answer to a SYN without timestamps."""
    ours, = struct.unpack("!I", answer(bpf, Packet(SYN, sport=port, seq=7000))[4:8])
    return int(ours + 1) % 2**32


def test_many_guesses(c: Cluster) -> None:
    """Cookies without timestamps do not count then. Clients without them are served by the socket
    path; those with them, and whose handshake had ended before, as ever."""
    assert c.fe
    fe, bpf = c.fe, Bpf(c.fe_host, ("fe_ingress",))
    timestamps(c, False)
    with first_frame(c.client, lambda frame: frame[47] == ACK) as frames:
        before = c.client.connect(c.VIP)
        wait_for(lambda: frames, "the end of the handshake")
    wait_for(lambda: bpf.count("shaken") == 1 or fe.ctl("status")["in_hand"] == 1, "it to arrive")
    right = Packet(ACK | PSH, sport=4020, seq=7001, ack=cookie(bpf, 4020), data=GET)
    assert not wary(c)
    guess(c, bpf)
    wait_for(lambda: wary(c), "the front end to be wary")
    wait_for(lambda: "may be guessing" in fe.log.read_text(), "a word of it")
    with bpf.memory("guesses") as memory:
        memory[:8], memory[16:20] = struct.pack("=Q", c.fe_host.now_ns()), bytes(4)
        assert bpf.run("fe_ingress", right)[0] == DROP
        assert memory[16:20] == bytes(4)  # it was none
    assert bpf.run("fe_ingress", Packet(SYN, sport=4021))[0] == STACK
    settled, status = fast(c), fe.ctl("status")["packets"]
    with c.client.connect(c.VIP) as s:
        ask(s)
    assert fast(c) == settled and fe.ctl("status")["packets"]["wary"] == status["wary"] + 1
    ask(before)
    before.close()
    timestamps(c, True)
    with c.client.connect(c.VIP) as s:
        ask(s)
    assert fast(c) >= settled + 1
    calm_down(bpf)
    bpf.drop("unknown_flows", flow(4020))
    try:
        assert bpf.run("fe_ingress", right)[0] == REDIRECT
    finally:
        bpf.drop("flows", flow(4020))
    wait_for(lambda: "it is calm" in fe.log.read_text(), "a word of that")
    settle(c)


def test_a_few_wrong_ones(c: Cluster) -> None:
    """Stray segments, and guesses of who has timestamps, are no reason."""
    bpf = Bpf(c.fe_host, ("fe_ingress",))
    forger = Forger(c.client, c, 61000)
    assert c.fe
    before = c.fe.ctl("status")["packets"]["forged"]
    for _ in range(GUESSES):
        forger.send(ACK | PSH, random.getrandbits(32), GET, tsval=1)
    for _ in range(GUESSES // 10):
        forger.send(ACK | PSH, random.getrandbits(32), GET)
    fe = c.fe
    wait_for(lambda: fe.ctl("status")["packets"]["forged"] >= before + GUESSES // 10, "them")
    assert not wary(c)
    assert bpf.run("fe_ingress", Packet(SYN, sport=4022))[0] == REDIRECT


def test_agreed_timestamps_must_be_there(c: Cluster) -> None:
    """Or a guess without them would be as good where 15 bits more were to be guessed."""
    bpf = Bpf(c.fe_host, ("fe_ingress",))
    tcp = answer(bpf, Packet(SYN, sport=4023, seq=7000, tcp_options=MSS + SACK_TS))
    ours, = struct.unpack("!I", tcp[4:8])
    tsval, = struct.unpack("!I", options(tcp)[8][:4])
    timed: dict[str, Any] = {"sport": 4023, "seq": 7001, "ack": (ours + 1) % 2**32}
    untimed: dict[str, Any] = {"sport": 4024, "seq": 7001, "ack": cookie(bpf, 4024)}
    stamp = stamped(5, tsval)
    try:
        assert bpf.run("fe_ingress", Packet(ACK | PSH, data=GET, **timed))[0] == DROP
        assert bpf.run("fe_ingress", Packet(ACK | PSH, data=GET, tcp_options=stamp, **untimed))[0] \
            == DROP
        # a RST may come without; it ends the handshake
        assert bpf.run("fe_ingress", Packet(ACK, tcp_options=stamp, **timed))[0] == DROP
        assert bpf.count("shaken") == 1
        assert bpf.run("fe_ingress", Packet(RST | ACK, **timed))[0] == DROP
        assert bpf.count("shaken") == 0
        assert bpf.run("fe_ingress", Packet(ACK | PSH, data=GET, **untimed))[0] == REDIRECT
        verdict, out = bpf.run("fe_ingress", Packet(ACK | PSH, data=GET, tcp_options=stamp,
                                                    **timed))
        assert verdict == REDIRECT and out[:3] == b"\x02\x76\x01"
    finally:
        for port in (4023, 4024):
            bpf.drop("flows", flow(port))
