# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that other software puts on servers: conntrack has not seen the handshake of what is handed
over, and must not judge it."""
from __future__ import annotations

import os
from typing import Any

import pytest
from test_edges import resets

from tcpha.lab.bed import Cluster, Host
from test_serve import digest, settle, upload_many

pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct", "nfqueue-direct")
NAT = """
table ip site_nat {
    chain before { type nat hook prerouting priority -100;
        fib daddr type local tcp dport 8000 dnat to 172.17.0.2:80; }
    chain out { type nat hook output priority -100; }
    chain behind { type nat hook postrouting priority 100; ip saddr 172.17.0.0/16 masquerade; }
}
table ip site_forward {
    chain forward { type filter hook forward priority 0; policy drop;
        ct state established,related accept; }
}"""
STATEFUL = """
table inet site_filter {
    chain in {
        type filter hook input priority 0; policy drop
        ct state established,related accept
        ct state invalid drop
        iifname "lo" accept
        ip protocol { icmp, 4 } accept
        tcp dport { 80, 666 } accept
    }
}"""
RULES = {"NAT": (NAT, "1"), "stateful": (STATEFUL, "1"), "stateful, strict": (STATEFUL, "0"),
         "NAT and stateful": (NAT + STATEFUL, "1")}


def tables(host: Host) -> list[str]:
    return sorted(host.run("nft", "list", "tables").stdout.splitlines())


@pytest.mark.parametrize("kind", RULES)
def test_rules_of_others(mode: dict[str, Any], kind: str) -> None:
    """On all hosts, before the daemons start. Everything is served, and no client is reset."""
    rules, loose = RULES[kind]
    c = Cluster(2, **mode, start=False)
    try:
        hosts = (c.fe_host, *c.be_hosts)
        for host in hosts:
            host.run("nft", "-f", "-", input=rules)
            host.sysctl("net.netfilter.nf_conntrack_tcp_loose", loose)
        before = {host.name: tables(host) for host in hosts}
        for n in c.nginx:
            n.file("index.html", f"index of {n.host.name}\n".encode())
            n.file("a.jpg", f"picture of {n.host.name}\n".encode())
        big = c.nginx[0].root / "big"
        big.write_bytes(os.urandom(8 << 20))
        c.start()
        was = resets(c)
        for _ in range(5):
            assert c.get("/") == "index of be1\n"
            assert c.get("/a.jpg") == "picture of be2\n"
        c.get("/big", "-o", str(c.bed.dir / "down"))
        assert digest(c.bed.dir / "down") == digest(big)
        upload_many(c, 8, 1 << 20, "-H", "Expect:")
        settle(c)
        assert resets(c) == was
        assert c.fe
        for daemon in (c.fe, *c.be):
            daemon.stop()
        assert {host.name: tables(host) for host in hosts} == before
    finally:
        c.close()
