# SPDX-License-Identifier: GPL-2.0-or-later
"""tcphactl doctor: what on this host stands in the way, and what to do about it.

Looks and probes only; changes nothing.
"""
from __future__ import annotations

import contextlib
import errno
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcpha._fast.bpf import kernel_has_function
from tcpha._fast.diag import SockDiag
from tcpha.application import (
    Application,
    Found,
    applications_of,
    devices_of,
    find,
    local_ways,
    ways_to,
)
from tcpha.config import ANY, Config, ConfigError, load
from tcpha.daemon.control_socket import Refused, ask
from tcpha.datapath import ADOPT_KFUNC, DatapathError
from tcpha.datapath.opening import Way, choose, describe
from tcpha.net import arp, firewall
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.keeper import BEFORE_US

Finding = dict[str, str]
GOOD, WARNING, FAULT = "good", "warning", "fault"
PATIENCE = 2.0  # seconds for a peer to accept a connection
TUNNEL_OVERHEAD = 20
RECENT = 3600.0  # seconds for which it matters that something was taken away
# without these, options that the front end agreed on with a client cannot be kept
OPTIONS = ("tcp_timestamps", "tcp_sack", "tcp_window_scaling")


def default_config(role: str) -> str:
    return f"/etc/tcpha/tcpha{role}.conf"


def roles(run_dir: Path, file: str | None) -> list[str]:
    """Which roles this host has: by running daemons, else by configurations."""
    running = [r for r in ("fe", "be") if (run_dir / f"tcpha{r}.sock").exists()]
    if file:
        named = [r for r in ("fe", "be") if f"tcpha{r}" in Path(file).name]
        return named or running
    return running or [r for r in ("fe", "be") if os.path.exists(default_config(r))]


def examine(role: str, file: str | None, run_dir: Path) -> list[Finding]:
    """All findings: check, state (good, warning, fault), finding and what to do."""
    return [{"check": f"{role}: {check}", "state": state, "finding": text, "what to do": remedy}
            for check, state, text, remedy in _findings(role, file or default_config(role),
                                                        run_dir)]


Row = tuple[str, str, str, str]


def _findings(role: str, file: str, run_dir: Path) -> Iterator[Row]:
    try:
        config = load(role, file)
    except ConfigError as error:
        for fault in error.faults:
            yield ("configuration", WARNING if fault.warning else FAULT,
                   f"{fault.file}:{fault.line}: {fault.key}", fault.text)
        return
    for fault in config.warnings:
        yield "configuration", WARNING, f"{fault.file}:{fault.line}: {fault.key}", fault.text
    yield "configuration", GOOD, file, ""
    if os.geteuid() != 0:
        yield "user", FAULT, "not root: what follows may be wrong", "use sudo"
    host = Host(Path(os.devnull))
    yield from _daemon(role, run_dir)
    yield from _kernel(role, config)
    yield from _sysctls(role, config, host)
    yield from _addresses(role, config, host)
    if role == "fe":
        yield from _firewall(config)
        yield from _peers(config, host)
        yield from _applications(role, config, host)
    else:
        yield from _arp(config, host)
        yield from _applications(role, config, host)
        if config.dregister:
            yield from _reach("front end", config.feaddr, config.feport,
                              "start tcphafe there, or mend feaddr and feport")
    if not config.secret:
        yield ("secret", WARNING, "none: control connections are neither authenticated nor "
               "encrypted", "'openssl rand -hex 32' into a file for all hosts, and 'secret = FILE'")
    else:
        yield "secret", GOOD, config.secret, ""


def _daemon(role: str, run_dir: Path) -> Iterator[Row]:
    name = f"tcpha{role}"
    try:
        status = ask(run_dir / f"{name}.sock", "status", [])
    except (OSError, Refused):
        yield ("daemon", WARNING, f"no {name} answers in {run_dir}",
               f"systemctl start {name}, or look into its log: journalctl -u {name}")
        return
    yield ("daemon", GOOD, f"{name} runs, {status['live']} live connections, "
           f"{status['chosen']}", "")
    yield from _kept(status["host"])
    for server in status.get("servers", []):
        if server["state"] != "up":
            yield ("back end", FAULT if server["state"] == "down" else WARNING,
                   f"{server['server']} is {server['state']}: {server['reason']}",
                   f"tcphactl fe undrain {server['server']}" if server["state"] == "draining" else
                   "run 'tcphactl doctor' on that host")
    for trouble in dict.fromkeys(place["trouble"] for place in status.get("places", [])
                                 if not place["listening"] and not place["optional"]):
        yield "application", FAULT, f"tcphabe finds: {trouble}", "see below"


