# SPDX-License-Identifier: GPL-2.0-or-later
"""Back ends that refuse, die or vanish: the client gets its answer from the next one, or 503."""
from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tcpha._fast import message
from tcpha._fast.packet import forge_segment
from tcpha.lab.bed import Cluster, Host, freeze, sh, wait_for
from tests.support.client import KEEP, REQUEST, body, connect_from, read_all, upload_many
from tests.support.modes import USUAL
from tests.support.network import mac, nft_on_switch
from tests.support.packets import Packet
from tests.support.state import settle
from tests.support.wire import send_again

pytestmark = pytest.mark.modes(*USUAL, "fast-tunnel")
UNAVAILABLE = "Service Unavailable\n503"
PAIR = [(0, "^/"), (1, "^/"), (1, ".*")]


@pytest.fixture(scope="module")
def owned(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Two back ends that can serve the same requests."""
    c = Cluster(2, **mode, rules=PAIR, fe_conf="dtcinterval = 1\nheadtimeout = 3",
                be_conf="maxclients = 200")
    try:
        for n in c.nginx:
            n.file("index.html", f"index of {n.host.name}\n".encode())
            n.file("1k", size=1024)
            n.file("big", size=8 << 20)
        yield c
    finally:
        c.close()


@pytest.fixture
def pair(owned: Cluster) -> Cluster:
    wait_for(lambda: owned.fe and [s["state"] for s in owned.fe.ctl("servers")] == ["up"] * 2,
             "both back ends up", 15)
    return owned


def request(c: Cluster, data: bytes = REQUEST) -> socket.socket:
    s = c.client.connect(c.VIP)
    s.sendall(data)
    return s


def servers(c: Cluster) -> list[dict[str, object]]:
    assert c.fe
    return list(c.fe.ctl("servers"))


def names(c: Cluster, count: int) -> set[str]:
    return {c.get("/").split()[-1] for _ in range(count)}


def test_equal_patterns_share_the_load(pair: Cluster) -> None:
    assert names(pair, 10) == {"be1", "be2"}
    settle(pair)
    held = []
    for _ in range(20):  # fewest live connections first
        s = pair.client.connect(pair.VIP)
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        s.recv(65536)
        held.append(s)
    assert [s["live"] for s in servers(pair)] == [10, 10]
    for s in held:
        s.close()
    settle(pair)


def test_server_not_listening(pair: Cluster) -> None:
    pair.nginx[0].stop()
    try:
        assert names(pair, 10) == {"be2"}  # by refusals, until the back end has said so
    finally:
        pair.nginx[0].start()
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "be1 in use again")


def test_nobody_listening_is_503(pair: Cluster) -> None:
    for n in pair.nginx:
        n.stop()
    try:
        for _ in range(3):
            assert pair.get("/", "-w", "%{http_code}") == UNAVAILABLE
        s = pair.client.connect(pair.VIP)
        s.sendall(REQUEST.replace(b"GET", b"HEAD"))
        head = read_all(s)
        assert head.startswith(b"HTTP/1.1 503 ") and head.endswith(b"\r\n\r\n")
        # the request's body is on its way while the answer is prepared
        s = pair.client.connect(pair.VIP)
        s.sendall(b"PUT /up/x HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50000)
        assert read_all(s).startswith(b"HTTP/1.1 503 ")
        s.close()
    finally:
        for n in pair.nginx:
            n.start()
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "both in use again")


ROOM = 5  # in an accept queue with a backlog of 4


@contextmanager
def crowded(c: Cluster) -> Iterator[tuple[list[int], list[socket.socket]]]:
    """The first back end's server stands still, and its accept queue is full: its workers, and the
    clients in the queue. The second back end is drained."""
    assert c.fe
    host, server = c.be_hosts[0], c.nginx[0]
    somaxconn = host.sysctl("net.core.somaxconn")
    host.sysctl("net.core.somaxconn", str(ROOM - 1))
    c.fe.ctl("drain", c.be_hosts[1].address)
    try:
        server.stop()
        server.start()
        wait_for(lambda: names(c, 1) == {"be1"}, "be1 in use")
        settle(c)
        workers = server.worker_pids()
        freeze(*workers)
        clients = [request(c) for _ in range(ROOM)]
        wait_for(lambda: c.be[0].ctl("status")["live"] == ROOM, "a full accept queue")
        yield workers, clients
    finally:
        host.sysctl("net.core.somaxconn", somaxconn)
        server.stop()
        server.start()
        c.fe.ctl("undrain", c.be_hosts[1].address)
    settle(c)


def crowds(c: Cluster) -> int:
    """Offers that the first back end refused for its full accept queue."""
    return int(c.be[0].ctl("status")["counters"]["refusals"].get("accept queue full", 0))


def test_accept_queue_that_is_full_for_a_moment(pair: Cluster) -> None:
    """Who finds no room waits for it, as with TCP. Nobody is refused."""
    before = crowds(pair)
    with crowded(pair) as (workers, clients):
        clients += [request(pair) for _ in range(8)]
        wait_for(lambda: crowds(pair) > before, "a refusal for the full queue")
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert [len(body(read_all(s))) for s in clients] == [1024] * (ROOM + 8)


def out_of_order(host: Host) -> int:
    return int(host.run("nstat", "-asz", "TcpExtTCPOFOQueue").stdout.split()[-2])


@pytest.mark.socket_path
def test_order_of_what_comes_while_a_request_waits(pair: Cluster) -> None:
    """Each time that nobody takes it, our stack gets what was kept, and only then what follows."""
    data = os.urandom(1 << 20)
    with crowded(pair) as (workers, clients), pair.bed.in_order():
        late, uploads = out_of_order(pair.fe_host), []
        for n in range(6):
            s, at, before = pair.client.connect(pair.VIP), 0, crowds(pair)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            s.sendall(b"PUT /up/order%d HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                      b"Content-Length: %d\r\n\r\n" % (n, len(data)))
            patience = s.gettimeout()
            s.setblocking(False)
            while crowds(pair) < before + 3:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(1000):
                        at += s.send(data[at:at + 1])
            s.settimeout(patience)
            assert at > 1000
            uploads.append((s, at))
        assert out_of_order(pair.fe_host) == late
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        for n, (s, at) in enumerate(uploads):
            s.sendall(data[at:])
            assert read_all(s).startswith(b"HTTP/1.1 20")
            assert (pair.nginx[0].root / f"up/order{n}").read_bytes() == data
        assert [len(body(read_all(s))) for s in clients] == [1024] * ROOM


@pytest.mark.socket_path  # else clients' own timers decide when they wait, and for how long
def test_accept_queue_that_stays_full(pair: Cluster) -> None:
    """Another back end that may take the request is asked at once. Else it is 503 after a while; a
    client that goes away meanwhile is forgotten. Who is in the queue is served later."""
    assert pair.fe
    fe, (be1, be2) = pair.fe, (h.address for h in pair.be_hosts)
    with crowded(pair) as (workers, clients):
        before, lost = crowds(pair), fe.ctl("status")["counters"]["lost"]
        fe.ctl("drain", be1)
        fe.ctl("undrain", be2)
        held = [request(pair, KEEP) for _ in range(ROOM + 2)]  # more than be1 has
        wait_for(lambda: servers(pair)[1]["live"] == ROOM + 2, "connections of be2")
        fe.ctl("undrain", be1)
        assert len(body(read_all(request(pair)))) == 1024
        assert crowds(pair) == before + 1
        for s in held:
            s.close()
        wait_for(lambda: servers(pair)[1]["live"] == 0, "their end")
        fe.ctl("drain", be2)
        waiting = [request(pair) for _ in range(4)]
        wait_for(lambda: fe.ctl("status")["in_hand"] == 4, "four that wait")
        gone = waiting.pop()
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        wait_for(lambda: fe.ctl("status")["in_hand"] == 3, "one to be forgotten")
        assert all(read_all(s).startswith(b"HTTP/1.1 503 ") for s in waiting)
        after = fe.ctl("status")["counters"]
        assert after["lost"] == lost + 1 and crowds(pair) >= before + 3 * 7
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert [len(body(read_all(s))) for s in clients] == [1024] * ROOM


def strays(c: Cluster, port: int) -> None:
    """Packets of a client's connection that were kept when it was in one of the front end's slots,
    and come when another one is. What they acknowledge says nothing of that one."""
    mark, slots = 0x0274, 256  # TCPHA_MAC_MARK, maxclients
    tap, = [link["ifname"] for link in json.loads(c.fe_host.ip("-j", "link", "show", "type", "tun"))
            if re.fullmatch(r"tcphafe\d+", link["ifname"])]
    raw = c.fe_host.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))

    def read() -> int:
        return int(json.loads(c.fe_host.ip("-j", "-s", "link", "show", tap))[0][
            "stats64"]["tx"]["packets"])
    before = read()
    with raw:
        raw.bind((tap, 0))
        for slot in range(slots):
            for ack in (0, 1 << 31):
                frame = forge_segment(c.client.address, port, c.VIP, 80,
                                      {"seq": 1, "ack": ack, "window": 512, "flags": 16})[10:]
                raw.send(struct.pack("=HI", socket.htons(mark), slot) + frame[6:])
    wait_for(lambda: read() >= before + 2 * slots, "all of them to be read")


@pytest.mark.modes("direct", "tunnel")
def test_packets_of_whoever_had_the_slot_before(pair: Cluster) -> None:
    """They are no sign that the back end has adopted what it then refuses."""
    with crowded(pair) as (workers, clients):
        before = crowds(pair)
        freeze(pair.be[0].process.pid)
        clients.append(request(pair))
        wait_for(lambda: servers(pair)[0]["live"] == ROOM + 1, "the offer")
        strays(pair, clients[-1].getsockname()[1] ^ 1)
        os.kill(pair.be[0].process.pid, signal.SIGCONT)
        wait_for(lambda: crowds(pair) > before, "a refusal for the full queue")
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert [len(body(read_all(s))) for s in clients] == [1024] * (ROOM + 1)


def test_server_that_ends_with_connections_in_its_accept_queue(pair: Cluster) -> None:
    """Of these the kernel says that they are over, but not which they are."""
    assert pair.fe
    fe, server = pair.fe, pair.nginx[0]
    fe.ctl("drain", pair.be_hosts[1].address)
    try:
        workers = server.worker_pids()
        freeze(server.process.pid, *workers)
        clients = [pair.client.connect(pair.VIP) for _ in range(12)]
        for s in clients:
            s.sendall(REQUEST)
        wait_for(lambda: pair.be[0].ctl("status")["live"] == 12, "them in the queue")
        for pid in (server.process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        server.process.wait()
        for s in clients:
            with pytest.raises(ConnectionResetError):
                s.recv(1)
            s.close()
        settle(pair)
    finally:
        server.start()
        fe.ctl("undrain", pair.be_hosts[1].address)


def test_silence_for_longer_than_idletimeout(mode: dict[str, Any]) -> None:
    """Two seconds: the back end is asked, and has the connection."""
    c = Cluster(1, **mode, rules=[(0, ".*")], fe_conf="idletimeout = 2")
    try:
        assert c.fe
        fe = c.fe
        c.nginx[0].file("1k", size=1024)
        with c.client.connect(c.VIP) as s:
            s.sendall(REQUEST.replace(b"close", b"keep-alive"))
            s.recv(65536)
            wait_for(lambda: [r for r in fe.ctl("conns") if r["idle"] > 6], "a long silence")
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
        settle(c)
    finally:
        c.close()


def test_maxclients_of_a_back_end(pair: Cluster) -> None:
    """be_conf says 200 each: 350 fit, and 500 do not."""
    held = []
    codes = []
    for _ in range(500):
        s = pair.client.connect(pair.VIP)
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        codes.append(int(s.recv(65536).split()[1]))
        held.append(s)
    assert codes[:350] == [200] * 350
    assert codes.count(200) == 400 and codes.count(503) == 100
    for s in held:
        s.close()
    settle(pair)
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "both in use again")


@pytest.mark.socket_path  # no process of the back end is in the way of the other
def test_back_end_stalls_between_send_and_adopted(pair: Cluster) -> None:
    freeze(pair.be[0].process.pid)
    try:
        assert names(pair, 6) == {"be2"}
        upload_many_small(pair)
    finally:
        pair.be[0].process.send_signal(signal.SIGCONT)
    # what it found in its connections must not have been adopted late
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "be1 in use again", 15)
    settle(pair)
    fe = pair.fe.ctl("status")["counters"]  # type: ignore[union-attr]
    assert fe["handed"] == fe["closed"]


@pytest.mark.modes("direct", "tunnel")
def test_garbage_while_a_connection_is_handed_over(pair: Cluster) -> None:
    """What has no sense behind its ports is kept like the rest of the flow, and sent on."""
    assert pair.fe
    pair.fe.ctl("drain", pair.be_hosts[1].address)
    freeze(pair.be[0].process.pid)
    try:
        with pair.client.connect(pair.VIP) as s:
            s.sendall(REQUEST)
            wait_for(lambda: pair.fe and pair.fe.ctl("servers")[0]["live"] == 1, "the offer")
            held = pair.fe.ctl("status")["packets"]["held"]
            frame = mac(pair.fe_host) + mac(pair.client) + Packet(
                source=pair.client.address, destination=pair.VIP, sport=s.getsockname()[1],
                flags=16, tcp_options=bytes((8, 0, 0, 0))).frame()[12:]
            for _ in range(3):
                send_again(pair.client, frame)
            wait_for(lambda: pair.fe and pair.fe.ctl("status")["packets"]["held"] == held + 3,
                     "them")
            pair.be[0].process.send_signal(signal.SIGCONT)
            assert len(body(read_all(s))) == 1024
    finally:
        pair.be[0].process.send_signal(signal.SIGCONT)
        pair.fe.ctl("undrain", pair.be_hosts[1].address)
    settle(pair)


@pytest.mark.socket_path
def test_back_end_whose_word_is_lost(pair: Cluster) -> None:
    """It has adopted and answers the client, and the front end does not hear of it: what the client
    acknowledges tells it, so that nobody else answers."""
    assert pair.fe
    settle(pair)
    pair.fe.ctl("drain", pair.be_hosts[1].address)
    host, big = pair.be_hosts[0], pair.nginx[0].file("lost", size=8 << 20)
    host.nft("""table ip lab {
        chain out { type filter hook output priority 0; tcp sport 666 drop; }
    }""")
    try:
        with pair.client.connect(pair.VIP) as s:
            s.sendall(REQUEST.replace(b"/1k", b"/lost"))
            wait_for(lambda: servers(pair)[0]["state"] == "down", "the silence to be noticed")
            assert body(read_all(s)) == big.read_bytes()
        assert [r["status"] for r in pair.nginx[0].seen() if "/lost" in r["request"]] == ["200"]
    finally:
        host.nft("")
        pair.fe.ctl("undrain", pair.be_hosts[1].address)
    wait_for(lambda: servers(pair)[0]["state"] == "up", "the back end in use again", 15)
    settle(pair)


def upload_many_small(c: Cluster) -> None:
    data = os.urandom(40_000)
    s = c.client.connect(c.VIP)
    s.sendall(b"PUT /up/small HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
              b"Content-Length: %d\r\n\r\n" % len(data) + data)
    assert read_all(s).split()[1] in (b"201", b"204")
    s.close()
    assert (c.nginx[1].root / "up" / "small").read_bytes() == data


def test_back_end_killed_under_load(pair: Cluster) -> None:
    load = pair.client.start("ab", "-q", "-r", "-n", "4000", "-c", "16", f"http://{pair.VIP}/1k",
                             stdout=-1)
    wait_for(lambda: pair.be[0].ctl("status")["counters"]["adopted"] > 300, "some load")
    pair.be[0].kill()
    if pair.datapath[1] == "nfqueue":  # what it had adopted goes on when it is back
        pair.be[0].start()
        out = load.communicate(timeout=60)[0]
    else:
        out = load.communicate(timeout=60)[0]
        pair.be[0].start()
    assert "Complete requests:      4000" in out and "Failed requests:        0" in out, out
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "be1 in use again", 15)


def test_connections_outlive_their_daemon(pair: Cluster) -> None:
    """The kernel has them; tcphabe was needed to begin them only. Where packets pass through it,
    they go on when it is back."""
    wait_for(lambda: pair.fe and not pair.fe.ctl("conns"), "the end of earlier connections")
    with pair.client.connect(pair.VIP) as s:
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        s.recv(65536)
        (row,) = wait_for(lambda: pair.fe and pair.fe.ctl("conns"), "the connection table")
        victim = [h.address for h in pair.be_hosts].index(row["server"])
        pair.be[victim].kill()
        try:
            s.sendall(REQUEST)
            if pair.datapath[1] == "ebpf":
                assert read_all(s).startswith(b"HTTP/1.1 200 ")
        finally:
            pair.be[victim].start()
        if pair.datapath[1] == "nfqueue":
            assert read_all(s).startswith(b"HTTP/1.1 200 ")


def test_what_a_control_connection_carried_when_it_was_cut(pair: Cluster) -> None:
    """A back end said CLOSED, and the front end never heard it: it asks when they meet again."""
    assert pair.fe
    fe = pair.fe
    settle(pair)
    with pair.client.connect(pair.VIP) as s:
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        s.recv(65536)
        (row,) = wait_for(lambda: fe.ctl("conns"), "the connection table")
        victim = [h.address for h in pair.be_hosts].index(row["server"])
        pair.be_hosts[victim].nft("""table ip lab {
            chain out { type filter hook output priority 0; tcp sport 666 drop; }
        }""")
    try:
        wait_for(lambda: pair.be[victim].ctl("status")["live"] == 0, "the connection's end")
        wait_for(lambda: servers(pair)[victim]["state"] == "down", "the cut to be noticed")
        assert fe.ctl("status")["live"] == 1
    finally:
        pair.be_hosts[victim].nft("")
    wait_for(lambda: servers(pair)[victim]["state"] == "up", "the back end in use again", 15)
    settle(pair)


def test_control_connections_that_only_the_back_end_takes_for_alive(pair: Cluster) -> None:
    """The front end has given them up, and the back end does not hear of it: what it says there of
    a connection's end is lost."""
    settle(pair)
    with pair.client.connect(pair.VIP) as s:
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        n = 0 if b"X-Served-By: be1" in s.recv(65536) else 1
        victim = pair.be[n]
        # more than the FIN: that comes again and again
        pair.be_hosts[n].nft("""table ip lab {
            chain in { type filter hook prerouting priority -400;
                       tcp dport 666 tcp flags & (fin|rst) != 0 drop; }
        }""")
        try:
            freeze(victim.process.pid)
            wait_for(lambda: servers(pair)[n]["state"] == "down", "detection")
            victim.process.send_signal(signal.SIGCONT)
            wait_for(lambda: servers(pair)[n]["state"] == "up", "new control connections", 15)
            assert victim.ctl("status")["live"] == 1
            s.close()
            wait_for(lambda: victim.ctl("status")["live"] == 0, "the connection's end")
        finally:
            victim.process.send_signal(signal.SIGCONT)
            pair.be_hosts[n].nft("")
    settle(pair)


@pytest.mark.modes("direct", "nfqueue-direct")
def test_control_connections_that_crawl(mode: dict[str, Any]) -> None:
    """Most of what a back end and the front end say to each other is lost, over and over, while
    packets of clients pass: every request is answered, by the other back end if need be."""
    c = Cluster(2, **mode, rules=PAIR, fe_conf="dtcinterval = 1")
    try:
        for n in c.nginx:
            n.file("index.html", f"index of {n.host.name}\n".encode())
            n.file("1k", size=1024)
        port = c.be_hosts[0].port
        nft_on_switch(c, f"""table bridge lab {{
            chain lose {{
                type filter hook forward priority 0
                iifname {port} tcp sport 666 ip length > 60 numgen random mod 100 < 85 drop
                oifname {port} tcp dport 666 ip length > 60 numgen random mod 100 < 85 drop
            }}
        }}""")
        for _ in range(3):
            done = c.client.run("ab", "-q", "-n", "200", "-c", "8", f"http://{c.VIP}/1k")
            assert "Complete requests:      200" in done.stdout
            assert "Failed requests:        0" in done.stdout
            assert "Non-2xx" not in done.stdout
        nft_on_switch(c, "")
        wait_for(lambda: [s["state"] for s in servers(c)] == ["up"] * 2, "both in use again", 60)
        wait_for(lambda: names(c, 10) == {"be1", "be2"}, "requests to both")
    finally:
        c.close()


def test_back_end_unreachable(pair: Cluster) -> None:
    port = pair.be_hosts[0].port
    sh("ip", "-n", pair.bed.switch, "link", "set", port, "down")
    try:
        assert names(pair, 6) == {"be2"}
    finally:
        sh("ip", "-n", pair.bed.switch, "link", "set", port, "up")
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "be1 in use again", 15)
    settle(pair)  # offers that it got when the cable was back were void


