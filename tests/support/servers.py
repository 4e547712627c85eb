# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers that listen as a test will have it, and what they serve."""
from __future__ import annotations

import socket
from collections.abc import Callable

from tcpha.lab.bed import Nginx

BIG = 32 << 20


def fill(server: Nginx) -> None:
    for name in ("index.html", "a.jpg"):
        server.file(name, f"{server.host.name}\n".encode())
    server.file("1k", size=1024)
    server.file("big", size=BIG)


def listener(port: int = 80, device: str = "",
             protocol: int = socket.IPPROTO_TCP) -> Callable[[], socket.socket]:
    def make() -> socket.socket:
        s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if device:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        s.bind(("0.0.0.0", port))
        s.listen(4096)
        return s
    return make


def restart(server: Nginx, inherits: Callable[[], socket.socket] | None) -> None:
    server.stop()
    server.inherits = inherits
    server.start()
