# SPDX-License-Identifier: GPL-2.0-or-later
"""What a client of a cluster says, and what it hears."""
from __future__ import annotations

import errno
import fcntl
import filecmp
import hashlib
import os
import socket
import struct
import termios
from pathlib import Path

from tcpha.lab.bed import Cluster, wait_for
from tests.support.state import settle

REQUEST = b"GET /1k HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"
KEEP = REQUEST.replace(b"close", b"keep-alive")


def read_all(s: socket.socket) -> bytes:
    pieces = []
    while piece := s.recv(1 << 18):
        pieces.append(piece)
    return b"".join(pieces)


def unacknowledged(s: socket.socket) -> int:
    """Bytes that the peer's kernel has not acknowledged (SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, bytes(4)))[0])


def body(response: bytes) -> bytes:
    head, _, rest = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), response[:200]
    return rest


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def upload_many(c: Cluster, count: int, size: int, *options: str) -> None:
    """With curl, to the first server; each arrives as it was sent."""
    sources = []
    for n in range(8):
        source = c.bed.dir / f"source{n}"
        source.write_bytes(os.urandom(size))
        sources.append(source)
    up = c.nginx[0].root / "up"
    lines = "\n".join(f"{sources[n % 8]} http://{c.VIP}/up/{n}" for n in range(count))
    c.client.run("xargs", "-P", "8", "-L", "1", "curl", "-sSf", "--max-time", "120", *options,
                 "-T", input=lines)
    for n in range(count):
        assert filecmp.cmp(up / str(n), sources[n % 8], shallow=False), n
        (up / str(n)).unlink()
    settle(c)


def ask(s: socket.socket, data: bytes = KEEP) -> None:
    """Have /1k, whole, on a connection that goes on."""
    s.sendall(data)
    got = b""
    while len(got.partition(b"\r\n\r\n")[2]) < 1024 and (more := s.recv(65536)):
        got += more
    assert len(body(got)) == 1024, got


def dial(c: Cluster, port: int, to: int = 80, vaddr: str = "") -> socket.socket | None:
    """A connection from a port of the client's, in whose namespace we are. None: the client's
    kernel waits for the last ACK of the one before."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.settimeout(30)
    s.bind((c.client.address, port))
    try:
        s.connect((vaddr or c.VIP, to))
    except OSError as error:
        s.close()
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return None
    return s


def connect_from(c: Cluster, port: int, to: int = 80, vaddr: str = "") -> socket.socket:
    """A connection from a port of the client's, as soon as the one before has left it."""
    connection: socket.socket = wait_for(
        lambda: c.client.inside(lambda: dial(c, port, to, vaddr)), "the port to be free", 30)
    return connection
