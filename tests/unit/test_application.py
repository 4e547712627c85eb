# SPDX-License-Identifier: GPL-2.0-or-later
"""Which applications a back end has, and which ways lead to each."""
from __future__ import annotations

from pathlib import Path

import pytest

from tcpha.application import Way, applications_of, local_ways, ways_to
from tcpha.config import Config, load

BE = "raddr = 192.168.1.33\nuaddr = 192.168.1.39\nvaddr = 192.168.1.36\nvaddr = 192.168.1.37\n"
FE = "vaddr = 192.168.1.36\nvaddr = 192.168.1.37\nserver = 192.168.1.33\nrule = 192.168.1.33 .*\n"
ONE, TWO = "192.168.1.36", "192.168.1.37"


def of(directory: Path, role: str, text: str) -> Config:
    file = directory / "conf"
    file.write_text(text)
    return load(role, str(file))


def test_without_an_address_each_vip_has_its_own(tmp_path: Path) -> None:
    config = of(tmp_path, "be", BE + "service = 8080 9080\n")
    ways = ways_to(config, config.places)
    assert ways == [Way(ONE, 0, ONE, 80), Way(ONE, 8080, ONE, 9080),
                    Way(TWO, 0, TWO, 80), Way(TWO, 8080, TWO, 9080)]
    assert [(a.address, a.port, a.ways) for a in applications_of(config, ways)] == \
        [(way.address, way.port, [way]) for way in ways]


def test_an_application_is_there_once(tmp_path: Path) -> None:
    config = of(tmp_path, "be", BE + "redirectaddr = 127.0.0.1\nservice = 8080 127.0.0.1:80\n"
                "service = 8081 127.0.0.1:81\n")
    first, second = applications_of(config, ways_to(config, config.places))
    assert [(way.vaddr, way.vport) for way in first.ways] == \
        [(ONE, 0), (ONE, 8080), (TWO, 0), (TWO, 8080)]
    assert [(way.vaddr, way.vport) for way in second.ways] == [(ONE, 8081), (TWO, 8081)]


@pytest.mark.parametrize(("more", "optional"), [
    ("", [False, False]),
    ("redirectport = 80\nservice = 8080 81\n", [False] * 4),
    ("service = 8080 81\n", [True, False, True, False]),
    ("service = 8080 80\n", [False, False])], ids=["usual", "named", "unnamed", "shared"])
def test_what_nobody_has_asked_for(tmp_path: Path, more: str, optional: list[bool]) -> None:
    config = of(tmp_path, "be", BE + more)
    found = applications_of(config, ways_to(config, config.places))
    assert [application.optional for application in found] == optional


def test_the_local_node(tmp_path: Path) -> None:
    config = of(tmp_path, "fe", FE + "redirectport = 8081\n")
    found = applications_of(config, local_ways(config))
    assert [(a.address, a.port, a.optional) for a in found] == \
        [(ONE, 8081, True), (TWO, 8081, True)]
