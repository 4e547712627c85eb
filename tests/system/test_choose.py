# SPDX-License-Identifier: GPL-2.0-or-later
"""Who gets a request (tcpha/_bpf/choose.h): workers, cached verdicts, the BPF program that uses
them and 'test-request' are of one opinion, whatever the rules and loads are."""
from __future__ import annotations

import random
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tests.support.bpf import Bpf
from tests.support.client import read_all

pytestmark = pytest.mark.modes("fast-direct")
PORTS = (80, 8080)
CONDITIONS = ("", "port=80", "port=8080")
PATTERNS = (r"jpg$", r"^/a", r"gif$|png$", r"x+", r".*")
TARGETS = ("/a.jpg", "/b.jpg", "/a.gif", "/xx.png", "/c")
SERVERS, LOAD = 4, 24  # of which size struct tcpha_load is
APART = 100  # between two loads that differ: far more than connections that come meanwhile


@dataclass
class Round:
    """Rules (server, condition, pattern), loads and drained back ends."""

    rules: list[tuple[int, str, str]]
    loads: list[int]
    drained: set[int]

    def winners(self, port: int, target: str) -> set[int]:
        """Any of these rules."""
        for condition, pattern in dict.fromkeys((c, p) for _, c, p in self.rules):
            if condition not in ("", f"port={port}") or not re.search(pattern, target):
                continue
            may = [n for n, (server, c, p) in enumerate(self.rules)
                   if (c, p) == (condition, pattern) and server not in self.drained]
            if may:
                least = min(self.loads[self.rules[n][0]] for n in may)
                return {n for n in may if self.loads[self.rules[n][0]] == least}
        return set()


def any_round(rnd: random.Random) -> Round:
    groups = [(condition, pattern) for pattern in PATTERNS for condition in CONDITIONS]
    rules = [(server, condition, pattern)
             for condition, pattern in rnd.sample(groups, rnd.randint(1, 5))
             for server in rnd.sample(range(SERVERS), rnd.randint(1, SERVERS))]
    if rnd.random() < 0.5:
        rnd.shuffle(rules)
    return Round(rules, [rnd.choice((0, 0, APART, 2 * APART)) for _ in range(SERVERS)],
                 {n for n in range(SERVERS) if rnd.random() < 0.2})


@contextmanager
def loaded(c: Cluster, bpf: Bpf, loads: list[int]) -> Iterator[None]:
    """Back ends have so many connections more."""
    assert c.fe
    fe = c.fe
    with bpf.memory("loads") as memory:
        def add(sign: int) -> None:
            wait_for(lambda: [s["live"] for s in fe.ctl("servers")]
                     == [0 if sign > 0 else n for n in loads], "connections to end")
            for server, n in enumerate(loads):
                at = server * LOAD + 16
                struct.pack_into("=I", memory, at,
                                 struct.unpack_from("=I", memory, at)[0] + sign * n)
        add(1)
        try:
            yield
        finally:
            add(-1)


@pytest.fixture
def c(mode: dict[str, Any]) -> Iterator[Cluster]:
    cluster = Cluster(SERVERS, **mode, rules=[(0, ".*")], fe_conf="listen = 8080\nport = 80\n"
                      "redirectport = 8000")
    try:
        yield cluster
    finally:
        cluster.close()


def test_all_are_of_one_opinion(c: Cluster) -> None:
    assert c.fe
    fe, bpf, rnd = c.fe, Bpf(c.fe_host, ("fe_ingress",)), random.Random(7)
    addresses = [h.address for h in c.be_hosts]
    took_turns = False

    def handed() -> list[int]:
        return [row["handed"] for row in fe.ctl("rules")]

    def request(port: int, target: str) -> bytes:
        with c.client.connect(c.VIP, port) as s:
            s.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            return read_all(s)

    for _ in range(25):
        now = any_round(rnd)
        c.rules = [(server, f"{condition} {pattern}".strip())
                   for server, condition, pattern in now.rules]
        fe.config.write_text(c.fe_text())
        fe.ctl("reload")
        for server in now.drained:
            fe.ctl("drain", addresses[server])
        with loaded(c, bpf, now.loads):
            for port, target in product(PORTS, TARGETS):
                want = now.winners(port, target)
                said = fe.ctl("test-request", f"port={port}", "GET", target)
                assert said.get("rule") in want if want else said["outcome"] == "503"
                for row in said["rules"]:
                    server = addresses.index(row["server"])
                    assert row["reason"] == ("draining" if server in now.drained else "")
                before = handed()
                answers = [request(port, target) for _ in range(5)]  # then by the program
                if not want:
                    assert all(a.startswith(b"HTTP/1.1 503 ") for a in answers)
                    continue
                wait_for(lambda b=before: sum(handed()) == sum(b) + 5, "the count")
                grew = [n - b for n, b in zip(handed(), before, strict=True)]
                assert {n for n, k in enumerate(grew) if k} <= want, (now, port, target)
                took_turns |= len(want) > 1 and all(grew[n] for n in want)
        for server in now.drained:
            fe.ctl("undrain", addresses[server])
    assert took_turns and fe.ctl("status")["packets"]["cached"] > 100


def test_the_same_rule_very_often(c: Cluster) -> None:
    """More of them than there may be back ends."""
    assert c.fe
    c.rules = [(n % 2, ".*") for n in range(1000)]
    c.fe.config.write_text(c.fe_text())
    c.fe.ctl("reload")
    said = c.fe.ctl("test-request", "GET", "/a")
    assert said["rule"] in (0, 1) and said["reason"].startswith("of 2 with this pattern"), said
    for _ in range(4):
        assert c.curl(f"http://{c.VIP}/a", "-w", "%{http_code}").stdout.endswith("404")
    assert sum(row["handed"] for row in c.fe.ctl("rules")[:2]) == 4
