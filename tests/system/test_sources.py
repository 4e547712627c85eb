# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose SYNs are answered, and where the answers go: as the front end's kernel has it, whoever
makes them."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host, wait_for

pytestmark = pytest.mark.modes("direct", "fast-direct", "fast-tunnel", "nfqueue-direct")
OTHER = "198.51.100.7"
DIALLED = ["curl", "-sS", "--max-time", "60", "--interface", OTHER, f"http://{Cluster.VIP}/"]
COUNT_ANSWERS = """table ip lab {{
    counter answers {{ }}
    chain in {{
        type filter hook prerouting priority -300;
        ip daddr {} tcp flags & (syn | ack) == syn | ack {} counter name answers
    }}
}}"""


@pytest.fixture
def c(mode: dict[str, Any]) -> Iterator[Cluster]:
    cluster = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        cluster.nginx[0].file("index.html", b"x\n")
        host = cluster.bed.host("neighbour", "192.168.1.60")
        host.ip("addr", "add", f"{OTHER}/32", "dev", "eth0")
        yield cluster
    finally:
        cluster.close()


def neighbour(c: Cluster) -> Host:
    return next(h for h in c.bed.hosts if h.name == "neighbour")


def strictly(host: Host, value: str) -> None:
    for name in ("all", "eth0"):
        host.sysctl(f"net.ipv4.conf.{name}.rp_filter", value)


def filtered(host: Host) -> int:
    """SYNs and whatever else the kernel's reverse-path filter has dropped."""
    names, values = (line.split() for line in host.run("cat", "/proc/net/netstat").stdout
                     .splitlines() if line.startswith("TcpExt:"))
    return int(values[names.index("IPReversePathFilter")])


def count_answers(host: Host, match: str = "") -> None:
    """Of SYNs that came from OTHER, as they arrive."""
    host.nft(COUNT_ANSWERS.format(OTHER, match))


def by_packet_path(c: Cluster) -> int:
    assert c.fe
    return int(c.fe.ctl("status")["packets"].get("cookies", 0))


def answered(c: Cluster) -> bool:
    """Whether OTHER is served; by the packet path, if there is one."""
    before = by_packet_path(c)
    assert neighbour(c).run(*DIALLED).stdout == "x\n"
    return by_packet_path(c) == before + c.fastpath


def by_eth0(c: Cluster) -> None:
    """OTHER does not ask for the MAC address: a strict kernel would not tell it, and where two
    interfaces are on one segment, either may answer."""
    neighbour(c).ip("neigh", "replace", c.VIP, "lladdr", c.fe_host.mac(), "dev", "eth0")


def dropped(c: Cluster) -> None:
    """What OTHER sends comes to nothing."""
    before, cookies = filtered(c.fe_host), by_packet_path(c)
    dialling = neighbour(c).start(*DIALLED)
    wait_for(lambda: filtered(c.fe_host) > before, "the SYN's end")
    assert by_packet_path(c) == cookies and neighbour(c).nft_counter("answers") == 0
    dialling.kill()


def test_an_address_behind_a_router_is_answered_there(c: Cluster) -> None:
    """A neighbour that uses it gets nothing."""
    router = c.bed.host("router", "192.168.1.200")
    strictly(c.fe_host, "1")
    c.fe_host.ip("route", "add", "default", "via", router.address)
    c.start()
    for host in (neighbour(c), router):
        count_answers(host)
    dialling = neighbour(c).start(*DIALLED)
    wait_for(lambda: router.nft_counter("answers"), "the answer")
    assert neighbour(c).nft_counter("answers") == 0 and by_packet_path(c) >= c.fastpath
    dialling.kill()


@pytest.mark.parametrize("rp_filter", ["0", "1", "2"])
def test_an_address_that_is_reached_by_another_device(c: Cluster, rp_filter: str) -> None:
    """Only a strict filter drops its SYNs; else the answer leaves by that device. What is set while
    the daemon runs counts at once."""
    fe = c.fe_host
    fe.plug("eth1", f"{fe.port}b")
    fe.link_up("eth1")
    fe.ip("addr", "add", "192.168.2.23/24", "dev", "eth1")
    neighbour(c).ip("addr", "add", "192.168.2.60/24", "dev", "eth0")
    fe.ip("route", "add", OTHER, "via", "192.168.2.60", "dev", "eth1")
    c.be_hosts[0].ip("route", "add", OTHER, "via", neighbour(c).address)
    strictly(fe, "0" if rp_filter == "1" else "1")
    c.start()
    count_answers(neighbour(c), f"ether saddr {fe.mac('eth1')}")
    by_eth0(c)
    strictly(fe, rp_filter)
    if rp_filter == "1":
        dropped(c)
    else:
        assert answered(c)
        assert neighbour(c).nft_counter("answers") == 1


def test_an_address_without_a_route(c: Cluster) -> None:
    strictly(c.fe_host, "1")
    c.start()
    count_answers(neighbour(c))
    by_eth0(c)
    dropped(c)


def test_a_route_for_what_the_host_itself_sends(c: Cluster) -> None:
    """A rule for 'iif lo', as for any packet of our own."""
    c.fe_host.ip("rule", "add", "iif", "lo", "to", OTHER, "lookup", "100")
    c.fe_host.ip("route", "add", OTHER, "via", neighbour(c).address, "table", "100")
    c.be_hosts[0].ip("route", "add", OTHER, "via", neighbour(c).address)
    c.start()
    assert answered(c)


def test_a_gateway_with_an_ipv6_address(c: Cluster) -> None:
    for host in (c.fe_host, neighbour(c)):
        host.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")
    neighbour(c).ip("addr", "add", "fd00::60/64", "dev", "eth0", "nodad")
    c.fe_host.ip("addr", "add", "fd00::23/64", "dev", "eth0", "nodad")
    c.fe_host.ip("route", "add", OTHER, "via", "inet6", "fd00::60", "dev", "eth0")
    c.be_hosts[0].ip("route", "add", OTHER, "via", neighbour(c).address)
    c.start()
    assert answered(c)


@pytest.mark.modes("fast-direct", "fast-tunnel")
def test_forwarding_that_somebody_turns_off(c: Cluster) -> None:
    """It is turned off for all devices, lo among them, without which BPF looks up no routes.
    Clients are served meanwhile, too."""
    fe = c.fe_host
    c.start()
    assert fe.sysctl("net.ipv4.conf.eth0.forwarding") == "0"
    fe.sysctl("net.ipv4.ip_forward", "1")
    fe.sysctl("net.ipv4.ip_forward", "0")
    assert c.get("/") == "x\n"
    wait_for(lambda: fe.sysctl("net.ipv4.conf.lo.forwarding") == "1", "lo's forwarding")
    before = by_packet_path(c)
    assert c.get("/") == "x\n" and by_packet_path(c) == before + 1
    assert c.fe and c.fe.stop() == 0
    assert fe.sysctl("net.ipv4.conf.lo.forwarding") == "0"
