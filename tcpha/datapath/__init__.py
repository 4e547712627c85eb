# SPDX-License-Identifier: GPL-2.0-or-later
"""How packets of handed-over flows travel. Callers see open_frontend() and open_backend(), and the
interface that both return; what the kernel offers is probed here and nowhere else."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tcpha._fast.bpf import kernel_has_function
from tcpha.config import Config
from tcpha.net.host import Host

LOCAL_CONNECTIONS = 16384  # that the Local Node may have at one time
ADOPT_KFUNC = "bpf_sk_assign_tcp_reqsk"  # Linux 6.9


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


class Frontend(Protocol):
    """The front end's datapath. table: what the workers call (see _fast/datapath.pxd)."""

    table: Any
    name: str
    fastpath: bool  # whether it has the packet path
    fresh: bool  # it knows nothing of connections of an earlier run, if there are any
    # back ends of a run that was killed, by address: index, and how many connections go on
    left: dict[str, tuple[int, int]]

    def set_backend(self, index: int, path: Path | None) -> None: ...
    def set_down(self, index: int, down: bool) -> None:
        """Packet path: requests that this back end has not answered may go to another one."""
    def open_local(self, address: str, port: int) -> Backend:
        """Open the way to the Local Node's server, at an address of this host."""
    def flows(self) -> list[dict[str, Any]]: ...
    def counters(self) -> dict[str, Any]: ...
    def refresh(self) -> None:
        """Look whether back ends are still where they were. Called every second."""
    def close(self) -> None: ...


class Backend(Protocol):
    """The back end's datapath."""

    table: Any
    name: str
    fastpath: bool

    def allow(self, address: str, allowed: bool) -> None: ...
    def counters(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def choose(role: str, requested: str) -> tuple[str, str]:
    """(datapath, a line that says what was found and chosen). Raises DatapathError."""
    if requested == "nfqueue":
        return "nfqueue", "datapath nfqueue, as requested"
    adopts = kernel_has_function(ADOPT_KFUNC)
    if adopts is None:
        lacking = "BTF (CONFIG_DEBUG_INFO_BTF)"
    elif not adopts and role == "be":  # the front end needs no more than BPF at tc, and BTF
        lacking = f"{ADOPT_KFUNC} (Linux 6.9 or later has it)"
    else:
        return "ebpf", (f"datapath ebpf ({requested}): the kernel has BTF"
                        + (f" and {ADOPT_KFUNC}" if adopts else ""))
    if requested == "auto":
        return "nfqueue", f"datapath nfqueue (auto): the kernel has no {lacking}"
    raise DatapathError(f"datapath {requested}: the kernel has no {lacking}; write auto or nfqueue")


def open_frontend(name: str, config: Config, host: Host) -> Frontend:
    """Open what choose() chose. Packets take that way from now on."""
    if name == "nfqueue":
        from tcpha.datapath.nfqueue import NfqueueFrontend
        return NfqueueFrontend(config, host)
    from tcpha.datapath.ebpf import EbpfFrontend
    return EbpfFrontend(config, host)


def allow_adoption(host: Host) -> None:
    """What adoption needs of the kernel: connections whose options somebody else negotiated."""
    for name in ("tcp_syncookies", "tcp_timestamps", "tcp_sack", "tcp_window_scaling"):
        host.sysctl_on(f"net/ipv4/{name}")
    host.sysctl("net/ipv4/tcp_rfc1337", "0")  # a TIME_WAIT socket yields to a RST


def open_backend(name: str, config: Config, host: Host) -> Backend:
    if name == "nfqueue":
        from tcpha.datapath.nfqueue import NfqueueBackend
        return NfqueueBackend(config, host)
    from tcpha.datapath.ebpf import EbpfBackend
    return EbpfBackend(config, host)
