# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'ebpf': TAP device, BPF object and tc filters of each role."""
from __future__ import annotations

import logging
import os
from functools import partial

from tcpha._fast.bpf import kernel_has_function
from tcpha._fast.diag import SockDiag
from tcpha._fast.ebpf import MAX_ROUTES, BeEbpf, FeEbpf
from tcpha.application import local_ways, ways_to
from tcpha.config import Config
from tcpha.datapath import (
    ADOPT_KFUNC,
    DEVICE_PRIORITY,
    DatapathError,
    Path,
    allow_adoption,
    headers,
    program_file,
)
from tcpha.datapath.fragments import REFUSED, Fragments, open_fragments
from tcpha.datapath.untracked import leave_untracked
from tcpha.net import rules
from tcpha.net.host import Host
from tcpha.net.journal import ROUTE, HostError
from tcpha.net.routes import Routes
from tcpha.net.tap import accept_any_source, open_queues, open_tap
from tcpha.undoing import each

log = logging.getLogger("tcpha")
FE_PRIORITY = 200
BE_PRIORITY = 201
MAX_QUEUES = 4  # FAST_QUEUES in _fast/datapath.pxd
TIMESTAMPS, SACK, WSCALE, ECN = 1, 2, 4, 8  # struct tcpha_fe_conf, options


class _Ebpf:
    name = "ebpf"
    chosen = ""
    fastpath = False
    fragments: Fragments | None = None

    def __init__(self, host: Host, prefix: str):
        self.tap_fd, self.tap_index, tap = open_tap(host, prefix)
        accept_any_source(host, tap, self.tap_index)

    def _attach(self, config: Config, host: Host, priority: int, tap: str, ingress: str) -> None:
        self._attach_tap(host, priority, tap)
        for index in host.ethernet(config.interface):
            if not host.is_ethernet(index):
                raise DatapathError(f"datapath ebpf: what {host.interface(index)} receives are no "
                                    "Ethernet frames; take it out of the key 'interface', or write "
                                    "'datapath = nfqueue'")
        host.attach_everywhere(config.interface, self.table.obj.program_fd(ingress), priority)

    def _attach_tap(self, host: Host, priority: int, program: str) -> None:
        host.attach(self.tap_index, self.table.obj.program_fd(program), priority)

    table: FeEbpf | BeEbpf

    def _open_fragments(self, config: Config, host: Host, role: str, program: str,
                        priority: int) -> None:
        fragments = open_fragments(config, host, role)
        if fragments is None:
            return
        self.fragment_rules = f"tcphafr_{host.handle:04x}_{os.getpid()}"
        self.fragmented = list(config.vaddrs) if role == "fe" else [config.raddr]
        try:
            self.way = rules.keep(host, self.fragment_rules, [
                fragments.rule(address) for address in self.fragmented])
            host.attach(fragments.index, self.table.obj.program_fd(program), priority)
        except HostError as error:
            log.warning("%s: %s", REFUSED[role], error)
            fragments.close()
            return
        except BaseException:
            fragments.close()
            raise
        fragments.start()
        self.fragments = fragments

    def counters(self) -> dict[str, int]:
        return self.table.counters() | (self.fragments.counters() if self.fragments else {})

    def close(self) -> None:
        if self.fragments:
            each(("rules", lambda: rules.remove(self.fragment_rules)),
                 ("fragments", self.fragments.close))
        os.close(self.tap_fd)


