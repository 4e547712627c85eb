# SPDX-License-Identifier: GPL-2.0-or-later
"""The Local Node: the front end's own server takes what no back end takes."""
from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, Nginx, freeze, wait_for
from tests.support.client import (
    KEEP,
    REQUEST,
    body,
    connect_from,
    dial,
    digest,
    read_all,
    upload_many,
)
from tests.support.daemons import front
from tests.support.network import links
from tests.support.state import settle

# back ends play a small part here
pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct", "nfqueue-direct",
                               "nfqueue-tunnel")
UNAVAILABLE = "Service Unavailable\n503"


@pytest.fixture(scope="module")
def node(mode: dict[str, Any]) -> Iterator[Cluster]:
    """One back end for pictures alone, and nginx on the front end's port 8080. 'nginx' of this
    cluster begins with the front end's."""
    c = Cluster(1, **mode, rules=[(0, "jpg$")], start=False, be_conf="maxclients = 2",
                fe_conf="rule = 192.168.1.23 ^/own\nmaxclients = 512\nheadtimeout = 8")
    c.fe_host.sysctl("net.ipv4.tcp_timestamps", "2")
    try:
        c.nginx.insert(0, Nginx(c.fe_host, (8080,)))
        for server in c.nginx:
            for name in ("index.html", "a.jpg", "own.jpg"):
                server.file(name, f"{server.host.name}\n".encode())
            server.file("1k", size=1024)
            server.file("big", size=32 << 20)
        c.start()
        yield c
    finally:
        c.close()


@pytest.fixture
def cluster(node: Cluster) -> Iterator[Cluster]:
    """Its daemons must be as sound afterwards as before."""
    wait_for(lambda: status(node)["listening"], "the Local Node's server")
    yield node
    assert front(node).process.poll() is None, front(node).log.read_text()
    settle(node)


