# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon does all the time goes on, whatever fails."""
from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpha import tasks
from tcpha._fast import message
from tcpha.config import ConfigError, load
from tcpha.control.hello import Hello, HelloError, call
from tcpha.lab.bed import Cluster, Daemon, wait_for
from tests.support.daemons import lines
from tests.support.memory import no_kernel_memory

cluster_modes = pytest.mark.modes("direct")  # how packets travel is not the point


class Fails:
    """The first times."""

    def __init__(self, times: int):
        self.left = times

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise ValueError(f"{self.left} left")

    async def task(self) -> None:
        self()


def said(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(f"{name} failed" in r.getMessage() for r in caplog.records)


def test_tasks_and_threads_begin_again(caplog: pytest.LogCaptureFixture) -> None:
    """Each failure counts, and one line tells of those of a minute."""
    before = tasks.deaths()
    asyncio.run(tasks.persist("a task", Fails(3).task))
    asyncio.run(tasks.persist("a task of its own", Fails(3).task, again=False))
    tasks.persistent_thread("a thread", Fails(2)).join()
    after = tasks.deaths()
    for name, count in ("a task", 3), ("a task of its own", 1), ("a thread", 2):
        assert after[name] - before.get(name, 0) == count and said(caplog, name) == 1


def test_callbacks_and_other_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = tasks.deaths()

    async def fail() -> None:
        loop = asyncio.get_running_loop()
        tasks.watch(loop)
        loop.call_soon(Fails(1))
        thread = threading.Thread(target=Fails(1), name="worker-1")
        thread.start()
        await asyncio.to_thread(thread.join)
    asyncio.run(fail())
    for name in ("callback", "worker"):
        assert tasks.deaths()[name] == before.get(name, 0) + 1


@cluster_modes
def test_a_reload_that_fails_is_done_again(mode: dict[str, Any]) -> None:
    """By either daemon: the kernel has no memory for a thread, for a while."""
    c = Cluster(1, **mode, rules=[(0, ".*")], fe_conf="admin = 9110", be_conf="admin = 9111")
    try:
        assert c.fe
        for d, host, port in (c.fe, c.fe_host, 9110), (c.be[0], c.be_hosts[0], 9111):
            d.config.write_text(d.config.read_text() + "dbglevel = 2\n")
            with no_kernel_memory(d, "clone3,clone"):
                d.process.send_signal(signal.SIGHUP)
                wait_for(lambda d=d: lines(d, "internal error: reload failed"), "the failure")
            wait_for(lambda d=d: d.ctl("status")["dbglevel"] == 2, "the reload")
            assert lines(d, "internal error: reload failed") == 1
            assert d.ctl("status")["deaths"]["reload"] >= 1
            page = host.run("curl", "-sS", f"http://127.0.0.1:{port}/metrics").stdout
            assert 'tcpha_deaths_total{task="reload"}' in page
    finally:
        c.close()


def front_end(servers: int, *more: str) -> str:
    return "\n".join(["vaddr = 10.1.0.100", *more, *(
        f"server = 10.0.{n >> 8}.{n & 255}" for n in range(1, servers + 1)), ""])


@pytest.mark.parametrize("text, what", [
    (front_end(256), "2: server: 256 back ends are more than 255; remove some"),
    (front_end(205, "connperbe = 5"), "2: connperbe: 205 back ends with 5 control connections each "
                                      "make 1025, more than 1023; lower connperbe to 4")],
    ids=["back ends", "connections"])
def test_sums_are_checked(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "fe.conf"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load("fe", str(file))
    assert f"{file}:{what}" in str(error.value)


@pytest.mark.parametrize("text", [front_end(255), front_end(204, "connperbe = 5")],
                         ids=["back ends", "connections"])
def test_as_many_as_there_may_be(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fe.conf"
    file.write_text(text)
    load("fe", str(file))


def test_rules_that_no_registration_has_room_for(tmp_path: Path) -> None:
    file = tmp_path / "be.conf"
    file.write_text("vaddr = 10.0.0.100\nraddr = 10.0.0.2\nuaddr = 10.0.0.3\ndregister = 1\n"
                    "feaddr = 10.0.0.1\n" + f"rule = {'x' * 700}\n" * 93)
    with pytest.raises(ConfigError, match=r"98: rule: the rules make .* has room for 65488"):
        load("be", str(file))
    file.write_text(file.read_text().rpartition("rule")[0])
    load("be", str(file))


@cluster_modes
def test_a_reload_counts_the_back_ends_of_before(mode: dict[str, Any]) -> None:
    """Each list has room, both together have not: nothing of the second one is taken over."""
    c = Cluster(1, **mode, rules=[(0, ".*")])
    try:
        assert c.fe
        fe = c.fe
        text = c.fe_text()

        def listed(net: int) -> str:
            return text + "".join(f"server = 192.168.{net}.{n}\n" for n in range(1, 201))
        fe.config.write_text(listed(2))
        fe.ctl("reload")
        before = fe.ctl("servers")
        assert len(before) == 201
        fe.config.write_text(listed(3) + "dbglevel = 2\nrule = 192.168.3.1 gif$\n")
        with pytest.raises(Exception, match="401 back ends are more than 255"):
            fe.ctl("reload")
        assert [s["server"] for s in fe.ctl("servers")] == [s["server"] for s in before]
        assert fe.ctl("status")["dbglevel"] == 0 and len(fe.ctl("rules")) == 1
        assert lines(fe, "reload refused, nothing was changed: 401 back ends") == 1
        fe.config.write_text(text)
        fe.ctl("reload")
        fe.config.write_text(listed(3))

        def reloaded() -> bool:  # those of before have gone
            with contextlib.suppress(Exception):
                fe.ctl("reload")
            return len(fe.ctl("servers")) == 201
        wait_for(reloaded, "the other list")
        assert fe.ctl("servers")[0]["state"] == "up" and not any(
            fe.ctl("status")["deaths"].values())
    finally:
        c.close()


@pytest.fixture
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@cluster_modes
@pytest.mark.usefixtures("descriptors")
def test_control_connections_for_which_there_is_no_room(mode: dict[str, Any]) -> None:
    """A back end says so, and goes on with those that it has."""
    c = Cluster(1, **mode, rules=[(0, ".*")])
    made: list[socket.socket] = []

    async def connect(be: Daemon) -> None:
        mine = Hello("fe", c.VIP, instance="another")
        for n in range(1100):
            if n % 32 == 0:
                for s in made:  # or they pass for those of a front end that hangs
                    s.send(message.encode(message.PING, n))
            s = socket.socket()
            s.setblocking(False)
            await asyncio.get_running_loop().sock_connect(s, (be.host.address, 666))
            await call(s, mine, None)
            made.append(s)
    try:
        be = c.be[0]
        with pytest.raises(HelloError, match="1024 control connections already"):
            c.client.inside(lambda: asyncio.run(connect(be)))
        assert len(made) == 1022  # two are the front end's
        assert not any(be.ctl("status")["deaths"].values())
        for s in made:
            s.close()
        wait_for(lambda: len(be.ctl("status")["frontends"]) == 2 and
                 be.ctl("status")["frontends"][1]["connections"] == 0, "their end")
        c.connected()
    finally:
        c.close()
