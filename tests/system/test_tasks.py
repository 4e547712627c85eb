# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon does all the time goes on, whatever fails."""
from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha._fast import message
from tcpha.control.hello import Hello, HelloError, call
from tcpha.lab.bed import Cluster, Daemon, wait_for
from tests.support.daemons import lines
from tests.support.memory import no_kernel_memory

pytestmark = pytest.mark.modes("direct")  # how packets travel is not the point


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
