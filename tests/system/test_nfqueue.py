# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong where packets pass through user space and are rewritten."""
from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Bed, Cluster, Host, freeze, wait_for
from tests.support.client import REQUEST, body, digest, read_all, upload_many
from tests.support.network import LOSS
from tests.support.repair import OFF_NO_PROBE, TCP_REPAIR, TCP_TIMESTAMP, numbers, option
from tests.support.state import left, settle


def near_the_wrap(c: Cluster, which: int, size: int) -> socket.socket:
    """A connection whose sequence numbers wrap within 'size' bytes, found by trying."""
    for _ in range(20000):
        s = c.client.connect(c.VIP)
        if 2**32 - size < numbers(s)[which] < 2**32 - 1000:
            return s
        s.close()
    raise AssertionError("no such connection in 20,000")


def fetch(s: socket.socket) -> bytes:
    return body(read_all(s))


def test_sequence_numbers_wrap_in_a_download(cluster: Cluster) -> None:
    s = near_the_wrap(cluster, 0, 60 << 20)
    s.sendall(REQUEST.replace(b"1k", b"big"))
    assert fetch(s) == (cluster.nginx[0].root / "big").read_bytes()
    s.close()
    settle(cluster)


def test_sequence_numbers_wrap_in_an_upload(cluster: Cluster) -> None:
    size = 24 << 20
    s = near_the_wrap(cluster, 1, size - (4 << 20))
    data = (cluster.nginx[0].root / "big").read_bytes()[:size]
    s.sendall(b"PUT /up/wrap HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n"
              b"Content-Length: %d\r\n\r\n" % size + data)
    assert read_all(s).split()[1] in (b"201", b"204")
    s.close()
    assert (cluster.nginx[0].root / "up" / "wrap").read_bytes() == data


def test_timestamps_wrap(cluster: Cluster) -> None:
    """The client's clock passes 2^32 during the handoff, and between two requests."""
    s = cluster.client.connect(cluster.VIP)

    def set_clock(value: int) -> None:
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        option(s, TCP_TIMESTAMP, value)
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_NO_PROBE)

    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    clock = option(s, TCP_TIMESTAMP)
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_NO_PROBE)
    keep = REQUEST.replace(b"close", b"keep-alive")
    sent = 0
    while (2**32 - 2 - clock) % 2**32 > 2**30:  # steps that PAWS takes for a clock going forward
        clock = (clock + 2**30) % 2**32
        set_clock(clock)
        s.sendall(keep[sent:sent + 1])
        sent += 1
    set_clock(2**32 - 2)  # 2 ms later it is 0
    s.sendall(keep[sent:])
    want = (cluster.nginx[0].root / "1k").read_bytes()
    for clock in (5, 2**30, 2**31 - 1, 2**31 + 2**29, 2**32 - 2, 50):
        data = b""
        while not data.endswith(want):
            try:
                data += s.recv(65536)
            except TimeoutError:
                raise AssertionError(f"no answer before {clock}; left: {left(cluster)}") from None
        set_clock(clock)
        s.sendall(keep)
    s.recv(65536)
    s.close()
    settle(cluster)


def test_sacks_are_understood_under_loss(cluster: Cluster) -> None:
    """SACK blocks that do not fit the sender's numbers are discarded, and it waits for timeouts."""
    names = ("TcpExtTCPSACKDiscard", "TcpExtTCPSackRecovery", "TcpExtPAWSEstab")

    def read() -> list[int]:
        out = cluster.be_hosts[0].run("nstat", "-asz", *names).stdout.split("\n")
        values = dict(line.split()[:2] for line in out if line.startswith(names))
        return [int(values[n]) for n in names]
    before = read()
    cluster.client.nft(LOSS)
    try:
        out = cluster.bed.dir / "down"
        cluster.get("/big", "-o", str(out))
    finally:
        cluster.client.nft("")
    assert digest(out) == digest(cluster.nginx[0].root / "big")
    discarded, recoveries, paws = (a - b for a, b in zip(read(), before, strict=True))
    # an ACK that the machine itself has overtaken may be one for PAWS; wrong clocks would be many
    assert discarded == 0 and recoveries > 0 and paws < recoveries