class EbpfFrontend(_Ebpf):
    table: FeEbpf

    def __init__(self, config: Config, host: Host, fastpath: bool):
        super().__init__(host, "tcphafe")
        self.config, self.host = config, host
        self.fastpath = fastpath
        self.queues: list[int] = []
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        config, host = self.config, self.host
        left = host.maps.get(FE_PRIORITY, {})
        self.table = FeEbpf(program_file("fe" if self.fastpath else "fe_socket"),
                            (self.tap_fd, self.tap_index), config.maxclients, config.maxflows,
                            config.forward == "tunnel", host.handle, self._open_fast(), left)
        self.left: dict[str, tuple[int, int]] = {}
        self.fresh = self.table.fresh
        if self.table.taken_over:
            live, known = self.table.take_over()
            self.left = {address: (index, live.get(index, 0)) for index, address in known.items()}
            log.info("%d connections of the earlier run go on", sum(live.values()))
        elif left:
            log.warning("the tables of the earlier run are of another version: back ends are asked "
                        "for its connections")
        self.add_services([(s.vaddr, s.port) for s in config.services])
        if self.fastpath:
            host.attach(self.fast_index, self.table.obj.program_fd("fe_fast"), FE_PRIORITY)
        self._open_fragments(config, host, "fe", "fe_ingress", FE_PRIORITY)
        host.forget_rules()
        self._attach(config, host, FE_PRIORITY, "fe_tap", "fe_ingress")
        if self.fastpath:
            host.follow(ROUTE, "MSS of routes",
                        Routes(host, MAX_ROUTES, self.table.set_route).look)

    def add_services(self, services: list[tuple[str, int]]) -> None:
        for vaddr, port in services:
            self.table.set_service(vaddr, port, None)
        if not self.fragments:
            return
        more = [v for v in dict.fromkeys(v for v, _ in services) if v not in self.fragmented]
        rules.add(self.host, self.fragment_rules,
                  [self.fragments.rule(address) for address in self.fragmented],
                  [self.fragments.rule(address) for address in more], self.way)
        self.fragmented += more

    def set_service(self, vaddr: str, port: int, number: int | None) -> None:
        self.table.set_service(vaddr, port, number)

    def fit(self, mtu: int) -> None:
        if self.fragments:
            self.fragments.fit(mtu)

    def _open_fast(self) -> tuple[list[int], int, int, int, int] | None:
        """The packet path's TAP device, and what its SYN-ACKs offer: what our kernel would."""
        if not self.fastpath:
            return None
        config, host = self.config, self.host
        allow_adoption(host)
        # or BPF may look up no routes there; nothing comes in by lo that could be sent on
        host.sysctl("net/ipv4/conf/lo/forwarding", "1")
        self.queues, self.fast_index, name = open_queues(
            host, "tcphafp", min(os.cpu_count() or 1, MAX_QUEUES))
        accept_any_source(host, name, self.fast_index)
        # kernel: tcp_select_initial_window()
        space = max(int(host.read_sysctl("net/ipv4/tcp_rmem").split()[2]),
                    int(host.read_sysctl("net/core/rmem_max") or 0))
        wscale = min(max(space.bit_length() - 16, 0), 14)
        options = TIMESTAMPS | SACK | WSCALE
        if host.read_sysctl("net/ipv4/tcp_ecn") != "0":
            options |= ECN
        return self.queues, self.fast_index, headers(config), wscale, options

    def set_down(self, index: int, down: bool) -> None:
        self.table.set_down(index, down)

    def wary(self) -> bool:
        return self.table.wary()

    def take_silent(self, seconds: float) -> None:
        self.table.take_silent(seconds)

    def close(self) -> None:
        each(("datapath", super().close), *(("queue", partial(os.close, fd)) for fd in self.queues))

    def set_backend(self, index: int, path: Path | None) -> None:
        self.table.set_backend(index, (path.ifindex, path.tunnel, path.nexthop, path.address,
                                       path.source, path.mtu) if path else None)

    def open_local(self) -> EbpfLocal:
        if not kernel_has_function(ADOPT_KFUNC):
            raise DatapathError(f"datapath ebpf: the kernel has no {ADOPT_KFUNC} (Linux 6.9 or "
                                "later has it); write 'datapath = nfqueue' for one")
        try:
            local = EbpfLocal(self.config, self.host)
        except OSError as error:
            raise DatapathError(f"datapath ebpf: {error}; write 'datapath = nfqueue' for "
                                "one") from None
        self.table.set_local()
        return local

    def refresh(self) -> None:
        """The kernel resolves neighbours by itself (bpf_redirect_neigh)."""


class _Adopter(_Ebpf):
    """Of a back end and of the Local Node."""

    table: BeEbpf

    def __init__(self, host: Host, prefix: str):
        super().__init__(host, prefix)
        self.host = host

    def follow(self, address: str, port: int, device: int) -> None:
        self.host.attach(device, self.table.obj.program_fd("be_forged"), DEVICE_PRIORITY)
        self.table.follow(address, port, device)


class EbpfBackend(_Adopter):
    def __init__(self, config: Config, host: Host, fastpath: bool):
        super().__init__(host, "tcphabe")
        self.fastpath = fastpath
        self.rules = f"tcphant_{host.handle:04x}_{os.getpid()}"
        try:
            leave_untracked(host, self.rules, config.vaddrs)
            self.table = BeEbpf(program_file("be"), (self.tap_fd, self.tap_index),
                                ways_to(config, config.places), config.raddr, host.handle,
                                fast=fastpath, left=host.maps.get(BE_PRIORITY, {}))
            self._open_fragments(config, host, "be", "be_ingress", BE_PRIORITY)
            host.forget_rules()
            self._attach(config, host, BE_PRIORITY, "be_tap", "be_ingress")
        except BaseException:
            self.close()
            raise

    def allow(self, address: str, allowed: bool) -> None:
        self.table.allow(address, allowed)

    def allowed(self) -> list[str]:
        return self.table.allowed()

    def close(self) -> None:
        each(("rules", lambda: rules.remove(self.rules)), ("datapath", super().close))


class EbpfLocal(_Adopter):
    """A back end's way of adoption for the front end's own server. No program of it sees what comes
    from the network."""

    def __init__(self, config: Config, host: Host):
        super().__init__(host, "tcphaln")
        self.sockets = SockDiag()
        try:
            self.table = BeEbpf(program_file("be"), (self.tap_fd, self.tap_index),
                                local_ways(config), config.vaddr, host.handle, self.sockets)
            self._attach_tap(host, BE_PRIORITY, "be_tap")
        except BaseException:
            self.close()
            raise

    def allow(self, address: str, allowed: bool) -> None:
        """Nobody tunnels to us."""

    def allowed(self) -> list[str]:
        return []

    def close(self) -> None:
        each(("datapath", super().close), ("sock_diag", self.sockets.close))
