# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets of a connection reach its back end in the order in which the client has sent them."""
from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tcpha.lab.bed import Cluster, Host
from tests.support.client import read_all
from tests.support.state import settle

CONNECTIONS = 2000
FIN, RST = 1, 4
ALL = 0x0003  # ETH_P_ALL
Packet = tuple[int, int, int, int]  # SEQ, ACK, flags, bytes of payload


def parse(ip: bytes) -> tuple[int, Packet] | None:
    """(source port, packet) of one for port 80."""
    at = (ip[0] & 15) * 4
    if ip[9] == 4:  # tunnelled
        return parse(ip[at:])
    source, port, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", ip, at)
    length = int.from_bytes(ip[2:4]) - at - (offset >> 4) * 4
    if length:
        ack = 0  # a first segment bears a front end's tag there
    return (source, (seq, ack, flags, length)) if ip[9] == 6 and port == 80 else None


@contextmanager
def arrivals(host: Host) -> Iterator[dict[int, list[Packet]]]:
    """What comes to a host's port 80, by source port, in the order of its coming."""
    got: dict[int, list[Packet]] = {}
    with host.inside(lambda: socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL))) as s:
        s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        s.bind(("eth0", ALL))
        s.settimeout(0.2)
        over = threading.Event()

        def read() -> None:
            while True:
                try:
                    data, where = s.recvfrom(128)
                except TimeoutError:
                    if over.is_set():
                        return
                    continue
                if where[2] == socket.PACKET_HOST and where[1] == 0x0800 and (found := parse(data)):
                    got.setdefault(found[0], []).append(found[1])
        thread = threading.Thread(target=read)
        thread.start()
        yield got
        over.set()
        thread.join()
        dropped = struct.unpack("II", s.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
        assert dropped == 0


def before(a: int, b: int) -> bool:
    return 0 < (b - a) & 0xffffffff < 1 << 31


def overtaken(packets: list[Packet]) -> list[tuple[Packet, Packet]]:
    """Pairs of neighbours of which the second was sent first: it acknowledges less, or begins where
    the client was before, and is nothing that was sent twice. The front end may have got them so:
    a client on two processors sends at the same time."""
    found, known = [], set()
    end = packets[0][0]
    for x, y in itertools.pairwise(packets):
        known.add(x[0])
        if before(end, x[0] + x[3] + (x[2] & FIN)):
            end = x[0] + x[3] + (x[2] & FIN)
        again = (y[3] or y[2] & FIN) and y[0] in known
        acknowledges_less = not x[3] and not y[3] and before(y[1], x[1])
        if not (x[2] | y[2]) & RST and (acknowledges_less or (before(y[0], end) and not again)):
            found.append((x, y))
    return found


def swapped(sent: dict[int, list[Packet]],
            got: dict[int, list[Packet]]) -> list[tuple[Packet, Packet]]:
    """Pairs that were overtaken between the front end and the back end."""
    return [(x, y) for port, packets in got.items() for x, y in overtaken(packets)
            if y in sent[port] and y in sent[port][:sent[port].index(x)]]


def counted(host: Host, name: str) -> int:
    return int(host.run("nstat", "-asz", name).stdout.split()[-2])


@pytest.mark.modes("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct",
                   "nfqueue-tunnel")
def test_no_packet_overtakes_another(cluster: Cluster) -> None:
    """Else its server's TIME_WAIT would answer twice, and the client's kernel with a RST. It does
    so, too, where a busy server has sent something once more, or a client its FIN."""
    client, host = cluster.client, cluster.be_hosts[0]

    def repeated() -> int:
        return counted(host, "TcpRetransSegs") + counted(client, "TcpRetransSegs")
    earlier = counted(client, "TcpOutRsts"), repeated()
    with cluster.bed.in_order(), arrivals(cluster.fe_host) as sent, arrivals(host) as got:
        done = client.run("ab", "-q", "-s", "60", "-n", str(CONNECTIONS), "-c", "50",
                          f"http://{cluster.VIP}/1k").stdout
    assert "Failed requests:        0" in done, done
    assert len(got) > CONNECTIONS * 0.9
    late = swapped(sent, got)
    assert not late, (len(late), late[:3])
    assert counted(client, "TcpOutRsts") - earlier[0] <= repeated() - earlier[1]
    settle(cluster)


@pytest.mark.modes("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct",
                   "nfqueue-tunnel")
def test_no_packet_overtakes_a_request(cluster: Cluster) -> None:
    """What a client sends behind its request comes while that one is being decided, and after."""
    with cluster.bed.in_order(), arrivals(cluster.fe_host) as sent, \
            arrivals(cluster.be_hosts[0]) as got:
        for _ in range(300):
            with cluster.client.connect(cluster.VIP) as s:
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                s.sendall(b"PUT /up/order HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                          b"Content-Length: 40\r\n\r\n")
                for _ in range(40):
                    s.send(b"x")
                assert read_all(s).startswith(b"HTTP/1.1 20")
    assert len(got) > 250  # ports come again
    late = swapped(sent, got)
    assert not late, (len(late), late[:3])
    settle(cluster)
