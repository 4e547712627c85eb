# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path: a request that reaches its back end without a socket on the front end."""
from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_bpf import ACK, DROP, FIN, PSH, REDIRECT, RST, STACK, SYN, Bpf, Packet, flow, number
from test_edges import Forger

from tcpha.lab.bed import Cluster, Host, wait_for
from test_serve import REQUEST, body, read_all, settle

pytestmark = pytest.mark.modes("fast-direct", "fast-tunnel")
ECE, CWR = 64, 128
KEEP = REQUEST.replace(b"close", b"keep-alive")
PENDING = 3


def fast(c: Cluster) -> int:
    """Connections that took the packet path."""
    assert c.fe
    return int(c.fe.ctl("status")["counters"]["fast"])


def ask(s: socket.socket) -> None:
    s.sendall(KEEP)
    got = b""
    while len(got.partition(b"\r\n\r\n")[2]) < 1024:
        got += s.recv(65536)
    assert len(body(got)) == 1024


def test_no_socket_on_the_front_end(cluster: Cluster) -> None:
    settle(cluster)
    before = fast(cluster)
    held = []
    for _ in range(20):
        held.append(cluster.client.connect(cluster.VIP))
        ask(held[-1])  # at once, or it would become a socket
    seen = cluster.fe_host.run("ss", "-Htan", "sport = :80").stdout
    ports = ["{}:{}".format(*s.getsockname()) for s in held]
    for s in held:
        s.close()
    assert "LISTEN" in seen and not any(port in seen for port in ports)
    settle(cluster)
    assert fast(cluster) == before + 20


# what is lost, once: where at the client, and which packets are meant
LOST = {
    "SYN": ("output", "tcp dport 80 tcp flags & (syn | ack) == syn"),
    "SYN-ACK": ("input", "tcp sport 80 tcp flags & (syn | ack) == (syn | ack)"),
    "ACK": ("output", "tcp dport 80 tcp flags & (syn | ack | psh) == ack"),
    "request": ("output", "tcp dport 80 tcp flags & psh == psh"),
    "response": ("input", "tcp sport 80 tcp flags & psh == psh"),
    "ACK of the response": ("output", "tcp dport 80 tcp flags & (syn | psh) == 0 ip length < 60 "
                            "tcp sequence > 0 numgen inc mod 1000 == 1"),
    "FIN": ("input", "tcp sport 80 tcp flags & fin == fin"),
}


@pytest.mark.parametrize("what", LOST)
def test_one_packet_lost(cluster: Cluster, what: str) -> None:
    hook, match = LOST[what]
    if "numgen" not in match:
        match += " numgen inc mod 1000 == 0"
    before = fast(cluster)
    cluster.client.nft(f"""table ip lab {{
        counter lost {{ }}
        chain lose {{ type filter hook {hook} priority 0;
            {match} counter name lost drop; }}
    }}""")
    try:
        with cluster.client.connect(cluster.VIP) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
        assert cluster.client.nft_counter("lost") == 1
    finally:
        cluster.client.nft("")
    settle(cluster)
    assert fast(cluster) == before + 1


@contextmanager
def everything_twice(host: Host) -> Iterator[None]:
    """Each segment that the host sends to port 80 leaves it a second time."""
    s = host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)))
    s.bind(("eth0", 0x0003))
    s.settimeout(0.1)
    ended = threading.Event()

    def copy() -> None:
        again: list[bytes] = []  # what we have sent comes by here too
        while not ended.is_set():
            try:
                frame, address = s.recvfrom(65536)
            except TimeoutError:
                continue
            if address[2] != socket.PACKET_OUTGOING or frame[12:14] != b"\x08\x00" or \
                    frame[23] != socket.IPPROTO_TCP or frame[36:38] != b"\0P":
                continue
            if frame in again:
                again.remove(frame)
            else:
                again.append(frame)
                s.send(frame)
    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        s.close()