@pytest.fixture(scope="module")
def one(mode: dict[str, Any]) -> Iterator[Cluster]:
    """One back end, jumbo frames, little room in the queues."""
    c = Cluster(1, **mode, rules=[(0, ".*")], mtu=9000, fe_conf="queuelen = 16",
                be_conf="queuelen = 16")
    try:
        c.nginx[0].file("1k", size=1024)
        c.nginx[0].file("big", size=32 << 20)
        yield c
    finally:
        c.close()


@pytest.mark.modes("nfqueue-direct", "nfqueue-tunnel")
@pytest.mark.parametrize("most", [64 << 20, 1 << 30])
def test_a_server_with_little_room(mode: dict[str, Any], most: int) -> None:
    """Its windows are smaller than the scale that the front end has told the client can express."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    try:
        server, sent = c.nginx[0], c.bed.dir / "sent"
        sent.write_bytes(os.urandom(100_000))
        server.stop()
        server.conf.write_text(server.conf.read_text().replace("listen 80 ",
                                                               "listen 80 rcvbuf=2k "))
        server.start()
        c.fe_host.sysctl("net.ipv4.tcp_rmem", f"4096 131072 {most}")
        c.start()
        c.get("/up/little", "-H", "Expect:", "-T", str(sent))
        assert (server.root / "up" / "little").read_bytes() == sent.read_bytes()
    finally:
        c.close()


def down(c: Cluster, count: int = 1) -> None:
    """Downloads at the same time, each right to the last byte."""
    want = digest(c.nginx[0].root / "big")

    def one_of_them(n: int) -> str:
        out = c.bed.dir / f"down{n}"
        c.get("/big", "-o", str(out))
        return digest(out)
    with ThreadPoolExecutor(count) as pool:
        assert set(pool.map(one_of_them, range(count))) == {want}


OFFLOADS = ("tso", "gso", "gro", "tx", "rx", "sg")


@pytest.mark.parametrize("where", ["nowhere", "be", "fe", "client", "everywhere"])
def test_offloads(one: Cluster, where: str) -> None:
    hosts: dict[str, Host] = {"be": one.be_hosts[0], "fe": one.fe_host, "client": one.client}
    off = [h for n, h in hosts.items() if where in (n, "everywhere")]
    try:
        for h in off:
            h.run("ethtool", "-K", "eth0", *[x for o in OFFLOADS for x in (o, "off")])
        down(one, 2)
        upload_many(one, 4, 3 << 20)
    finally:
        for h in off:
            h.run("ethtool", "-K", "eth0", *[x for o in OFFLOADS for x in (o, "on")])


def kernel_queues(h: Host) -> list[list[int]]:
    text = h.run("cat", "/proc/net/netfilter/nfnetlink_queue").stdout
    return [[int(x) for x in line.split()] for line in text.splitlines()]


@pytest.mark.queues_on("be")
def test_a_full_queue_loses_nothing_silently(one: Cluster) -> None:
    """The daemon stops in mid-transfer; packets of 64 KB overrun its queue. They are counted, and
    every download ends as if nothing had happened."""
    be = one.be[0]

    def overrun() -> bool:
        return any(q[5] for q in kernel_queues(be.host))
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):  # if they were too fast for us, once more
            downloads = pool.submit(down, one, 6)
            wait_for(lambda d=downloads: be.ctl("status")["live"] >= 3 or d.done(), "downloads")
            freeze(be.process.pid)
            try:
                with contextlib.suppress(TimeoutError):
                    wait_for(overrun, "a full queue", 2)
            finally:
                be.process.send_signal(signal.SIGCONT)
            downloads.result()
            if overrun():
                break
    packets = be.ctl("status")["packets"]
    assert packets["queue_dropped"] > 0 and packets["failed"] == 0
    settle(one)


@pytest.mark.queues_on("fe")
def test_queues_share_the_clients(one: Cluster) -> None:
    assert one.fe
    for _ in range(40):  # all from one address
        one.get("/1k", "-o", "/dev/null")
    shares = one.fe.ctl("status")["packets"]["by_queue"]
    assert len(shares) >= 1 and all(shares)


MARKED = """table ip lab {
    chain out {
        type filter hook output priority 0;
        tcp sport 80 meta mark set 5 meta priority set 1:1
    }
}"""


@pytest.mark.queues_on("be")
@pytest.mark.parametrize("why", ["nothing", "marks", "scale"])
def test_what_rules_cannot_store_is_rewritten_whole(one: Cluster, why: str) -> None:
    """The head of a packet suffices, unless its mark is taken or its window needs another scale."""
    host, be = one.be_hosts[0], one.be[0]
    memory = host.sysctl("net.ipv4.tcp_rmem")
    before = be.ctl("status")["packets"]
    try:
        if why == "marks":
            host.nft(MARKED)
        elif why == "scale":
            host.sysctl("net.ipv4.tcp_rmem", "4096 65536 100000000")
        down(one, 2)
        upload_many(one, 4, 3 << 20)
    finally:
        host.nft("")
        host.sysctl("net.ipv4.tcp_rmem", memory)
    after = be.ctl("status")["packets"]
    assert after["packets"] > before["packets"] and after["failed"] == before["failed"]
    assert (after["left"] > before["left"]) == (why != "nothing")


def thinned_by_a_pause(c: Cluster) -> bool:
    """Whether ACKs of two downloads that met a stopped front end were left out."""
    assert c.fe
    fe = c.fe
    before = fe.ctl("status")["packets"]["thinned"]
    with ThreadPoolExecutor(1) as pool:
        downloads = pool.submit(down, c, 2)
        wait_for(lambda: fe.ctl("status")["live"] == 2 or downloads.done(), "downloads")
        freeze(fe.process.pid)
        try:
            wait_for(lambda: any(q[2] > 4 for q in kernel_queues(fe.host)) or downloads.done(),
                     "ACKs that wait")
        finally:
            fe.process.send_signal(signal.SIGCONT)
        downloads.result()
    return bool(fe.ctl("status")["packets"]["thinned"] > before)


@pytest.mark.queues_on("fe")
def test_acks_that_waited_together_become_one(one: Cluster) -> None:
    assert any(thinned_by_a_pause(one) for _ in range(8))  # a download may be over too soon


FIREWALL = """table ip lab {
    counter invalid { }
    chain in { type filter hook input priority 0; policy drop;
        ct state invalid counter name invalid drop
        ct state established,related accept
        ip protocol icmp accept
        tcp dport { 80, 666 } ct state new accept
    }
    chain out { type filter hook output priority 0; policy drop;
        ct state invalid counter name invalid drop
        ct state new,established,related accept
    }
}"""


@pytest.mark.queues_on("be")
def test_beside_a_stateful_firewall(one: Cluster) -> None:
    be = one.be_hosts[0]
    settle(one)  # a FIN of a connection that began before the firewall would be invalid
    be.nft(FIREWALL)
    try:
        down(one, 2)
        upload_many(one, 4, 3 << 20)
        one.client.nft(LOSS)
        down(one)
        s = one.client.connect(one.VIP)
        s.sendall(REQUEST)
        s.shutdown(socket.SHUT_WR)
        assert len(fetch(s)) == 1024
        s.close()
        one.client.nft("")
        assert be.nft_counter("invalid") == 0
    finally:
        one.client.nft("")
        be.nft("")


def test_without_the_front_end_clients_are_refused_at_once(one: Cluster) -> None:
    assert one.fe
    with one.client.connect(one.VIP) as s:
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        assert s.recv(65536)
        one.fe.kill()
        try:
            with pytest.raises(ConnectionRefusedError):
                one.client.connect(one.VIP)
        finally:
            one.fe.start()
            one.connected()
    one.get("/1k", "-o", "/dev/null")


RULES = """
from tcpha.net import rules
from tcpha.net.rules import Rule
class Journal:
    def will_undo(self, **change): pass
