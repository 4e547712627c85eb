# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands in the way of one step of stopping keeps none of the others from being done."""
from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpha.backend.service import LEAVE
from tcpha.lab.bed import Cluster, Daemon, Host, sh, wait_for
from tests.support.client import KEEP
from tests.support.daemons import lines
from tests.support.host import state

pytestmark = pytest.mark.modes("direct", "nfqueue-direct")
LONG = ".*|" + "x" * 2000  # a rule that makes rows of the connection table long


@pytest.fixture
def idle(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(1, **mode, rules=[(0, LONG)], start=False)
    try:
        c.nginx[0].file("1k", size=1024)
        yield c
    finally:
        c.close()


def hosts(c: Cluster) -> list[Host]:
    return [c.fe_host, *c.be_hosts]


def daemons(c: Cluster) -> list[Daemon]:
    assert c.fe
    return [c.fe, *c.be]


def table(d: Daemon) -> Path:
    return d.run_dir / "tcpha_fe_conn"


def test_what_others_do_in_the_control_directory(idle: Cluster) -> None:
    """An editor leaves a swap file, and somebody mistakes names."""
    before = [state(h) for h in hosts(idle)]
    idle.start()
    fe, be = daemons(idle)
    for d in fe, be:
        directory = d.run_dir / f"ktcpha{d.role}"
        (directory / ".dbglevel.swp").write_text("")
        (directory / "unload").unlink()
        (directory / "unload").mkdir()
    table(fe).unlink()
    table(fe).mkdir()
    for d in fe, be:
        assert d.stop() == 0
        assert lines(d, "while stopping: unload:") == 1
        assert lines(d, f"ktcpha{d.role} stays: Directory not empty") == 1
        assert {p.name for p in d.run_dir.iterdir()} - {"tcpha_fe_conn"} == {f"ktcpha{d.role}"}
    assert [state(h) for h in hosts(idle)] == before


def test_readers_that_take_their_time(idle: Cluster) -> None:
    """One after the other has all of the table; none keeps us."""
    before = [state(h) for h in hosts(idle)]
    idle.start()
    fe, be = daemons(idle)
    clients = []
    for _ in range(60):
        clients.append(idle.client.connect(idle.VIP))
        clients[-1].sendall(KEEP)
        assert clients[-1].recv(4096).startswith(b"HTTP/1.1 200")
    with open(table(fe), "rb", buffering=0) as pager, socket.socket(socket.AF_UNIX) as talker:
        assert pager.read(10)
        text = sh("timeout", "30", "cat", str(table(fe))).stdout
        assert text.count(LONG) == 60 and len(text) > 1 << 16
        with open(table(fe), "rb", buffering=0) as another, \
                open(fe.run_dir / "ktcphafe" / "dbglevel") as level:
            assert another.read(10) and level.read()
            talker.connect(str(fe.run_dir / "tcphafe.sock"))
            talker.sendall(b'{"command": "conns"}\n' * 50)
            assert fe.stop() == 0 and be.stop() == 0
    for s in clients:
        s.close()
    assert "internal error" not in fe.log.read_text() + be.log.read_text()
    assert [list(d.run_dir.iterdir()) for d in (fe, be)] == [[], []]
    assert [state(h) for h in hosts(idle)] == before


def test_a_journal_that_cannot_be_written(idle: Cluster) -> None:
    """What is undone is to be taken out of it."""
    before = [state(h) for h in hosts(idle)]
    idle.start()
    for d in daemons(idle):
        (d.run_dir / f"tcpha{d.role}.new").mkdir()  # in its way
        assert d.stop() == 0
        assert [p.name for p in d.run_dir.iterdir()] == [f"tcpha{d.role}.new"]
    assert [state(h) for h in hosts(idle)] == before


@pytest.mark.parametrize("role", ["fe", "be"])
def test_a_start_that_fails_late(idle: Cluster, role: str) -> None:
    """When all of the host is set up already: there is no place for the control files."""
    host = idle.fe_host if role == "fe" else idle.be_hosts[0]
    text = idle.fe_text() if role == "fe" else idle.be_text(host)
    before = state(host)
    directory = host.dir / f"run-{role}"
    directory.mkdir()
    (directory / f"ktcpha{role}").write_text("")
    with pytest.raises(RuntimeError, match="cannot serve"):
        Daemon(host, role, text)
    assert [p.name for p in directory.iterdir()] == [f"ktcpha{role}"]
    wait_for(lambda: state(host) == before, "the end")


def test_a_reload_while_a_back_end_stops() -> None:
    """It comes too late. A second unload does not keep front ends from hearing that we leave."""
    c = Cluster(1, rules=[(0, ".*")], fastpath=True)
    try:
        assert c.fe
        be = c.be[0]
        with open(be.config, "a") as f:
            f.write("dbglevel = 1\n")
        c.fe.process.send_signal(signal.SIGSTOP)  # it does not answer, and is waited for
        be.ctl("unload")
        be.ctl("unload")
        wait_for(lambda: "tcphabe: stopping" in be.log.read_text(), "the end to begin")
        began = time.monotonic()
        be.process.send_signal(signal.SIGHUP)
        assert be.process.wait(30) == 0
        assert time.monotonic() - began > LEAVE / 2
        said = be.log.read_text()
        assert "reloaded" not in said and "Traceback" not in said
    finally:
        if c.fe:
            c.fe.process.send_signal(signal.SIGCONT)
        c.close()


def test_a_reload_while_a_front_end_stops() -> None:
    """It waits for somebody to take the virtual address away, with nothing that could reload."""
    c = Cluster(1, rules=[(0, ".*")], fe_conf="announce = off", start=False)
    try:
        c.fe_host.ip("addr", "add", f"{c.VIP}/32", "dev", "eth0")
        fe = c.fe = Daemon(c.fe_host, "fe", c.fe_text())
        fe.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "tcphafe: stopping" in fe.log.read_text(), "the end to begin")
        fe.process.send_signal(signal.SIGHUP)
        c.fe_host.ip("addr", "del", f"{c.VIP}/32", "dev", "eth0")
        assert fe.process.wait(30) == 0
        said = fe.log.read_text()
        assert "reloaded" not in said and "Traceback" not in said
    finally:
        c.close()
