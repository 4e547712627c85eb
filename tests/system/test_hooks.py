# SPDX-License-Identifier: GPL-2.0-or-later
"""Others at the hook where our programs see what comes from the network: shaping, policers,
programs of container networks. We come first, and they see what we let pass."""
from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tcpha._fast.bpf import open_program, tcx_detach
from tcpha.lab.bed import BIN, Cluster, Daemon, Host, wait_for
from tests.support.client import digest, upload_many
from tests.support.downloads import begin_big, finish_big
from tests.support.hooks import NEXT, PASS, Others, at_tcx, names_on, no_room_at_tcx
from tests.support.host import state
from tests.support.servers import fill, listener, restart
from tests.support.state import settle

pytestmark = pytest.mark.modes("direct", "tunnel", "fast-direct")
EVERYTHING = ("u32", "match", "u32", "0", "0")
INGRESS = ("dev", "eth0", "ingress", "protocol", "all", "prio")


@pytest.fixture
def idle(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    fill(c.nginx[0])
    yield c
    c.close()


def accepting(host: Host, directory: Path) -> None:
    """A filter that ends the classification of all there is."""
    host.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    host.run("tc", "filter", "add", *INGRESS, "1", *EVERYTHING, "flowid", "1:1")


def policing(host: Host, directory: Path) -> None:
    """The qdisc of older guides, which has no egress."""
    host.run("tc", "qdisc", "add", "dev", "eth0", "handle", "ffff:", "ingress")
    host.run("tc", "filter", "add", "dev", "eth0", "parent", "ffff:", "protocol", "ip", "prio",
             "50", *EVERYTHING, "flowid", ":1")


def shaping(host: Host, directory: Path) -> None:
    """What is received takes a way round, through a device that can have a queue."""
    host.ip("link", "add", "ifb0", "type", "ifb")
    host.ip("link", "set", "ifb0", "up")
    host.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    host.run("tc", "filter", "add", *INGRESS, "1", *EVERYTHING, "action", "mirred", "egress",
             "redirect", "dev", "ifb0")


def passing(host: Host, directory: Path) -> None:
    """A program of somebody else that says what becomes of all packets."""
    Others(directory, PASS).attach(host, "eth0")


def states(hosts: list[Host]) -> list[dict[str, str]]:
    """tc shows filters at the parent that was named when one was added last."""
    return [{k: v.replace("parent ffff: ", "") for k, v in state(h).items()} for h in hosts]


def doctor(daemon: Daemon) -> list[dict[str, str]]:
    """Its findings about what stands before us."""
    done = daemon.host.run(str(BIN / "tcphactl"), "--run-dir", str(daemon.run_dir), "--json",
                           "doctor", "-c", str(daemon.config), check=False)
    return [x for x in json.loads(done.stdout) if x["check"].endswith(": tc")]


def in_front(daemon: Daemon) -> list[dict[str, Any]]:
    return list(daemon.ctl("status")["host"]["in_front"])


def serves(c: Cluster) -> None:
    out = c.bed.dir / "big"
    for _ in range(10):
        assert c.get("/a.jpg") == "be1\n"
    c.get("/big", "-o", str(out))
    assert digest(out) == digest(c.nginx[0].root / "big")
    upload_many(c, 4, 1 << 20, "-H", "Expect:")
    settle(c)


@pytest.mark.parametrize("other", [accepting, policing, shaping, passing])
def test_we_come_first(idle: Cluster, other: Callable[[Host, Path], None]) -> None:
    hosts = [idle.fe_host, *idle.be_hosts]
    for host in hosts:
        other(host, idle.bed.dir)
    before = states(hosts)
    idle.start()
    assert idle.fe
    serves(idle)
    for daemon in (idle.fe, idle.be[0]):
        assert not in_front(daemon) and not doctor(daemon)
    if other is shaping:  # which sees what is the server's, but for what the front end answers
        seen = idle.be_hosts[0].run("tc", "-s", "filter", "show", "dev", "eth0", "ingress").stdout
        assert int(re.findall(r"Sent (\d+) bytes", seen)[0]) > 4 << 20
    assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
    assert states(hosts) == before


def with_tc(idle: Cluster, stack: ExitStack) -> None:
    """The daemons find no room at tcx, on neither host."""
    for host in (idle.fe_host, *idle.be_hosts):
        stack.enter_context(no_room_at_tcx(host, idle.bed.dir))


@pytest.mark.parametrize("priority", ["10", "3"])
def test_first_at_tc_if_there_is_room(idle: Cluster, priority: str) -> None:
    """Without tcx a filter of ours needs a priority below those of others, and has the fourth last
    one of its own if others begin with a higher one."""
    fe, be = idle.fe_host, idle.be_hosts[0]
    with ExitStack() as stack:
        with_tc(idle, stack)
        policing(be, idle.bed.dir)
        fe.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        fe.run("tc", "filter", "add", *INGRESS, priority, *EVERYTHING, "flowid", "1:1")
        before = states([fe, be])
        idle.start()
        assert idle.fe
        shown = fe.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
        ours = re.search(r"pref (\d+) bpf .* fe_ingress", shown)
        if priority == "10":
            assert ours and ours[1] == "8"
            serves(idle)
            wait_for(lambda: in_front(idle.fe), "a look")
            assert in_front(idle.fe)[0]["what"] == ["63 tcx programs"]
        else:  # there is none
            assert ours and ours[1] == "200"
            wait_for(lambda: in_front(idle.fe), "a look")
            assert "a u32 filter of priority 3" in in_front(idle.fe)[0]["what"]
        assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
        assert states([fe, be]) == before


@pytest.mark.parametrize("to", ["tcx", "tc"])
def test_from_one_hook_to_the_other(idle: Cluster, to: str) -> None:
    """As by an upgrade: what a killed run has at the other hook serves until there is something in
    its place, and leaves then."""
    hosts = [idle.fe_host, *idle.be_hosts]
    before = states(hosts)
    with ExitStack() as stack:
        if to == "tcx":
            with_tc(idle, stack)
        idle.start()
        assert idle.fe
        s, begun = begin_big(idle)
        wait_for(lambda: idle.be[0].ctl("status")["live"] == 1, "the download")
        for daemon in (idle.fe, idle.be[0]):
            daemon.kill()
        if to == "tcx":
            stack.close()
        else:
            with_tc(idle, stack)
            assert "fe_ingress" in names_on(idle.fe_host, "eth0")
        for daemon in (idle.fe, idle.be[0]):
            daemon.start()
        idle.connected()
        finish_big(idle, s, begun)
        assert idle.get("/a.jpg") == "be1\n"
        for host, name in zip(hosts, ("fe_ingress", "be_ingress"), strict=True):
            assert names_on(host, "eth0").count(name) == 1
        assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
    assert states(hosts) == before


def test_a_run_whose_journal_is_lost_leaves_no_program(idle: Cluster) -> None:
    """The next one knows what is its predecessor's."""
    idle.start()
    assert idle.fe
    for daemon in (idle.fe, idle.be[0]):
        daemon.kill()
        shutil.rmtree(daemon.run_dir)
        daemon.start()
    idle.connected()
    assert names_on(idle.fe_host, "eth0") == ["fe_ingress"]
    assert names_on(idle.be_hosts[0], "eth0") == ["be_ingress"]
    assert idle.get("/a.jpg") == "be1\n"
    assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
    assert names_on(idle.fe_host, "eth0") == names_on(idle.be_hosts[0], "eth0") == []


def test_what_stands_before_us_is_named(idle: Cluster) -> None:
    """Who wants to come first may: but the administrator is told."""
    idle.start()
    assert idle.fe
    fe, daemon = idle.fe_host, idle.fe
    others = Others(idle.bed.dir, NEXT)
    assert not in_front(daemon)
    others.attach(fe, "eth0", behind=at_tcx(fe, "eth0")[-1][0])
    others.attach(fe, "eth0")
    assert names_on(fe, "eth0") == ["other", "fe_ingress", "other"]
    fe.run("ip", "link", "set", "dev", "eth0", "xdpgeneric", "obj", str(others.file), "sec", "xdp")
    both = ["an XDP program", "1 tcx program"]
    wait_for(lambda: in_front(daemon) == [{"interface": "eth0", "what": both}], "the finding")
    assert "on eth0: an XDP program and 1 tcx program before ours" in daemon.log.read_text()
    found = doctor(daemon)
    assert [x["state"] for x in found] == ["warning"] and "TCX_NEXT" in found[0]["what to do"]
    assert idle.get("/a.jpg") == "be1\n"
    others.detach(fe, "eth0")
    fe.run("ip", "link", "set", "dev", "eth0", "xdpgeneric", "off")
    wait_for(lambda: not in_front(daemon), "its end")
    assert names_on(fe, "eth0") == ["fe_ingress"]


def test_daemons_on_one_host_are_no_strangers(idle: Cluster) -> None:
    """Whichever is started, or started again, or killed: none takes the other for somebody that
    stands before it."""
    idle.start()
    assert idle.fe
    fe = idle.fe
    be = Daemon(fe.host, "be", idle.be_text(fe.host).replace(idle.VIP, "192.168.1.37"))

    def looked() -> None:
        for daemon in (fe, be):
            daemon.ctl("status")
            assert not in_front(daemon)
        assert sorted(names_on(fe.host, "eth0")) == ["be_ingress", "fe_ingress"]
        assert idle.get("/a.jpg") == "be1\n"
    looked()
    first, second = names_on(fe.host, "eth0")
    fe.stop()
    fe.start()
    idle.connected()
    looked()
    assert names_on(fe.host, "eth0") == [second, first]
    be.kill()
    be.start()
    looked()
    assert be.stop() == 0


def test_programs_of_ours_keep_their_order(idle: Cluster) -> None:
    """One that somebody has taken away comes back where it was, between another one of ours and
    what is somebody else's."""
    restart(idle.nginx[0], listener(device="eth0"))
    others = Others(idle.bed.dir, NEXT)
    be = idle.be_hosts[0]
    others.attach(be, "eth0")
    idle.start()
    want = ["be_forged", "be_ingress", "other"]
    assert names_on(be, "eth0") == want

    def detach() -> None:
        fd = open_program(at_tcx(be, "eth0")[1][0])
        tcx_detach(socket.if_nametoindex("eth0"), fd)
    be.inside(detach)
    assert names_on(be, "eth0") == ["be_forged", "other"]
    be.ip("link", "set", "eth0", "up")
    wait_for(lambda: names_on(be, "eth0") == want, "the program")
    assert idle.get("/a.jpg") == "be1\n"


@pytest.mark.parametrize("named", [False, True])
def test_renamed(idle: Cluster, named: bool) -> None:
    """An interface that gets another name keeps its program if it is still one of ours, and is left
    without one."""
    if named:
        idle.fe_conf = "interface = eth0\ninterface = eth1"
    fe = idle.fe_host
    fe.plug("eth1", f"{fe.port}b")
    fe.link_up("eth1")
    idle.start()
    assert idle.fe
    assert names_on(fe, "eth1") == ["fe_ingress"]
    fe.ip("link", "set", "eth1", "down")
    fe.ip("link", "set", "eth1", "name", "lan1")
    fe.ip("link", "set", "lan1", "up")
    journal = idle.fe.run_dir / "tcphafe.journal"
    wait_for(lambda: ("lan1" in journal.read_text()) != named and "eth1" not in journal.read_text(),
             "a look")
    assert names_on(fe, "lan1") == ["fe_ingress"]
    assert idle.fe.stop() == 0
    assert names_on(fe, "lan1") == names_on(fe, "eth0") == []
