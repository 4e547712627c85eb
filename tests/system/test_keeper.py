# SPDX-License-Identifier: GPL-2.0-or-later
"""What others take away from a host while the daemons run, these put back."""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tcpha.lab.bed import BIN, Cluster, Daemon, Host, wait_for
from tests.support.hooks import names_on, take_away
from tests.support.host import state
from tests.support.modes import MODES

pytestmark = pytest.mark.modes("direct", "fast-direct", "nfqueue-direct")


@pytest.fixture
def idle(mode: dict[str, Any]):
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    c.nginx[0].file("index.html", b"x\n")
    yield c
    c.close()


def no_programs(host: Host) -> None:
    take_away(host, "eth0")  # nfqueue has none


def no_address(host: Host) -> None:
    host.ip("addr", "del", f"{Cluster.VIP}/32", "dev", "lo" if host.name == "be1" else "eth0")


def no_rules(host: Host) -> None:
    host.run("nft", "flush", "ruleset")


def old_sysctls(host: Host) -> None:
    for name in ("conf.all.arp_ignore", "conf.all.arp_announce", "tcp_timestamps"):
        host.sysctl(f"net.ipv4.{name}", "0")
    host.sysctl("net.ipv4.tcp_rfc1337", "1")


def filtered(host: Host, device: str) -> bool:
    return bool(names_on(host, device))


def as_served(host: Host) -> dict[str, str]:
    """What of its state the daemon cares for."""
    seen = state(host)
    return {key: seen[key] for key in ("addresses", "programs", "nft", "sysctls")}


def doctor(daemon: Daemon) -> list[dict[str, str]]:
    """Its findings about what the daemon keeps."""
    done = daemon.host.run(str(BIN / "tcphactl"), "--run-dir", str(daemon.run_dir), "--json",
                           "doctor", "-c", str(daemon.config), check=False)
    return [x for x in json.loads(done.stdout) if x["check"].endswith("in place")]


@pytest.mark.modes(*MODES)
@pytest.mark.parametrize("take", [no_programs, no_address, no_rules, old_sysctls])
def test_what_is_taken_away_comes_back(idle: Cluster, take: Callable[[Host], None]) -> None:
    hosts = [idle.fe_host, *idle.be_hosts]
    before = [state(h) for h in hosts]
    idle.start()
    assert idle.fe and idle.get("/") == "x\n"
    served = [as_served(h) for h in hosts]
    for h in hosts:
        take(h)
    wait_for(lambda: [as_served(h) for h in hosts] == served, "all of it again")
    assert idle.get("/") == "x\n"
    daemons = idle.fe, idle.be[0]
    taken = [d.ctl("status")["host"] for d in daemons]
    bare = take is no_programs and idle.datapath == ("nfqueue", "nfqueue")
    assert any(t["taken"] for t in taken) != bare and not any(t["missing"] for t in taken)
    for daemon, loss in zip(daemons, taken, strict=True):
        assert daemon.log.read_text().count("somebody took it away") == len(loss["taken"])
        found = doctor(daemon)
        assert [x["state"] for x in found] == ["warning"] * len(loss["taken"]) + ["good"]
    assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
    after = [state(h) for h in hosts]
    if take is old_sysctls:  # what the administrator set last
        assert [h.sysctl("net.ipv4.tcp_rfc1337") for h in hosts] == ["1"] * 2
        for b, a in zip(before, after, strict=True):
            b["sysctls"] = a["sysctls"] = ""
    assert after == before


def test_sources_of_forged_segments_pass_whatever_is_set_later(idle: Cluster) -> None:
    """As 'sysctl --system' does, also for devices that it does not know."""
    hosts = [idle.fe_host, *idle.be_hosts]
    idle.start()
    for value, ours in ("1", "2"), ("0", "0"):
        for h in hosts:
            for name in h.run("ls", "/proc/sys/net/ipv4/conf").stdout.split():
                h.sysctl(f"net.ipv4.conf.{name}.rp_filter", value)
        for h in hosts:
            wait_for(lambda h=h, n=ours: {*re.findall(
                r"conf\.tcpha\w+\.rp_filter = (\d)", h.run("sysctl", "-a").stdout)} <= {n}, ours)
        assert idle.get("/") == "x\n"


def test_two_that_fight_do_not_fill_the_log(idle: Cluster) -> None:
    idle.start()
    assert idle.fe
    fe, daemon = idle.fe_host, idle.fe
    for n in range(1, 5):
        no_address(fe)
        wait_for(lambda n=n: sum(t["times"] for t in daemon.ctl("status")["host"]["taken"]) == n,
                 "the address again")
    assert daemon.log.read_text().count("address 192.168.1.36: somebody took it away") == 1
    assert "taken away 4 times" in doctor(daemon)[0]["finding"]


@pytest.mark.modes("direct", "fast-direct")
def test_an_interface_that_comes_up_later_serves(idle: Cluster) -> None:
    idle.start()
    fe = idle.fe_host
    fe.plug("eth1", f"{fe.port}b")
    fe.link_up("eth1")
    wait_for(lambda: filtered(fe, "eth1"), "the filter")
    idle.client.ip("neigh", "replace", idle.VIP, "lladdr", fe.mac("eth1"), "dev", "eth0")
    assert idle.get("/") == "x\n"
    fe.ip("link", "del", "eth1")
    assert idle.fe
    journal = idle.fe.run_dir / "tcphafe.journal"
    wait_for(lambda: "eth1" not in journal.read_text(), "the journal without it")
    assert not idle.fe.ctl("status")["host"]["taken"]


@pytest.mark.parametrize("role", ["fe", "be"])
def test_an_interface_that_is_replaced_serves(idle: Cluster, role: str) -> None:
    """It comes back under its name and with its address, and is another one."""
    host = idle.fe_host if role == "fe" else idle.be_hosts[0]
    before = state(host)
    idle.start()
    assert idle.fe and idle.get("/") == "x\n"
    host.ip("link", "del", "eth0")
    host.plug("eth0", host.port)
    host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
    host.link_up("eth0")
    for h in idle.bed.hosts:
        h.ip("neigh", "flush", "all")
    wait_for(lambda: role == "be" or f"{idle.VIP}/32" in host.ip("addr", "show", "eth0"), "the VIP")
    wait_for(lambda: "nfqueue" in idle.datapath or filtered(host, "eth0"), "the filter")
    idle.connected()
    assert idle.get("/") == "x\n"
    assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
    after = state(host)
    for part in "links", "addresses":
        before[part] = after[part] = ""  # they show the interface's MAC address
    assert after == before


def test_an_address_of_somebody_else_is_left_to_him(idle: Cluster) -> None:
    """As of keepalived on two front ends."""
    idle.fe_conf = "announce = off"
    before = state(idle.fe_host)
    idle.start()
    fe = idle.fe_host
    assert idle.fe and idle.VIP not in fe.ip("addr", "show", "eth0")
    fe.ip("addr", "add", f"{idle.VIP}/32", "dev", "eth0")
    assert idle.get("/") == "x\n"
    no_address(fe)
    no_programs(fe)
    if idle.datapath[0] == "ebpf":
        wait_for(lambda: idle.fe and idle.fe.ctl("status")["host"]["taken"], "a look")
    assert idle.VIP not in fe.ip("addr", "show", "eth0")
    assert idle.fe.stop() == 0
    assert state(fe) == before
