# SPDX-License-Identifier: GPL-2.0-or-later
"""Corners of TCP: what clients rarely do, and what attackers do who cannot see the traffic."""
from __future__ import annotations

import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tests.support.bpf import Bpf
from tests.support.client import KEEP, REQUEST, body, read_all
from tests.support.host import resets
from tests.support.repair import OFF_NO_PROBE, TCP_REPAIR, TCP_TIMESTAMP, numbers, option
from tests.support.state import settle
from tests.support.wire import Forger, first_frame, send_again

pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct", "nfqueue-direct",
                               "nfqueue-tunnel")
RST, SYN, ACK, FIN = 4, 2, 16, 1


def put(name: str, data: bytes) -> bytes:
    return (b"PUT /up/%s HTTP/1.1\r\nHost: lab\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % (name.encode(), len(data)))


@pytest.fixture
def calm(cluster: Cluster) -> Iterator[Cluster]:
    """No client is reset, and nothing is left over."""
    before = resets(cluster)
    yield cluster
    settle(cluster)
    assert resets(cluster) == before


def test_zero_window(calm: Cluster) -> None:
    """A client that does not read for a while: window probes, then the rest."""
    want = (calm.nginx[0].root / "big").read_bytes()

    def dial() -> socket.socket:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        s.settimeout(60)
        s.connect((calm.VIP, 80))
        return s
    with calm.client.inside(dial) as s:
        s.sendall(REQUEST.replace(b"1k", b"big"))
        host = calm.be_hosts[0]
        wait_for(lambda: "timer:(persist" in host.run("ss", "-Htno", "sport", "= :80").stdout,
                 "the server to probe a closed window")
        assert body(read_all(s)) == want


def test_keep_alive_probes(calm: Cluster) -> None:
    """Before the request, they are the front end's to answer; after it, the back end's."""
    with calm.client.connect(calm.VIP) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1),
                              (socket.TCP_KEEPCNT, 2)):
            s.setsockopt(socket.IPPROTO_TCP, option, value)
        for _ in range(2):
            time.sleep(4.5)  # what is tested is that a silent time does no harm
            s.sendall(KEEP)
            assert s.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_urgent_data(mode: dict[str, Any]) -> None:
    """Out of band for the server. (nginx does not always read on behind it, without us either.)"""
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        c.nginx[0].stop()
        with c.be_hosts[0].inside(lambda: socket.create_server(("0.0.0.0", 80))) as server:
            assert c.fe
            fe = c.fe
            wait_for(lambda: fe.ctl("servers")[0]["state"] == "up", "the server")
            for _ in range(10):
                s = c.client.connect(c.VIP)
                s.sendall(REQUEST)
                conn, peer = server.accept()
                assert peer == s.getsockname()
                s.sendall(b"0123456789")
                s.send(b"!", socket.MSG_OOB)
                s.sendall(b"abc")
                s.shutdown(socket.SHUT_WR)
                assert select.select([], [], [conn], 30)[2]
                assert conn.recv(1, socket.MSG_OOB) == b"!"
                assert read_all(conn) == REQUEST + b"0123456789abc"
                conn.sendall(b"over")
                conn.close()
                assert read_all(s) == b"over"
                s.close()
            settle(c)
    finally:
        c.close()


def test_urgent_data_in_the_head(calm: Cluster) -> None:
    """A byte that the server would not see must not end the head for us."""
    with calm.client.connect(calm.VIP) as s:
        s.send(REQUEST, socket.MSG_OOB)  # its last byte is urgent
        assert read_all(s).startswith(b"HTTP/1.1 408 ")


def test_fin_with_the_request(calm: Cluster) -> None:
    for _ in range(20):
        with calm.client.connect(calm.VIP) as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            s.send(REQUEST, socket.MSG_MORE)
            s.shutdown(socket.SHUT_WR)  # data and FIN in one segment
            assert len(body(read_all(s))) == 1024


def test_both_close_at_once(calm: Cluster) -> None:
    for _ in range(100):
        with calm.client.connect(calm.VIP) as s:
            s.sendall(REQUEST)
            got = b""
            while len(got.partition(b"\r\n\r\n")[2]) < 1024:
                got += s.recv(65536)
        # closed here while the server's FIN is on its way


def test_fast_open(calm: Cluster) -> None:
    """The listener knows no cookies: the SYN's data comes again behind the handshake."""
    calm.client.sysctl("net.ipv4.tcp_fastopen", "1")

    def ask() -> bytes:
        with socket.socket() as s:  # one that waits: settimeout() would not let it
            s.sendto(REQUEST, socket.MSG_FASTOPEN, (calm.VIP, 80))
            return read_all(s)
    for _ in range(3):
        assert len(body(calm.client.inside(ask))) == 1024


def test_multipath(calm: Cluster) -> None:
    """A client that offers MPTCP gets TCP."""
    def ask() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as s:
            s.settimeout(30)
            s.connect((calm.VIP, 80))
            s.sendall(REQUEST.replace(b"1k", b"big"))
            return read_all(s)
    answer = calm.client.inside(ask)
    assert body(answer) == (calm.nginx[0].root / "big").read_bytes()