@pytest.mark.modes("direct", "nfqueue-direct")
def test_back_end_unreachable_without_detection(mode: dict[str, Any]) -> None:
    """The kernel finds that nothing is acknowledged, long before it would give up by itself."""
    c = Cluster(2, **mode, rules=PAIR, fe_conf="dtcinterval = 0")
    try:
        sh("ip", "-n", c.bed.switch, "link", "set", c.be_hosts[0].port, "down")
        wait_for(lambda: servers(c)[0]["state"] == "down", "the kernel's word", 90)
        assert c.fe and f"back end {c.be_hosts[0].address}: host dead (" in c.fe.log.read_text()
        assert "process dead" not in c.fe.log.read_text()
        sh("ip", "-n", c.bed.switch, "link", "set", c.be_hosts[0].port, "up")
        wait_for(lambda: servers(c)[0]["state"] == "up", "be1 in use again")
    finally:
        c.close()


def test_silence_is_detected_without_traffic(pair: Cluster) -> None:
    freeze(pair.be[0].process.pid)
    try:
        wait_for(lambda: servers(pair)[0]["state"] == "down", "detection")
        assert names(pair, 4) == {"be2"}
    finally:
        pair.be[0].process.send_signal(signal.SIGCONT)
    wait_for(lambda: servers(pair)[0]["state"] == "up", "be1 up again", 15)


