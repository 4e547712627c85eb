# SPDX-License-Identifier: GPL-2.0-or-later
"""The cluster that most stories have in common."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster

BIG = 64 << 20


@pytest.fixture(scope="session", autouse=True)
def as_root(root: None) -> None:
    """All tests here."""


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
