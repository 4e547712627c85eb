# SPDX-License-Identifier: GPL-2.0-or-later
"""The application: what listens where handed-over connections are to go, a back end's server or the
Local Node's."""
from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Protocol

from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.diag import SockDiag
from tcpha.config import ANY, Config
from tcpha.net.host import Host
from tcpha.net.journal import HostError

REMEDY = ("start the application, or mend redirectaddr and redirectport; rules that send the port "
          "to a container do not count, docker's userland proxy does")
RENEW = 1.0  # seconds between two looks at the devices
PLAIN_TCP = ("have it listen with TCP (programs in Go with GODEBUG=multipathtcp=0, others without "
             "mptcpize), or write 'datapath = nfqueue' on this host")


class Follower(Protocol):
    """A datapath that injects what clients have sent."""

    name: str

    def follow(self, device: int) -> None:
        """The listener takes only what comes by this device. Raises OSError or NetlinkError."""


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


def address_of(config: Config) -> str:
    """Where the application listens."""
    return str(config.vaddr if config.redirectaddr == ANY else config.redirectaddr)


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


class Application:
    """Looks at the listener, and has the datapath follow it."""

    def __init__(self, config: Config, host: Host):
        self.config, self.host = config, host
        self.address, self.port = address_of(config), config.redirectport
        self.sockets = SockDiag()
        self.devices: list[int] = []
        self.renewed = float("-inf")
        self.followed = 0
        self.found: Found | None = None  # as last seen

    @property
    def usable(self) -> bool:
        return self.found is not None and not self.found.trouble

    def look(self, datapath: Follower) -> bool:
        """Whether anything has changed."""
        found = self._find(datapath)
        if found.trouble and self._renew():  # devices may have come or gone
            found = self._find(datapath)
        changed = found != self.found
        self.found = found
        return changed

    def _find(self, datapath: Follower) -> Found:
        found = find(self.sockets, self.devices, self.address, self.port, datapath.name)
        if found.device and found.device != self.followed:
            found = self._follow(datapath, found)
        return found

    def _follow(self, datapath: Follower, found: Found) -> Found:
        name = f"number {found.device}"
        try:
            name = socket.if_indextoname(found.device)
            datapath.follow(found.device)
        except (OSError, NetlinkError) as error:
            return Found(f"the application on {self.address}:{self.port} is bound to the device "
                         f"{name}, and what is handed over cannot come by that: {error}",
                         "bind it to an address instead", found.device)
        self.followed = found.device
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
