# SPDX-License-Identifier: GPL-2.0-or-later
"""What a cluster has in hand at a moment, and when that is nothing."""
from __future__ import annotations

from typing import Any

from tcpha.lab.bed import Cluster, wait_for


def left(c: Cluster) -> dict[str, Any]:
    """What a test that fails should tell: all connections, and why packets were discarded."""
    assert c.fe
    return {"fe": c.fe.ctl("conns"),
            "client": (c.client.run("ss", "-tanoi", "dport", "= :80").stdout,
                       c.client.run("nstat", "-as").stdout),
            **{be.host.name: (be.ctl("conns"), be.host.run("nstat", "-as").stdout,
                              be.host.run("ss", "-tanoi", "sport", "= :80").stdout)
               for be in c.be}}


def settle(c: Cluster) -> None:
    """Wait until both sides have forgotten all connections."""
    assert c.fe
    fe = c.fe
    try:
        wait_for(lambda: fe.ctl("status")["live"] == 0, "no live flows on the FE")
        wait_for(lambda: not fe.ctl("conns"), "an empty flow table")
        for be in c.be:
            wait_for(lambda be=be: be.ctl("status")["live"] == 0, "no live connections on the BE")
    except TimeoutError as error:
        raise AssertionError(f"{error}; left: {left(c)}") from None


def fast(c: Cluster) -> int:
    """Connections that took the packet path."""
    assert c.fe
    return int(c.fe.ctl("status")["counters"]["fast"])
