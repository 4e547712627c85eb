# SPDX-License-Identifier: GPL-2.0-or-later
"""A port is used again while the server still remembers the connection before: by hosts behind one
address translator, whose sequence numbers and clocks have nothing to do with each other."""
from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host
from tests.support.client import REQUEST, body, read_all
from tests.support.packets import internet_sum

pytestmark = pytest.mark.modes("direct", "fast-direct", "fast-tunnel", "nfqueue-direct")
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
ADDRESS = "192.168.1.57"
RTO = 0.3  # seconds; doubled at each turn
PATIENCE = 10.0


class Wire:
    """Sends and receives segments on a host of the cluster, in the name of an address whose TCP is
    ours: its kernel answers nothing."""

    def __init__(self, c: Cluster):
        self.c = c
        c.client.ip("addr", "add", f"{ADDRESS}/24", "dev", "eth0")
        c.client.nft(f"""table ip lab {{
            chain out {{ type filter hook output priority 0;
                ip saddr {ADDRESS} tcp flags rst meta mark != 7 drop; }}
        }}""")
        self.out = c.client.inside(lambda: socket.socket(
            socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        self.out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
        self.back = c.client.inside(lambda: socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)))
        self.back.bind(("eth0", 0x0800))

    def close(self) -> None:
        self.out.close()
        self.back.close()
        self.c.client.nft("")
        self.c.client.ip("addr", "del", f"{ADDRESS}/24", "dev", "eth0")


