# SPDX-License-Identifier: GPL-2.0-or-later
"""The network of a bed: links that lose, routers, what the switch does."""
from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tcpha.lab.bed import Cluster, Host, inside, sh

# 1 % of the packets, each way
LOSS = """table ip lab {
    chain in { type filter hook input priority 0;
        iifname "eth0" numgen random mod 1000 < 10 drop
    }
    chain out { type filter hook output priority 0;
        oifname "eth0" numgen random mod 1000 < 10 drop
    }
}"""
NARROW = 1300
FAR = "10.9.0.2"


@contextmanager
def links(c: Cluster, kind: str) -> Iterator[None]:
    """The client's link 'clean' or 'lossy' for a while."""
    if kind == "lossy":
        c.client.nft(LOSS)
    yield
    c.client.nft("")


def move_behind_a_router(c: Cluster, be: Host, mtu: int = 1500) -> Host:
    """Move a back end, which has not been started, to a network of its own. Returns the router."""
    router = c.bed.host("router", "192.168.1.1", mtu)
    router.ip("addr", "add", "10.9.0.1/24", "dev", "eth0")
    for name in ("conf.all.send_redirects", "conf.eth0.send_redirects"):
        router.sysctl(f"net.ipv4.{name}", "0")
    router.sysctl("net.ipv4.ip_forward", "1")
    be.ip("addr", "flush", "dev", "eth0")
    be.address = "10.9.0.33"
    be.ip("addr", "add", "10.9.0.33/24", "dev", "eth0")
    be.ip("route", "add", "default", "via", "10.9.0.1")
    c.fe_host.ip("route", "add", "10.9.0.0/24", "via", "192.168.1.1")
    return router


def behind_a_router(c: Cluster) -> Host:
    """A client whose way to the others has a link that takes no more than NARROW bytes."""
    router = c.bed.host("router", "192.168.1.200")
    far = c.bed.host("far", FAR)
    router.ip("addr", "add", "10.9.0.1/24", "dev", "eth0")
    router.ip("route", "replace", "10.9.0.0/24", "dev", "eth0", "mtu", "lock", str(NARROW))
    router.ip("route", "add", c.VIP, "dev", "eth0", "mtu", "lock", str(NARROW))
    router.sysctl("net.ipv4.conf.all.send_redirects", "0")
    router.sysctl("net.ipv4.conf.eth0.send_redirects", "0")
    router.sysctl("net.ipv4.ip_forward", "1")
    far.ip("route", "add", "default", "via", "10.9.0.1")
    for host in (c.fe_host, *c.be_hosts):
        host.ip("route", "add", "10.9.0.0/24", "via", router.address)
    return far


def mac(host: Host) -> bytes:
    link, = json.loads(host.ip("-j", "link", "show", "eth0"))
    return bytes.fromhex(link["address"].replace(":", ""))


def nft_on_switch(c: Cluster, rules: str) -> None:
    sh("nsenter", f"--net=/run/netns/{c.bed.switch}", "nft", "-f", "-",
       input=f"table bridge lab\ndelete table bridge lab\n{rules}")


def let_grow(ns: str, device: str, size: int) -> None:
    """gso_ipv4_max_size and gro_ipv4_max_size of a device; Debian 12's ip(8) does not know them."""
    def ask() -> int:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
            message = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(device), 0, 0) + \
                struct.pack("=HHIHHI", 8, 63, size, 8, 64, size)
            s.send(struct.pack("=IHHII", 16 + len(message), 16, 5, 1, 0) + message)
            return int(struct.unpack_from("=i", s.recv(4096), 16)[0])
    error = inside(ns, ask)
    assert error == 0, os.strerror(-error)