@pytest.mark.socket_path
def test_an_offer_that_was_given_up_is_not_adopted_late(pair: Cluster) -> None:
    """A back end is stopped with offers in its control connections, and goes on as soon as the
    front end has given it up. Each connection has one owner."""
    def adopted() -> int:
        return sum(b.ctl("status")["counters"]["adopted"] for b in pair.be)
    before = adopted()
    freeze(pair.be[0].process.pid)
    try:
        clients = []
        for _ in range(4):
            clients.append(pair.client.connect(pair.VIP))
            clients[-1].sendall(REQUEST)
        wait_for(lambda: servers(pair)[0]["state"] == "down", "detection")
    finally:
        pair.be[0].process.send_signal(signal.SIGCONT)
    for s in clients:
        assert len(body(read_all(s))) == 1024
        s.close()
    wait_for(lambda: servers(pair)[0]["state"] == "up", "be1 up again", 15)
    assert adopted() == before + 4
    settle(pair)


def until_closed(s: socket.socket) -> None:
    """Wait for the peer to close; with a RST if it has not read all."""
    with contextlib.suppress(ConnectionResetError):
        read_all(s)
    s.close()


def test_garbage_on_the_control_port(pair: Cluster) -> None:
    be = pair.be_hosts[0].address
    hello = struct.pack("!HBBIQ", 0x5443, message.VERSION, message.HELLO, 16 + 40, 1)
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), b"\xff" * 64, hello + b"{" * 40,
                 struct.pack("!HBBIQ", 0x5443, message.VERSION, message.HELLO, 0xffffffff, 1),
                 message.encode_hello(b'{"role": "fe", "vaddr": "10.0.0.1", "version": %d}'
                                      % message.VERSION),
                 message.encode_hello(b'{"role": "be", "vaddr": "192.168.1.36", "clock": "x"}')):
        s = pair.client.connect(be, 666)
        s.sendall(data)
        until_closed(s)
    # a peer that introduced itself well and then talks nonsense is cut off, and nobody else
    for nonsense in (os.urandom(400), message.encode(message.ADOPTED, 1),
                     struct.pack("!HBBIQ", 0x5443, message.VERSION, message.HANDOFF, 100, 1)
                     + b"x" * 84):
        s = pair.client.connect(be, 666)
        s.sendall(message.encode_hello(
            b'{"role": "fe", "vaddr": "192.168.1.36", "version": %d, "instance": "x", "clock": 1}'
            % message.VERSION))
        assert len(s.recv(4096)) > 16
        s.sendall(nonsense)
        until_closed(s)
    silent = pair.client.connect(be, 666)
    assert names(pair, 4) == {"be1", "be2"}
    assert read_all(silent) == b""  # its patience ended


