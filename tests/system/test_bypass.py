# SPDX-License-Identifier: GPL-2.0-or-later
"""What reaches a back end without having passed a front end: from hosts of its segment, or from
anybody who writes a front end's address as source."""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.backend.tunnels import AWAY, Tunnels
from tcpha.lab.bed import Cluster, Host, wait_for
from tests.support.client import REQUEST, ask, body, read_all
from tests.support.host import be_patient, retransmitted
from tests.support.packets import internet_sum, ip_header
from tests.support.state import settle
from tests.support.wire import first_frame, handshake_ack, send_again, with_data

IPIP, SYN, ACK, FRAGMENTS = 4, 2, 16, 0x2000
DIRECT = pytest.mark.modes("direct", "nfqueue-direct")
FAST = pytest.mark.modes("fast-direct", "fast-tunnel")
TUNNEL = pytest.mark.modes("tunnel", "fast-tunnel", "nfqueue-tunnel")


@pytest.fixture
def c(mode: dict[str, Any]) -> Iterator[Cluster]:
    cluster = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        cluster.bed.host("stranger", "192.168.1.66")
        cluster.nginx[0].file("1k", size=1024)
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def stranger(c: Cluster) -> Host:
    return c.bed.hosts[-1]


def packets(c: Cluster) -> dict[str, int]:
    found: dict[str, int] = c.be[0].ctl("status")["packets"]
    return found


def send(c: Cluster, ip: bytes, *more: bytes) -> None:
    """Packets from the stranger to the back end, whoever they say that they are from."""
    to, own = (bytes.fromhex(h.mac().replace(":", "")) for h in (c.be_hosts[0], stranger(c)))
    for packet in (ip, *more):
        send_again(stranger(c), to + own + b"\x08\x00" + packet)


def wrapped(c: Cluster, ip: bytes, source: str = "") -> bytes:
    """As a front end would tunnel it."""
    return ip_header(4, 5, 20 + len(ip), 0x4000, IPIP, source or c.fe_host.address,
                     c.be_hosts[0].address) + ip


def in_fragments(ip: bytes) -> tuple[bytes, bytes]:
    """Cut behind 40 bytes of payload."""
    head, data = ip[:20], ip[20:]
    source, destination = (socket.inet_ntoa(head[at:at + 4]) for at in (12, 16))
    return tuple(ip_header(4, 5, 20 + len(part), fragment, head[9], source, destination) + part
                 for part, fragment in ((data[:40], FRAGMENTS), (data[40:], 5)))  # type: ignore


def reassembled(host: Host) -> int:
    return int(host.run("nstat", "-asz", "IpReasmOKs").stdout.split()[-2])


def test_when_a_tunnel_ends() -> None:
    """With its front end: unless that had its process killed, and its kernel goes on."""
    class Datapath:
        def __init__(self) -> None:
            self.accepted = {"left"}

        def allowed(self) -> list[str]:
            return list(self.accepted)

        def allow(self, address: str, allowed: bool) -> None:
            (self.accepted.add if allowed else self.accepted.remove)(address)
    datapath = Datapath()
    tunnels = Tunnels(datapath, 0.0)  # type: ignore[arg-type]
    owners = {"a", "left"}
    for address, tunnel in (("a", True), ("b", True), ("c", False)):
        tunnels.meet(address, tunnel, 0.0)
    steps = (({"a", "b", "c"}, 9.0, {"a", "b", "left"}), (set(), 9.0 + AWAY, {"a", "b", "left"}),
             (set(), 9.1 + AWAY, {"a", "left"}), ({"a"}, 50.0, {"a", "left"}))
    for present, now, accepted in steps:
        tunnels.look(present, owners.__contains__, now)
        assert datapath.accepted == accepted
    owners.clear()
    tunnels.look(set(), owners.__contains__, 50.0 + AWAY)
    assert datapath.accepted == {"a"}
    tunnels.meet("a", False, 50.0 + AWAY)
    assert datapath.accepted == set()


def smuggle(c: Cluster) -> tuple[dict[str, int], dict[str, int]]:
    """Another request on a client's live connection, wrapped up as if by the front end. What the
    back end had counted before and after."""
    with first_frame(c.client, lambda frame: frame[47] == ACK) as frames, \
            c.client.connect(c.VIP) as s:
        ask(s)
        wait_for(lambda: frames, "an ACK")
        wait_for(lambda: c.be[0].ctl("status")["live"] == 1, "the connection")
        before = packets(c)
        send(c, wrapped(c, with_data(frames[0], REQUEST)[14:]))
        wait_for(lambda: sum(packets(c)[k] - before[k] for k in ("foreign", "decapsulated")) == 1,
                 "the packet to be judged")
        return before, packets(c)