def test_ip_options(calm: Cluster) -> None:
    data = os.urandom(1_000_000)

    def ask() -> bytes:
        with socket.socket() as s:
            s.settimeout(30)
            s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1\1\1\0")
            s.connect((calm.VIP, 80))
            s.sendall(put("options", data))
            s.sendall(data)
            return read_all(s)
    assert calm.client.inside(ask).split()[1] in (b"201", b"204")
    assert (calm.nginx[0].root / "up" / "options").read_bytes() == data


# Packets of somebody who guesses


@pytest.mark.modes("nfqueue-direct", "nfqueue-tunnel")  # where no socket option tells TS.Recent
def test_guessed_timestamps(calm: Cluster) -> None:
    """A TSval that the front end took from anybody, and passed on, would make the back end discard
    what the client sends (RFC 7323 section 5.3)."""
    for n in range(100):
        with calm.client.connect(calm.VIP) as s:
            nxt = numbers(s)[1]
            s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            tsval = (option(s, TCP_TIMESTAMP) + (-1) ** n * 2**30) % 2**32
            s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_NO_PROBE)
            forger = Forger(calm.client, calm, s.getsockname()[1])
            answered = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                flood = pool.submit(forger.flood, answered, nxt, tsval)
                try:
                    for _ in range(2):
                        s.sendall(KEEP)
                        got = b""
                        while len(got.partition(b"\r\n\r\n")[2]) < 1024:
                            got += s.recv(65536)
                finally:
                    answered.set()
                    flood.result()


def test_blind_injection(mode: dict[str, Any]) -> None:
    """RST, SYN, FIN, ACK and data with numbers that are guessed: uploads and downloads go on (RFC
    5961). A RST and a SYN in turn would cut an upload at a front end that believed both."""
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        attacker = c.bed.host("attacker", "192.168.1.66")
        want = c.nginx[0].file("big", size=24 << 20).read_bytes()
        rate = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "60mbit", "burst",
                "64kb", "latency", "200ms"]
        c.client.run(*rate)
        c.be_hosts[0].run(*rate)
        for upload in (True, False):
            with c.client.connect(c.VIP) as s:
                forger = Forger(attacker, c, s.getsockname()[1])
                s.settimeout(0.02)
                out = memoryview(put("big", want) + want if upload else
                                 REQUEST.replace(b"1k", b"big"))
                got, sent = b"", 0
                while True:
                    for flags in (RST, SYN, RST | ACK, FIN | ACK, ACK, SYN | ACK):
                        forger.send(flags, random.getrandbits(32), b"x" * 10 * (flags == ACK))
                    if sent < len(out):
                        try:
                            sent += s.send(out[sent:sent + 65536])
                        except TimeoutError:
                            continue
                    else:
                        try:
                            piece = s.recv(65536)
                        except TimeoutError:
                            continue
                        if not piece:
                            break
                        got += piece
            if upload:
                assert got.split()[1] in (b"201", b"204")
                assert (c.nginx[0].root / "up" / "big").read_bytes() == want
            else:
                assert body(got) == want
    finally:
        c.close()


def read_more(s: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = s.recv(min(size - len(got), 1 << 18))
        assert piece
        got += piece
    return bytes(got)


@pytest.mark.parametrize("acknowledged", [1 << 16, 4 << 20])
def test_a_late_copy_of_the_request(calm: Cluster, acknowledged: int) -> None:
    """It comes once more while its answer is under way: it is for the connection that lives, which
    goes on, and the request is served once."""
    want = (calm.nginx[0].root / "big").read_bytes()
    target = b"/big?once%d" % acknowledged
    with first_frame(calm.client, lambda frame: b" HTTP/1.1\r\n" in frame) as frames:
        s = calm.client.connect(calm.VIP)
        s.sendall(REQUEST.replace(b"/1k", target))
        wait_for(lambda: frames, "the request")
        got = read_more(s, acknowledged)
        for _ in range(3):
            send_again(calm.client, frames[0])
            got += read_more(s, 1 << 20)
    got += read_all(s)
    s.close()
    assert body(got) == want
    settle(calm)
    assert sum(target.decode() in r["request"] for r in calm.nginx[0].seen()) == 1


@pytest.mark.modes("fast-direct", "fast-tunnel")
def test_a_copy_of_the_request_when_all_is_over(calm: Cluster) -> None:
    """Its cookie is good for two minutes, and nobody has an entry for it any more."""
    assert calm.fe
    settle(calm)
    bpf = Bpf(calm.fe_host, ("fe_ingress",))
    before = calm.fe.ctl("status")["counters"]["accepted"]
    with first_frame(calm.client, lambda frame: b" HTTP/1.1\r\n" in frame) as frames:
        with calm.client.connect(calm.VIP) as s:
            s.sendall(REQUEST.replace(b"/1k", b"/1k?over"))
            assert len(body(read_all(s))) == 1024
        wait_for(lambda: frames, "the request")
    wait_for(lambda: bpf.count("flows") == 0, "the end of its entry")
    for _ in range(3):
        send_again(calm.client, frames[0])
    with calm.client.connect(calm.VIP) as s:  # behind the copies
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024
    settle(calm)
    assert calm.fe.ctl("status")["counters"]["accepted"] == before + 2
    assert sum("/1k?over" in r["request"] for r in calm.nginx[0].seen()) == 1
