# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients that are slow, odd, or whose TCP differs; and lossy links."""
from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tests.support.client import REQUEST, body, connect_from, digest, read_all, upload_many
from tests.support.modes import USUAL
from tests.support.network import LOSS
from tests.support.state import settle

pytestmark = pytest.mark.modes(*USUAL, "fast-direct")
HEADLIMIT = 16384


def ok(c: Cluster, s: socket.socket) -> None:
    """The answer to REQUEST has come, whole, and the connection was handed over."""
    assert body(read_all(s)) == (c.nginx[0].root / "1k").read_bytes()
    s.close()


def status(s: socket.socket) -> int:
    """Read our own answer to its end; it must be well-formed and close."""
    data = read_all(s)
    head, _, rest = data.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields[b"Connection"] == b"close" and int(fields[b"Content-Length"]) == len(rest)
    s.close()
    return int(head.split()[1])


# Heads

def test_head_byte_by_byte(cluster: Cluster) -> None:
    s = cluster.client.connect(cluster.VIP)
    for n in range(len(REQUEST)):
        s.sendall(REQUEST[n:n + 1])
    ok(cluster, s)


def test_head_in_three_packets(cluster: Cluster) -> None:
    assert cluster.fe
    for pause in (0.0, 0.05):
        s = cluster.client.connect(cluster.VIP)
        for piece in (REQUEST[:7], REQUEST[7:30], REQUEST[30:]):
            s.sendall(piece)
            time.sleep(pause)  # a slow typist, not a condition waited for
        ok(cluster, s)


def padded(size: int) -> bytes:
    head = b"GET /1k HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
    for n in range(8):
        room = size - len(head) - 2 - (7 - n) * 12
        value = min(room - 8, 4000)
        if value > 0:
            head += b"X-%d: " % n + b"x" * (value - 0) + b"\r\n"
    head = head[:size - 2] if len(head) > size - 2 else head
    missing = size - 2 - len(head)
    if missing:
        head = head[:-2] + b"x" * missing + b"\r\n"
    return head + b"\r\n"


@pytest.mark.parametrize("size", [HEADLIMIT - 1, HEADLIMIT])
def test_head_up_to_the_limit(cluster: Cluster, size: int) -> None:
    request = padded(size)
    assert len(request) == size
    s = cluster.client.connect(cluster.VIP)
    s.sendall(request)
    ok(cluster, s)


def test_head_over_the_limit(cluster: Cluster) -> None:
    s = cluster.client.connect(cluster.VIP)
    s.sendall(padded(HEADLIMIT + 1))
    assert status(s) == 431
    s = cluster.client.connect(cluster.VIP)
    s.sendall(b"GET /" + b"x" * 2 * HEADLIMIT)
    assert status(s) == 431


def test_silent_and_slow_clients_hold_up_nobody(cluster: Cluster) -> None:
    """408 is for half a head. Who has not begun one waits for no answer, and a client that keeps
    the connection for later would read it as the answer to its first request."""
    assert cluster.fe
    fe = cluster.fe
    before = fe.ctl("status")["counters"]
    silent = [cluster.client.connect(cluster.VIP) for _ in range(50)]
    blank = [cluster.client.connect(cluster.VIP) for _ in range(2)]
    slow = [cluster.client.connect(cluster.VIP) for _ in range(2)]
    blank[0].sendall(b"\r\n")
    blank[1].sendall(b"\r\n\r\n\r")
    slow[0].sendall(REQUEST[:20])
    slow[1].sendall(b"\r\nG")
    assert cluster.get("/") == "index of be1\n"
    wait_for(lambda: fe.ctl("status")["workers"]["idle"] >= 2, "workers that are idle")
    for s in [*silent, *blank]:
        assert read_all(s) == b""
        s.close()
    for s in slow:
        assert status(s) == 408
    after = fe.ctl("status")["counters"]
    assert after["silent"] - before["silent"] == 52
    assert after["answered_408"] - before["answered_408"] == 2


