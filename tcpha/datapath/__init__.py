# SPDX-License-Identifier: GPL-2.0-or-later
"""How packets of handed-over flows travel. Callers see open_frontend() and open_backend(), and the
interface that both return; what the kernel offers is probed here and nowhere else."""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol, TypeVar

from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.bpf import kernel_has_function
from tcpha.config import Config
from tcpha.net.host import Host

log = logging.getLogger("tcpha")
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
    """The front end's datapath. table: what the workers call (see _fast/datapath.pxd)."""

    table: Any
    name: str
    chosen: str  # a line that says what was found and chosen
    fastpath: bool  # whether it has the packet path
    fresh: bool  # it knows nothing of connections of an earlier run, if there are any
    # back ends of a run that was killed, by address: index, and how many connections go on
    left: dict[str, tuple[int, int]]

    def set_backend(self, index: int, path: Path | None) -> None: ...
    def fit(self, mtu: int) -> None:
        """The least MTU of the ways to back ends, for packets that are put together here."""
    def set_down(self, index: int, down: bool) -> None:
        """Packet path: requests that this back end has not answered may go to another one."""
    def wary(self) -> bool:
        """Packet path: somebody may be guessing cookies, so not all count."""
    def open_local(self, address: str, port: int) -> Backend:
        """Open the way to the Local Node's server, at an address of this host."""
    def counters(self) -> dict[str, Any]: ...
    def refresh(self) -> None:
        """Look whether back ends are still where they were. Called every second."""
    def close(self) -> None: ...


class Backend(Protocol):
    """The back end's datapath."""

    table: Any
    name: str
    chosen: str
    fastpath: bool

    def allow(self, address: str, allowed: bool) -> None:
        """Accept tunnelled packets from a front end, or no longer."""
    def allowed(self) -> list[str]:
        """Whose are accepted; also by what an earlier run has left."""
    def follow(self, device: int) -> None:
        """The application's listener is bound to a device, and takes only what comes by that.
        Raises OSError or NetlinkError. It may become another one later, or none."""
    def counters(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


Way = tuple[str, bool]  # a datapath, and whether with the packet path


def choose(role: str, config: Config) -> tuple[list[Way], str]:
    """(what to try, the best first; what the kernel has or lacks). Raises DatapathError."""
    requested = config.datapath
    if requested == "nfqueue":
        return [("nfqueue", False)], "as requested"
    adopts = kernel_has_function(ADOPT_KFUNC)
    if adopts is None:
        lacking = "BTF (CONFIG_DEBUG_INFO_BTF)"
    elif not adopts and role == "be":  # the front end needs no more than BPF at tc, and BTF
        lacking = f"{ADOPT_KFUNC} (Linux 6.9 or later has it)"
    else:
        lacking = ""
    if lacking and requested == "auto":
        return [("nfqueue", False)], f"the kernel has no {lacking}"
    if lacking:
        raise DatapathError(f"datapath {requested}: the kernel has no {lacking}; write auto or "
                            "nfqueue")
    fast = bool(adopts) and config.fastpath == "on"
    found: list[Way] = [("ebpf", fast)]
    if requested == "auto":
        found += [("ebpf", False)] * fast + [("nfqueue", False)]
    return found, (f"the kernel has BTF and {ADOPT_KFUNC}" if adopts else
                   f"the kernel has BTF, and no {ADOPT_KFUNC} (Linux 6.9 or later has it)")


def describe(way: Way, requested: str, why: str) -> str:
    """What is used and why, for people."""
    name, fastpath = way
    path = f", {'with' if fastpath else 'without'} the packet path" if name == "ebpf" else ""
    return f"datapath {name} ({requested}){path}: {why}"


Opened = TypeVar("Opened", "Frontend", "Backend")


def _open(role: str, config: Config, host: Host,
          make: Callable[[Way], Opened]) -> Opened:
    """Open the best datapath that works here. What a kernel lacks, or its verifier refuses, may
    show only when it is tried; what a way that failed had changed on the host is put back."""
    ways, why = choose(role, config)
    for way in ways:
        before = list(host.undo)
        try:
            datapath = make(way)
        except (OSError, NetlinkError, DatapathError) as error:
            host.restore_since(before)
            if way == ways[-1]:
                raise DatapathError(_failure(way[0], config.datapath, why, error)) from None
            what = "with the packet path" if way[1] else way[0]
            why += f"; {what} it fails: {error}"
            continue
        datapath.chosen = describe(way, config.datapath, why)
        log.info("%s", datapath.chosen)
        return datapath
    raise AssertionError("nothing to try")


def _failure(name: str, requested: str, why: str, error: Exception) -> str:
    text = str(error) if isinstance(error, DatapathError) else f"datapath {name}: {error}"
    if requested == "auto":
        text += f" ({why})"
    elif requested == "ebpf":
        text += "; 'datapath = auto' takes what works"
    return text + "".join(f"\n    {line}" for line in getattr(error, "log", []))


def open_frontend(config: Config, host: Host) -> Frontend:
    """Packets take the way that is found from now on."""
    def make(way: Way) -> Frontend:
        if way[0] == "nfqueue":
            from tcpha.datapath.nfqueue import NfqueueFrontend
            return NfqueueFrontend(config, host)
        from tcpha.datapath.ebpf import EbpfFrontend
        return EbpfFrontend(config, host, way[1])
    return _open("fe", config, host, make)


def allow_adoption(host: Host) -> None:
    """What adoption needs of the kernel: connections whose options somebody else negotiated."""
    for name in ("tcp_syncookies", "tcp_timestamps", "tcp_sack", "tcp_window_scaling"):
        host.sysctl_on(f"net/ipv4/{name}")
    host.sysctl("net/ipv4/tcp_rfc1337", "0")  # a TIME_WAIT socket yields to a RST


def open_backend(config: Config, host: Host) -> Backend:
    def make(way: Way) -> Backend:
        if way[0] == "nfqueue":
            from tcpha.datapath.nfqueue import NfqueueBackend
            return NfqueueBackend(config, host)
        from tcpha.datapath.ebpf import EbpfBackend
        return EbpfBackend(config, host, way[1])
    return _open("be", config, host, make)
