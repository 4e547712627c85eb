# SPDX-License-Identifier: GPL-2.0-or-later
"""Three machines for the tests here."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import images
from tests.kernels.cluster import Machines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--versions", help="of kernels: the front end's, then the back ends'")
    parser.addoption("--age", type=float, default=0, help="seconds the first is older")
    parser.addoption("--datapath", default="auto,auto", help="the front end's, the back ends'")
    parser.addoption("--logs", type=Path, help="where consoles and logs are kept")
    parser.addoption("--megabytes", type=int, default=64, help="of a large download")
    parser.addoption("--downloads", type=int, default=500, help="under way when a daemon is killed")


@pytest.fixture(scope="session")
def count(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--downloads"))


@pytest.fixture(scope="session")
def booted(pytestconfig: pytest.Config) -> Iterator[Machines]:
    option = pytestconfig.getoption
    kernels = [images.cached(version) for version in option("--versions").split(",")]
    m = Machines(kernels, option("--logs"), option("--megabytes"), option("--age"),
                 tuple(option("--datapath").split(",")))
    yield m
    try:
        for machine in m.all:
            (option("--logs") / f"{machine.name}.log").write_text(
                machine.run("cat", f"/run/tcpha{machine.role}.log", check=False).stdout +
                json.dumps(machine.ctl("status"), indent=1))
    finally:
        m.close()


@pytest.fixture
def machines(booted: Machines, request: pytest.FixtureRequest) -> Iterator[Machines]:
    yield booted
    for m in booted.all:  # the daemons live
        m.ctl("status")
