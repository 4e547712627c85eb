# SPDX-License-Identifier: GPL-2.0-or-later
"""Segments that reach the front end in IPv4 fragments: of a client without path MTU discovery,
behind a narrow link."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host, Nginx, wait_for
from tests.support.network import behind_a_router

pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct",
                               "nfqueue-tunnel", "ebpf-nfqueue", "nfqueue-ebpf")
LONG = b"X-Filler: " + b"f" * 1300 + b"\r\n"  # a request that fits into no packet of that link


@pytest.fixture
def cluster(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(1, **mode, rules=[(0, ".*")])
    yield c
    c.close()


def fragmenting(c: Cluster, more: str = "") -> Host:
    far = behind_a_router(c)
    far.sysctl("net.ipv4.ip_no_pmtu_disc", "1")  # DF is not set: the router may cut
    c.fe_host.nft(f"""table ip lab {{
        counter resets {{ }}
        counter lost {{ }}
        {more}
        chain out {{ type filter hook output priority 0;
            tcp sport 80 tcp flags & rst == rst counter name resets
        }}
    }}""")
    return far


def defragmented(c: Cluster) -> int:
    assert c.fe
    return int(c.fe.ctl("status")["packets"]["defragmented"])


def test_requests_in_fragments(cluster: Cluster) -> None:
    """The first one, which chooses the back end, and later ones of the same connection."""
    c = cluster
    far = fragmenting(c)
    content = c.nginx[0].file("1k", size=1024).read_bytes()
    request = b"GET /1k HTTP/1.1\r\nHost: a\r\n" + LONG + b"\r\n"

    def work() -> list[bytes]:
        answers = []
        with socket.create_connection((c.VIP, 80), timeout=30) as s:
            for _ in range(5):
                s.sendall(request)
                got = b""
                while len(got.partition(b"\r\n\r\n")[2]) < 1024:
                    more = s.recv(65536)
                    assert more, got
                    got += more
                answers.append(got.partition(b"\r\n\r\n")[2])
        return answers
    assert far.inside(work) == [content] * 5
    wait_for(lambda: defragmented(c) >= 5, "five segments, put together")
    assert c.fe_host.nft_counter("resets") == 0
    if c.fe and c.fe.ctl("status")["packet_path"]:
        assert c.fe.ctl("status")["counters"]["fast"] == 1
        assert c.fe_host.run("ss", "-Htn", "sport = :80").stdout == ""


def test_uploads_in_fragments(cluster: Cluster) -> None:
    c = cluster
    far = fragmenting(c)
    upload = far.dir / "upload"
    upload.write_bytes(os.urandom(2 << 20))
    far.run("curl", "-sSf", "--max-time", "60", "-T", str(upload), f"http://{c.VIP}/up/file")
    assert (c.nginx[0].root / "up/file").read_bytes() == upload.read_bytes()
    assert defragmented(c) > 100


def test_a_fragment_lost(cluster: Cluster) -> None:
    """What is not whole is no segment: the client sends all of it again."""
    c = cluster
    far = fragmenting(c, """chain early { type filter hook prerouting priority -450;
        ip frag-off & 0x1fff != 0 numgen inc mod 1000000 == 0 counter name lost drop
    }""")
    content = c.nginx[0].file("1k", size=1024).read_bytes()
    got = far.dir / "1k"
    far.run("curl", "-sSf", "--max-time", "60", "-o", str(got), "-H", LONG.decode().strip(),
            f"http://{c.VIP}/1k")
    assert got.read_bytes() == content
    assert c.fe_host.nft_counter("lost") == 1
    assert c.fe_host.nft_counter("resets") == 0


@pytest.mark.parametrize("datapath", ("ebpf", "nfqueue"))
def test_a_request_in_fragments_for_the_local_node(datapath: str) -> None:
    c = Cluster(1, datapath=(datapath, datapath), rules=[(0, "jpg$")], start=False)
    try:
        server = Nginx(c.fe_host, (8080,))
        server.file("1k", size=1024)
        c.start()
        far = fragmenting(c)
        far.run("curl", "-sSf", "--max-time", "60", "-H", LONG.decode().strip(),
                *["-o", "/dev/null", f"http://{c.VIP}/1k"] * 3)
        wait_for(lambda: defragmented(c) >= 3, "three segments, put together")
    finally:
        c.close()