@pytest.fixture(params=["clean", "lossy"])
def path(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with links(cluster, request.param):
        yield cluster


def status(c: Cluster) -> dict[str, Any]:
    answer: dict[str, Any] = front(c).ctl("status")["localnode"]
    return answer


def test_takes_what_no_rule_schedules(cluster: Cluster) -> None:
    assert cluster.get("/a.jpg") == "be1\n"
    port = cluster.get("/", "-o", "/dev/null", "-w", "%{local_port}")
    (seen,) = wait_for(lambda: [r for r in cluster.nginx[0].seen() if r["client_port"] == port],
                       "the access log")
    assert seen["client"] == cluster.client.address
    assert cluster.get("/") == "fe\n"


def test_takes_what_a_rule_gives_it(cluster: Cluster) -> None:
    """Rules are tried in order: the picture's back end comes before."""
    assert cluster.get("/own") != UNAVAILABLE
    cluster.get("/own?x", "-o", "/dev/null")
    assert wait_for(lambda: cluster.nginx[0].seen()[-1]["request"] == "GET /own?x HTTP/1.1",
                    "the access log")
    assert cluster.get("/own.jpg") == "be1\n"


def test_takes_what_back_ends_cannot(cluster: Cluster) -> None:
    be, address = cluster.be[0], cluster.be_hosts[0].address
    front(cluster).ctl("drain", address)
    assert cluster.get("/a.jpg") == "fe\n"
    front(cluster).ctl("undrain", address)
    assert cluster.get("/a.jpg") == "be1\n"
    with contextlib.ExitStack() as held:  # maxclients of the back end is 2
        answers = []
        for _ in range(4):
            s = held.enter_context(cluster.client.connect(cluster.VIP))
            s.sendall(KEEP.replace(b"1k", b"a.jpg"))
            answers.append(s.recv(65536).split()[-1])
        assert answers == [b"be1", b"be1", b"fe", b"fe"]
    settle(cluster)
    be.kill()
    assert cluster.get("/a.jpg") == "fe\n"
    be.start()
    wait_for(lambda: cluster.get("/a.jpg") == "be1\n", "the back end in use again")
    server = cluster.nginx[1]
    server.stop()
    assert cluster.get("/a.jpg") == "fe\n"
    server.start()
    wait_for(lambda: cluster.get("/a.jpg") == "be1\n", "the back end in use again")


def test_nobody_listens(cluster: Cluster) -> None:
    cluster.nginx[0].stop()
    try:
        for _ in range(3):
            assert cluster.get("/", "-w", "%{http_code}") == UNAVAILABLE
        assert not wait_for(lambda: not status(cluster)["listening"] and status(cluster),
                            "the status")["listening"]
        assert cluster.get("/", "-w", "%{http_code}") == UNAVAILABLE
        assert cluster.get("/a.jpg") == "be1\n"
    finally:
        cluster.nginx[0].start()
    wait_for(lambda: cluster.get("/") == "fe\n", "the Local Node in use again")


def test_download(path: Cluster) -> None:
    out = path.bed.dir / "down"
    path.get("/big", "-o", str(out))
    assert digest(out) == digest(path.nginx[0].root / "big")


def test_uploads(path: Cluster) -> None:
    upload_many(path, 40, 5 << 20)
    upload_many(path, 20, 1 << 20, "-H", "Expect:")


def test_body_in_flight_when_the_handoff_starts(path: Cluster) -> None:
    for size in (10_000, 200_000, 3_000_000):
        data = os.urandom(size)
        with path.client.connect(path.VIP) as s:
            s.sendall(b"PUT /up/flight HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
                      b"Content-Length: %d\r\n\r\n" % size + data)
            assert read_all(s).split()[1] in (b"201", b"204")
        assert (path.nginx[0].root / "up" / "flight").read_bytes() == data


def test_half_close_and_reset(path: Cluster) -> None:
    for _ in range(10):
        with path.client.connect(path.VIP) as s:
            s.sendall(REQUEST)
            s.shutdown(socket.SHUT_WR)
            assert body(read_all(s)) == (path.nginx[0].root / "1k").read_bytes()
    s = path.client.connect(path.VIP)
    s.sendall(REQUEST.replace(b"1k", b"big"))
    assert s.recv(65536)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    s.close()  # RST


def test_table_and_counters(cluster: Cluster) -> None:
    before = status(cluster)
    with cluster.client.connect(cluster.VIP) as s:
        s.sendall(KEEP.replace(b"1k", b"1k?table"))
        s.recv(65536)
        (row,) = wait_for(lambda: front(cluster).ctl("conns"), "the connection table")
        assert row["client"] == "{}:{}".format(*s.getsockname())
        assert (row["target"], row["rule"], row["server"]) == ("/1k?table", "", "localnode")
        s.sendall(KEEP)
        s.recv(65536)
        (row,) = wait_for(lambda: [r for r in front(cluster).ctl("conns") if r["packets"] >= 2],
                          "packets to be counted")
        assert row["bytes"] > len(KEEP)
        assert status(cluster)["live"] == 1 == front(cluster).ctl("status")["live"]
    settle(cluster)
    after = status(cluster)
    assert after["handed"] == before["handed"] + 1 and after["closed"] == before["closed"] + 1


def test_many_connections_at_once(cluster: Cluster) -> None:
    done = cluster.client.run("ab", "-q", "-n", "4000", "-c", "64", f"http://{cluster.VIP}/1k")
    assert "Complete requests:      4000" in done.stdout and "Failed requests:        0" \
        in done.stdout, done.stdout
    done = cluster.client.run("ab", "-q", "-k", "-n", "4000", "-c", "64",
                              f"http://{cluster.VIP}/1k")
    assert "Failed requests:        0" in done.stdout, done.stdout


def test_port_used_again_at_once(cluster: Cluster) -> None:
    """TIME_WAIT sockets on the front end's own host."""
    for _ in range(20):
        with connect_from(cluster, 20046) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024


def test_full_accept_queue(cluster: Cluster) -> None:
    """What is in the queue of a server that has stopped is served later, the rest is told."""
    server, host = cluster.nginx[0], cluster.fe_host
    somaxconn = host.sysctl("net.core.somaxconn")
    host.sysctl("net.core.somaxconn", "4")
    try:
        server.stop()
        server.start()
        workers = server.worker_pids()
        wait_for(lambda: status(cluster)["listening"], "the Local Node's server")
        freeze(*workers)
        told = front(cluster).ctl("status")["counters"]["answered_503"]
        clients = []
        for _ in range(12):
            clients.append(cluster.client.connect(cluster.VIP))
            clients[-1].sendall(REQUEST)
        wait_for(lambda: front(cluster).ctl("status")["counters"]["answered_503"] > told, "a 503")
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        codes = [int(read_all(s).split()[1]) for s in clients]
        assert codes.count(200) >= 4 and codes.count(503) >= 1
        assert codes.count(200) + codes.count(503) == 12, codes
        for s in clients:
            s.close()
    finally:
        host.sysctl("net.core.somaxconn", somaxconn)
        server.stop()
        server.start()


def test_direct_use_of_its_port(cluster: Cluster) -> None:
    """The server stays what it was for those who know its port."""
    for address in (cluster.VIP, cluster.fe_host.address):
        answer = cluster.curl(f"http://{address}:8080/").stdout
        assert answer == "fe\n"


def test_direct_use_from_a_port_that_was_handed_over(cluster: Cluster) -> None:
    """To the server both connections have the same name, if packets are rewritten for it."""
    for _ in range(3):
        for port in (80, 8080):
            with connect_from(cluster, 20046, port) as s:  # no ephemeral port
                s.sendall(REQUEST.replace(b"/1k", b"/"))
                assert body(read_all(s)) == b"fe\n"


@pytest.mark.parametrize("end", ["server", "client", "both", "hasty"])
def test_direct_use_after(cluster: Cluster, end: str) -> None:
    """Whoever closed the connection for the VIP first, and even if the client uses its port for the
    server before that one was handed over."""
    for port in range(20050, 20074):
        with connect_from(cluster, port) as s:
            s.sendall(REQUEST if end in ("server", "both") else KEEP)
            if end == "both":
                s.shutdown(socket.SHUT_WR)
            if end in ("server", "both"):
                read_all(s)
            elif end == "client":
                s.recv(65536)
        with connect_from(cluster, port, 8080) as s:
            s.sendall(REQUEST.replace(b"/1k", b"/"))
            assert body(read_all(s)) == b"fe\n"


def test_direct_use_meanwhile(cluster: Cluster) -> None:
    """Many clients at once give a request up and use their port for the server while the handoff is
    under way: whichever connection the server gets first, it resets none for the other's sake."""
    def give_up(first: int) -> None:
        for port in [*range(first, first + 20)] * 5:
            with wait_for(partial(dial, cluster, port), "the port to be free") as s:
                s.sendall(KEEP)
            with wait_for(partial(dial, cluster, port, 8080), "the port to be free") as s:
                s.sendall(REQUEST.replace(b"/1k", b"/"))
                assert body(read_all(s)) == b"fe\n"

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(cluster.client.inside, partial(give_up, first))
                for first in range(20100, 20180, 20)]
        for run in runs:
            run.result()


