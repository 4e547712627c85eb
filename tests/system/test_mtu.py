# SPDX-License-Identifier: GPL-2.0-or-later
"""Path MTU discovery (RFC 1191): routers write to the VIP, so to the front end, about segments that
a back end has sent."""
from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host, Nginx, sh, wait_for
from tests.support.client import upload_many
from tests.support.network import FAR, NARROW, behind_a_router


def check(c: Cluster, far: Host, server: Nginx) -> None:
    content = server.file("1m", size=1 << 20).read_bytes()
    got = far.dir / "1m"
    far.run("curl", "-sS", "--max-time", "60", "-o", str(got), f"http://{c.VIP}/1m")
    assert got.read_bytes() == content
    # the segments were too large at first, and the host that sent them has heard of it
    assert f"mtu {NARROW}" in server.host.ip("route", "get", FAR)


@pytest.fixture
def cluster(mode: dict[str, Any]) -> Iterator[Cluster]:
    # where addresses are rewritten, those in the error must be, too
    rewritten = "redirectaddr = 192.168.1.33\nredirectport = 8080"
    c = Cluster(1, **mode, nginx={"ports": (80, 8080)}, rules=[(0, ".*")],
                be_conf=rewritten if mode["datapath"][1] == "nfqueue" else "")
    yield c
    c.close()


@pytest.mark.modes("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct",
                   "nfqueue-tunnel", "ebpf-nfqueue", "nfqueue-ebpf")
def test_a_narrow_link(cluster: Cluster) -> None:
    far = behind_a_router(cluster)
    check(cluster, far, cluster.nginx[0])
    assert cluster.fe and cluster.fe.ctl("status")["packets"]["icmp"] > 0


@pytest.mark.parametrize("datapath", ("ebpf", "nfqueue"))
def test_a_narrow_link_to_the_local_node(datapath: str) -> None:
    c = Cluster(1, datapath=(datapath, datapath), rules=[(0, "jpg$")], start=False)
    try:
        server = Nginx(c.fe_host, (8080,))
        c.start()
        check(c, behind_a_router(c), server)
    finally:
        c.close()


MODES = ("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct", "nfqueue-tunnel")


def grow(host: Host, mtu: int) -> None:
    for ns, device in ((host.ns, "eth0"), (host.bed.switch, host.port)):
        sh("ip", "-n", ns, "link", "set", device, "mtu", str(mtu))


@pytest.mark.modes(*MODES)
def test_back_ends_on_smaller_frames(mode: dict[str, Any]) -> None:
    """Clients are not offered what does not fit through to the servers."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        for host in (c.client, c.fe_host):
            grow(host, 9000)
        c.start()
        upload_many(c, 4, 1 << 20, "-H", "Expect:")
        with c.client.connect(c.VIP) as s:
            assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 1500 - 52
    finally:
        c.close()


@pytest.mark.modes(*MODES)
def test_an_interface_that_nothing_passes_through(mode: dict[str, Any]) -> None:
    """An overlay's, say, with its small MTU: no business of clients that come by another one."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        c.fe_host.ip("link", "add", "overlay", "mtu", "1280", "type", "veth", "peer", "name", "far")
        c.fe_host.ip("link", "set", "overlay", "up")
        c.fe_host.ip("link", "set", "far", "up")
        c.start()
        with c.client.connect(c.VIP) as s:
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            s.recv(1)
            assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == \
                1500 - 52 - 20 * (c.forward == "tunnel")
    finally:
        c.close()


OTHER = "198.51.100.7"
ALL = 0  # that the interface has room for
ROUTES = (  # of the front end, one after the other; and what clients at two addresses are told
    ("", 1200, None), ("replace 192.168.1.50 dev eth0 mtu 1140", 1100, None),
    ("replace 192.168.1.50 dev eth0 mtu lock 1040", 1000, None),
    ("replace 192.168.1.50 dev eth0 mtu 100", 256, None),  # net.ipv4.route.min_adv_mss
    ("replace 192.168.1.50 dev eth0", ALL, None),
    ("replace 192.168.1.0/24 dev eth0 advmss 800", ALL, None), ("del 192.168.1.50", 800, None),
    ("add default via 192.168.1.50 advmss 900", 800, 900),
    ("add 198.51.0.0/16 via 192.168.1.50", 800, ALL),
    ("add 198.51.100.0/24 advmss 950 nexthop via 192.168.1.50 nexthop via 192.168.1.50 weight 2",
     800, 950),
    ("replace 192.168.1.0/24 dev eth0 advmss 1400", 1400, 950), ("del 198.51.100.0/24", 1400, ALL),
    ("del 198.51.0.0/16", 1400, 900), ("del default", 1400, None),
    ("replace 192.168.1.0/24 dev eth0", ALL, None))


@pytest.mark.modes(*MODES)
def test_routes_that_say_what_clients_may_send(mode: dict[str, Any]) -> None:
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        c.client.ip("addr", "add", f"{OTHER}/32", "dev", "eth0")
        c.fe_host.ip("route", "add", c.client.address, "dev", "eth0", "advmss", "1200")
        c.start()
        for route, *told in ROUTES:
            if route:
                c.fe_host.ip("route", *route.split())
            for source, mss in zip((c.client.address, OTHER), told, strict=True):
                if mss is not None:
                    want = mss or 1460 - 20 * (c.forward == "tunnel")
                    wait_for(lambda s=source, n=want: offered(c, s) == n, f"{want} after {route}")
        if c.fastpath:
            assert c.fe and c.fe.ctl("status")["packets"]["cookies"] > len(ROUTES)
    finally:
        c.close()


def offered(c: Cluster, source: str) -> int:
    """The MSS that the front end tells a client; its segments have 12 bytes of options."""
    def dial() -> int:
        with socket.socket() as s:
            s.settimeout(10)
            s.bind((source, 0))
            s.connect((c.VIP, 80))
            return s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) + 12
    return c.client.inside(dial)
