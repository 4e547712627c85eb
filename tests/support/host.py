# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host has, and what its kernel has counted."""
from __future__ import annotations

import re

from tcpha.lab.bed import Cluster, Host
from tests.support.hooks import names_on


def state(host: Host) -> dict[str, str]:
    """All that a daemon could have changed in a host's network."""
    out = {
        "addresses": re.sub(r"(valid|preferred)_lft \S+", "", host.ip("addr")),
        "links": re.sub(r"^\d+: ", "", host.ip("link"), flags=re.M),
        "routes": host.ip("route", "show", "table", "all"),
        "rules": host.ip("rule"),
        "qdiscs": host.run("tc", "qdisc").stdout,
        "filters": host.run("tc", "filter", "show", "dev", "eth0", "ingress", check=False).stdout,
        "programs": " ".join(names_on(host, "eth0")),
        "nft": host.run("nft", "list", "ruleset").stdout,
        "sysctls": "\n".join(line for line in host.run("sysctl", "-a", "-r", "^net\\.").stdout
                             .splitlines() if "conntrack_count" not in line)}
    return out


def resets(c: Cluster) -> int:
    """RSTs that the client has received on live connections."""
    for line in c.client.run("cat", "/proc/net/snmp").stdout.splitlines():
        if line.startswith("Tcp: ") and line.split()[1].isdigit():
            return int(line.split()[8])  # EstabResets
    raise AssertionError("no TCP statistics")


def be_patient(host: Host) -> None:
    """Send nothing again that is only late: what is sent again then, was lost (RFC 6298, 8985)."""
    host.run("sysctl", "-qw", "net.ipv4.tcp_early_retrans=0")
    host.ip("route", "change", "192.168.1.0/24", "dev", "eth0", "rto_min", "10s")


def retransmitted(host: Host) -> int:
    return int(host.run("nstat", "-asz", "TcpRetransSegs").stdout.split()[-2])
