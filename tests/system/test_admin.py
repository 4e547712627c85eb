# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin address, where anybody who can connect may ask."""
from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpha.daemon import web
from tcpha.lab.bed import Cluster, wait_for

PORT = 9110


@pytest.fixture(scope="module")
def asked() -> Iterator[Cluster]:
    line = f"admin = {PORT}\nadminname = one.example.org\nadminname = Two.example.org"
    c = Cluster(1, rules=[(0, ".*")], fe_conf=line, be_conf=line)
    try:
        yield c
    finally:
        c.close()


def status(c: Cluster, role: str, host: str) -> str:
    at = c.fe_host if role == "fe" else c.be_hosts[0]
    return at.run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Host: {host}",
                  f"http://127.0.0.1:{PORT}/metrics").stdout


@pytest.mark.parametrize("role", ["fe", "be"])
def test_pages_of_others_cannot_ask(asked: Cluster, role: str) -> None:
    """Whoever has a name of his own resolved to our address (DNS rebinding) may not read by it."""
    for host in ("192.168.1.23:9110", "127.0.0.1", "[::1]:9110", "localhost:9110", "Localhost.",
                 "one.example.org:9110", "two.example.org", socket.gethostname()):
        assert status(asked, role, host) == "200", host
    for host in ("evil.example:9110", "evil.example", "127.0.0.1.evil.example", "example.org",
                 "localhost.evil.example", "[::1", "x" * 300):
        assert status(asked, role, host) == "421", host


@pytest.mark.parametrize("role", ["fe", "be"])
def test_slow_clients_leave_room(asked: Cluster, role: str) -> None:
    daemon, host = (asked.fe, asked.fe_host) if role == "fe" else (asked.be[0], asked.be_hosts[0])
    assert daemon
    proc = Path(f"/proc/{daemon.process.pid}")

    def used() -> int:
        for s in clients:  # none is silent for long
            with contextlib.suppress(OSError):
                s.send(b"a")
        return len(list((proc / "task").iterdir())) + len(list((proc / "fd").iterdir()))
    clients: list[socket.socket] = []
    before = used()

    def come() -> list[socket.socket]:
        clients = [socket.create_connection(("127.0.0.1", PORT)) for _ in range(150)]
        for s in clients:
            s.sendall(b"GET /metrics HTTP/1.1\r\nHost: a")
        return clients
    clients = host.inside(come)
    assert status(asked, role, "localhost") == "200"
    wait_for(lambda: used() < before + 3 * web.MOST, "threads and descriptors")
    for s in clients:
        s.close()
