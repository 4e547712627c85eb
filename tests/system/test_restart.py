# SPDX-License-Identifier: GPL-2.0-or-later
"""A front end that is killed loses no connection that it has handed over: its tables outlive it
(datapath ebpf), or back ends tell the next run what they have."""
from __future__ import annotations

import shutil
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tests.support.bpf import Bpf, number
from tests.support.client import REQUEST
from tests.support.daemons import front
from tests.support.downloads import COUNT, begin, finish
from tests.support.hooks import take_away
from tests.support.state import settle

pytestmark = pytest.mark.modes("tunnel", "fast-direct")
VERSION = 64  # offset in struct tcpha_state


@pytest.fixture
def busy(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(2, **mode, rules=[(1, "jpg"), (0, ".*")], fe_conf="headtimeout = 3")
    try:
        for n in c.nginx:
            n.file("1k", size=1024)
            n.file("big", size=8 << 20)
            (n.root / "big.jpg").write_bytes((n.root / "big").read_bytes())
        yield c
    finally:
        c.close()


def kill(c: Cluster) -> None:
    """When the front end has none in its hands: such would be lost."""
    wait_for(lambda: front(c).ctl("status")["in_hand"] == 0, "all handed over")
    front(c).kill()


def test_downloads_outlive_the_front_end(busy: Cluster) -> None:
    want = (busy.nginx[0].root / "big").read_bytes()
    held = [begin(busy) for _ in range(COUNT)]
    ports = {f"{busy.client.address}:{s.getsockname()[1]}" for s in held}
    kill(busy)
    for s in held[:COUNT // 2]:  # nobody is needed to forward their ACKs and the next request
        finish(s, want)
    front(busy).start()
    busy.connected()
    rows = [r for r in front(busy).ctl("conns") if r["client"] in ports]
    assert len(rows) >= COUNT // 2
    assert {(r["target"], r["server"]) for r in rows} == {("/big", busy.be_hosts[0].address)}
    for s in held[COUNT // 2:]:
        finish(s, want)
    settle(busy)
    assert busy.get("/1k", "-o", "/dev/null", "-w", "%{http_code}") == "200"


@pytest.mark.parametrize("first", ["fe", "be"])
def test_downloads_outlive_both_daemons(busy: Cluster, first: str) -> None:
    want = (busy.nginx[0].root / "big").read_bytes()
    held = [begin(busy) for _ in range(COUNT)]
    both = [front(busy), *busy.be]
    kill(busy)
    for d in busy.be:
        d.kill()
    for d in both if first == "fe" else both[::-1]:
        d.start()
    busy.connected()
    for s in held:
        finish(s, want)
    settle(busy)


def test_killed_again_and_again(busy: Cluster) -> None:
    want = (busy.nginx[0].root / "big").read_bytes()
    held = []
    for _ in range(4):
        held += [begin(busy) for _ in range(5)]
        kill(busy)
        front(busy).start()
        busy.connected()
    for s in held:
        finish(s, want)
    settle(busy)


@pytest.mark.modes("fast-direct", "fast-tunnel")
@pytest.mark.parametrize("when", ["while nobody listens", "afterwards"])
def test_a_handshake_outlives_the_front_end(busy: Cluster, when: str) -> None:
    """On the packet path nobody remembers it; but the key of its cookie is kept. On the socket path
    it would have been in the killed front end's hands."""
    wait_for(lambda: busy.get("/1k", "-o", "/dev/null") == "" and
             front(busy).ctl("status")["counters"]["fast"], "the packet path")
    # the last of them in two segments, and with its FIN
    held = [busy.client.connect(busy.VIP) for _ in range(8)]
    kill(busy)
    if when == "afterwards":
        front(busy).start()
        busy.connected()
    for s in held:
        s.sendall(REQUEST[:20] if s is held[-1] else REQUEST)
    held[-1].sendall(REQUEST[20:])
    held[-1].shutdown(socket.SHUT_WR)
    if when != "afterwards":
        with pytest.raises(ConnectionRefusedError):
            busy.client.connect(busy.VIP)
        front(busy).start()
        busy.connected()
    for s in held:
        s.settimeout(30)
        assert s.recv(65536).startswith(b"HTTP/1.1 200 ")
        s.close()
    settle(busy)


def test_back_ends_that_are_no_longer_listed_keep_what_they_have(busy: Cluster) -> None:
    want = (busy.nginx[0].root / "big").read_bytes()
    held = [begin(busy, b"/big.jpg"), begin(busy)]
    kill(busy)
    second = busy.be_hosts[1].address
    text = front(busy).config.read_text()
    kept = text.replace(f"server = {second} 666\n", "").replace(f"rule = {second} jpg\n", "")
    front(busy).config.write_text(kept)
    front(busy).start()
    wait_for(lambda: front(busy).ctl("servers")[0]["state"] == "up", "the first back end")
    assert sorted(r["server"] for r in front(busy).ctl("conns")) == \
        sorted(h.address for h in busy.be_hosts)
    finish(held[0], (busy.nginx[1].root / "big").read_bytes())
    finish(held[1], want)
    front(busy).config.write_text(text)
    front(busy).ctl("reload")
    busy.connected()
    settle(busy)


def lose_all(c: Cluster) -> None:
    """As if another host took the front end's place."""
    shutil.rmtree(front(c).run_dir)
    c.fe_host.ip("addr", "del", c.VIP, "dev", "eth0")
    take_away(c.fe_host, "eth0")


def check_rebuilt(busy: Cluster, what: str) -> None:
    want = [(n.root / "big").read_bytes() for n in busy.nginx]
    held = [(begin(busy, path), n) for n, path in enumerate((b"/big", b"/big.jpg"))
            for _ in range(COUNT)]
    victims = [front(busy), *(busy.be if "all" in what else [])]
    if what == "stopped":
        wait_for(lambda: front(busy).ctl("status")["in_hand"] == 0, "all handed over")
        assert front(busy).stop() == 0
    else:
        kill(busy)
        for d in victims[1:]:
            d.kill()
        if busy.datapath[0] == "ebpf":
            lose_all(busy)
    for d in victims[::-1 if "back ends first" in what else 1]:
        d.start()
    busy.connected()
    for s, n in held:
        finish(s, want[n])
    assert front(busy).ctl("status")["counters"]["restored"] == 2 * COUNT
    assert f"{2 * COUNT} connections of an earlier run go on" in front(busy).log.read_text()
    settle(busy)
    assert front(busy).ctl("conns") == []


@pytest.mark.modes("tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct", "nfqueue-tunnel",
                   "ebpf-nfqueue", "nfqueue-ebpf")
def test_a_table_that_is_lost_is_rebuilt(busy: Cluster) -> None:
    """Clients go on meanwhile, and none of them hears that there is no such connection."""
    check_rebuilt(busy, "killed")


@pytest.mark.modes("fast-direct", "nfqueue-tunnel")
@pytest.mark.parametrize("what", ["stopped", "all killed, front end first",
                                  "all killed, back ends first"])
def test_other_ways_to_lose_a_table(busy: Cluster, what: str) -> None:
    check_rebuilt(busy, what)


def test_tables_of_another_version_are_not_read(busy: Cluster) -> None:
    want = (busy.nginx[0].root / "big").read_bytes()
    held = [begin(busy) for _ in range(COUNT)]
    bpf = Bpf(busy.fe_host, ("fe_ingress",))
    state = bytearray(bpf.get("state", number(0)))
    struct.pack_into("=I", state, VERSION, 99)
    kill(busy)
    bpf.put("state", number(0), bytes(state))
    front(busy).start()
    busy.connected()
    assert "of another version" in front(busy).log.read_text()
    for s in held:
        finish(s, want)
    assert busy.get("/1k", "-o", "/dev/null", "-w", "%{http_code}") == "200"
    settle(busy)


# Back ends that were drained

def states(c: Cluster) -> list[str]:
    """Once both are connected."""
    c.connected()
    return [s["state"] for s in front(c).ctl("servers")]


@pytest.mark.modes("tunnel", "fast-direct", "nfqueue-direct")
def test_drained_back_ends_stay_so(busy: Cluster) -> None:
    first = busy.be_hosts[0].address
    text = front(busy).config.read_text()
    assert states(busy) == ["up", "up"]
    front(busy).ctl("drain", first)
    front(busy).ctl("reload")
    assert states(busy) == ["draining", "up"]
    for end in (front(busy).stop, lambda: kill(busy)):
        end()
        front(busy).start()
        assert states(busy) == ["draining", "up"]
        assert busy.get("/1k", "-o", "/dev/null", "-w", "%{http_code}") == "503"
    # taken out of the configuration while nobody looks: forgotten
    front(busy).stop()
    front(busy).config.write_text(text.replace(f"server = {first} 666\n", "").replace(
        f"rule = {first} .*\n", ""))
    front(busy).start()
    front(busy).config.write_text(text)
    front(busy).ctl("reload")
    assert states(busy) == ["up", "up"]
    front(busy).ctl("drain", first)
    front(busy).ctl("undrain", first)
    front(busy).stop()
    front(busy).start()
    assert states(busy) == ["up", "up"]
    settle(busy)


@pytest.mark.modes("tunnel")
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"192.168.1.33": 1}', "\0"])
def test_a_damaged_list_of_drained_back_ends(busy: Cluster, text: str) -> None:
    front(busy).ctl("drain", busy.be_hosts[0].address)
    front(busy).stop()
    (front(busy).run_dir / "tcphafe.drained").write_text(text)
    front(busy).start()
    assert states(busy) == ["up", "up"]
    assert front(busy).log.read_text().count("tcphafe.drained is damaged") == 1
