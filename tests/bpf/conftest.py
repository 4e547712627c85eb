# SPDX-License-Identifier: GPL-2.0-or-later
"""A cluster whose BPF programs are given packets."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tcpha.lab.bed import Cluster


@pytest.fixture(scope="module")
def lab(root: None) -> Iterator[Cluster]:
    c = Cluster(1, datapath=("ebpf", "ebpf"), rules=[(0, ".*")])
    try:
        c.nginx[0].file("index.html", b"x\n")
        c.get("/")  # hosts know each other's MAC addresses
        yield c
    finally:
        c.close()
