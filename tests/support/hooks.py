# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs on the interfaces of a host: those of the daemons, wherever they are attached, and
those of others."""
from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tcpha._fast.bpf import (
    Object,
    open_program,
    program_id,
    program_name,
    tcx_attach,
    tcx_detach,
    tcx_programs,
)
from tcpha.lab.bed import Host, sh

OTHER = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("tc") int other(struct __sk_buff *skb) { return %s; }
SEC("xdp") int other_xdp(struct xdp_md *ctx) { return XDP_PASS; }
char LICENSE[] SEC("license") = "GPL";
"""
NEXT, PASS = -1, 0  # TCX_NEXT, TCX_PASS


def at_tcx(host: Host, device: str) -> list[tuple[int, str]]:
    """Id and name of each program at an interface's tcx, in their order."""
    def look() -> list[tuple[int, str]]:
        found = []
        for number in tcx_programs(socket.if_nametoindex(device)):
            with contextlib.suppress(OSError):  # it has left
                fd = open_program(number)
                found.append((number, program_name(fd)))
                os.close(fd)
        return found
    return host.inside(look)


def _at_tc(host: Host) -> list[dict[str, str | int]]:
    return list(json.loads(host.run("bpftool", "-j", "net", "show").stdout)[0]["tc"])


def programs(host: Host) -> dict[str, int]:
    """By name, the id of each program on a host's interfaces."""
    found = {str(p["name"]).split(":")[0]: int(p["id"]) for p in _at_tc(host)}
    for _, device in host.inside(socket.if_nameindex):
        with contextlib.suppress(OSError):  # it is gone
            found |= {name: number for number, name in at_tcx(host, device)}
    return found


def names_on(host: Host, device: str) -> list[str]:
    """In the order in which they see packets."""
    return [name for _, name in at_tcx(host, device)] + [
        str(p["name"]).split(":")[0] for p in _at_tc(host) if p["devname"] == device]


def take_away(host: Host, device: str) -> None:
    """All programs from an interface, and its clsact qdisc."""
    def detach() -> None:
        index = socket.if_nametoindex(device)
        for number in tcx_programs(index):
            fd = open_program(number)
            tcx_detach(index, fd)
            os.close(fd)
    host.inside(detach)
    host.run("tc", "qdisc", "del", "dev", device, "clsact", check=False)


class Others:
    """Programs of somebody else."""

    def __init__(self, directory: Path, verdict: int):
        source, self.file = directory / "other.c", directory / "other.o"
        source.write_text(OTHER % verdict)
        sh("clang", "-O2", "-g", "-target", "bpf", f"-I/usr/include/{os.uname().machine}-linux-gnu",
           "-c", str(source), "-o", str(self.file))
        self.objects: list[Object] = []

    def attach(self, host: Host, device: str, behind: int = 0) -> int:
        """At tcx, at the head or behind another one. Returns its id."""
        self.objects.append(Object(str(self.file)))
        fd = self.objects[-1].program_fd("other")
        host.inside(lambda: tcx_attach(socket.if_nametoindex(device), fd, behind))
        return int(program_id(fd))

    def detach(self, host: Host, device: str) -> None:
        def leave() -> None:
            for o in self.objects:
                with contextlib.suppress(OSError):
                    tcx_detach(socket.if_nametoindex(device), o.program_fd("other"))
        host.inside(leave)


@contextmanager
def no_room_at_tcx(host: Host, directory: Path, device: str = "eth0") -> Iterator[None]:
    """As on a kernel without tcx, daemons have to do with tc there."""
    others = Others(directory, NEXT)
    with pytest.raises(OSError, match="out of range"):  # BPF_MPROG_MAX
        while True:
            others.attach(host, device)
    yield
    others.detach(host, device)