@DIRECT
def test_nobody_tunnels_to_those_who_are_reached_directly(c: Cluster) -> None:
    assert c.be[0].ctl("status")["frontends"][0]["tunnel"] is False
    before, after = smuggle(c)
    assert after["foreign"] == before["foreign"] + 1
    with c.client.connect(c.VIP) as s:
        s.sendall(REQUEST)
        read_all(s)
    assert len(c.nginx[0].seen()) == 2


@TUNNEL
def test_a_tunnel_ends_with_its_front_end(c: Cluster) -> None:
    assert c.fe
    host = c.be_hosts[0]
    other = with_address(c, "192.168.1.67")
    whole = wrapped(c, other)
    before, parts = packets(c), reassembled(host)
    send(c, wrapped(c, other, "192.168.1.66"), *in_fragments(wrapped(c, other, "192.168.1.66")))
    wait_for(lambda: packets(c)["foreign"] == before["foreign"] + 2, "the stranger's packets")
    send(c, whole)
    wait_for(lambda: packets(c)["decapsulated"] == before["decapsulated"] + 1, "the front end's")
    c.fe.stop()
    wait_for(lambda: not c.be[0].ctl("status")["frontends"][0]["tunnel"], "the end of the tunnel")
    send(c, whole)
    wait_for(lambda: packets(c)["foreign"] == before["foreign"] + 3, "that in its name")
    assert packets(c)["decapsulated"] == before["decapsulated"] + 1
    assert reassembled(host) == parts


@DIRECT
def test_a_handshake_in_fragments(c: Cluster) -> None:
    """Nobody sees of it what it is, until the back end's stack has put it together."""
    host = c.be_hosts[0]
    tcp = bytearray(struct.pack("!HHIIBBHHH", 4000, 80, 1000, 0, 14 << 4, SYN, 1000, 0, 0))
    tcp += b"\1" * 36
    source, vip = socket.inet_aton(stranger(c).address), socket.inet_aton(c.VIP)
    tcp[16:18] = struct.pack("!H", internet_sum(source + vip + struct.pack("!HH", 6, len(tcp))
                                                + tcp))
    before, parts = packets(c)["guarded"], reassembled(host)
    send(c, *in_fragments(ip_header(4, 5, 20 + len(tcp), 0, socket.IPPROTO_TCP,
                                    stranger(c).address, c.VIP) + tcp))
    wait_for(lambda: packets(c)["guarded"] > before or reassembled(host) > parts, "a judgement")
    assert reassembled(host) == parts


def with_address(c: Cluster, source: str) -> bytes:
    """An ACK of a client that nobody knows."""
    tcp = struct.pack("!HHIIBBHHH", 4000, 80, 1000, 1, 5 << 4, ACK, 1000, 0, 0) + bytes(60)
    return ip_header(4, 5, 20 + len(tcp), 0x4000, socket.IPPROTO_TCP, source, c.VIP) + tcp


@FAST
def test_a_cookie_is_for_the_front_end(c: Cluster) -> None:
    """A client that has got it, and goes straight to a back end of its choice, is not heard."""
    with handshake_ack(c.client) as frames:
        s = c.client.connect(c.VIP)
        wait_for(lambda: frames, "the end of the handshake")
    request = with_data(frames[0], REQUEST)[14:]
    ways = [request, wrapped(c, request)] if c.forward == "tunnel" else [request]
    before = packets(c)
    send(c, *ways)
    wait_for(lambda: packets(c)["guarded"] == before["guarded"] + len(ways), "them to be judged")
    assert packets(c)["adopted"] == before["adopted"]
    s.sendall(REQUEST)
    assert len(body(read_all(s))) == 1024
    assert packets(c)["adopted"] == before["adopted"] + 1


@FAST
def test_a_long_first_segment_that_is_cut(c: Cluster) -> None:
    """It is one packet to the front end and many to the back end; none of them is lost."""
    assert c.fe
    c.fe_host.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
    be_patient(c.client)
    data = b"x" * 12000
    before = retransmitted(c.client), c.be_hosts[0].counter("rx_packets")
    with c.client.connect(c.VIP) as s:
        s.sendall(b"PUT /up/long HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert read_all(s).split()[1] in (b"201", b"204")
    assert (c.nginx[0].root / "up/long").read_bytes() == data
    settle(c)
    assert c.fe.ctl("status")["counters"]["fast"] == 1
    assert c.be_hosts[0].counter("rx_packets") > before[1] + len(data) // 1500
    assert retransmitted(c.client) == before[0]
