# SPDX-License-Identifier: GPL-2.0-or-later
"""Clusters for the tests. Every test that moves packets runs for each forward mode with each
datapath; those of test_serve.py for datapaths that differ, and with the packet path, too. Where the
way of packets is not the point, a test runs for each datapath."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tcpha.lab import bed
from tcpha.lab.bed import Cluster
from tests.support.modes import MODES, NFQUEUE, USUAL

# a loaded machine is no fault of what is tested
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

BIG = 64 << 20
collect_ignore = ["kernels"]  # they run in virtual machines: make test-kernels

# Namespaces share a clock, machines do not. In order of a bed's hosts: the front end is five hours
# ahead of the client, the first back end eleven, and the second is behind both.
HOUR = 3_600_000_000_000
bed.CLOCKS[:] = ["0:0", f"{5 * HOUR}:200", f"{11 * HOUR}:-200"]


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of what one datapath alone has exists in the modes that have it, and in no other. So
    does one that names its modes."""
    def exists(item: pytest.Item) -> bool:
        mode = getattr(item, "callspec", None) and item.callspec.params.get("mode")  # type: ignore
        if mode is None:
            return True
        named = item.get_closest_marker("modes")
        if mode not in (named.args if named else USUAL):
            return False
        if item.get_closest_marker("socket_path") and mode.startswith("fast-"):
            return False
        mark = item.get_closest_marker("queues_on")
        return mark is None or MODES[mode][("fe", "be").index(mark.args[0]) + 1] == NFQUEUE
    items[:] = [item for item in items if exists(item)]
    for item in items:  # where tests run side by side: what shares a cluster stays together
        spec = getattr(item, "callspec", None)
        params = spec.params if spec else {}
        mode = params.get("mode", "")
        shared = "shared" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(
            mode if shared else f"{item.path.stem}-{mode or params.get('release', '')}"))


@pytest.fixture(scope="session", params=MODES)
def mode(request: Any) -> dict[str, Any]:
    """Arguments for Cluster(): forward mode and datapaths of the front end and the back ends."""
    forward, fe, be, fastpath = MODES[request.param]
    return {"forward": forward, "datapath": (fe, be), "fastpath": fastpath}


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.exit("the tests make network namespaces: run them as root", 2)


@pytest.fixture(scope="session")
def shared(mode: dict[str, Any]) -> Iterator[Cluster]:
    """One client, one FE, two BEs with nginx on ports 80 and 8080. Where packets are tunnelled, the
    control connections are encrypted."""
    # a client that lost a SYN-ACK may take 3 s as its first RTO: under loss, headtimeout is longer
    c = Cluster(**mode, fe_conf="headtimeout = 8\nmaxclients = 512",
                be_conf="maxclients = 8192", nginx={"ports": (80, 8080)}, start=False)
    # hosts share the kernel's timestamp offsets otherwise, and mistakes would not show
    c.fe_host.sysctl("net.ipv4.tcp_timestamps", "2")
    try:
        if mode["forward"] == "tunnel":
            secret = c.bed.dir / "secret"
            secret.write_text(os.urandom(16).hex())
            secret.chmod(0o600)
            c.fe_conf += f"\nsecret = {secret}"
            c.be_conf += f"\nsecret = {secret}"
        c.start()
        for n in c.nginx:
            n.file("index.html", f"index of {n.host.name}\n".encode())
            n.file("a.jpg", f"picture of {n.host.name}\n".encode())
            n.file("1k", size=1024)
            n.file("big", size=BIG)
        yield c
    finally:
        c.close()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The shared cluster; afterwards both daemons must be as sound as before."""
    assert shared.fe is not None
    # what the front end answered itself in earlier tests: on such a tuple, it would again
    shared.fe_host.run("ss", "-KHtan", "state", "time-wait", "sport", "= :80")
    yield shared
    assert shared.fe.process.poll() is None, shared.fe.log.read_text()
    for be in shared.be:
        assert be.process.poll() is None, be.log.read_text()
