# SPDX-License-Identifier: GPL-2.0-or-later
"""The applications: what listens where handed-over connections are to go, a back end's servers or
the Local Node's."""
from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.diag import SockDiag
from tcpha.config import ANY, Config, Place
from tcpha.net.host import Host
from tcpha.net.journal import HostError

REMEDY = ("start the application, or mend the key that says where it listens (redirectaddr, "
          "redirectport, service); rules that send the port to a container do not count, docker's "
          "userland proxy does")
RENEW = 1.0  # seconds between two looks at the devices
PLAIN_TCP = ("have it listen with TCP (programs in Go with GODEBUG=multipathtcp=0, others without "
             "mptcpize), or write 'datapath = nfqueue' on this host")


class Way(NamedTuple):
    """Of clients' connections to a port of a virtual address to the application that listens for
    them. vport 0: any port that has no way of its own."""

    vaddr: str
    vport: int
    address: str
    port: int


class Follower(Protocol):
    """A datapath that injects what clients have sent."""

    name: str

    def follow(self, address: str, port: int, device: int) -> None:
        """A listener takes only what comes by this device. Raises OSError or NetlinkError."""


@dataclass(frozen=True)
class Found:
    """trouble: why connections cannot be handed to what listens; empty: they can be. device: that
    the listener is bound to (SO_BINDTODEVICE), or 0."""

    trouble: str = ""
    remedy: str = ""
    device: int = 0

    @property
    def absent(self) -> bool:
        return self.remedy == REMEDY


def ways_to(config: Config, places: Iterable[Place]) -> list[Way]:
    """From all virtual addresses, one after the other."""
    return [Way(vaddr, place.vport, vaddr if place.address == ANY else place.address, place.port)
            for vaddr in config.vaddrs for place in places]


def local_ways(config: Config) -> list[Way]:
    """To the Local Node's server."""
    return ways_to(config, [Place(0, config.redirectaddr, config.redirectport)])


def devices_of(config: Config, host: Host) -> list[int]:
    """By which clients' packets may come."""
    try:
        return host.ethernet(config.interface)
    except HostError:  # none is up: any listener is as good as another
        return [0]


def find(sockets: SockDiag, devices: list[int], address: str, port: int, datapath: str) -> Found:
    """What a client's SYN would find in this host's own view: rules that send it elsewhere do not
    count, since what is handed over has no SYN."""
    where = f"{address}:{port}"
    listener = sockets.listener(address, port, devices)
    if listener is not None:
        device, mptcp = listener
        if mptcp and datapath == "ebpf":  # bpf_sk_assign_tcp_reqsk() refuses it
            return Found(f"the application on {where} is an MPTCP listener, to which the kernel "
                         "hands nothing over with datapath ebpf", PLAIN_TCP)
        return Found(device=device)
    present = socket.if_nameindex()
    names = ", ".join(name for index, name in present if index in devices)
    for index, name in present:
        if sockets.listener(address, port, [index]):
            return Found(f"the application on {where} is bound to the device {name}, by which no "
                         "client's packet comes",
                         f"bind it to none, or to {names}, or mend the key 'interface'")
    return Found(f"nothing listens on {where} that can take a handed-over connection", REMEDY)


@dataclass
class Application:
    """One that listens, or should, and the ways that lead there. optional: nobody has asked for
    it. found: as last seen. said: what front ends were told, see message SERVER; 0: nothing."""

    address: str
    port: int
    ways: list[Way]
    optional: bool
    found: Found | None = None
    followed: int = 0
    said: int = 0

    @property
    def usable(self) -> bool:
        return self.found is not None and not self.found.trouble

    @property
    def trouble(self) -> str:
        return self.found.trouble if self.found else ""


def applications_of(config: Config, ways: Iterable[Way]) -> list[Application]:
    """Each once, though several ways may lead there."""
    found: dict[tuple[str, int], list[Way]] = {}
    for way in ways:
        found.setdefault((way.address, way.port), []).append(way)
    default = config.role == "fe" or (
        bool(config.service) and not {"redirectaddr", "redirectport"} & config.lines.keys())
    return [Application(address, port, led, default and not any(way.vport for way in led))
            for (address, port), led in found.items()]


class Watch:
    """Looks at the listeners, and has the datapath follow them."""

    def __init__(self, config: Config, host: Host, ways: Iterable[Way]):
        self.config, self.host = config, host
        self.applications = applications_of(config, ways)
        self.sockets = SockDiag()
        self.devices: list[int] = []
        self.renewed = float("-inf")

    @property
    def first(self) -> Application:
        """That of the first virtual address, for ports without a way of their own."""
        return self.applications[0]

    @property
    def complete(self) -> bool:
        """Whether nothing is missed."""
        return all(one.usable or one.optional for one in self.applications)

    def look(self, datapath: Follower) -> list[Application]:
        """Those of which anything has changed."""
        changed = []
        for application in self.applications:
            found = self._find(datapath, application)
            if found.trouble and self._renew():  # devices may have come or gone
                found = self._find(datapath, application)
            if found != application.found:
                application.found = found
                changed.append(application)
        return changed

    def _find(self, datapath: Follower, application: Application) -> Found:
        found = find(self.sockets, self.devices, application.address, application.port,
                     datapath.name)
        if found.device and found.device != application.followed:
            found = self._follow(datapath, application, found)
        return found

    def _follow(self, datapath: Follower, application: Application, found: Found) -> Found:
        name = f"number {found.device}"
        try:
            name = socket.if_indextoname(found.device)
            datapath.follow(application.address, application.port, found.device)
        except (OSError, NetlinkError) as error:
            return Found(f"the application on {application.address}:{application.port} is bound to "
                         f"the device {name}, and what is handed over cannot come by that: {error}",
                         "bind it to an address instead", found.device)
        application.followed = found.device
        return found

    def _renew(self) -> bool:
        """Look which devices there are, but not too often. Returns whether we did."""
        if time.monotonic() < self.renewed + RENEW:
            return False
        self.renewed = time.monotonic()
        self.devices = devices_of(self.config, self.host)
        return True

    def close(self) -> None:
        self.sockets.close()
