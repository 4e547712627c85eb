# SPDX-License-Identifier: GPL-2.0-or-later
"""Clusters for tests that run in a virtual machine, once for each way that its kernel has."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tcpha.lab import bed
from tcpha.lab.bed import Cluster

WAYS = {  # forward, datapath of the FE and of the BEs, fastpath
    "fast-direct": ("direct", "ebpf", "ebpf", True),
    "fast-tunnel": ("tunnel", "ebpf", "ebpf", True),
    "direct": ("direct", "ebpf", "ebpf", False), "tunnel": ("tunnel", "ebpf", "ebpf", False),
    "nfqueue-direct": ("direct", "nfqueue", "nfqueue", False),
    "nfqueue-tunnel": ("tunnel", "nfqueue", "nfqueue", False),
    "ebpf-nfqueue": ("tunnel", "ebpf", "nfqueue", True),
    "nfqueue-ebpf": ("direct", "nfqueue", "ebpf", True)}
MB = 1 << 20
PATIENT = "send_timeout 900s;"  # nginx ends what its client does not read
# as in tests/conftest.py: hosts of one machine share its clock
HOUR = 3_600_000_000_000
bed.CLOCKS[:] = ["0:0", f"{5 * HOUR}:200", f"{11 * HOUR}:-200"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ways", default="nfqueue-direct", help="of " + ", ".join(WAYS))
    parser.addoption("--megabytes", type=int, default=64, help="of a large download")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "queues: exists on ways with netfilter queues alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        ways = metafunc.config.getoption("--ways").split(",")
        if metafunc.module.__name__ == "test_networks":  # the best one, and the last resort
            ways = list(dict.fromkeys([ways[0], ways[-1]]))
        if metafunc.definition.get_closest_marker("queues"):
            ways = [way for way in ways if "nfqueue" in WAYS[way][1:3]]
        metafunc.parametrize("way", ways, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Way by way: with a second parameter, pytest's order would make a cluster anew for each."""
    def rank(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        way = callspec and callspec.params.get("way")
        return list(WAYS).index(way) if way else 0
    items.sort(key=rank)


def make(way: str, interface: str = "", **kw: object) -> Cluster:
    forward, fe, be, fastpath = WAYS[way]
    named = f"interface = {interface}\n" if interface else ""
    return Cluster(forward=forward, datapath=(fe, be), fastpath=fastpath, nginx={"http": PATIENT},
                   fe_conf=f"{named}headtimeout = 60", be_conf=named, **kw)  # type: ignore[arg-type]


def fill(c: Cluster, megabytes: int) -> None:
    for n in c.nginx:
        n.file("index.html", f"index of {n.host.name}\n".encode())
        n.file("a.jpg", f"picture of {n.host.name}\n".encode())
        n.file("1k", size=1024)
        n.file("8m", size=8 * MB)
        n.file("big", size=megabytes * MB)


@pytest.fixture(scope="session")
def shared(way: str, pytestconfig: pytest.Config) -> Iterator[Cluster]:
    c = make(way)
    try:
        fill(c, pytestconfig.getoption("--megabytes"))
        yield c
    finally:
        c.close()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The shared one; afterwards its daemons must be as sound as before."""
    assert shared.fe
    yield shared
    for daemon in (shared.fe, *shared.be):
        assert daemon.process.poll() is None, daemon.log.read_text()
