# SPDX-License-Identifier: GPL-2.0-or-later
"""A reload: what it compiles is compiled once, and beside everything else."""
from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, wait_for
from tests.support.daemons import REGISTER, front, logged, secret_file, start_back
from tests.support.patterns import MANY

pytestmark = pytest.mark.modes("direct")  # how packets travel is not the point


@pytest.fixture
def one(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        c.nginx[0].file("1k", size=1024)
        yield c
    finally:
        c.close()


def with_rules(c: Cluster, patterns: list[str], *lines: str) -> str:
    address = c.be_hosts[0].address
    return "\n".join([c.fe_text(), *(f"rule = {address} {p}" for p in patterns), *lines, ""])


def answers_until(done: Future[Any], fe: Daemon) -> int:
    """How many commands are answered before something has been done."""
    count = 0
    while not done.done():
        fe.ctl("status")
        count += not done.done()
    return count


def test_the_loop_answers_while_a_reload_compiles(one: Cluster) -> None:
    fe = front(one)
    text = fe.config.read_text()
    with ThreadPoolExecutor(1) as pool:
        fe.config.write_text(with_rules(one, MANY))
        assert answers_until(pool.submit(fe.ctl, "reload"), fe) > 20
        assert len(fe.ctl("rules")) == len(MANY) + 1
        fe.config.write_text(with_rules(one, MANY[::-1], "rule = 192.168.1.33 jpg(",
                                        "dbglevel = 3"))
        refused = pool.submit(fe.ctl, "reload")
        assert answers_until(refused, fe) > 20
        with pytest.raises(Exception, match=r"'jpg\(' does not compile"):
            refused.result()
        assert fe.ctl("rules")[1]["pattern"] == MANY[0] and fe.ctl("status")["dbglevel"] == 0
        # the same patterns again: nothing is left to compile
        fe.config.write_text(with_rules(one, MANY, "dbglevel = 1"))
        fe.ctl("reload")
        assert fe.ctl("status")["dbglevel"] == 1
    assert one.get("/1k?site1", "-o", "/dev/null", "-w", "%{http_code}") == "200"
    fe.config.write_text(text)
    fe.ctl("reload")
    assert len(fe.ctl("rules")) == 1


def test_reloads_that_come_meanwhile_are_one(one: Cluster) -> None:
    fe = front(one)
    fe.config.write_text(with_rules(one, MANY))
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(fe.ctl, "reload")
        answers = 0
        while answers < 5 and not first.done():
            fe.ctl("status")
            answers += 1
        last = fe.config.with_name("last")  # the first one may be reading yet
        last.write_text(with_rules(one, ["^/last"]))
        last.replace(fe.config)
        others = [pool.submit(fe.ctl, "reload") for _ in range(8)]
        for _ in range(8):
            fe.process.send_signal(signal.SIGHUP)
        for done in (first, *others):
            assert done.result() == {"restart_needed_for": []}
    assert [r["pattern"] for r in fe.ctl("rules")] == [".*", "^/last"]
    assert len(re.findall("configuration reloaded", fe.log.read_text())) <= 3


def test_a_stop_does_not_wait_for_a_reload(one: Cluster) -> None:
    """Nor does that touch what is closed by then."""
    fe = front(one)
    fe.config.write_text(with_rules(one, [*MANY, *(f"{p}|gif$" for p in MANY)]))
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(fe.run_dir / "tcphafe.sock"))
        s.sendall(json.dumps({"command": "reload"}).encode() + b"\n")
        for _ in range(5):
            fe.ctl("status")
        assert fe.stop() == 0
        assert b"the daemon stops" in s.recv(4096)
    assert not re.search("reload|internal error", fe.log.read_text())


def test_the_loop_answers_while_a_registration_compiles(mode: dict[str, Any]) -> None:
    """And its end needs nothing compiled: it holds at once."""
    c = Cluster(1, **mode, start=False, rules=[])
    try:
        secret = f"secret = {secret_file(c, 'secret')}"
        c.fe = Daemon(c.fe_host, "fe", "\n".join([
            "raddr = 192.168.1.23", f"vaddr = {c.VIP}", f"datapath = {c.datapath[0]}", secret,
            *(f"rule = 192.168.1.23 {p}" for p in MANY), ""]))
        be = start_back(c, 0, secret, REGISTER, "rule = gif$")
        answers = 0
        while not c.fe.ctl("servers"):  # its rule is being compiled
            answers += 1
        assert answers > 20
        wait_for(logged(be, "registered at the front end"), "the answer to the registration")
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(be.stop)
            wait_for(logged(c.fe, "its registration has ended"), "the end of the registration")
            assert c.fe.ctl("servers") == [] and len(c.fe.ctl("rules")) == len(MANY)
            assert ended.result() == 0
    finally:
        c.close()
