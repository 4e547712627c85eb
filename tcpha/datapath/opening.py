# SPDX-License-Identifier: GPL-2.0-or-later
"""Which datapath this kernel has, and how it is opened. Callers see open_frontend() and
open_backend()."""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.bpf import kernel_has_function
from tcpha.config import Config
from tcpha.datapath import ADOPT_KFUNC, Backend, DatapathError, Frontend
from tcpha.net.host import Host

log = logging.getLogger("tcpha")
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


Opened = TypeVar("Opened", Frontend, Backend)


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


def open_backend(config: Config, host: Host) -> Backend:
    def make(way: Way) -> Backend:
        if way[0] == "nfqueue":
            from tcpha.datapath.nfqueue import NfqueueBackend
            return NfqueueBackend(config, host)
        from tcpha.datapath.ebpf import EbpfBackend
        return EbpfBackend(config, host, way[1])
    return _open("be", config, host, make)
