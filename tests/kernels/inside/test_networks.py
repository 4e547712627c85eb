# SPDX-License-Identifier: GPL-2.0-or-later
"""What stock kernels have and small ones have not: devices, links, rulesets, and other users of the
same hooks beside us."""
from __future__ import annotations

import platform
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from conftest import make
from tcpha.lab.bed import Cluster, Host, sh
from tests.support.client import REQUEST, body, digest, read_all, upload_many
from tests.support.network import let_grow
from tests.support.state import settle

MB = 1 << 20
IPPROTO_MPTCP = 262
KERNEL = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2])
LINKS = {
    "delay": "delay 20ms 5ms", "reordering": "delay 10ms reorder 90% 50% gap 3",
    "duplication": "duplicate 10%", "loss": "loss 1%",
    "all": "delay 20ms 10ms reorder 95% duplicate 2% loss 0.5%"}
# what docker makes for a container that publishes port 8000
DOCKER = """
table ip nat {
    chain DOCKER { iifname "docker0" return
        iifname != "docker0" tcp dport 8000 dnat to 172.17.0.2:80; }
    chain PREROUTING { type nat hook prerouting priority -100;
        fib daddr type local jump DOCKER; }
    chain OUTPUT { type nat hook output priority -100;
        ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER; }
    chain POSTROUTING { type nat hook postrouting priority 100;
        oifname != "docker0" ip saddr 172.17.0.0/16 masquerade; }
}
table ip filter {
    chain FORWARD { type filter hook forward priority 0; policy drop;
        oifname "docker0" ct state related,established accept
        iifname "docker0" accept; }
}"""
# what firewalld makes of a zone with services: web, our control port, protocol 4
FIREWALLD = """
table inet firewalld {
    chain mangle_PREROUTING { type filter hook prerouting priority -140;
        icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
        meta nfproto ipv6 fib saddr . mark . iif oif missing drop; }
    chain nat_PREROUTING { type nat hook prerouting priority -90; }
    chain filter_INPUT { type filter hook input priority 10;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        ip protocol icmp accept
        ip protocol 4 accept
        tcp dport { 80, 666 } ct state { new, untracked } accept
        reject with icmpx admin-prohibited; }
    chain filter_FORWARD { type filter hook forward priority 10;
        ct state { established, related } accept
        ct state invalid drop
        reject with icmpx admin-prohibited; }
    chain filter_OUTPUT { type filter hook output priority 10;
        ct state { established, related } accept
        oifname "lo" accept; }
}"""


def fill(c: Cluster) -> None:
    for n in c.nginx:
        n.file("index.html", f"index of {n.host.name}\n".encode())
        n.file("a.jpg", f"picture of {n.host.name}\n".encode())
        n.file("1k", size=1024)
        n.file("8m", size=8 * MB)


def serves(c: Cluster) -> None:
    """Both ways, to both back ends."""
    assert c.get("/") == "index of be1\n"
    assert c.get("/a.jpg") == "picture of be2\n"
    out = c.bed.dir / "down"
    c.get("/8m", "-o", str(out))
    assert digest(out) == digest(c.nginx[0].root / "8m")
    upload_many(c, 8, MB)
    upload_many(c, 8, MB, "-H", "Expect:")
    settle(c)


@contextmanager
def cluster_on(way: str, prepare: Callable[[Cluster], None], **kw: object) -> Iterator[Cluster]:
    """A cluster whose hosts are prepared before the daemons start."""
    c = make(way, start=False, **kw)
    try:
        fill(c)
        prepare(c)
        c.start()
        yield c
    finally:
        c.close()


def everywhere(*command: str) -> Callable[[Cluster], None]:
    """Run a command on the front end and the back ends."""
    def run(c: Cluster) -> None:
        for host in (c.fe_host, *c.be_hosts):
            host.run(*command)
    return run


@pytest.fixture
def plain(cluster: Cluster) -> Cluster:
    """The shared cluster."""
    for n in cluster.nginx:
        n.file("8m", size=8 * MB)
    return cluster


@pytest.mark.parametrize("kind", LINKS)
def test_netem(plain: Cluster, kind: str) -> None:
    """On every link, both ways."""
    ends = [(h.ns, "eth0") for h in plain.bed.hosts]
    ends += [(plain.bed.switch, h.port) for h in plain.bed.hosts]
    for ns, device in ends:
        sh("ip", "netns", "exec", ns, "tc", "qdisc", "add", "dev", device, "root", "netem",
           *LINKS[kind].split())
    try:
        serves(plain)
    finally:
        for ns, device in ends:
            sh("ip", "netns", "exec", ns, "tc", "qdisc", "del", "dev", device, "root")


@pytest.mark.skipif(KERNEL < (6, 1), reason="Debian's 5.10 is built without MPTCP")
def test_mptcp_client(plain: Cluster) -> None:
    """It offers MPTCP, and gets TCP."""
    def ask() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as s:
            s.settimeout(60)
            s.connect((plain.VIP, 80))
            s.sendall(REQUEST)
            return read_all(s)
    for _ in range(10):
        assert body(plain.client.inside(ask)) == (plain.nginx[0].root / "1k").read_bytes()
    settle(plain)