@pytest.mark.modes("nfqueue-direct", "nfqueue-tunnel")  # the others have no handshake
def test_direct_use_refused_meanwhile(cluster: Cluster) -> None:
    """While the server has not answered for the request that its client has given up, nobody
    listens for the client itself: it hears that at once."""
    cluster.fe_host.nft("""table ip lab {
        counter asked { }
        chain out { type filter hook output priority -500;
            tcp sport 8080 tcp dport 20048 tcp flags & (syn | ack) == (syn | ack) \\
                counter name asked drop; }
        chain in { type filter hook input priority 0;
            iif != lo tcp dport 8080 tcp sport 20048 reject with tcp reset; }
    }""")
    try:
        with connect_from(cluster, 20048) as s:
            s.sendall(KEEP)
            wait_for(lambda: cluster.fe_host.nft_counter("asked"), "the server to be asked")
        with pytest.raises(ConnectionRefusedError):
            connect_from(cluster, 20048, 8080)
    finally:
        cluster.fe_host.nft("")


def test_direct_use_while_the_last_ack_is_missing(cluster: Cluster) -> None:
    """The client sends its FIN again when the port has a direct connection already, and must get
    its answer."""
    with connect_from(cluster, 20047) as s:
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024
        cluster.client.nft("""table ip lab {
            counter lost { }
            chain in { type filter hook input priority 0;
                tcp sport 80 tcp dport 20047 tcp flags & (syn | psh) == 0 counter name lost drop; }
        }""")
    try:
        wait_for(lambda: cluster.client.nft_counter("lost"), "the lost ACK")
        with connect_from(cluster, 20047, 8080) as s:
            s.sendall(REQUEST.replace(b"/1k", b"/"))
            assert body(read_all(s)) == b"fe\n"
    finally:
        cluster.client.nft("")
    with connect_from(cluster, 20047) as s:  # not before the FIN was answered
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024


def test_none_where_the_front_end_listens(mode: dict[str, Any]) -> None:
    """Its default port may be the front end's own."""
    c = Cluster(1, **mode, rules=[(0, "jpg$")], fe_conf="port = 8080")
    try:
        c.nginx[0].file("a.jpg", b"x\n")
        assert c.curl(f"http://{c.VIP}:8080/a.jpg").stdout == "x\n"
        assert c.curl(f"http://{c.VIP}:8080/").stdout == "Service Unavailable\n"
    finally:
        c.close()


def test_unload_waits_for_it(mode: dict[str, Any]) -> None:
    """On another address, too; and the host is left as it was."""
    c = Cluster(0, **mode, start=False, rules=[],
                fe_conf="redirectaddr = 127.0.0.1\nredirectport = 8081")
    try:
        server = Nginx(c.fe_host, ("127.0.0.1:8081",))
        server.file("big", size=32 << 20)
        rules = c.fe_host.run("nft", "list", "ruleset").stdout
        localnet = c.fe_host.sysctl("net.ipv4.conf.all.route_localnet")
        c.fe = Daemon(c.fe_host, "fe", c.fe_text())
        wait_for(lambda: status(c)["listening"], "the Local Node's server")
        s = c.client.connect(c.VIP)
        s.sendall(REQUEST.replace(b"1k", b"big"))
        got = s.recv(65536)
        c.fe.ctl("unload")
        with pytest.raises(ConnectionRefusedError):
            c.client.connect(c.VIP)
        assert c.fe.process.poll() is None
        got += read_all(s)
        s.close()
        want = hashlib.sha256((server.root / "big").read_bytes()).hexdigest()
        assert hashlib.sha256(body(got)).hexdigest() == want
        assert c.fe.process.wait(20) == 0
        assert c.fe_host.run("nft", "list", "ruleset").stdout == rules
        assert c.fe_host.sysctl("net.ipv4.conf.all.route_localnet") == localnet
    finally:
        c.close()