def test_drain_and_undrain(pair: Cluster) -> None:
    assert pair.fe
    pair.fe.ctl("drain", pair.be_hosts[0].address)
    assert names(pair, 6) == {"be2"}
    pair.fe.ctl("undrain", pair.be_hosts[0].address)
    settle(pair)  # whose connections are not known to have ended has more to do than the other
    assert names(pair, 6) == {"be1", "be2"}


def test_reload(pair: Cluster) -> None:
    assert pair.fe
    text = pair.fe.config.read_text()
    s = pair.client.connect(pair.VIP)
    s.sendall(REQUEST.replace(b"close", b"keep-alive"))
    s.recv(65536)
    try:
        pair.fe.config.write_text(text.replace(f"rule = {pair.be_hosts[0].address} ^/\n", ""))
        pair.fe.ctl("reload")
        assert names(pair, 6) == {"be2"}
        pair.fe.config.write_text(text + "rul = 1\n")
        pair.fe.process.send_signal(signal.SIGHUP)
        wait_for(lambda: pair.fe and "reload refused" in pair.fe.log.read_text(), "the refusal")
        assert names(pair, 6) == {"be2"}
    finally:
        pair.fe.config.write_text(text)
        pair.fe.ctl("reload")
    s.sendall(REQUEST)
    assert read_all(s).startswith(b"HTTP/1.1 200 ")  # the connection is still there
    s.close()
    settle(pair)
    assert names(pair, 6) == {"be1", "be2"}