@pytest.mark.queues
def test_nft_queue(plain: Cluster) -> None:
    """Where there are queues, these kernels have nft's own expression for them."""
    used = [d for d, path in ((plain.fe, plain.datapath[0]), (plain.be[0], plain.datapath[1]))
            if d and path == "nfqueue"]
    for daemon in used:
        assert "by nft queue" in daemon.log.read_text()


def test_ipip_device_beside_us(way: str) -> None:
    """The module takes protocol 4, too."""
    def prepare(c: Cluster) -> None:
        for host in (c.fe_host, *c.be_hosts):
            host.run("modprobe", "ipip")
            host.ip("link", "set", "tunl0", "up")
            host.ip("tunnel", "add", "beside", "mode", "ipip", "remote", "192.168.1.99",
                    "local", host.address)
            host.ip("link", "set", "beside", "up")
    with cluster_on(way, prepare) as c:
        serves(c)


def test_ipvs_beside_us(way: str) -> None:
    """For another port, and for another address."""
    def prepare(c: Cluster) -> None:
        for host in (c.fe_host, *c.be_hosts):
            for service in (f"{c.VIP}:8088", f"{host.address}:80"):
                host.run("ipvsadm", "-A", "-t", service, "-s", "rr")
                host.run("ipvsadm", "-a", "-t", service, "-r", "192.168.1.99", "-g")
    with cluster_on(way, prepare) as c:
        serves(c)


def counts_big(host: Host) -> None:
    host.nft("""table ip lab {
        counter big { }
        chain out { type filter hook output priority 0; meta length > 65535 counter name big; }
    }""")


@pytest.mark.skipif(KERNEL < (6, 3), reason="BIG TCP for IPv4 came with 6.3")
def test_big_tcp(way: str) -> None:
    """Packets above 64 KB: the IP header says 0 of their length."""
    def prepare(c: Cluster) -> None:
        for host in c.bed.hosts:
            let_grow(host.ns, "eth0", 200_000)
            let_grow(c.bed.switch, host.port, 200_000)
        let_grow(c.bed.switch, "br0", 200_000)
        counts_big(c.client)
        counts_big(c.be_hosts[0])
    with cluster_on(way, prepare) as c:
        big = c.nginx[0].file("big", size=64 * MB)
        out = c.bed.dir / "down"
        c.get("/big", "-o", str(out))
        assert digest(out) == digest(big)
        upload_many(c, 8, 16 * MB, "-H", "Expect:")
        serves(c)
        assert c.client.nft_counter("big") and c.be_hosts[0].nft_counter("big")


@pytest.mark.parametrize("rules", [DOCKER, FIREWALLD], ids=["docker", "firewalld"])
def test_ruleset(way: str, rules: str) -> None:
    def prepare(c: Cluster) -> None:
        for host in (c.fe_host, *c.be_hosts):
            host.run("nft", "-f", "-", input=rules)
    with cluster_on(way, prepare) as c:
        serves(c)


def over_eth0(host: Host, device: str, *kind: str) -> None:
    """Put a device on top of eth0, and the host's address on that."""
    host.ip("addr", "flush", "dev", "eth0")
    host.ip("link", "add", "link", "eth0", "name", device, "type", *kind)
    host.ip("link", "set", device, "up")
    host.ip("addr", "add", f"{host.address}/24", "dev", device)


def bond(host: Host, device: str) -> None:
    host.ip("addr", "flush", "dev", "eth0")
    host.ip("link", "add", "name", device, "type", "bond", "mode", "active-backup", "miimon",
            "100")
    host.ip("link", "set", "eth0", "down")
    host.ip("link", "set", "eth0", "master", device)
    host.ip("link", "set", device, "up")
    host.ip("addr", "add", f"{host.address}/24", "dev", device)


DEVICES: dict[str, Callable[[Host, str], None]] = {
    "vlan": lambda host, device: over_eth0(host, device, "vlan", "id", "10"),
    "bond": bond,
    "macvlan": lambda host, device: over_eth0(host, device, "macvlan", "mode", "bridge"),
    "ipvlan": lambda host, device: over_eth0(host, device, "ipvlan", "mode", "l2")}


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("kind", DEVICES)
def test_device(way: str, kind: str, named: bool) -> None:
    """On all hosts: one that the configuration names, or that the daemons find by themselves."""
    def prepare(c: Cluster) -> None:
        for host in c.bed.hosts:
            DEVICES[kind](host, "net0")
    with cluster_on(way, prepare, interface="net0" if named else "") as c:
        serves(c)


def test_priority_tags(way: str) -> None:
    """Frames of VLAN 0, as some adapters and hypervisors leave them."""
    def prepare(c: Cluster) -> None:
        for host in c.bed.hosts:
            host.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
            host.run("tc", "filter", "add", "dev", "eth0", "egress", "matchall", "action", "vlan",
                     "push", "id", "0", "priority", "5")
    with cluster_on(way, prepare) as c:
        serves(c)
