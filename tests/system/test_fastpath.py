# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path: a request that reaches its back end without a socket on the front end."""
from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Host, wait_for
from tests.support.bpf import (
    Bpf,
    calm_down,
)
from tests.support.client import KEEP, REQUEST, ask, body, connect_from, read_all
from tests.support.host import retransmitted
from tests.support.network import nft_on_switch
from tests.support.packets import (
    ACK,
    PSH,
    SYN,
)
from tests.support.repair import OFF_NO_PROBE, TCP_REPAIR
from tests.support.state import fast, settle
from tests.support.wire import Forger, handshake_ack, queued, with_data

pytestmark = pytest.mark.modes("fast-direct", "fast-tunnel")


def test_no_socket_on_the_front_end(cluster: Cluster) -> None:
    settle(cluster)
    before = fast(cluster)
    held, late = [], 0
    for _ in range(20):
        begin = time.monotonic()
        held.append(cluster.client.connect(cluster.VIP))
        ask(held[-1])
        late += time.monotonic() - begin > 0.9  # who is silent for a second gets a socket
    seen = cluster.fe_host.run("ss", "-Htan", "sport = :80").stdout
    ports = ["{}:{}".format(*s.getsockname()) for s in held]
    for s in held:
        s.close()
    assert "LISTEN" in seen and not any(port in seen for port in ports)
    settle(cluster)
    assert late < 5 and before + 20 - late <= fast(cluster) <= before + 20


def test_the_end_of_a_connection_waits_for_nothing(cluster: Cluster) -> None:
    """The client's FIN, its timestamp later than the server's FIN, is for the TIME_WAIT: it once
    went round in the back end's program as if its socket were in the making."""
    settle(cluster)
    before = [be.ctl("status")["packets"] for be in cluster.be]
    for _ in range(50):
        s = cluster.client.connect(cluster.VIP)
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024
        clock = time.monotonic_ns() // 1_000_000
        while time.monotonic_ns() // 1_000_000 - clock < 2:  # the timestamps' unit is 1 ms
            pass
        s.close()
    settle(cluster)
    after = [be.ctl("status")["packets"] for be in cluster.be]
    assert sum(p["adopted"] for p in after) - sum(p["adopted"] for p in before) >= 40
    assert [now["again"] for now in after] == [old["again"] for old in before]


# what is lost, once: where at the client, and which packets are meant
LOST = {
    "SYN": ("output", "tcp dport 80 tcp flags & (syn | ack) == syn"),
    "SYN-ACK": ("input", "tcp sport 80 tcp flags & (syn | ack) == (syn | ack)"),
    "ACK": ("output", "tcp dport 80 tcp flags & (syn | ack | psh) == ack"),
    "request": ("output", "tcp dport 80 tcp flags & psh == psh"),
    "response": ("input", "tcp sport 80 tcp flags & psh == psh"),
    "ACK of the response": ("output", "tcp dport 80 tcp flags & (syn | psh) == 0 ip length < 60 "
                            "tcp sequence > 0 numgen inc mod 1000 == 1"),
    "FIN": ("input", "tcp sport 80 tcp flags & fin == fin"),
}


@pytest.mark.parametrize("what", LOST)
def test_one_packet_lost(cluster: Cluster, what: str) -> None:
    hook, match = LOST[what]
    if "numgen" not in match:
        match += " numgen inc mod 1000 == 0"
    before = fast(cluster)
    cluster.client.nft(f"""table ip lab {{
        counter lost {{ }}
        chain lose {{ type filter hook {hook} priority 0;
            {match} counter name lost drop; }}
    }}""")
    try:
        with cluster.client.connect(cluster.VIP) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
        assert cluster.client.nft_counter("lost") == 1
    finally:
        cluster.client.nft("")
    settle(cluster)
    assert fast(cluster) == before + 1


def test_body_before_its_request(cluster: Cluster) -> None:
    """The handshake's ACK and the request are both lost: what comes behind them, of a connection
    that nobody knows, does not end it."""
    match = f"iifname {cluster.client.port} tcp dport 80"
    nft_on_switch(cluster, f"""table bridge lab {{
        counter lost {{ }}
        chain lose {{
            type filter hook forward priority 0
            {match} ip length < 60 tcp flags == ack numgen inc mod 1000 == 0 counter name lost drop
            {match} ip length 100-400 numgen inc mod 1000 == 0 counter name lost drop
        }}
    }}""")
    before = cluster.fe and cluster.fe.ctl("status")["packets"]["forged"]
    try:
        with cluster.client.connect(cluster.VIP) as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            s.sendall(b"PUT /up/early HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
                      b"Content-Length: 3000\r\n\r\n")
            s.sendall(bytes(3000))
            assert read_all(s).split()[1] == b"201"
    finally:
        nft_on_switch(cluster, "")
    settle(cluster)
    assert cluster.fe and cluster.fe.ctl("status")["packets"]["forged"] > before


