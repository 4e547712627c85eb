# SPDX-License-Identifier: GPL-2.0-or-later
"""Downloads that wait for their reader while something happens to a cluster."""
from __future__ import annotations

import socket

from tcpha.lab.bed import Cluster
from tests.support.client import KEEP, REQUEST, body, read_all

COUNT = 20


def begin(c: Cluster, path: bytes = b"/big") -> socket.socket:
    """One on a connection that goes on."""
    s = c.client.connect(c.VIP)
    s.sendall(KEEP.replace(b"/1k", path))
    assert s.recv(1) == b"H"
    return s


def finish(s: socket.socket, want: bytes) -> None:
    """The rest of it, and a request behind it."""
    for size, request in ((len(want), KEEP), (1024, b"")):
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0 or len(data) < end + 4 + size:
            got = s.recv(1 << 20)
            assert got, "the connection has ended"
            data += got
        if size > 1024:
            assert data[end + 4:] == want
        s.sendall(request)
    s.close()


def begin_big(c: Cluster) -> tuple[socket.socket, bytes]:
    """One whose connection ends with it, and what was read of it."""
    s = c.client.connect(c.VIP)
    s.sendall(REQUEST.replace(b"1k", b"big"))
    return s, s.recv(1 << 16)


def finish_big(c: Cluster, s: socket.socket, begun: bytes) -> None:
    with s:
        assert body(begun + read_all(s)) == (c.nginx[0].root / "big").read_bytes()