def _kept(host: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
    """What the daemon has put on this host, as it found it when it last looked."""
    for lack in host["missing"]:
        yield "in place", FAULT, f"{lack['what']}: {lack['why']}", "the daemon tries again"
    for loss in host["taken"]:
        if loss["ago"] < RECENT:
            yield ("in place", WARNING, f"{loss['what']}: taken away {loss['times']} times, "
                   f"{loss['ago']:.0f} seconds ago for the last time; the daemon put it back",
                   "find out who does that: a network manager, an agent, a firewall's reload?")
    for found in host["in_front"]:
        yield ("tc", WARNING, f"{found['interface']}: {' and '.join(found['what'])} before ours: "
               "packets that it takes or accepts do not reach us", BEFORE_US)
    if not host["missing"]:
        yield "in place", GOOD, "all that the daemon has put on this host", ""


def _kernel(role: str, config: Config) -> Iterator[Row]:
    release = platform.release()
    try:
        ways, why = choose(role, config)
    except DatapathError as error:
        yield "kernel", FAULT, f"Linux {release}: {error}", "write 'datapath = auto'"
        return
    datapath = ways[0][0]
    yield "kernel", GOOD, f"Linux {release}: {describe(ways[0], config.datapath, why)}", ""
    if datapath == "ebpf" and not kernel_has_function(ADOPT_KFUNC):
        yield ("kernel", WARNING, f"no {ADOPT_KFUNC}: no packet path, and no Local Node with ebpf",
               "Linux 6.9 or later has it; the socket path works without")
    if datapath == "nfqueue" and config.datapath == "auto":
        yield ("kernel", WARNING, "packets pass through user space",
               "a kernel of 6.9 or later with BTF is faster")


def _sysctls(role: str, config: Config, host: Host) -> Iterator[Row]:
    wrong = [f"net.ipv4.{n}" for n in OPTIONS if host.read_sysctl(f"net/ipv4/{n}") == "0"]
    if wrong:
        yield ("sysctls", WARNING, f"{', '.join(wrong)} = 0", "the daemon sets it to 1 while it "
               "runs; sysctl -w it, and mend /etc/sysctl.d, if it should stay so")
    if host.read_sysctl("net/ipv4/tcp_timestamps") == "2":
        yield ("sysctls", GOOD, "tcp_timestamps = 2: without random offsets", "")
    if role == "be":
        strict = [n for n in ("all", "default")
                  if host.read_sysctl(f"net/ipv4/conf/{n}/rp_filter") == "1"]
        if strict and config.datapath != "nfqueue":
            yield ("sysctls", WARNING, f"rp_filter = 1 for {', '.join(strict)}: packets of clients "
                   "whose route back leaves by another interface are dropped",
                   "sysctl -w net.ipv4.conf.all.rp_filter=2 (loose), if there is such a route")
    if not wrong:
        yield "sysctls", GOOD, "TCP options are on", ""


def _addresses(role: str, config: Config, host: Host) -> Iterator[Row]:
    if config.raddr != ANY:
        index = host.holder(config.raddr)
        if index is None:
            yield ("raddr", FAULT, f"{config.raddr} is no address of this host",
                   f"mend the key, or 'ip addr add {config.raddr}/24 dev ...'")
            return
        yield "raddr", GOOD, f"{config.raddr} on {host.interface(index)}", ""
    for vaddr in config.vaddrs:
        yield _virtual(role, config, host, vaddr)
    if role == "be" and (here := [v for v in config.vaddrs if host.holder(v) is not None]):
        yield ("own requests", GOOD, f"programs on this host that ask {' or '.join(here)} reach "
               "its own servers, whatever the rules say, and containers behind its bridges nobody",
               "if that is not what they need, have them run on a host that is no back end")
    try:
        mtu = min(host.mtu(i) for i in host.ethernet(config.interface))
    except HostError as error:
        yield "interfaces", FAULT, str(error), ""
        return
    if role == "fe" and config.forward == "tunnel":
        yield ("MTU", GOOD, f"{mtu}: clients are offered an MSS of {mtu - 40 - TUNNEL_OVERHEAD}, "
               f"so that what they send fits the tunnel", f"an MTU of {mtu + TUNNEL_OVERHEAD} "
               "between front end and back ends would save that")
    else:
        yield "MTU", GOOD, str(mtu), ""


def _virtual(role: str, config: Config, host: Host, vaddr: str) -> Row:
    """Where one of the virtual addresses is."""
    try:
        index = host.holder(config.raddr) if config.raddr != ANY else None
        index = host.route(vaddr).ifindex if index is None else index
    except HostError as error:
        return "vaddr", FAULT, str(error), f"add a route, or write raddr in {config.file}"
    holder = host.holder(vaddr)
    loopback = holder is not None and host.interface(holder) == "lo"
    ours = role == "be" or config.announce == "on"  # to put there, and to take away
    if holder is not None and ours and loopback != (role == "be"):
        return ("vaddr", FAULT, f"{vaddr} is on {host.interface(holder)}",
                "on a back end it belongs on lo alone: remove it, tcphabe adds it" if role == "be"
                else "on the front end it belongs on the interface of raddr: remove it, tcphafe "
                "adds it")
    if holder is not None:
        return "vaddr", GOOD, f"{vaddr} on {host.interface(holder)}", ""
    if role == "fe" and host.is_ethernet(index) and (mac := _who_has(host, index, vaddr)):
        return ("vaddr", FAULT, f"{vaddr} is in use: {mac} answers for it",
                "another front end runs, or a back end answers ARP: stop it, or run doctor there")
    if role == "fe" and config.announce == "off":
        return "vaddr", GOOD, f"{vaddr} is not here, and announce is off", ""
    return "vaddr", GOOD, f"{vaddr} is free; the daemon adds it", ""


def _who_has(host: Host, index: int, address: str) -> str | None:
    try:
        return arp.holder_on_link(host.interface(index), host.mac(index), address)
    except OSError:
        return None


def _reach(check: str, address: str, port: int, remedy: str) -> Iterator[Row]:
    where = f"{address}:{port}"
    try:
        with socket.create_connection((address, port), PATIENCE):
            yield check, GOOD, f"{where} accepts connections", ""
    except OSError as error:
        refused = error.errno == errno.ECONNREFUSED
        yield (check, FAULT, f"{where}: {error.strerror or 'no answer'}",
               remedy if refused else "is the host up, and does a firewall let us through?")


def _peers(config: Config, host: Host) -> Iterator[Row]:
    for server in config.server:
        yield from _reach("back end", server.address, server.port, "start tcphabe there")
        try:
            route = host.route(server.address)
        except HostError as error:
            yield "route", FAULT, str(error), ""
            continue
        if config.forward == "direct" and not route.on_link(server.address):
            yield ("route", FAULT, f"{server.address} is behind a router ({route.nexthop})",
                   "write 'forward = tunnel'")
    if not config.server and not config.secret and config.registration != "open":
        yield "back ends", WARNING, "none is listed, and none may register", "add 'server' lines"


def _arp(config: Config, host: Host) -> Iterator[Row]:
    index = host.holder(config.raddr)
    if index is None:
        return
    if host.holder(config.uaddr) is not None:
        yield "uaddr", FAULT, f"{config.uaddr} is an address of this host", "name an unused one"
    elif host.is_ethernet(index):
        mac = _who_has(host, index, config.uaddr)
        if mac:
            yield "uaddr", FAULT, f"{config.uaddr} is in use: {mac}", "name an unused address"
        else:
            yield "uaddr", GOOD, f"{config.uaddr} is unused", ""
    if all(host.holder(vaddr) is None for vaddr in config.vaddrs):
        return
    ignore, announce = (host.read_sysctl(f"net/ipv4/conf/all/{n}")
                        for n in ("arp_ignore", "arp_announce"))
    if ignore == "0" or announce == "0":
        yield ("ARP", FAULT, f"this host has a VIP and arp_ignore = {ignore}, arp_announce = "
               f"{announce}: it may take clients from the front end",
               "start tcphabe, which sets both, or remove the address")
    else:
        yield "ARP", GOOD, f"arp_ignore = {ignore}, arp_announce = {announce}", ""


def _firewall(config: Config) -> Iterator[Row]:
    """The packet path answers a SYN where it arrives, before netfilter has it."""
    if _way("fe", config) != ("ebpf", True):
        return
    try:
        chains = firewall.chains()
    except OSError as error:
        yield "firewall", WARNING, f"rules of netfilter cannot be listed: {error}", "look yourself"
        return
    if chains:
        services = ", ".join(f"{s.vaddr}:{s.port}" for s in config.services)
        yield ("firewall", WARNING, f"clients of {services} do not pass through "
               f"{', '.join(chains)}: the packet path answers before that",
               "keep out whom these rules are to keep out by XDP (xdp-filter, say), or on the "
               "router; or write 'fastpath = off'")
    else:
        yield "firewall", GOOD, "no rules that the packet path would leave out", ""


def _way(role: str, config: Config) -> Way:
    with contextlib.suppress(DatapathError):
        return choose(role, config)[0][0]
    return "", False


def _applications(role: str, config: Config, host: Host) -> Iterator[Row]:
    ways = ways_to(config, config.places) if role == "be" else local_ways(config)
    sockets, devices = SockDiag(), devices_of(config, host)
    try:
        for one in applications_of(config, ways):
            found = find(sockets, devices, one.address, one.port, _way(role, config)[0])
            yield _application(role, host, one, found)
    finally:
        sockets.close()


def _application(role: str, host: Host, one: Application, found: Found) -> Row:
    what = "application" if role == "be" else "Local Node"
    where = f"{one.address}:{one.port}"
    if not found.trouble:
        bound = f", bound to {host.interface(found.device)}" if found.device else ""
        return what, GOOD, f"somebody listens on {where}{bound}", ""
    if not one.optional or not found.absent:
        return what, FAULT if role == "be" else WARNING, found.trouble, found.remedy
    if role == "be":
        return (what, GOOD, f"nobody listens on {where}: ports without a 'service' line are "
                "refused", "write redirectaddr or redirectport if they should not be")
    return (what, GOOD, f"nobody listens on {where}: what no back end takes is answered 503",
            "start a web server there, if it should be served")
