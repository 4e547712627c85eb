# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests have in common: their modes, and which of them run in one process.

A test that moves packets runs for each forward mode with each datapath, or in the modes that it
names (mark 'modes'): more, as those of test_serve.py, or fewer, where the way of packets is not the
point."""
from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tcpha.lab import bed
from tests.support.modes import MODES, NFQUEUE, USUAL

# a loaded machine is no fault of what is tested
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

collect_ignore = ["kernels"]  # they run in virtual machines: make test-kernels

# Namespaces share a clock, machines do not. In order of a bed's hosts: the front end is five hours
# ahead of the client, the first back end eleven, and the second is behind both.
HOUR = 3_600_000_000_000
bed.CLOCKS[:] = ["0:0", f"{5 * HOUR}:200", f"{11 * HOUR}:-200"]


@pytest.fixture(scope="session")
def root() -> None:
    if os.geteuid() != 0:
        pytest.exit("these tests make network namespaces: run them as root; 'make unit' runs those "
                    "that do not", 2)


@pytest.fixture(scope="session", params=MODES)
def mode(request: Any, root: None) -> dict[str, Any]:
    """Arguments for Cluster(): forward mode and datapaths of the front end and the back ends."""
    forward, fe, be, fastpath = MODES[request.param]
    return {"forward": forward, "datapath": (fe, be), "fastpath": fastpath}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test exists in the modes that it names, or in the usual ones; one of what a datapath alone
    has, in those that have it."""
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