def test_back_end_that_starts_after_the_front_end(mode: dict[str, Any]) -> None:
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        from tcpha.lab.bed import Daemon
        c.nginx[0].file("index.html", b"late\n")
        c.fe = Daemon(c.fe_host, "fe", c.fe_text())
        assert c.get("/", "-w", "%{http_code}") == UNAVAILABLE
        c.be = [Daemon(c.be_hosts[0], "be", c.be_text(c.be_hosts[0]))]
        c.connected()
        assert c.get("/") == "late\n"
    finally:
        c.close()


def test_unload_drains(mode: dict[str, Any]) -> None:
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        assert c.fe
        c.nginx[0].file("1k", size=1024)
        s = c.client.connect(c.VIP)
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        s.recv(65536)
        with open(c.fe.run_dir / "ktcphafe" / "unload", "a") as f:
            f.write("1\n")
        wait_for(lambda: c.fe and c.fe.ctl("status")["unloading"], "unloading")
        with pytest.raises(ConnectionRefusedError):
            c.client.connect(c.VIP)
        assert c.fe.process.poll() is None
        s.sendall(REQUEST)
        assert read_all(s).startswith(b"HTTP/1.1 200 ")
        s.close()
        assert c.fe.process.wait(10) == 0
        c.be[0].ctl("unload")
        assert c.be[0].process.wait(10) == 0
    finally:
        c.close()


