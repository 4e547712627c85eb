# SPDX-License-Identifier: GPL-2.0-or-later
"""What passes a host's interface: seen, held up, sent once more, or forged."""
from __future__ import annotations

import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from netfilterqueue import NetfilterQueue

from tcpha.lab.bed import Cluster, Host
from tests.support.packets import ACK, PSH, internet_sum


@contextmanager
def first_frame(host: Host, wanted: Callable[[bytes], bool]) -> Iterator[list[bytes]]:
    """The next frame to port 80 that leaves the host and is wanted, whole."""
    host.run("ethtool", "-K", "eth0", "tx", "off")  # or the checksum would not be there yet
    s = host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)))
    s.bind(("eth0", 0x0003))
    s.settimeout(10)
    frames: list[bytes] = []

    def listen() -> None:
        while not frames:
            frame = s.recv(65536)
            if frame[36:38] == b"\0P" and wanted(frame):
                frames.append(frame)
    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield frames
    finally:
        thread.join()
        s.close()
        host.run("ethtool", "-K", "eth0", "tx", "on")


def send_again(host: Host, frame: bytes) -> None:
    with host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as s:
        s.bind(("eth0", 0))
        s.send(frame)


class Forger:
    """A host on the segment that sends in the client's name. It knows the addresses and ports."""

    def __init__(self, host: Host, c: Cluster, port: int):
        self.ends = socket.inet_aton(c.client.address), socket.inet_aton(c.VIP), port
        self.raw = host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW,
                                                     socket.IPPROTO_RAW))
        self.vip = c.VIP

    def send(self, flags: int, seq: int, data: bytes = b"", tsval: int | None = None) -> None:
        source, destination, port = self.ends
        options = b"" if tsval is None else struct.pack("!BBBBII", 1, 1, 8, 10, tsval, 0)
        tcp = struct.pack("!HHIIBBHHH", port, 80, seq, random.getrandbits(32),
                          (20 + len(options)) // 4 << 4, flags, 512, 0, 0) + options + data
        pseudo = source + destination + struct.pack("!HH", 6, len(tcp)) + tcp
        pseudo += b"\0" * (len(tcp) & 1)
        total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        tcp = tcp[:16] + struct.pack("!H", ~total & 0xFFFF) + tcp[18:]
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0, source,
                           destination)
        self.raw.sendto(head + tcp, (self.vip, 0))

    def flood(self, ended: threading.Event, near: int, tsval: int) -> None:
        """Data outside the window, with a TSval."""
        while not ended.is_set():
            for seq in (near + 2**20, near - 2**20, near + 2**31):
                self.send(ACK, seq % 2**32, b"x", tsval)


def handshake_ack(host: Host) -> AbstractContextManager[list[bytes]]:
    """The frame of the bare ACK with which the host's next handshake with port 80 ends."""
    return first_frame(host, lambda frame: frame[47] == ACK)


def with_data(ack: bytes, data: bytes, damage: int = 0, padding: bytes = b"") -> bytes:
    """A segment like that of an ACK, with data; its checksum is wrong by so much. padding: behind
    the packet, as Ethernet has it."""
    ip, tcp = bytearray(ack[14:34]), bytearray(ack[34:66])
    ip[2:4] = struct.pack("!H", len(ip) + len(tcp) + len(data))
    ip[10:12] = b"\0\0"
    ip[10:12] = struct.pack("!H", internet_sum(bytes(ip)))
    tcp[13] |= PSH
    tcp[16:18] = b"\0\0"
    pseudo = bytes(ip[12:20]) + struct.pack("!HH", 6, len(tcp) + len(data))
    tcp[16:18] = struct.pack("!H", internet_sum(pseudo + bytes(tcp) + data) ^ damage)
    return ack[:14] + bytes(ip + tcp) + data + padding


@contextmanager
def queued(host: Host, on_packet: Callable[[Any], None], chain: str, *match: str) -> Iterator[None]:
    """The host's packets that match come to on_packet(), which has the say."""
    queue = host.inside(NetfilterQueue)
    queue.bind(7, on_packet)
    rule = (chain, *match, "-j", "NFQUEUE", "--queue-num", "7")
    host.run("iptables", "-t", "mangle", "-A", *rule)
    ended = threading.Event()

    def run() -> None:
        poll = select.poll()
        poll.register(queue.get_fd(), select.POLLIN)
        while not ended.is_set():
            if poll.poll(50):
                queue.run(block=False)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        host.run("iptables", "-t", "mangle", "-D", *rule)
        ended.set()
        thread.join()
        queue.unbind()


@contextmanager
def arp_sent_by(host: Host) -> Iterator[list[tuple[int, str, str]]]:
    """What a host puts on the wire meanwhile: (operation, sender, target) of each ARP packet."""
    def listen() -> socket.socket:
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        s.bind(("eth0", 3))
        return s
    seen: list[tuple[int, str, str]] = []
    s = host.inside(listen)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    yield seen
    s.setblocking(False)
    while True:
        try:
            frame, where = s.recvfrom(128)
        except BlockingIOError:
            break
        except OSError:
            continue  # said once, after the interface was down
        if where[1] == 0x0806 and where[2] == socket.PACKET_OUTGOING:
            seen.append((frame[21], socket.inet_ntoa(frame[28:32]),
                         socket.inet_ntoa(frame[38:42])))
    s.close()