def test_every_packet_twice(cluster: Cluster) -> None:
    cluster.client.run("ethtool", "-K", "eth0", "tx", "off")  # what is copied must be complete
    settle(cluster)
    before = fast(cluster)
    try:
        with everything_twice(cluster.client):
            for _ in range(20):
                with cluster.client.connect(cluster.VIP) as s:
                    s.sendall(REQUEST)
                    assert len(body(read_all(s))) == 1024
    finally:
        cluster.client.run("ethtool", "-K", "eth0", "tx", "on")
    settle(cluster)
    assert fast(cluster) == before + 20
    assert cluster.fe
    n = cluster.fe.ctl("status")["counters"]
    assert n["handed"] == n["closed"]


def test_key_changes_during_a_handshake(cluster: Cluster) -> None:
    """Cookies of both keys are good, at the front end and at the back end."""
    bpf = Bpf(cluster.fe_host, ("fe_ingress",))
    before = fast(cluster)
    with cluster.client.connect(cluster.VIP) as old:
        keys = bytearray(bpf.get("keys", number(0)))
        keys[32] ^= 1  # current
        bpf.put("keys", number(0), bytes(keys))
        with cluster.client.connect(cluster.VIP) as new:
            for s in (old, new):
                ask(s)
    settle(cluster)
    assert fast(cluster) == before + 2


def test_floods_leave_nothing(cluster: Cluster) -> None:
    """SYNs cost no state, and guessed cookies bring nothing to a back end."""
    settle(cluster)
    assert cluster.fe
    before = cluster.fe.ctl("status"), [be.ctl("status") for be in cluster.be]
    forgers = [Forger(cluster.client, cluster, port) for port in range(61000, 61020)]
    for _ in range(250):
        for f in forgers:
            f.send(SYN, random.getrandbits(32))
            f.send(ACK | PSH, random.getrandbits(32), REQUEST)
    ask(cluster.client.connect(cluster.VIP))
    after = cluster.fe.ctl("status"), [be.ctl("status") for be in cluster.be]
    assert "SYN-RECV" not in cluster.fe_host.run("ss", "-Htan", "sport = :80").stdout
    assert after[0]["packets"]["forged"] >= before[0]["packets"]["forged"] + 5000
    assert sum(be["counters"]["adopted"] for be in after[1]) == \
        sum(be["counters"]["adopted"] for be in before[1]) + 1


def test_silent_client_becomes_a_socket(cluster: Cluster) -> None:
    """Who says nothing for a second after the handshake is accepted like on the socket path."""
    assert cluster.fe
    fe = cluster.fe
    settle(cluster)
    before = fe.ctl("status")["counters"]
    with cluster.client.connect(cluster.VIP) as s:
        wait_for(lambda: fe.ctl("status")["in_hand"] == 1, "a socket of the front end")
        ask(s)
    settle(cluster)
    after = fe.ctl("status")["counters"]
    assert after["handed"] == before["handed"] + 1 and after["fast"] == before["fast"]


def test_a_back_end_smaller_than_its_traffic(mode: dict[str, Any]) -> None:
    """Adoptions are told in batches, ends one by one: however far the table lags behind, each
    connection is in it, and counted once."""
    c = Cluster(1, **mode, rules=[(0, ".*")], be_conf="maxclients = 24")
    try:
        c.nginx[0].file("1k", size=1024)
        done = c.client.run("ab", "-q", "-s", "60", "-n", "8000", "-c", "16", f"http://{c.VIP}/1k")
        assert "Complete requests:      8000" in done.stdout
        assert "Failed requests:        0" in done.stdout, done.stdout
        settle(c)
        assert c.fe
        n = c.fe.ctl("status")["counters"]
        assert n["handed"] == n["closed"] == c.be[0].ctl("status")["counters"]["adopted"] == 8000
    finally:
        c.close()


# The SYN's answer, packet by packet

@pytest.fixture(scope="module")
def lab() -> Iterator[Cluster]:
    c = Cluster(1, datapath=("ebpf", "ebpf"), rules=[(0, ".*")])
    try:
        c.nginx[0].file("index.html", b"x\n")
        c.get("/")
        yield c
    finally:
        c.close()