def test_connection_that_nobody_knows(cluster: Cluster) -> None:
    """Its client is told when it repeats what it has sent."""
    s = cluster.client.inside(socket.socket)
    with s:
        s.settimeout(30)
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        s.bind((cluster.client.address, 20082))
        s.connect((cluster.VIP, 80))  # sends nothing
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_NO_PROBE)
        s.sendall(REQUEST)
        with pytest.raises(ConnectionResetError):
            s.recv(1)


@contextmanager
def everything_twice(host: Host) -> Iterator[None]:
    """Each segment that the host sends to port 80 leaves it a second time."""
    s = host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)))
    s.bind(("eth0", 0x0003))
    s.settimeout(0.1)
    ended = threading.Event()

    def copy() -> None:
        again: list[bytes] = []  # what we have sent comes by here too
        while not ended.is_set():
            try:
                frame, address = s.recvfrom(65536)
            except TimeoutError:
                continue
            if address[2] != socket.PACKET_OUTGOING or frame[12:14] != b"\x08\x00" or \
                    frame[23] != socket.IPPROTO_TCP or frame[36:38] != b"\0P":
                continue
            if frame in again:
                again.remove(frame)
            else:
                again.append(frame)
                s.send(frame)
    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        s.close()


def test_every_packet_twice(cluster: Cluster) -> None:
    cluster.client.run("ethtool", "-K", "eth0", "tx", "off")  # what is copied must be complete
    settle(cluster)
    before = fast(cluster)
    try:
        with everything_twice(cluster.client):
            for _ in range(20):
                with cluster.client.connect(cluster.VIP) as s:
                    s.sendall(REQUEST)
                    assert len(body(read_all(s))) == 1024
    finally:
        cluster.client.run("ethtool", "-K", "eth0", "tx", "on")
    settle(cluster)
    assert fast(cluster) == before + 20
    assert cluster.fe
    n = cluster.fe.ctl("status")["counters"]
    assert n["handed"] == n["closed"]