def test_restart_under_load_loses_no_connection(pair: Cluster) -> None:
    """unload, and a new run: whoever was connected is served. Both daemons in turn."""
    assert pair.fe
    want = {name: (pair.nginx[0].root / name).read_bytes() for name in ("1k", "big")}
    for n in pair.nginx:
        (n.root / "same").write_bytes(want["1k"])
    ended, served, failed = threading.Event(), [0], []

    def ask() -> None:
        while not ended.is_set():
            with socket.socket() as s:
                s.settimeout(30)
                try:
                    s.connect((pair.VIP, 80))
                except OSError:  # nobody there yet
                    ended.wait(0.05)
                    continue
                try:
                    s.sendall(REQUEST.replace(b"1k", b"same"))
                    if body(read_all(s)) != want["1k"]:
                        failed.append("another answer")
                except (OSError, AssertionError) as error:
                    failed.append(repr(error))
                served[0] += 1

    def more() -> None:
        now = served[0]
        wait_for(lambda: served[0] > now + 100, "more requests", 30)

    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(pair.client.inside, ask) for _ in range(8)]
        try:
            for daemon in (pair.fe, pair.be[0], pair.fe):
                more()
                daemon.ctl("unload")
                assert daemon.process.wait(30) == 0
                daemon.start()
            more()
        finally:
            ended.set()
            for job in work:
                job.result()
    assert not failed, (failed[0], len(failed), *(d.log.read_text()[-3000:]
                                                  for d in (pair.fe, *pair.be)))
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "both in use again")
    settle(pair)


