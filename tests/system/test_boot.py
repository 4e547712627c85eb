# SPDX-License-Identifier: GPL-2.0-or-later
"""Started before the host is ready, or by who has his own ideas of a process."""
from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tcpha.daemon.service import WAIT, WAIT_STEP
from tcpha.lab.bed import BIN, Cluster, Daemon, Host, sh, wait_for
from tests.support.host import state

pytestmark = pytest.mark.modes("fast-direct", "nfqueue-direct")


@pytest.fixture
def idle(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    c.nginx[0].file("index.html", b"x\n")
    yield c
    c.close()


def parts(c: Cluster, role: str) -> tuple[Host, str]:
    host = c.fe_host if role == "fe" else c.be_hosts[0]
    return host, c.fe_text() if role == "fe" else c.be_text(host)


def without_address(host: Host) -> None:
    host.ip("addr", "del", f"{host.address}/24", "dev", "eth0")


def add_address(host: Host) -> None:
    host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")


def begin(host: Host, role: str, text: str) -> subprocess.Popen[str]:
    """Start a daemon, and do not wait for it."""
    config = host.dir / "early.conf"
    config.write_text(text)
    return host.start(str(BIN / f"tcpha{role}"), "-f", "-c", str(config), "--run-dir",
                      str(host.dir / "run"), stderr=open(host.dir / "early.log", "w"))


def waits(host: Host) -> bool:
    return "waiting: raddr" in (host.dir / "early.log").read_text()


@pytest.mark.parametrize("role", ["fe", "be"])
def test_under_a_service_manager_it_waits_for_its_address(idle: Cluster, role: str) -> None:
    """As long as it takes, here longer than without one."""
    host, text = parts(idle, role)
    without_address(host)
    with ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(idle.bed.dir / "notify"))
        manager.settimeout(30)
        started = pool.submit(Daemon, host, role, text,
                              environment={"NOTIFY_SOCKET": str(idle.bed.dir / "notify")})
        for _ in range(int(WAIT / WAIT_STEP) + 4):
            said = manager.recv(4096)
            assert said.startswith(b"STATUS=Waiting: raddr") and b"EXTEND_TIMEOUT_USEC=" in said
        add_address(host)
        while manager.recv(4096) != b"READY=1":
            pass
        daemon = started.result()
    assert daemon.log.read_text().count("waiting: ") == 1
    other = "be" if role == "fe" else "fe"
    daemons = {role: daemon, other: Daemon(parts(idle, other)[0], other, parts(idle, other)[1])}
    idle.fe, idle.be = daemons["fe"], [daemons["be"]]
    idle.connected()
    assert idle.get("/") == "x\n"


@pytest.mark.parametrize("role", ["fe", "be"])
def test_without_one_it_waits_for_a_while(idle: Cluster, role: str) -> None:
    host, text = parts(idle, role)
    without_address(host)
    done = begin(host, role, text)
    wait_for(lambda: waits(host), "the wait")
    add_address(host)
    wait_for(lambda: "serving" in (host.dir / "early.log").read_text(), "the daemon")
    done.terminate()
    assert done.wait(20) == 0


@pytest.mark.parametrize("role", ["fe", "be"])
def test_it_can_be_stopped_while_it_waits(idle: Cluster, role: str) -> None:
    host, text = parts(idle, role)
    without_address(host)
    before = state(host)
    done = begin(host, role, text)
    wait_for(lambda: waits(host), "the wait")
    done.terminate()
    assert done.wait(20) == 0
    assert state(host) == before and list((host.dir / "run").iterdir()) == []


def test_a_check_of_the_configuration_does_not_wait(idle: Cluster) -> None:
    for role in "fe", "be":
        host, text = parts(idle, role)
        without_address(host)
        (host.dir / "early.conf").write_text(text)
        done = host.run(str(BIN / f"tcpha{role}"), "-t", "-c", str(host.dir / "early.conf"))
        assert done.stdout.endswith(": good\n")


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("role", ["fe", "be"])
def test_the_umask_of_who_starts_it_does_not_matter(idle: Cluster, role: str, left: bool) -> None:
    """keepalived's is 0177. left: an earlier run has made its directory."""
    host, text = parts(idle, role)
    config, run = host.dir / "early.conf", host.dir / "made" / "run"
    config.write_text(text)
    if left:
        run.mkdir(parents=True)
        run.chmod(0o600)
    host.run("sh", "-c", f"umask 0177; exec {BIN}/tcpha{role} -c {config} --run-dir {run}")
    status = json.loads(host.run(str(BIN / "tcphactl"), "--run-dir", str(run), "--json", role,
                                 "status").stdout)
    assert status["vaddr"] == idle.VIP
    assert run.stat().st_mode & 0o777 == (run / f"ktcpha{role}").stat().st_mode & 0o777 == 0o755
    sh("kill", (run / f"tcpha{role}.pid").read_text().strip())
    wait_for(lambda: not (run / f"tcpha{role}.pid").exists(), "the daemon's end")
