# SPDX-License-Identifier: GPL-2.0-or-later
"""What the ways to tunnels' other ends have room for (RFC 2003 section 4).

A router that has none for an outer packet says so to us (RFC 1191). An open raw socket of the outer
packets' protocol is what makes the kernel listen to that, as it does for packets of its own: it
keeps the MTU with the route, never takes one below net.ipv4.route.min_pmtu, and forgets it after
net.ipv4.route.mtu_expires.
"""
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Callable

IP_RECVERR, IP_MTU = 11, 14
SO_ATTACH_FILTER = 26
REFUSE = struct.pack("=HBBI", 0x06, 0, 0, 0)  # struct sock_filter: BPF_RET | BPF_K, no byte of it
IPIP = 4
ONCE = 64  # errors that are read before others have their turn


def known(address: str, source: str) -> int | None:
    """What the kernel takes for the path MTU to an address from one of ours; None: it knows no way.
    Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind((source, 0))
        s.connect((address, 9))
        return s.getsockopt(socket.IPPROTO_IP, IP_MTU)
    return None


class PathMtu:
    """Belongs to the loop's thread. told: called with the addresses that errors were about, once
    the kernel has taken those."""

    def __init__(self, told: Callable[[set[str]], None]):
        self.told = told
        self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC
                                 | socket.SOCK_NONBLOCK, IPIP)
        self._receive_nothing()
        self.raw.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        asyncio.get_running_loop().add_reader(self.raw.fileno(), self._read)

    def _receive_nothing(self) -> None:
        """Errors come all the same, and find room."""
        refuse = ctypes.create_string_buffer(REFUSE)
        self.raw.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                            struct.pack("@HP", 1, ctypes.addressof(refuse)))

    def _read(self) -> None:
        about = set()
        for _ in range(ONCE):
            try:
                about.add(self.raw.recvmsg(0, 0, socket.MSG_ERRQUEUE)[3][0])
            except BlockingIOError:
                # one that found no room in the queue shows here only
                self.raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                break
        self.told(about)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.raw.fileno())
        self.raw.close()
