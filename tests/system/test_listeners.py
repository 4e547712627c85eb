# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets that an application may listen with: of both families, bound to a device, MPTCP,
behind rules that send its port elsewhere."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Nginx, freeze, program, wait_for
from tests.support.client import REQUEST, body, connect_from, digest, read_all, upload_many
from tests.support.downloads import begin_big, finish_big
from tests.support.hooks import names_on
from tests.support.servers import fill, listener, restart
from tests.support.state import settle

pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct", "nfqueue-direct",
                               "nfqueue-tunnel")
BOTH_FAMILIES = "[::]:{} ipv6only=off"


def application(c: Cluster) -> str:
    return str(c.be[0].ctl("status")["application"])


def remedies(c: Cluster) -> str:
    """What the doctor finds on the back end, and what to do."""
    be = c.be[0]
    done = be.host.run(program("tcphactl"), "--run-dir", str(be.run_dir), "--json", "doctor", "-c",
                       str(be.config), check=False)
    return " ".join(f"{row['finding']}: {row['what to do']}" for row in json.loads(done.stdout)
                    if row["state"] == "fault")


@pytest.fixture(scope="module")
def dual(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Servers that listen for both families with one socket, one of them as Local Node."""
    c = Cluster(1, **mode, start=False, rules=[(0, "jpg$|1k|big")],
                nginx={"ports": (BOTH_FAMILIES.format(80),)})
    try:
        c.nginx.append(Nginx(c.fe_host, (BOTH_FAMILIES.format(8080),)))
        for server in c.nginx:
            fill(server)
        c.start()
        yield c
    finally:
        c.close()


def test_both_families(dual: Cluster) -> None:
    """The end of each connection is heard of, though its socket is one of IPv6."""
    assert dual.fe
    wait_for(lambda: dual.fe and dual.fe.ctl("status")["localnode"]["listening"], "the Local Node")
    for _ in range(20):
        assert dual.get("/a.jpg") == "be1\n"
        assert dual.get("/") == "fe\n"
    settle(dual)
    handed = dual.fe.ctl("status")["localnode"]
    assert handed["handed"] == handed["closed"] >= 20


def test_both_families_on_a_port_of_before(dual: Cluster) -> None:
    """The server has closed first: its TIME_WAIT socket is one of IPv6, and must yield."""
    for _ in range(5):
        with connect_from(dual, 40321) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
    settle(dual)


@pytest.mark.parametrize("fresh", [False, True], ids=["back end", "both"])
def test_both_families_after_a_restart(dual: Cluster, fresh: bool) -> None:
    """Connections of a run that was killed are found, by those who ask for them too, and so is
    their end. With nfqueue, too: its table outlives the daemon."""
    be, fe = dual.be[0], dual.fe
    assert fe
    s, begun = begin_big(dual)
    wait_for(lambda: be.ctl("status")["live"] == 1, "the download")
    be.kill()
    if fresh:
        assert fe.stop() == 0
    be.start()
    if fresh:
        fe.start()
    dual.connected()
    wait_for(lambda: be.ctl("status")["live"] == 1, "the download of before")
    finish_big(dual, s, begun)
    settle(dual)


def test_both_families_unload(dual: Cluster) -> None:
    be = dual.be[0]
    for _ in range(20):
        assert dual.get("/a.jpg") == "be1\n"
    be.ctl("unload")
    assert be.process.wait(20) == 0
    be.start()
    dual.connected()


@pytest.fixture(scope="module")
def bound(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Servers whose listeners are bound to the hosts' interface, one of them the Local Node's."""
    c = Cluster(1, **mode, start=False, rules=[(0, "jpg$|1k|big|up")])
    try:
        restart(c.nginx[0], listener(device="eth0"))
        c.nginx.append(Nginx(c.fe_host, (8080,), inherits=listener(8080, "eth0")))
        for server in c.nginx:
            fill(server)
        c.start()
        yield c
    finally:
        c.close()


def test_bound_to_a_device(bound: Cluster) -> None:
    assert bound.fe
    fe, out = bound.fe, bound.bed.dir / "big"
    wait_for(lambda: fe.ctl("status")["localnode"]["listening"], "the Local Node")
    for _ in range(20):
        assert bound.get("/a.jpg") == "be1\n"
        assert bound.get("/") == "fe\n"
    # longer than it takes to look for connections whose end was not heard of
    bound.get("/big", "--limit-rate", "16M", "-o", str(out))
    assert digest(out) == digest(bound.nginx[0].root / "big")
    upload_many(bound, 8, 1 << 20, "-H", "Expect:")
    for _ in range(5):  # an older socket has the name
        with connect_from(bound, 40322) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
    with bound.client.connect(bound.VIP) as s:  # a head of two segments, so a socket there
        s.sendall(REQUEST[:20])
        s.sendall(REQUEST[20:])
        assert len(body(read_all(s))) == 1024
    settle(bound)
    status = fe.ctl("status")["localnode"]
    assert status["handed"] == status["closed"] >= 20


def test_bound_no_longer(bound: Cluster) -> None:
    """Connections to the listener of before go on, also past a restart of the daemon."""
    s, begun = begin_big(bound)
    be = bound.be[0]
    wait_for(lambda: be.ctl("status")["live"] == 1, "the download")
    be.kill()
    be.start()
    bound.connected()
    bound.nginx[0].process.send_signal(3)  # SIGQUIT: listens no more, serves what it has
    wait_for(lambda: application(bound) == "dead", "the end of the listener")
    old = bound.nginx[0].process
    bound.nginx[0].inherits = None
    bound.nginx[0].start()
    wait_for(lambda: application(bound) == "listening", "the new listener")
    assert bound.get("/a.jpg") == "be1\n"
    finish_big(bound, s, begun)
    assert old.wait(20) == 0
    restart(bound.nginx[0], listener(device="eth0"))
    wait_for(lambda: application(bound) == "listening", "the listener of before")
    assert bound.get("/a.jpg") == "be1\n"
    settle(bound)


def test_bound_elsewhere(bound: Cluster) -> None:
    """By that device no client comes: said, with the remedy, and mended by itself."""
    restart(bound.nginx[0], listener(device="lo"))
    wait_for(lambda: application(bound) == "dead", "a listener that is of no use")
    why = "the application on 192.168.1.36:80 is bound to the device lo"
    assert why in bound.be[0].ctl("status")["trouble"]
    assert why in bound.be[0].log.read_text()
    assert "bind it to none, or to eth0" in remedies(bound)
    restart(bound.nginx[0], listener(device="eth0"))
    wait_for(lambda: application(bound) == "listening", "the listener")
    assert bound.get("/a.jpg") == "be1\n"
    be = bound.be[0]
    assert be.stop() == 0
    for device in ("eth0", "lo"):
        assert names_on(be.host, device) == []
    be.start()
    bound.connected()


@pytest.fixture
def multipath(mode: dict[str, Any]) -> Iterator[Cluster]:
    """The first of two back ends, and the Local Node, have a listener of MPTCP, as programs in Go
    have by default."""
    c = Cluster(2, **mode, start=False, rules=[(0, "jpg$"), (1, "jpg$")])
    try:
        restart(c.nginx[0], listener(protocol=socket.IPPROTO_MPTCP))
        c.nginx.append(Nginx(c.fe_host, (8080,),
                             inherits=listener(8080, protocol=socket.IPPROTO_MPTCP)))
        for server in c.nginx:
            fill(server)
        c.start()
        yield c
    finally:
        c.close()


@pytest.mark.modes("direct", "tunnel", "fast-direct")
def test_multipath_listener(multipath: Cluster) -> None:
    """The kernel hands nothing over to it. Others take its requests, and the remedy is said; it is
    used as soon as it listens with TCP."""
    assert multipath.fe
    fe, be = multipath.fe, multipath.be[0]
    why = "192.168.1.36:80 is an MPTCP listener"
    wait_for(lambda: application(multipath) == "dead", "a listener that is of no use")
    wait_for(lambda: [s["state"] for s in fe.ctl("servers")] == ["down", "up"],
             "the front end to hear of it")
    for _ in range(10):
        assert multipath.get("/a.jpg") == "be2\n"
    assert multipath.get("/", "-w", "%{http_code}").endswith("503")
    for said in (be.log.read_text(), be.ctl("status")["trouble"], remedies(multipath)):
        assert why in said
    for said in (be.log.read_text(), remedies(multipath), fe.log.read_text()):
        assert "GODEBUG=multipathtcp=0" in said and "datapath = nfqueue" in said
    restart(multipath.nginx[0], None)
    wait_for(lambda: [s["state"] for s in fe.ctl("servers")] == ["up", "up"], "its return")
    multipath.nginx[1].stop()
    assert multipath.get("/a.jpg") == "be1\n"
    settle(multipath)


@pytest.mark.modes("nfqueue-direct", "nfqueue-tunnel")
def test_multipath_listener_is_served(multipath: Cluster) -> None:
    """A forged handshake is one like any other."""
    out = multipath.bed.dir / "big.jpg"
    multipath.nginx[1].stop()
    (multipath.nginx[0].root / "big.jpg").symlink_to("big")
    for _ in range(20):
        assert multipath.get("/a.jpg") == "be1\n"
        assert multipath.get("/") == "fe\n"
    multipath.get("/big.jpg", "-o", str(out))
    assert digest(out) == digest(multipath.nginx[0].root / "big")
    settle(multipath)


def test_a_back_end_that_asks_the_vip(mode: dict[str, Any]) -> None:
    """It reaches itself, whatever the rules say, and the doctor says so, which is no fault."""
    c = Cluster(2, **mode, rules=[(1, ".*")])
    try:
        for server in c.nginx:
            fill(server)
        assert c.get("/a.jpg") == "be2\n"
        be = c.be[0]
        assert be.host.run("curl", "-sS", f"http://{c.VIP}/a.jpg").stdout == "be1\n"
        done = be.host.run(program("tcphactl"), "--run-dir", str(be.run_dir), "--json", "doctor",
                           "-c", str(be.config))
        row = next(r for r in json.loads(done.stdout) if r["check"] == "be: own requests")
        assert row["state"] == "good" and c.VIP in row["finding"] and "own server" in row["finding"]
        assert c.get("/a.jpg") == "be2\n"
        settle(c)
    finally:
        c.close()


# as docker publishes a container's port 80
PUBLISHED = """
table ip nat {
    chain DOCKER { iifname "docker0" return
        iifname != "docker0" tcp dport 80 dnat to 172.17.0.2:80; }
    chain PREROUTING { type nat hook prerouting priority -100;
        fib daddr type local jump DOCKER; }
    chain OUTPUT { type nat hook output priority -100;
        ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER; }
    chain POSTROUTING { type nat hook postrouting priority 100;
        oifname != "docker0" ip saddr 172.17.0.0/16 masquerade; }
}"""


@pytest.fixture(scope="module")
def published(mode: dict[str, Any]) -> Iterator[Cluster]:
    """The first of two back ends has a container behind its port 80, and a server of its own, as
    docker's userland proxy is one."""
    c = Cluster(2, **mode, start=False, rules=[(0, "jpg$|1k|big|up"), (1, "jpg$")])
    try:
        host = c.be_hosts[0]
        container = c.bed.host("container", "192.168.1.60")
        container.ip("link", "set", "eth0", "down")
        host.ip("link", "add", "docker0", "type", "veth", "peer", "name", "up0", "netns",
                container.ns)
        for where, device, address in ((host, "docker0", "172.17.0.1/16"),
                                       (container, "up0", "172.17.0.2/16")):
            where.ip("addr", "add", address, "dev", device)
            where.ip("link", "set", device, "up")
        container.ip("route", "add", "default", "via", "172.17.0.1")
        host.sysctl("net.ipv4.ip_forward", "1")
        host.run("nft", "-f", "-", input=PUBLISHED)
        c.nginx.append(Nginx(container))
        for server in c.nginx:
            fill(server)
        c.start()
        yield c
    finally:
        c.close()


def test_published_port_with_a_proxy(published: Cluster) -> None:
    """What listens on the host takes what is handed over, whatever the rules say."""
    host, out = published.be_hosts[0], published.bed.dir / "big"
    assert published.curl(f"http://{host.address}/").stdout == "container\n"
    published.nginx[1].stop()
    try:
        for _ in range(10):
            assert published.get("/a.jpg") == "be1\n"
    finally:
        published.nginx[1].start()
    published.get("/big", "-o", str(out))
    assert digest(out) == digest(published.nginx[0].root / "big")
    upload_many(published, 8, 1 << 20, "-H", "Expect:")
    assert published.curl(f"http://{host.address}/").stdout == "container\n"
    settle(published)


def test_published_port_alone(published: Cluster) -> None:
    """Nothing on the host listens: the next back end takes it, and it is said why."""
    host, be = published.be_hosts[0], published.be[0]
    published.nginx[0].stop()
    assert published.curl(f"http://{host.address}/").stdout == "container\n"
    for _ in range(10):
        assert published.get("/a.jpg") == "be2\n"
    assert published.get("/1k", "-w", "%{http_code}").endswith("503")
    wait_for(lambda: application(published) == "dead", "the end of the listener")
    why = f"nothing listens on {published.VIP}:80 that can take a handed-over connection"
    for said in (be.log.read_text(), remedies(published)):
        assert why in said and "docker's userland proxy" in said
    published.nginx[0].start()
    wait_for(lambda: application(published) == "listening", "the listener")
    settle(published)


@contextlib.contextmanager
def unpublished(published: Cluster) -> Iterator[None]:
    """The first back end begins on a host without such rules, and is the only one that serves."""
    host, be = published.be_hosts[0], published.be[0]
    assert be.stop() == 0
    host.run("nft", "delete", "table", "ip", "nat")
    bare = host.run("nft", "list", "tables").stdout
    be.start()
    published.connected()
    published.nginx[1].stop()
    try:
        assert published.get("/a.jpg") == "be1\n"
        yield
    finally:
        published.nginx[1].start()
    settle(published)
    assert be.stop() == 0
    host.run("nft", "delete", "table", "ip", "nat")
    assert host.run("nft", "list", "tables").stdout == bare
    host.run("nft", "-f", "-", input=PUBLISHED)
    be.start()
    published.connected()


def test_published_later(published: Cluster) -> None:
    """As by docker that is started, or restarted, while the daemon runs."""
    host, be = published.be_hosts[0], published.be[0]
    with unpublished(published):
        host.run("nft", "-f", "-", input=PUBLISHED)
        if published.datapath[1] == "nfqueue":
            wait_for(lambda: "type nat hook output priority -101" in host.run(
                "nft", "list", "ruleset").stdout, "rules of our own")
        for _ in range(10):
            assert published.get("/a.jpg") == "be1\n"
        assert published.curl(f"http://{host.address}/").stdout == "container\n"
        assert "somebody took it away" not in be.log.read_text()


@pytest.mark.socket_path
def test_published_in_the_midst_of_a_handover(published: Cluster) -> None:
    """It meets their rules before ours are there, and conntrack remembers."""
    be, fe = published.be[0], published.fe
    assert fe and be.process
    with unpublished(published):
        before = fe.ctl("status")["counters"]["lost"]
        freeze(be.process.pid)
        try:
            s = published.client.connect(published.VIP)
            s.sendall(REQUEST)
            wait_for(lambda: fe.ctl("status")["in_hand"] == 1, "an offer")
            published.be_hosts[0].run("nft", "-f", "-", input=PUBLISHED)
        finally:
            os.kill(be.process.pid, signal.SIGCONT)
        assert len(body(read_all(s))) == 1024
        status = be.ctl("status")["counters"]
        assert fe.ctl("status")["counters"]["lost"] == before and not status["refusals"]
