# SPDX-License-Identifier: GPL-2.0-or-later
"""How packets of handed-over flows travel: the interface of all datapaths. See opening.py."""
from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

from tcpha._fast.datapath import BeDatapath, FeDatapath
from tcpha.config import Config
from tcpha.net.host import Host

LOCAL_CONNECTIONS = 16384  # that the Local Node may have at one time
DEVICE_PRIORITY = 199  # of filters: before those that judge what comes from the network
ADOPT_KFUNC = "bpf_sk_assign_tcp_reqsk"  # Linux 6.9


def program_file(name: str) -> str:
    """Of BPF programs, an object."""
    return str(resources.files("tcpha._bpf") / f"{name}.bpf.o")


class DatapathError(Exception):
    """No datapath works here; the message says why."""


@dataclass(frozen=True)
class Path:
    """How the front end reaches a back end."""

    ifindex: int
    tunnel: bool
    nexthop: str
    address: str
    source: str
    mtu: int  # the least of both ends', and of what is known to be between them


def headers(config: Config) -> int:
    """Bytes of a packet on its way to a back end that are no payload: without options, as of an
    MSS (RFC 9293 section 3.7.1), and with the outer header."""
    return 40 + (20 if config.forward == "tunnel" else 0)


class Frontend(Protocol):
    """The front end's datapath."""

    @property
    def table(self) -> FeDatapath:
        """What the workers call (see _fast/datapath.pxd)."""
    name: str
    chosen: str  # a line that says what was found and chosen
    fastpath: bool  # whether it has the packet path
    fresh: bool  # it knows nothing of connections of an earlier run, if there are any
    # back ends of a run that was killed, by address: index, and how many connections go on
    left: dict[str, tuple[int, int]]

    def add_services(self, services: list[tuple[str, int]]) -> None:
        """Look at packets for more addresses and ports. New connections are left to our own stack
        as yet. Raises OSError."""
    def set_service(self, vaddr: str, port: int, number: int | None) -> None:
        """Take new connections for a service, by its number; None: leave them to our own stack."""
    def set_backend(self, index: int, path: Path | None) -> None: ...
    def fit(self, mtu: int) -> None:
        """The least MTU of the ways to back ends, for packets that are put together here."""
    def set_down(self, index: int, down: bool) -> None:
        """Packet path: requests that this back end has not answered may go to another one."""
    def wary(self) -> bool:
        """Packet path: somebody may be guessing cookies, so not all count."""
    def take_silent(self, seconds: float) -> None:
        """Packet path: connections whose client has said nothing for so long become sockets. May
        take long."""
    def open_local(self) -> Backend:
        """Open the way to the Local Node's server."""
    def counters(self) -> dict[str, Any]: ...
    def refresh(self) -> None:
        """Look whether back ends are still where they were. Called every second."""
    def close(self) -> None: ...


class Backend(Protocol):
    """The back end's datapath."""

    @property
    def table(self) -> BeDatapath:
        """As the front end's."""
    name: str
    chosen: str
    fastpath: bool

    def allow(self, address: str, allowed: bool) -> None:
        """Accept tunnelled packets from a front end, or no longer."""
    def allowed(self) -> list[str]:
        """Whose are accepted; also by what an earlier run has left."""
    def follow(self, address: str, port: int, device: int) -> None:
        """An application's listener is bound to a device, and takes only what comes by that.
        Raises OSError or NetlinkError. It may become another one later, or none."""
    def counters(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def allow_adoption(host: Host) -> None:
    """What adoption needs of the kernel: connections whose options somebody else negotiated."""
    for name in ("tcp_syncookies", "tcp_timestamps", "tcp_sack", "tcp_window_scaling"):
        host.sysctl_on(f"net/ipv4/{name}")
    host.sysctl("net/ipv4/tcp_rfc1337", "0")  # a TIME_WAIT socket yields to a RST
