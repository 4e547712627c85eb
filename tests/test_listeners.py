# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets that an application may listen with: of both families, bound to a device, MPTCP, behind
rules that send its port elsewhere."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Nginx, wait_for
from test_clients import connect_from
from test_serve import REQUEST, body, digest, read_all, settle

pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct", "nfqueue-direct")
BOTH_FAMILIES = "[::]:{} ipv6only=off"
BIG = 32 << 20


def fill(server: Nginx) -> None:
    for name in ("index.html", "a.jpg"):
        server.file(name, f"{server.host.name}\n".encode())
    server.file("1k", size=1024)
    server.file("big", size=BIG)


@pytest.fixture(scope="module")
def dual(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Servers that listen for both families with one socket, one of them as Local Node."""
    c = Cluster(1, **mode, start=False, rules=[(0, "jpg$|1k|big")],
                nginx={"ports": (BOTH_FAMILIES.format(80),)})
    try:
        c.nginx.append(Nginx(c.fe_host, (BOTH_FAMILIES.format(8080),)))
        for server in c.nginx:
            fill(server)
        c.start()
        yield c
    finally:
        c.close()


def test_both_families(dual: Cluster) -> None:
    """The end of each connection is heard of, though its socket is one of IPv6."""
    assert dual.fe
    wait_for(lambda: dual.fe and dual.fe.ctl("status")["localnode"]["listening"], "the Local Node")
    for _ in range(20):
        assert dual.get("/a.jpg") == "be1\n"
        assert dual.get("/") == "fe\n"
    settle(dual)
    handed = dual.fe.ctl("status")["localnode"]
    assert handed["handed"] == handed["closed"] >= 20


def test_both_families_on_a_port_of_before(dual: Cluster) -> None:
    """The server has closed first: its TIME_WAIT socket is one of IPv6, and must yield."""
    for _ in range(5):
        with connect_from(dual, 40321) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
    settle(dual)


@pytest.mark.parametrize("fresh", [False, True], ids=["back end", "both"])
def test_both_families_after_a_restart(dual: Cluster, fresh: bool) -> None:
    """Connections of a run that was killed are found, by those who ask for them too, and so is
    their end. With nfqueue, too: its table outlives the daemon."""
    be, fe = dual.be[0], dual.fe
    assert fe
    out = dual.bed.dir / "big"
    download = dual.client.start("curl", "-sS", "--limit-rate", "8M", "-o", str(out),
                                 f"http://{dual.VIP}/big")
    wait_for(lambda: be.ctl("status")["live"] == 1, "the download")
    be.kill()
    if fresh:
        assert fe.stop() == 0
    be.start()
    if fresh:
        fe.start()
    dual.connected()
    wait_for(lambda: be.ctl("status")["live"] == 1, "the download of before")
    assert download.wait(60) == 0
    assert digest(out) == digest(dual.nginx[0].root / "big")
    settle(dual)


def test_both_families_unload(dual: Cluster) -> None:
    be = dual.be[0]
    for _ in range(20):
        assert dual.get("/a.jpg") == "be1\n"
    be.ctl("unload")
    assert be.process.wait(20) == 0
    be.start()
    dual.connected()