vip = {"hook": "prerouting", "destination": "192.168.1.36", "dport": 80}
print(rules.install(Journal(), "tcphafe_test", [
    Rule("prerouting", mark=7), Rule(**vip, queue=(7, 2), flags=rules.SYN, bypass=True),
    Rule(**vip, queue=(7, 2)), Rule("prerouting", drop=True, protocol=None,
                                    destination=rules.LOOPBACK),
    Rule("postrouting", source="192.168.1.36", sport=80, queue=(9, 1), flags=rules.SYN_ACK),
    Rule("input", mark=8, destination="192.168.1.36", queue=(11, 1))],
    (rules.%s,)))
"""


@pytest.mark.parametrize("way", ["COMPAT", "IPTABLES"])
def test_rules_by_every_way(idle_host: Host, way: str) -> None:
    def seen() -> list[str]:
        return [idle_host.run("nft", "list", "ruleset").stdout,
                *(idle_host.run("iptables", "-t", t, "-S").stdout
                  for t in ("raw", "mangle", "filter"))]
    before = seen()
    idle_host.run(sys.executable, "-c", RULES % way)
    inside = "".join(seen())
    assert inside.count("tcphafe_test") >= 1 and "192.168.1.36" in inside
    if way == "IPTABLES":
        assert "--queue-balance 7:8 --queue-bypass" in inside and "--queue-num 9" in inside
        assert "-d 192.168.1.36/32 -m mark --mark 0x8 -j NFQUEUE --queue-num 11" in inside
    idle_host.run(sys.executable, "-c",
                  "from tcpha.net import rules; rules.remove('tcphafe_test')")
    assert [x for text in seen() for x in text.splitlines() if "tcpha" in x] == []
    if way == "COMPAT":  # iptables leaves its own empty tables behind
        assert seen() == before


@pytest.fixture
def idle_host() -> Iterator[Host]:
    bed = Bed()
    try:
        yield bed.host("one", "192.168.1.23")
    finally:
        bed.close()


def test_the_queue_numbers_of_others_are_left_to_them(idle_host: Host) -> None:
    text = ("from tcpha._fast.nfqueue import open_queues\n"
            "a = open_queues(2, 100); b = open_queues(2, 99)\n"
            "print([q.num for q in a + b])\n"
            "for q in a + b: q.close()\n")
    assert idle_host.run(sys.executable, "-c", text).stdout == "[100, 101, 102, 103]\n"


@pytest.mark.queues_on("be")
def test_flow_file_of_another_layout_is_not_read(one: Cluster) -> None:
    be = one.be[0]
    file = Path(be.run_dir / "tcphabe.flows")
    assert file.exists()
    be.kill()
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"  # the version
    file.write_bytes(data)
    be.start()
    one.connected()
    one.get("/1k", "-o", "/dev/null")


@pytest.mark.queues_on("be")
def test_rules_of_a_killed_run_go_with_another_datapath(one: Cluster) -> None:
    be = one.be[0]
    be.kill()
    # until there are others, or packets would pass as they are
    assert "table ip tcphabe_" in be.host.run("nft", "list", "ruleset").stdout
    be.options = ("--datapath", "ebpf")
    try:
        be.start()
        one.connected()
        assert "table ip tcphabe_" not in be.host.run("nft", "list", "ruleset").stdout
        one.get("/1k", "-o", "/dev/null")
    finally:
        be.stop()
        be.options = ()
        be.start()
    one.connected()
    one.get("/1k", "-o", "/dev/null")