MSS = b"\x02\x04\x05\xb4"
SACK_TS = b"\x04\x02\x08\x0a" + struct.pack("!II", 0x01020304, 0)
WSCALE = b"\x01\x03\x03\x07"
# the SYN's options: the kinds of options that the answer must have, in order
SYNS = {
    "none": (b"", [2]), "MSS": (MSS, [2]), "all": (MSS + SACK_TS + WSCALE, [2, 4, 8, 3]),
    "no SACK": (MSS + b"\1\1\x08\x0a" + bytes(8) + WSCALE, [2, 8, 3]),
    "no window scale": (MSS + SACK_TS, [2, 4, 8]),
    "no timestamps": (MSS + b"\1\1\4\2" + WSCALE, [2, 4, 3]),
    "window scale alone": (WSCALE, [2, 3]), "behind the end": (MSS + b"\0" + SACK_TS[1:], [2]),
    "an unknown one": (MSS + b"\xfe\4\0\0" + WSCALE, [2, 3]),
}


def total(data: bytes) -> int:
    data += b"\0" * (len(data) & 1)
    n = sum(struct.unpack(f"!{len(data) // 2}H", data))
    n = (n & 0xFFFF) + (n >> 16)
    return (n & 0xFFFF) + (n >> 16)


def options(tcp: bytes) -> dict[int, bytes]:
    out, at = {}, 20
    while at < tcp[12] >> 4 << 2:
        if tcp[at] == 1:
            at += 1
            continue
        out[tcp[at]] = tcp[at + 2:at + tcp[at + 1]]
        at += tcp[at + 1]
    return out


def answer(bpf: Bpf, packet: Packet) -> bytes:
    """The TCP header of the SYN-ACK."""
    verdict, out = bpf.run("fe_ingress", packet)
    assert verdict == REDIRECT
    ip, tcp = out[14:34], out[34:]
    assert ip[12:16] == socket.inet_aton(packet.destination)
    assert ip[16:20] == socket.inet_aton(packet.source)
    assert int.from_bytes(ip[2:4], "big") == 20 + len(tcp) and total(ip) == 0xFFFF
    assert total(ip[12:] + struct.pack("!HH", 6, len(tcp)) + tcp) == 0xFFFF
    assert tcp[:4] == struct.pack("!HH", packet.dport, packet.sport)
    assert tcp[8:12] == struct.pack("!I", (packet.seq + 1) % 2**32)
    return tcp


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


def stamped(tsval: int, tsecr: int) -> bytes:
    return b"\1\1\x08\x0a" + struct.pack("!II", tsval, tsecr % 2**32)


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
        for flags, data in ((ACK, b""), (ACK | PSH, b"GET")):
            packet = Packet(flags, data=data, **{**good, **other})
            assert bpf.run("fe_ingress", packet)[0] == STACK, other
    assert bpf.run("fe_ingress", Packet(RST | ACK, **good))[0] == DROP
    assert bpf.run("fe_ingress", Packet(ACK, **good))[0] == DROP
    # a later segment that comes first is lost, not answered with a RST
    assert bpf.run("fe_ingress", Packet(ACK, data=b"x", **{**good, "seq": 8000}))[0] == DROP
    try:
        for _ in range(2):  # the second one is the client's retransmission
            packet = Packet(ACK | PSH, data=b"GET / HTTP/1.1\r\n\r\n", **good)
            verdict, out = bpf.run("fe_ingress", packet)
            assert verdict == REDIRECT and out[:3] == b"\x02\x76\x01"
            assert out[14:] == packet.frame()[14:]
            state, = struct.unpack("=I", bpf.get("flows", flow(port))[48:52])
            assert state == PENDING
        verdict, out = bpf.run("fe_ingress", Packet(ACK, data=b"more", **{**good, "seq": 7500}))
        assert verdict == REDIRECT and out[:3] == b"\x02\x76\x02"
    finally:
        bpf.drop("flows", flow(port))