@pytest.mark.parametrize("data", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),  # a TLS ClientHello
    b"\0" * 100, b"GET / HTTP/1.1\nHost: a\n\n", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    os.urandom(1000),
], ids=["tls", "nul", "bare-lf", "two-spaces", "http2", "no-host", "smuggling", "random"])
def test_garbage_gets_400(cluster: Cluster, data: bytes) -> None:
    s = cluster.client.connect(cluster.VIP)
    s.sendall(data)
    assert status(s) == 400


def test_end_before_the_head_is_complete(cluster: Cluster) -> None:
    s = cluster.client.connect(cluster.VIP)
    s.sendall(REQUEST[:-2])
    s.shutdown(socket.SHUT_WR)
    assert status(s) == 400
    for nothing in (b"", b"\r\n"):
        s = cluster.client.connect(cluster.VIP)
        s.sendall(nothing)
        s.shutdown(socket.SHUT_WR)
        assert read_all(s) == b""
        s.close()


# TCP options

OPTIONS = {"no-timestamps": {"tcp_timestamps": "0"}, "no-sack": {"tcp_sack": "0"},
           "no-wscale": {"tcp_window_scaling": "0"},
           "none": {"tcp_timestamps": "0", "tcp_sack": "0", "tcp_window_scaling": "0"},
           "ecn": {"tcp_ecn": "1"}}


