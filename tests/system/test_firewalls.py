# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that other software puts on servers: conntrack has not seen the handshake of what is handed
over, and must not judge it."""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Bed, Cluster, Host, program
from tests.support.client import digest, upload_many
from tests.support.host import resets
from tests.support.state import settle

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


def firewall_found(c: Cluster) -> list[dict[str, str]]:
    """What the doctor says of the front end's firewall."""
    assert c.fe
    done = c.fe_host.run(program("tcphactl"), "--run-dir", str(c.fe.run_dir), "--json", "doctor",
                         "-c", str(c.fe.config), check=False)
    return [x for x in json.loads(done.stdout) if x["check"] == "fe: firewall"]


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


ONE_CHAIN = """
table {} site {{
    chain in {{
        type filter hook {};
        {}
    }}
}}"""
BY_NFT = ("nft", "-f", "-")
JUDGED = {  # what sets it up, what it reads, and the chain that the doctor names
    "stateful": (BY_NFT, STATEFUL, "nft inet site_filter in"),
    "NAT": (BY_NFT, NAT, "nft ip site_nat before"),
    "policy": (BY_NFT, ONE_CHAIN.format("ip", "input priority 0; policy drop", ""),
               "nft ip site in"),
    "ingress": (BY_NFT, ONE_CHAIN.format("netdev", "ingress device eth0 priority 0",
                                         "ip saddr 192.0.2.1 drop"), "nft netdev site in"),
    "iptables-nft": (("iptables-nft", "-A", "INPUT", "-s", "192.0.2.1", "-j", "DROP"), "",
                     "nft ip filter INPUT"),
    "iptables-legacy": (("iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-s", "192.0.2.1",
                         "-j", "DROP"), "", "iptables raw PREROUTING"),
    "no rules": (BY_NFT, ONE_CHAIN.format("ip", "input priority 0", ""), ""),
    "output": (BY_NFT, ONE_CHAIN.format("ip", "output priority 0", "ip daddr 192.0.2.1 drop"), ""),
}


@pytest.mark.modes("direct", "fast-direct", "nfqueue-direct")
def test_doctor_names_rules_that_clients_do_not_pass_through(mode: dict[str, Any]) -> None:
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        for kind, (command, rules, chain) in JUDGED.items():
            c.fe_host.run(*command, input=rules)
            found = firewall_found(c)
            if not c.fastpath:
                assert found == []
            elif chain:
                assert [f["state"] for f in found] == ["warning"], kind
                assert f" {chain}:" in found[0]["finding"], kind
            else:
                assert [f["state"] for f in found] == ["good"], kind
            c.fe_host.run("iptables-legacy", "-t", "raw", "-F")
            for table in tables(c.fe_host):
                if not table.split()[-1].startswith("tcpha"):
                    c.fe_host.run("nft", "delete", *table.split())
    finally:
        c.close()


@pytest.mark.modes("direct")
def test_looking_for_chains_makes_no_table(mode: dict[str, Any], tmp_path: Path) -> None:
    """With iptables of the older kind; where there is a table for NAT, the kernel tracks all."""
    legacy = shutil.which("iptables-legacy")
    assert legacy
    (tmp_path / "iptables").symlink_to(legacy)
    bed = Bed()
    try:
        host = bed.host("host", "192.168.1.2")
        host.run(sys.executable, "-c", "from tcpha.net.rules import remove; remove('tcpha_test')",
                 env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert host.run("cat", "/proc/net/ip_tables_names").stdout == ""
    finally:
        bed.close()
