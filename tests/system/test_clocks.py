# SPDX-License-Identifier: GPL-2.0-or-later
"""No host compares its clock with another one's. The hosts of all tests have clocks of their own,
hours apart and running at different rates (conftest.py); here it is seen that this is so, and what
is made of it."""
from __future__ import annotations

import struct
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, wait_for
from tests.support.bpf import Bpf, number
from tests.support.client import REQUEST, body, read_all

SECOND = 1_000_000_000
MS = SECOND // 1000
CLOCK = 48              # offset in struct tcpha_keys


def clock_at(c: Cluster, n: int) -> tuple[int, int]:
    """(ms that the front end's clock is ahead of a back end's, slack), as the back end knows it."""
    keys = Bpf(c.be_hosts[n], ("be_ingress",)).get("keys", number(0))
    word, = struct.unpack_from("=Q", keys, CLOCK)
    return word >> 32, word & 0xffffffff


def difference(c: Cluster, n: int) -> int:
    return (c.fe_host.now_ns() - c.be_hosts[n].now_ns()) // MS


@pytest.mark.modes("fast-direct", "fast-tunnel")
def test_back_ends_know_the_front_ends_clock(mode: dict[str, Any]) -> None:
    c = Cluster(2, **mode, rules=[(1, "jpg$"), (0, ".*")])
    try:
        assert abs(difference(c, 0)) > 3_600_000 and abs(difference(c, 1)) > 3_600_000
        for n in range(2):
            wait_for(lambda n=n: clock_at(c, n)[1] < 1100, "an exchange")
            ahead, slack = clock_at(c, n)
            assert abs((difference(c, n) - ahead + (1 << 31)) % (1 << 32) - (1 << 31)) <= slack
    finally:
        c.close()


def moved(d: Daemon, by_ns: int) -> None:
    """Kill a daemon, and start it on a host whose clock is ahead by so much more."""
    ahead, ppm = d.host.clock.split(":")
    d.kill()
    d.host.clock = f"{int(ahead) + by_ns}:{ppm}"
    d.start()


@pytest.mark.modes("direct", "fast-direct", "nfqueue-tunnel")
@pytest.mark.parametrize("by", [5, 3600, 86400])
def test_a_daemon_comes_back_with_another_clock(mode: dict[str, Any], by: int) -> None:
    """What it and its peers knew of each other's clocks is void."""
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        c.nginx[0].file("1k", size=1024)
        assert c.fe
        for daemon in (c.be[0], c.fe, c.be[0]):
            moved(daemon, by * SECOND)
            c.connected()
            before = c.be[0].ctl("status")["counters"]
            for _ in range(20):
                s = c.client.connect(c.VIP)
                s.sendall(REQUEST)
                assert len(body(read_all(s))) == 1024
                s.close()
            # the server may answer before an adoption is counted
            after = wait_for(lambda b=before: (
                now := c.be[0].ctl("status")["counters"])["adopted"] >= b["adopted"] + 20 and now,
                "all adoptions")
            assert after["adopted"] == before["adopted"] + 20
            assert after["fast"] == before["fast"] + (20 if c.fastpath else 0)
            assert c.fe.ctl("status")["counters"]["refused"] == 0
    finally:
        c.close()