@pytest.fixture(params=OPTIONS)
def odd_client(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    saved = {k: cluster.client.sysctl(f"net.ipv4.{k}") for k in OPTIONS[request.param]}
    for key, value in OPTIONS[request.param].items():
        cluster.client.sysctl(f"net.ipv4.{key}", value)
    yield cluster
    for key, value in saved.items():
        cluster.client.sysctl(f"net.ipv4.{key}", value)


def exchange(c: Cluster, size: int = 4 << 20, count: int = 8) -> None:
    """A download, an upload and a few small requests, all complete."""
    out = c.bed.dir / "exchange"
    c.get("/big", "-r", f"0-{size - 1}", "-o", str(out))
    want = (c.nginx[0].root / "big").open("rb").read(size)
    assert hashlib.sha256(want).hexdigest() == digest(out)
    upload_many(c, count, 1 << 20)
    upload_many(c, count, 1 << 20, "-H", "Expect:")
    assert c.get("/") == "index of be1\n"


def test_clients_without_options(odd_client: Cluster) -> None:
    exchange(odd_client)


@pytest.mark.parametrize("mtu", [1300, 576])
def test_small_mtu(cluster: Cluster, mtu: int) -> None:
    cluster.client.ip("link", "set", "eth0", "mtu", str(mtu))
    try:
        exchange(cluster, 1 << 20, 4)
    finally:
        cluster.client.ip("link", "set", "eth0", "mtu", "1500")


def test_mss_below_536(cluster: Cluster) -> None:
    """bpf_sk_assign_tcp_reqsk() takes no connection with so small an MSS; the client must hear so,
    not hang. A forged handshake knows no such limit."""
    s = cluster.client.connect(cluster.VIP, mss=400)
    s.sendall(REQUEST)
    if cluster.datapath[1] == "ebpf":
        assert status(s) == 503
    else:
        ok(cluster, s)


@pytest.mark.parametrize("where", ["fe", "be"])
def test_clocks_forced_apart(cluster: Cluster, where: str) -> None:
    """tcp_timestamps=2 takes the random offset away on one side; the handoff comes late."""
    hosts = [cluster.fe_host] if where == "fe" else cluster.be_hosts
    saved = cluster.fe_host.sysctl("net.ipv4.tcp_timestamps")
    cluster.fe_host.sysctl("net.ipv4.tcp_timestamps", "1")
    for h in hosts:
        h.sysctl("net.ipv4.tcp_timestamps", "2")
    try:
        for pause in (0.0, 0.3):
            s = cluster.client.connect(cluster.VIP)
            s.sendall(REQUEST[:30])
            time.sleep(pause)  # lets the clocks go on between the SYN and the snapshot
            s.sendall(REQUEST[30:])
            ok(cluster, s)
        exchange(cluster)
    finally:
        for h in cluster.be_hosts:
            h.sysctl("net.ipv4.tcp_timestamps", "1")
        cluster.fe_host.sysctl("net.ipv4.tcp_timestamps", saved)


def test_timestamps_never_go_back(cluster: Cluster) -> None:
    """PAWS (RFC 7323 section 5) at the client sees one clock, whoever sends."""
    counters = ("TcpExtPAWSEstab", "TcpExtPAWSActive", "TcpInErrs")

    def read() -> list[str]:
        out = cluster.client.run("nstat", "-asz", *counters).stdout.split("\n")
        return [" ".join(line.split()[:2]) for line in out if line.startswith(counters)]
    before = read()
    for _ in range(50):
        cluster.get("/1k", "-o", "/dev/null")
    assert read() == before and len(before) == 3


# Loss

@pytest.fixture
def lossy(cluster: Cluster) -> Iterator[Cluster]:
    """1 % of the packets are lost, each way."""
    cluster.client.nft(LOSS)
    yield cluster
    cluster.client.nft("")


def test_everything_completes_under_loss(lossy: Cluster) -> None:
    exchange(lossy, 16 << 20, 16)
    for pieces in (1, 3):
        for _ in range(20):
            s = lossy.client.connect(lossy.VIP)
            step = -(-len(REQUEST) // pieces)
            for n in range(0, len(REQUEST), step):
                s.sendall(REQUEST[n:n + step])
            ok(lossy, s)
    upload_many(lossy, 8, 1 << 20, "-H", "Expect: 100-continue")


def test_short_connections_under_loss(lossy: Cluster) -> None:
    done = lossy.client.run("ab", "-q", "-s", "60", "-n", "2000", "-c", "32",
                            f"http://{lossy.VIP}/1k")
    assert "Complete requests:      2000" in done.stdout
    assert "Failed requests:        0" in done.stdout, done.stdout


# Load


def test_port_used_again_at_once(cluster: Cluster) -> None:
    """The same 4-tuple, connection after connection: no SYN is taken for one on a live flow, which
    would cost the client a retransmission."""
    assert cluster.fe
    before = cluster.fe.ctl("status")["packets"]["live_syn"]
    for _ in range(50):
        s = connect_from(cluster, 20045)  # no ephemeral port
        s.sendall(REQUEST)
        ok(cluster, s)  # the server closes first, so no TIME_WAIT is left here
    assert cluster.fe.ctl("status")["packets"]["live_syn"] == before


def test_many_short_connections(cluster: Cluster) -> None:
    """30,000 of them, 64 at a time, over few ports, so that 4-tuples are used again and again."""
    settle(cluster)
    assert cluster.fe
    saved = cluster.client.sysctl("net.ipv4.ip_local_port_range")
    cluster.client.sysctl("net.ipv4.ip_local_port_range", "30000 33999")
    cluster.client.nft("""table ip lab {
        counter resets { }
        chain in { type filter hook input priority 0;
            ip saddr 192.168.1.36 tcp flags & rst == rst counter name resets
        }
    }""")
    before = cluster.fe.ctl("status")["counters"]
    adopted = cluster.be[0].ctl("status")["counters"]["adopted"]
    try:
        done = cluster.client.run("ab", "-q", "-n", "30000", "-c", "64", f"http://{cluster.VIP}/1k")
        assert "Complete requests:      30000" in done.stdout
        assert "Failed requests:        0" in done.stdout, done.stdout
        # At its end ab closes connections on which it has said nothing, and the front end does the
        # same. Where their last packets overtake each other between CPUs, a RST is TCP's answer.
        silent = cluster.fe.ctl("status")["counters"]["lost"] - before["lost"]
        assert silent <= 64 and cluster.client.nft_counter("resets") <= silent
        settle(cluster)
        after = cluster.fe.ctl("status")["counters"]
        assert after["handed"] - before["handed"] == 30000
        assert after["closed"] - before["closed"] == 30000
        assert cluster.be[0].ctl("status")["counters"]["adopted"] - adopted == 30000
        wait_for(lambda: cluster.fe and cluster.fe.ctl("status")["in_hand"] == 0, "no slot in use")
    finally:
        cluster.client.nft("")
        cluster.client.sysctl("net.ipv4.ip_local_port_range", saved)
