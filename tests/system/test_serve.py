# SPDX-License-Identifier: GPL-2.0-or-later
"""What a client, a server and an operator see when all goes well."""
from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, listening, wait_for
from tests.support.client import REQUEST, body, digest, read_all, upload_many
from tests.support.modes import MODES
from tests.support.network import links, move_behind_a_router
from tests.support.state import settle

pytestmark = pytest.mark.modes(*MODES)
BIG = 64 << 20


@pytest.fixture(params=["clean", "lossy"])
def cluster(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Everything in this file happens on sound links, and where 1 % of the packets is lost each
    way between the client and the switch."""
    with links(cluster, request.param):
        yield cluster


def test_dispatch_by_rule(cluster: Cluster) -> None:
    assert cluster.get("/") == "index of be1\n"
    assert cluster.get("/a.jpg") == "picture of be2\n"
    assert cluster.get("/1k?x=a.jpg", "-o", "/dev/null", "-w", "%{http_code}") == "200"
    assert cluster.nginx[1].seen()[-1]["request"] == "GET /1k?x=a.jpg HTTP/1.1"


def test_server_sees_the_client(cluster: Cluster) -> None:
    port = cluster.get("/", "-o", "/dev/null", "-w", "%{local_port}")
    seen = wait_for(lambda: [r for r in cluster.nginx[0].seen() if r["client_port"] == port],
                    "the access log")[-1]
    assert seen["client"] == cluster.client.address
    assert (seen["server"], seen["server_port"]) == (cluster.VIP, "80")


def test_large_download_bypasses_the_front_end(cluster: Cluster) -> None:
    want = digest(cluster.nginx[0].root / "big")
    before = {h.name: h.counter("tx_bytes") for h in (cluster.fe_host, cluster.be_hosts[0])}
    out = cluster.bed.dir / "down"
    cluster.get("/big", "-o", str(out))
    assert digest(out) == want
    size = out.stat().st_size
    sent = {h.name: h.counter("tx_bytes") - before[h.name]
            for h in (cluster.fe_host, cluster.be_hosts[0])}
    assert sent["be1"] >= size
    # what the FE sends are the client's acknowledgements, on their way to the back end
    assert sent["fe"] < size / 20


def test_no_response_crosses_the_front_end(cluster: Cluster) -> None:
    cluster.fe_host.nft("""table ip lab {
        counter answers { }
        chain out { type filter hook output priority 0;
            ip saddr 192.168.1.36 tcp sport 80 ip length > 200 counter name answers; }
        chain in { type filter hook prerouting priority 0;
            ip saddr 192.168.1.36 tcp sport 80 counter name answers; }
    }""")
    try:
        for _ in range(5):
            cluster.get("/1k", "-o", "/dev/null")
        assert cluster.fe_host.nft_counter("answers") == 0
    finally:
        cluster.fe_host.nft("")


def test_four_requests_on_one_connection(cluster: Cluster) -> None:
    url = f"http://{cluster.VIP}/1k"
    done = cluster.curl(*[a for _ in range(4) for a in ("-o", "/dev/null", url)],
                        "-w", "%{local_port} %{http_code}\n")
    lines = done.stdout.split("\n")[:4]
    assert len(set(lines)) == 1 and lines[0].endswith(" 200")


def test_idle_close_by_client_and_server(cluster: Cluster) -> None:
    settle(cluster)
    s = cluster.client.connect(cluster.VIP)
    s.sendall(REQUEST.replace(b"close", b"keep-alive"))
    assert b"200 OK" in s.recv(65536)
    s.close()
    settle(cluster)
    s = cluster.client.connect(cluster.VIP)
    s.sendall(REQUEST)
    assert len(body(read_all(s))) == 1024  # the server closed
    s.close()
    settle(cluster)


def test_client_aborts_in_mid_transfer(cluster: Cluster) -> None:
    s = cluster.client.connect(cluster.VIP)
    s.sendall(REQUEST.replace(b"1k", b"big"))
    assert len(s.recv(65536)) > 0
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    s.close()  # RST
    settle(cluster)


def test_half_close_after_the_request(cluster: Cluster) -> None:
    for _ in range(10):
        s = cluster.client.connect(cluster.VIP)
        s.sendall(REQUEST)
        s.shutdown(socket.SHUT_WR)
        assert body(read_all(s)) == (cluster.nginx[0].root / "1k").read_bytes()
        s.close()
    settle(cluster)


def test_half_close_before_a_long_answer(mode: dict[str, Any]) -> None:
    """nginx gives up on a client that has half-closed when its send buffer is full; Python's server
    goes on, so that a long answer can be seen to arrive."""
    c = Cluster(1, **mode, be_conf="redirectport = 8081", rules=[(0, ".*")])
    try:
        path = c.nginx[0].file("big", size=BIG)
        c.be_hosts[0].start("python3", "-m", "http.server", "8081", "-d", str(c.nginx[0].root),
                            stderr=subprocess.DEVNULL)
        wait_for(lambda: listening(c.be_hosts[0], 8081), "http.server")
        s = c.client.connect(c.VIP)
        s.sendall(REQUEST.replace(b"1k", b"big"))
        s.shutdown(socket.SHUT_WR)
        answer = read_all(s).partition(b"\r\n\r\n")[2]
        assert hashlib.sha256(answer).hexdigest() == digest(path)
    finally:
        c.close()


def test_uploads(cluster: Cluster) -> None:
    upload_many(cluster, 100, 5 << 20)


def test_uploads_without_waiting(cluster: Cluster) -> None:
    """'Expect:' off: the body is on its way while the connection is handed over."""
    upload_many(cluster, 40, 1 << 20, "-H", "Expect:")


def test_upload_with_expect_continue(cluster: Cluster) -> None:
    upload_many(cluster, 8, 5 << 20, "-H", "Expect: 100-continue")


def test_body_in_flight_when_the_handoff_starts(cluster: Cluster) -> None:
    for size in (10_000, 60_000, 200_000, 3_000_000):
        data = os.urandom(size)
        s = cluster.client.connect(cluster.VIP)
        s.sendall(b"PUT /up/flight HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
                  b"Content-Length: %d\r\n\r\n" % size + data)
        assert read_all(s).split()[1] in (b"201", b"204")
        s.close()
        assert (cluster.nginx[0].root / "up" / "flight").read_bytes() == data
    settle(cluster)


def test_pipelined_second_request(cluster: Cluster) -> None:
    s = cluster.client.connect(cluster.VIP)
    s.sendall(REQUEST.replace(b"Connection: close\r\n", b"") + REQUEST)
    assert read_all(s).count(b"HTTP/1.1 200 OK") == 2


def test_counters_and_tables(cluster: Cluster) -> None:
    settle(cluster)
    assert cluster.fe
    s = cluster.client.connect(cluster.VIP)
    s.sendall(REQUEST.replace(b"close", b"keep-alive").replace(b"1k", b"1k?table"))
    s.recv(65536)
    (row,) = wait_for(lambda: cluster.fe and cluster.fe.ctl("conns"), "the connection table")
    assert row["client"] == "{}:{}".format(*s.getsockname())
    assert row["target"] == "/1k?table" and row["rule"] == ".*"
    assert row["server"] == cluster.be_hosts[0].address
    (seen,) = cluster.be[0].ctl("conns")
    assert seen["client"] == row["client"] and seen["frontend"] == cluster.fe_host.address
    s.close()
    settle(cluster)
    fe, servers = cluster.fe.ctl("status")["counters"], cluster.fe.ctl("servers")
    assert fe["handed"] == fe["closed"] == sum(x["handed"] for x in servers)
    for server, be in zip(servers, cluster.be, strict=True):
        assert server["handed"] == be.ctl("status")["counters"]["adopted"]


def test_client_on_the_front_end_itself(cluster: Cluster) -> None:
    done = cluster.fe_host.run("curl", "-sS", "--max-time", "10", "-w", "%{http_code}",
                               f"http://{cluster.VIP}/1k")
    assert done.stdout == "Service Unavailable\n503"


def test_listener_on_another_port(mode: dict[str, Any]) -> None:
    c = Cluster(1, **mode, be_conf="redirectport = 8080", nginx={"ports": (8080,)},
                rules=[(0, ".*")])
    try:
        c.nginx[0].file("index.html", b"port 8080\n")
        assert c.get("/") == "port 8080\n"
        assert c.nginx[0].seen()[-1]["server"] == c.VIP
    finally:
        c.close()


def test_listener_on_another_address(mode: dict[str, Any]) -> None:
    c = Cluster(1, **mode, be_conf="redirectaddr = 127.0.0.1\nredirectport = 8080",
                nginx={"ports": ("127.0.0.1:8080",)}, rules=[(0, ".*")])
    try:
        c.nginx[0].file("index.html", b"loopback only\n")
        assert c.get("/") == "loopback only\n"
    finally:
        c.close()


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_back_end_behind_a_router(mode: dict[str, Any], mtu: int) -> None:
    """tunnel: back ends anywhere, also where packets may be no larger than the client's own.
    direct: refused with the remedy."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False, mtu=mtu)
    try:
        be = c.be_hosts[0]
        move_behind_a_router(c, be, mtu)
        c.nginx[0].file("big", size=8 << 20)
        if mode["forward"] == "direct":
            c.be = [Daemon(be, "be", c.be_text(be))]
            c.fe = Daemon(c.fe_host, "fe", c.fe_text())
            (row,) = wait_for(lambda: [
                r for r in c.fe.ctl("servers") if "behind a router" in r["reason"]], "the reason")
            assert "forward = tunnel" in row["reason"]
            assert c.get("/", "-w", "%{http_code}") == "Service Unavailable\n503"
            return
        c.start()
        out = c.bed.dir / "down"
        c.get("/big", "-o", str(out))
        assert digest(out) == digest(c.nginx[0].root / "big")
        upload_many(c, 8, 5 << 20)
        upload_many(c, 8, 5 << 20, "-H", "Expect:")
    finally:
        c.close()


def test_real_address_left_to_the_daemon(mode: dict[str, Any]) -> None:
    """raddr defaults to any: the interface is found by the route to the VIP."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        c.nginx[0].file("index.html", b"any\n")
        c.be = [Daemon(c.be_hosts[0], "be", c.be_text(c.be_hosts[0]))]
        c.fe = Daemon(c.fe_host, "fe", c.fe_text().replace("raddr = 192.168.1.23\n", ""))
        c.connected()
        assert c.get("/") == "any\n"
    finally:
        c.close()
