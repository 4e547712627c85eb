# SPDX-License-Identifier: GPL-2.0-or-later
"""What clients of a cluster see on this kernel, on each way that it has."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tcpha.lab.bed import Cluster, Daemon, wait_for
from tests.support.client import REQUEST, body, digest, read_all, upload_many
from tests.support.daemons import front
from tests.support.downloads import begin, finish
from tests.support.state import settle

COUNT = 20  # downloads under way when a daemon is killed
PORTS = 50
SHORT = 500


def test_dispatch_by_rule(cluster: Cluster) -> None:
    assert cluster.get("/") == "index of be1\n"
    assert cluster.get("/a.jpg") == "picture of be2\n"


def test_large_download(cluster: Cluster) -> None:
    out = cluster.bed.dir / "down"
    cluster.get("/big", "-o", str(out))
    assert digest(out) == digest(cluster.nginx[0].root / "big")


@pytest.mark.parametrize("options", [(), ("-H", "Expect:")], ids=["expect", "at once"])
def test_uploads(cluster: Cluster, options: tuple[str, ...]) -> None:
    upload_many(cluster, 16, 5 << 20, *options)


def test_four_requests_on_one_connection(cluster: Cluster) -> None:
    url = f"http://{cluster.VIP}/1k"
    done = cluster.curl(*[a for _ in range(4) for a in ("-o", "/dev/null", url)],
                        "-w", "%{local_port} %{http_code}\n")
    lines = done.stdout.split("\n")[:4]
    assert len(set(lines)) == 1 and lines[0].endswith(" 200")


@pytest.fixture
def few_ports(cluster: Cluster) -> Iterator[Cluster]:
    """A client whose ports come again within seconds."""
    name = "net.ipv4.ip_local_port_range"
    before = cluster.client.sysctl(name)
    cluster.client.sysctl(name, f"40000 {40000 + PORTS - 1}")
    yield cluster
    cluster.client.sysctl(name, before)


def test_ports_that_come_again(few_ports: Cluster) -> None:
    """Server and client end them in turn: the one that does has had the port in TIME_WAIT."""
    want = (few_ports.nginx[0].root / "1k").read_bytes()
    for n in range(SHORT):
        s = few_ports.client.connect(few_ports.VIP)
        s.sendall(REQUEST.replace(b"close", b"keep-alive") if n % 2 else REQUEST)
        if n % 2:
            head = s.recv(65536)
            while len(head.partition(b"\r\n\r\n")[2]) < len(want):
                head += s.recv(65536)
            assert body(head) == want
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        else:
            assert body(read_all(s)) == want, n
        s.close()
    settle(few_ports)


@pytest.mark.parametrize("who", ["fe", "be", "all"])
def test_downloads_outlive_daemons(cluster: Cluster, who: str) -> None:
    """Killed in the middle, and started again."""
    want = (cluster.nginx[0].root / "8m").read_bytes()
    held = [begin(cluster, b"/8m") for _ in range(COUNT)]
    victims = [*([front(cluster)] if who != "be" else []), *(cluster.be if who != "fe" else [])]
    wait_for(lambda: front(cluster).ctl("status")["in_hand"] == 0, "all handed over")
    for daemon in victims:
        daemon.kill()
    with ThreadPoolExecutor() as pool:
        list(pool.map(Daemon.start, victims))
    cluster.connected()
    for s in held:
        s.settimeout(120)
        finish(s, want)
    settle(cluster)
    assert cluster.get("/1k", "-o", os.devnull, "-w", "%{http_code}") == "200"