def test_slow_back_ends_are_waited_for_at_the_start(pair: Cluster) -> None:
    """Their hosts take the control connections, their daemons are late: nobody is told 503."""
    assert pair.fe
    settle(pair)
    pair.fe.stop()
    for be in pair.be:
        freeze(be.process.pid)
    with ThreadPoolExecutor(1) as pool:
        try:
            started = pool.submit(pair.fe.start)
            s = wait_for(lambda: try_to_connect(pair), "somebody who listens")
            s.sendall(REQUEST)
            assert not select.select([s], [], [], 1.5)[0], s.recv(1024)
        finally:
            for be in pair.be:
                be.process.send_signal(signal.SIGCONT)
            started.result()
    with s:
        assert len(body(read_all(s))) == 1024
    pair.connected()


def try_to_connect(c: Cluster) -> socket.socket | None:
    try:
        return c.client.connect(c.VIP)
    except ConnectionRefusedError:
        return None


def test_handshakes_end_before_unload_does(pair: Cluster) -> None:
    """A client whose last ACK of the handshake was lost takes itself for connected."""
    assert pair.fe
    fe = pair.fe
    pair.client.nft("""table ip lab {
        chain out { type filter hook output priority 0;
            tcp dport 80 tcp flags & (syn | ack) == ack numgen inc mod 8 < 2 drop; }
    }""")
    try:
        with pair.client.connect(pair.VIP) as s:
            if not pair.fastpath:  # which knows nothing of it
                listed = "ss", "-Htan", "sport = :80"
                wait_for(lambda: "SYN-RECV" in pair.fe_host.run(*listed).stdout,
                         "half a connection")
            fe.ctl("unload")
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
    finally:
        pair.client.nft("")
        assert fe.process.wait(30) == 0
        fe.start()
    wait_for(lambda: names(pair, 4) == {"be1", "be2"}, "both in use again", 15)


