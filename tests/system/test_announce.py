# SPDX-License-Identifier: GPL-2.0-or-later
"""Neighbours hear who has the VIP, also if they did not listen the first time."""
from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tcpha.net.announcer import Announcer
from tcpha.net.host import Host as NetHost
from tests.support.wire import arp_sent_by

pytestmark = pytest.mark.modes("fast-direct", "nfqueue-direct")
ELSEWHERE = "02:00:00:00:00:99"


@pytest.fixture
def one(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    c.nginx[0].file("index.html", b"x\n")
    c.nginx[0].file("big", size=64 << 20)
    yield c
    c.close()


def believes(c: Cluster) -> str:
    """Whom the client takes for the VIP's host. It says nothing, and so asks nobody."""
    return c.client.ip("neigh", "show", c.VIP)


def mislead(c: Cluster) -> None:
    c.client.ip("neigh", "replace", c.VIP, "lladdr", ELSEWHERE, "dev", "eth0", "nud", "stale")


def test_an_announcement_that_is_lost_is_repeated(one: Cluster) -> None:
    mislead(one)
    one.client.run("nft", "-f", "-", input="""table arp lab {
        counter lost { }
        chain in { type filter hook input priority 0; counter name lost drop; }
    }""")
    one.start()
    assert ELSEWHERE in believes(one)
    one.client.run("nft", "delete", "table", "arp", "lab")
    wait_for(lambda: one.fe_host.mac() in believes(one), "what was said again")


def test_a_link_that_comes_back_is_announced(one: Cluster) -> None:
    one.start()
    one.fe_host.ip("link", "set", "eth0", "down")
    mislead(one)
    one.fe_host.ip("link", "set", "eth0", "up")
    wait_for(lambda: one.fe_host.mac() in believes(one), "what was said again")


def test_another_mac_address_is_announced(one: Cluster) -> None:
    one.start()
    assert one.get("/") == "x\n"
    one.fe_host.ip("link", "set", "eth0", "address", "02:00:00:00:00:23")
    wait_for(lambda: "02:00:00:00:00:23" in believes(one), "what was said again")


def test_an_address_that_was_taken_away_is_announced_again(one: Cluster) -> None:
    one.start()
    mislead(one)
    one.fe_host.ip("addr", "del", f"{one.VIP}/32", "dev", "eth0")
    wait_for(lambda: one.fe_host.mac() in believes(one), "what was said again")


def test_it_is_said_now_and_then(one: Cluster) -> None:
    """For neighbours that were told something else, or were not there."""
    fe = one.fe_host

    def two_minutes() -> None:
        host = NetHost(fe.dir / "journal")
        index = socket.if_nametoindex("eth0")
        announcer = Announcer(host, fe.address, lambda: index)
        place = announcer.look()
        for now in range(121):
            announcer.take(place, float(now))
        host.close()
    with arp_sent_by(fe) as seen:
        fe.inside(two_minutes)
    assert seen == [(1, fe.address, fe.address)] * 4


@pytest.mark.modes("direct", "fast-direct", "fast-tunnel", "nfqueue-direct", "nfqueue-tunnel")
@pytest.mark.parametrize("role", ["fe", "be"])
def test_connections_live_through_another_mac_address(one: Cluster, role: str) -> None:
    """As after a bond's failover, or a virtual machine's move. Clients wait as long as many do."""
    host = one.fe_host if role == "fe" else one.be_hosts[0]
    one.start()
    file = one.client.dir / "big"
    download = one.client.start("curl", "-sS", "--limit-rate", "8M", "--speed-limit", "1",
                                "--speed-time", "20", "-o", str(file), f"http://{one.VIP}/big")
    wait_for(lambda: file.exists() and file.stat().st_size > 4 << 20, "the middle of a download")
    host.ip("link", "set", "eth0", "address", "02:00:00:00:00:23")
    assert one.get("/", "--max-time", "20") == "x\n"
    assert download.wait(120) == 0
    assert file.read_bytes() == (one.nginx[0].root / "big").read_bytes()