class Connection:
    """What a client does that sends one request, and whose server closes first."""

    def __init__(self, wire: Wire, port: int, isn: int, tsval: int | None):
        self.wire, self.port, self.nxt, self.tsval = wire, port, isn, tsval
        self.rcv_nxt = self.tsecr = 0
        self.began = time.monotonic()

    def send(self, flags: int, data: bytes = b"", seq: int | None = None) -> None:
        options = b""
        if self.tsval is not None:
            now = (self.tsval + int((time.monotonic() - self.began) * 1000)) % 2**32
            options = struct.pack("!BBBBII", 1, 1, 8, 10, now, self.tsecr)
        if flags & SYN:
            options = struct.pack("!BBH", 2, 4, 1460) + options
        ends = socket.inet_aton(ADDRESS), socket.inet_aton(self.wire.c.VIP)
        tcp = struct.pack("!HHIIBBHHH", self.port, 80, self.nxt if seq is None else seq,
                          self.rcv_nxt if flags & ACK else 0, (20 + len(options)) // 4 << 4, flags,
                          60000, 0, 0) + options + data
        total = internet_sum(b"".join(ends) + struct.pack("!HH", 6, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0, *ends)
        self.wire.out.sendto(head + tcp, (self.wire.c.VIP, 0))

    def receive(self, seconds: float) -> tuple[int, int, int, bytes] | None:
        """The next segment for us: flags, seq, ack, data."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.wire.back.settimeout(left)
            try:
                packet = self.wire.back.recv(65536)
            except TimeoutError:
                return None
            packet = packet[:struct.unpack("!H", packet[2:4])[0]]
            if packet[9] != 6 or packet[16:20] != socket.inet_aton(ADDRESS):
                continue
            tcp = packet[20:]
            ports, seq, ack = struct.unpack("!4sII", tcp[:12])
            if ports != struct.pack("!HH", 80, self.port):
                continue
            size = (tcp[12] >> 4) * 4
            at = tcp[20:size].find(b"\x08\x0a")
            if self.tsval is not None and at >= 0:
                self.tsecr = struct.unpack_from("!I", tcp, 20 + at + 2)[0]
            return tcp[13], seq, ack, tcp[size:]
        return None

    def repeat(self, flags: int, data: bytes = b"") -> Iterator[tuple[int, int, int, bytes]]:
        """Send a segment until it is answered; yields what comes."""
        end, rto = time.monotonic() + PATIENCE, RTO
        while time.monotonic() < end:
            self.send(flags, data)
            until = time.monotonic() + rto
            while (left := until - time.monotonic()) > 0 and (got := self.receive(left)):
                yield got
            rto *= 2
        raise AssertionError(f"no answer to {data[:20]!r}, flags {flags}, in {PATIENCE} s")

    def connect(self) -> None:
        for flags, seq, ack, _ in self.repeat(SYN):
            if flags & RST:
                continue
            if flags & SYN and ack == (self.nxt + 1) % 2**32:
                self.nxt, self.rcv_nxt = ack, (seq + 1) % 2**32
                self.send(ACK)
                return
            self.send(RST, seq=ack)  # RFC 9293 section 3.10.7.3

    def answer(self, request: bytes) -> bytes:
        """The whole answer; the server has closed, and so have we."""
        got = bytearray()
        for flags, seq, ack, data in self.repeat(ACK | PSH, request):
            assert not flags & RST, "reset"
            if seq != self.rcv_nxt:
                continue
            got += data
            self.rcv_nxt = (self.rcv_nxt + len(data)) % 2**32
            if (ack - self.nxt) % 2**32 == len(request):
                self.nxt, request = ack, b""
            if flags & FIN:
                self.rcv_nxt = (self.rcv_nxt + 1) % 2**32
                break
            if data:
                self.send(ACK)
        for flags, _, ack, _ in self.repeat(FIN | ACK):
            assert not flags & RST, "reset"
            if ack == (self.nxt + 1) % 2**32:
                return bytes(got)
        raise AssertionError


PORTS = itertools.count(21000)
ISN, CLOCK = 0x50000000, 0x60000000
ORDERS = {  # what the initial sequence number and the clock do from one connection to the next
    "higher, later": (CLOCK, 1 << 20, 5000), "higher, earlier": (CLOCK, 1 << 20, -1 << 20),
    "lower, later": (CLOCK, -1 << 20, 5000), "lower, far later": (CLOCK, -1 << 20, 1 << 20),
    "lower, earlier": (CLOCK, -1 << 20, -1 << 20), "both far back": (CLOCK, -1 << 30, -1 << 30),
    "higher": (None, 1 << 20, 0), "lower": (None, -1 << 20, 0)}  # no timestamps


@pytest.mark.parametrize("order", ORDERS)
def test_a_port_used_again(cluster: Cluster, order: str) -> None:
    """The second connection is served at once, as one whose port was never used."""
    clock, up, later = ORDERS[order]
    port = next(PORTS)
    want = b"index of be1\n"
    request = REQUEST.replace(b"/1k", b"/")
    wire = Wire(cluster)
    try:
        for turn in range(3):
            c = Connection(wire, port, (ISN + turn * up) % 2**32,
                           None if clock is None else (clock + turn * later) % 2**32)
            c.connect()
            assert c.answer(request).endswith(want), turn
    finally:
        wire.close()


class Behind:
    """Three hosts behind a real address translator, the cluster's client, which has few ports."""

    PORTS = 50

    def __init__(self, c: Cluster):
        self.c = c
        c.client.ip("addr", "add", "10.8.0.1/24", "dev", "eth0")
        c.client.sysctl("net.ipv4.ip_forward", "1")
        for name in ("all", "eth0"):
            c.client.sysctl(f"net.ipv4.conf.{name}.send_redirects", "0")
        self.hosts = [c.bed.host(f"inner{n}", f"10.8.0.{n}") for n in (2, 3, 4)]
        for host in self.hosts:
            host.ip("route", "add", "default", "via", "10.8.0.1")

    def ask(self, address: str) -> list[float]:
        """Seconds that each request of many took. The server closes first each time."""
        self.c.client.nft(f"""table ip lab {{
            chain out {{ type nat hook postrouting priority 100;
                ip saddr 10.8.0.0/24 ip protocol tcp masquerade to :20000-{20000 + self.PORTS - 1}
            }}
        }}""")

        def work(host: Host) -> list[float]:
            took = []
            for _ in range(100):
                began = time.monotonic()
                with host.connect(address) as s:
                    s.sendall(REQUEST)
                    assert len(body(read_all(s))) == 1024
                took.append(time.monotonic() - began)
            return took
        with ThreadPoolExecutor() as pool:
            return [t for each in pool.map(work, self.hosts) for t in each]


def test_hosts_behind_an_address_translator(mode: dict[str, Any]) -> None:
    """Where the server itself lets a client wait until it repeats its SYN, as the port was used a
    moment ago, we let no more wait."""
    with contextlib.closing(Cluster(1, **mode, rules=[(0, ".*")])) as c:
        c.nginx[0].file("1k", size=1024)
        behind = Behind(c)
        direct, ours = (sum(t > 0.5 for t in behind.ask(address))
                        for address in (c.be_hosts[0].address, c.VIP))
        assert ours <= direct + 3  # of 300