def test_new_connection_on_a_half_dead_tuple(pair: Cluster) -> None:
    """The client's host lost its state and uses the port again while the back end still holds the
    old connection: the challenge ACK of RFC 5961 clears it up."""
    def dial(port: int) -> socket.socket:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.settimeout(20)
        s.bind((pair.client.address, port))
        s.connect((pair.VIP, 80))
        return s
    s = pair.client.inside(lambda: dial(20678))
    s.sendall(REQUEST.replace(b"close", b"keep-alive"))
    s.recv(65536)
    # vanish: nothing of the close leaves the client
    pair.client.nft("""table ip lab {
        chain out { type filter hook output priority 0;
            tcp sport 20678 drop
        }
    }""")
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    s.close()
    pair.client.nft("")
    s = pair.client.inside(lambda: dial(20678))
    s.sendall(REQUEST)
    assert read_all(s).startswith(b"HTTP/1.1 200 ")
    s.close()
    settle(pair)


def test_socket_that_ends_unseen_by_its_daemon(pair: Cluster) -> None:
    """The back end's socket ends while tcphabe is stopped, and the client, who knows, uses the port
    again at once: that SYN, still for the old connection, must not reach the listener."""
    assert pair.fe
    fe, port = pair.fe, 20679
    fe.ctl("drain", pair.be_hosts[1].address)
    silence = f"""table ip lab {{
        chain out {{ type filter hook output priority 0;
            tcp sport {port} tcp flags & rst == rst drop; }}
        chain in {{ type filter hook input priority 0;
            tcp dport {port} tcp flags & rst == rst drop; }}
    }}"""

    def again() -> bytes:
        with connect_from(pair, port) as s:
            s.sendall(REQUEST)
            return read_all(s)
    for _ in range(8):
        s = connect_from(pair, port)
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        assert s.recv(65536).startswith(b"HTTP/1.1 200 ")
        before = fe.ctl("status")["packets"]["live_syn"]
        pair.client.nft(silence)
        freeze(pair.be[0].process.pid)
        try:
            pair.be_hosts[0].run("ss", "-KHtn", f"dport = :{port}")
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            s.close()
            with ThreadPoolExecutor(1) as thread:
                answer = thread.submit(again)
                wait_for(lambda b=before: fe.ctl("status")["packets"]["live_syn"] > b, "the SYN")
                pair.client.nft("")
                pair.be[0].process.send_signal(signal.SIGCONT)
                assert answer.result().startswith(b"HTTP/1.1 200 ")
        finally:
            pair.be[0].process.send_signal(signal.SIGCONT)
            pair.client.nft("")
        settle(pair)
    fe.ctl("undrain", pair.be_hosts[1].address)


def test_uploads_while_back_ends_come_and_go(pair: Cluster) -> None:
    assert pair.fe
    pair.fe.ctl("drain", pair.be_hosts[1].address)
    upload_many(pair, 24, 1 << 20, "-H", "Expect:")
    pair.fe.ctl("undrain", pair.be_hosts[1].address)


def test_restart_after_an_answer_of_its_own(mode: dict[str, Any]) -> None:
    """The socket of a connection that was offered in vain is in TIME_WAIT when the front end starts
    anew, and does not hold its port."""
    c = Cluster(1, **mode, rules=[(0, ".*")], fe_conf="dtcinterval = 0")
    try:
        assert c.fe
        c.nginx[0].stop()
        with c.client.connect(c.VIP) as s:  # the front end closes first
            s.sendall(REQUEST)
            assert b" 503 " in read_all(s)
        wait_for(lambda: c.fe_host.run("ss", "-Htan", "state", "time-wait", "sport = :80").stdout,
                 "the socket in TIME_WAIT")
        assert c.fe.stop() == 0
        c.fe.start()
    finally:
        c.close()