@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_a_damaged_request_decides_nothing(cluster: Cluster, cached: bool) -> None:
    """Its checksum is wrong: what the client repeats is another request."""
    target = b"/%d.jpg" % cached
    for _ in range(4 * cached):
        cluster.get(target.decode())
    with handshake_ack(cluster.client) as frames:
        s = cluster.client.connect(cluster.VIP)
        wait_for(lambda: frames, "the end of the handshake")
        damaged = with_data(frames[0], REQUEST.replace(b"/1k", target), 0x0101)
        with cluster.client.inside(
                lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as wire:
            wire.bind(("eth0", 0))
            for _ in range(3):
                wire.send(damaged)
        s.sendall(REQUEST.replace(b"/1k", b"/"))
        assert body(read_all(s)) == b"index of be1\n"
        s.close()
    settle(cluster)


def test_what_is_behind_a_packet_is_not_read(cluster: Cluster) -> None:
    """Frames may be padded: that makes no head complete which is not."""
    assert cluster.fe
    settle(cluster)
    before = fast(cluster)
    with handshake_ack(cluster.client) as frames:
        s = cluster.client.connect(cluster.VIP)
        wait_for(lambda: frames, "the end of the handshake")
        with cluster.client.inside(
                lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as wire:
            wire.bind(("eth0", 0))
            wire.send(with_data(frames[0], REQUEST[:-1], padding=REQUEST[-1:]))
        fe = cluster.fe
        wait_for(lambda: fe.ctl("status")["in_hand"] == 1, "a socket, which waits for the rest")
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024
        s.close()
    settle(cluster)
    assert fast(cluster) == before


@contextmanager
def swapped(host: Host, *match: str) -> Iterator[list[Any]]:
    """Of the host's packets that match, the first two leave it in the other order. Yields what was
    let go so far."""
    held: list[Any] = []
    gone: list[Any] = []

    def on_packet(packet: Any) -> None:
        held.append(packet)
        if gone or len(held) == 2:
            gone.extend(reversed(held))
            for p in reversed(held):
                p.accept()
            held.clear()
    with queued(host, on_packet, "OUTPUT", "-p", "tcp", "--dport", "80", "--tcp-flags", *match):
        yield gone


@pytest.mark.parametrize("what", ["handshake", "request"])
def test_two_packets_in_the_other_order(cluster: Cluster, what: str) -> None:
    """The request before the ACK of the handshake; its second half before its first: nothing is
    lost, so nothing need come a second time. The client may think so of one (RFC 8985)."""
    match = ("SYN,ACK", "ACK") if what == "handshake" else ("PSH", "PSH")
    before = retransmitted(cluster.client)
    for _ in range(5):
        with swapped(cluster.client, *match) as gone:
            with cluster.client.connect(cluster.VIP) as s:
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if what == "request":
                    s.sendall(REQUEST[:30])
                    s.sendall(REQUEST[30:])
                else:
                    s.sendall(REQUEST)
                assert len(body(read_all(s))) == 1024
            assert len(gone) >= 2
    assert retransmitted(cluster.client) <= before + 1
    settle(cluster)


def test_key_changes_during_a_handshake(cluster: Cluster) -> None:
    """Cookies of both keys are good, at the front end and at the back end."""
    bpf = Bpf(cluster.fe_host, ("fe_ingress",))
    before = fast(cluster)
    with cluster.client.connect(cluster.VIP) as old, bpf.memory("state") as state:
        state[32] ^= 1  # current
        try:
            with cluster.client.connect(cluster.VIP) as new:
                for s in (old, new):
                    ask(s)
        finally:
            state[32] ^= 1  # or the daemon's next key would take the place of the one in use
    settle(cluster)
    assert fast(cluster) == before + 2


def test_floods_leave_nothing(cluster: Cluster) -> None:
    """SYNs cost no state, and guessed cookies bring nothing to a back end."""
    settle(cluster)
    assert cluster.fe
    before = cluster.fe.ctl("status"), [be.ctl("status") for be in cluster.be]
    forgers = [Forger(cluster.client, cluster, port) for port in range(61000, 61020)]
    for _ in range(250):
        for f in forgers:
            f.send(SYN, random.getrandbits(32))
            f.send(ACK | PSH, random.getrandbits(32), REQUEST)
    ask(cluster.client.connect(cluster.VIP))
    calm_down(Bpf(cluster.fe_host, ("fe_ingress",)))
    after = cluster.fe.ctl("status"), [be.ctl("status") for be in cluster.be]
    assert "SYN-RECV" not in cluster.fe_host.run("ss", "-Htan", "sport = :80").stdout
    # some may be lost on the way: there is room for 1000 in a veth's queue
    assert after[0]["packets"]["forged"] >= before[0]["packets"]["forged"] + 2500
    assert sum(be["counters"]["adopted"] for be in after[1]) == \
        sum(be["counters"]["adopted"] for be in before[1]) + 1


def test_silent_client_becomes_a_socket(cluster: Cluster) -> None:
    """Who says nothing for a second after the handshake is accepted like on the socket path."""
    assert cluster.fe
    fe = cluster.fe
    settle(cluster)
    before = fe.ctl("status")["counters"]
    with cluster.client.connect(cluster.VIP) as s:
        wait_for(lambda: fe.ctl("status")["in_hand"] == 1, "a socket of the front end")
        ask(s)
    settle(cluster)
    after = fe.ctl("status")["counters"]
    assert after["handed"] == before["handed"] + 1 and after["fast"] == before["fast"]


def test_silent_client_on_a_port_used_before(cluster: Cluster) -> None:
    """The front end still knows the connection before, which is over."""
    assert cluster.fe
    fe = cluster.fe
    for _ in range(3):
        with connect_from(cluster, 20080) as s:
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
        with connect_from(cluster, 20080) as s:
            wait_for(lambda: fe.ctl("status")["in_hand"] == 1, "a socket of the front end")
            ask(s)
        settle(cluster)


def test_silent_clients_wait_for_room(mode: dict[str, Any]) -> None:
    """Sockets for some of them only: the others hear nothing of it, and lose nothing."""
    c = Cluster(1, **mode, rules=[(0, ".*")], fe_conf="maxclients = 1")
    try:
        c.nginx[0].file("1k", size=1024)
        assert c.fe
        c.fe.stop()
        c.fe_host.sysctl("net.core.somaxconn", "1")
        c.fe.start()
        c.connected()
        wait_for(lambda: once(c) and fast(c), "the packet path")
        clients = [c.client.connect(c.VIP) for _ in range(8)]
        wait_for(lambda: int(c.fe_host.run("ss", "-Hltn", "sport = :80").stdout.split()[1]) == 2,
                 "a full backlog")
        assert not select.select(clients, [], [], 1.0)[0], "somebody was reset"
        for s in clients:
            s.sendall(REQUEST)
        for s in clients:
            assert len(body(read_all(s))) == 1024
            s.close()
        settle(c)
    finally:
        c.close()


def test_a_back_end_smaller_than_its_traffic(mode: dict[str, Any]) -> None:
    """Adoptions are told in batches, ends one by one: however far the table lags behind, each
    connection is in it, and counted once."""
    c = Cluster(1, **mode, rules=[(0, ".*")], be_conf="maxclients = 24")
    try:
        c.nginx[0].file("1k", size=1024)
        done = c.client.run("ab", "-q", "-s", "60", "-n", "8000", "-c", "16", f"http://{c.VIP}/1k")
        assert "Complete requests:      8000" in done.stdout
        assert "Failed requests:        0" in done.stdout, done.stdout
        settle(c)
        assert c.fe
        n = c.fe.ctl("status")["counters"]
        assert n["handed"] == n["closed"] == c.be[0].ctl("status")["counters"]["adopted"] == 8000
    finally:
        c.close()


# The verdict cache

def cached(c: Cluster) -> int:
    """Requests that no process decided."""
    assert c.fe
    return int(c.fe.ctl("status")["packets"]["cached"])


def once(c: Cluster, data: bytes = REQUEST) -> bytes:
    with c.client.connect(c.VIP) as s:
        s.sendall(data)
        return read_all(s)


def warm(c: Cluster, data: bytes = REQUEST) -> None:
    """Until the cache knows it: key changes may make it forget."""
    def hit() -> bool:
        before = cached(c)
        with c.client.connect(c.VIP) as s:
            if b"close" in data:
                s.sendall(data)
                read_all(s)
            else:
                ask(s, data)
        return cached(c) > before
    wait_for(hit, "a cached verdict")


def with_field(request: bytes, field: bytes) -> bytes:
    return request.replace(b"\r\n", b"\r\n" + field + b"\r\n", 1)


def test_repeated_requests_need_no_process(cluster: Cluster) -> None:
    """And are counted and listed like others."""
    assert cluster.fe
    fe = cluster.fe
    settle(cluster)
    warm(cluster)
    settle(cluster)
    before, hits = fe.ctl("status")["counters"], cached(cluster)
    adopted = sum(be.ctl("status")["counters"]["adopted"] for be in cluster.be)
    for _ in range(20):
        assert len(body(once(cluster))) == 1024
    settle(cluster)
    after = fe.ctl("status")["counters"]
    assert cached(cluster) >= hits + 15
    for name in ("accepted", "handed", "closed", "fast"):
        assert after[name] == before[name] + 20, name
    assert sum(be.ctl("status")["counters"]["adopted"] for be in cluster.be) == adopted + 20
    warm(cluster, KEEP)
    with cluster.client.connect(cluster.VIP) as s:
        hits = cached(cluster)
        ask(s)
        assert cached(cluster) == hits + 1
        row, = [r for r in fe.ctl("conns") if r["client"].endswith(f":{s.getsockname()[1]}")]
        assert (row["target"], row["rule"], row["state"]) == ("/1k", ".*", "forward")
        assert row["server"] == cluster.be_hosts[0].address


def test_target_and_fields_are_known_apart(cluster: Cluster) -> None:
    """A target that is known, with fields that are: a hit, though they come together for the first
    time."""
    one, two = with_field(REQUEST, b"X-One: 1"), with_field(REQUEST, b"X-Two: 2")
    two = two.replace(b"/1k", b"/?two")
    for _ in range(3):  # the key may change in between
        warm(cluster, one)
        warm(cluster, two)
        before = cached(cluster)
        assert b"200 OK" in once(cluster, two.replace(b"/?two", b"/1k"))
        if cached(cluster) == before + 1:
            return
    pytest.fail("no hit")


def test_the_cache_accepts_nothing_that_the_parser_refuses(cluster: Cluster) -> None:
    warm(cluster)
    for bad in (b"GET /1k HTTP/1.1\r\n\r\n", b"GET /1k HTTP/1.1\nHost: lab\n\n",
                with_field(REQUEST, b"Content-Length: 1\r\nContent-Length: 2"),
                REQUEST.replace(b"Host", b"Host ")):
        for _ in range(4):
            assert b" 400 " in once(cluster, bad).partition(b"\r\n")[0]
    # two requests in one packet, the first of which is known
    warm(cluster, KEEP)
    assert once(cluster, KEEP + REQUEST).count(b"200 OK") == 2
    # and half of one
    with cluster.client.connect(cluster.VIP) as s:
        s.sendall(REQUEST[:-4])
        s.sendall(REQUEST[-4:])
        assert len(body(read_all(s))) == 1024


@pytest.fixture
def equal(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Two back ends that are both good for everything."""
    c = Cluster(2, **mode, rules=[(0, ".*"), (1, ".*")], fe_conf="dtcinterval = 1",
                be_conf="maxclients = 12")
    try:
        for n in c.nginx:
            n.file("1k", size=1024)
        yield c
    finally:
        c.close()


def handed(c: Cluster) -> list[int]:
    assert c.fe
    return [s["handed"] for s in c.fe.ctl("servers")]


def test_cached_verdicts_share_the_load(equal: Cluster) -> None:
    """The one with the fewest connections is next; one that is full is left out."""
    warm(equal)
    warm(equal, KEEP)
    settle(equal)
    before, hits = handed(equal), cached(equal)
    held = []
    for _ in range(24):
        held.append(equal.client.connect(equal.VIP))
        ask(held[-1])
    assert [b - a for a, b in zip(before, handed(equal), strict=True)] == [12, 12]
    assert cached(equal) >= hits + 20
    assert once(equal).startswith(b"HTTP/1.1 503 ")
    for s in held:
        s.close()
    settle(equal)
    assert len(body(once(equal))) == 1024


def test_cached_verdicts_end_with_what_they_stand_on(equal: Cluster) -> None:
    """Drained, dead, reloaded: from that moment no request goes by an older verdict."""
    assert equal.fe
    fe = equal.fe

    def shares(n: int = 20, settled: bool = False) -> list[int]:
        warm(equal)
        before = handed(equal)
        for _ in range(n):
            if settled:
                settle(equal)
            assert len(body(once(equal))) == 1024
        return [b - a for a, b in zip(before, handed(equal), strict=True)]

    def shared() -> bool:
        # before each, or the one that served last has more to do, for as long as its end is news
        return min(shares(6, settled=True)) > 1
    assert shared()
    warm(equal)
    fe.ctl("drain", equal.be_hosts[0].address)
    assert shares() == [0, 20]
    fe.ctl("undrain", equal.be_hosts[0].address)
    assert shared()
    text = fe.config.read_text()
    fe.config.write_text(text.replace(f"rule = {equal.be_hosts[1].address} .*\n", ""))
    fe.ctl("reload")
    assert shares() == [20, 0]
    fe.config.write_text(text)
    fe.ctl("reload")
    assert shared()
    equal.be[0].process.kill()
    wait_for(lambda: fe.ctl("servers")[0]["state"] == "down", "be1 to be missed")
    assert shares() == [0, 20]


def test_known_halves_of_a_head_that_is_too_long(equal: Cluster) -> None:
    """Each has come in a head that was short enough."""
    assert equal.fe
    text = equal.fe.config.read_text()
    equal.fe.config.write_text(f"{text}\nheadlimit = 512\n")
    equal.fe.ctl("reload")
    target, field = b"/1k?" + b"t" * 380, b"X: " + b"f" * 380
    one, two = REQUEST.replace(b"/1k", target), with_field(REQUEST, field)
    for _ in range(5):  # the key may change in between
        for data in (one, two):
            assert once(equal, data).startswith(b"HTTP/1.1 200 ")
        both = once(equal, with_field(one, field))
        assert both.startswith(b"HTTP/1.1 431 ")
    warm(equal)


def test_the_cache_can_be_turned_off(equal: Cluster) -> None:
    assert equal.fe
    fe = equal.fe
    warm(equal)
    text = fe.config.read_text()
    log = fe.run_dir / "access.log"
    for line in ("verdictcache = off", f"accesslog = {log}", "dbglevel = 2"):
        fe.config.write_text(f"{text}\n{line}\n")
        fe.ctl("reload")
        before, handed = cached(equal), fe.ctl("status")["counters"]["handed"]
        for _ in range(5):
            once(equal)
        assert cached(equal) == before, line
        # a worker that is late would write the line of the last one to the log that is opened next
        wait_for(lambda n=handed: fe.ctl("status")["counters"]["handed"] == n + 5, "the count")
    # the worker writes its line behind the request that it has sent on
    wait_for(lambda: len(log.read_text().splitlines()) >= 5, "lines for all")
    assert len(log.read_text().splitlines()) == 5
    fe.config.write_text(text)
    fe.ctl("reload")
    warm(equal)
