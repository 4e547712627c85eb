# SPDX-License-Identifier: GPL-2.0-or-later
"""Large tables: what goes through them makes nothing of each flow in Python, and what shows them
does so a piece at a time. As a measure serves what a daemon's memory grows by."""
from __future__ import annotations

import json
import subprocess
import sys
from select import select

import pytest

from tcpha.lab.bed import BIN, Cluster, Daemon, wait_for
from tests.support.memory import modest

MANY = 30_000
CROWD = 350_000


def teller(c: Cluster, count: int = MANY) -> subprocess.Popen[str]:
    """Stands for a back end with many connections, and says it when it was asked about each."""
    host = c.be_hosts[0]
    process = host.start(sys.executable, "-m", "tcpha.lab.teller", host.address, c.VIP, str(count),
                         stdout=subprocess.PIPE)
    assert heard(process) == "listening\n"
    return process


def heard(process: subprocess.Popen[str]) -> str:
    """The next line of what it says; '' if it is silent."""
    assert process.stdout
    return process.stdout.readline() if select([process.stdout], [], [], 60)[0] else ""


def shown(fe: Daemon, *options: str) -> str:
    return subprocess.run([BIN / "tcphactl", "--run-dir", fe.run_dir, *options, "fe", "conns"],
                          check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("datapath", ["ebpf", "nfqueue"])
def test_a_large_table(datapath: str) -> None:
    """It is shown in each way; back ends are asked about silent flows; when theirs is gone, they
    are forgotten."""
    c = Cluster(1, datapath=(datapath, datapath), rules=[(0, ".*")], start=False,
                fe_conf="idletimeout = 2")
    try:
        told = teller(c)
        fe = Daemon(c.fe_host, "fe", c.fe_text())
        wait_for(lambda: fe.ctl("status")["counters"]["restored"] == MANY, "all flows", 60)
        with modest(fe):
            assert heard(told) == f"asked about {MANY}\n"
            rows = json.loads(shown(fe, "--json"))
            clients = {r["client"] for r in rows}
            assert len(rows) == len(clients) == MANY and "10.0.0.1:1025" in clients
            assert list(rows[0]) == ["client", "vaddr", "target", "rule", "server", "state", "age",
                                     "idle", "packets", "bytes"]
            assert {(r["vaddr"], r["target"], r["rule"], r["server"], r["state"], r["packets"])
                    for r in rows} == {(f"{c.VIP}:80", "", "", c.be_hosts[0].address, "forward", 0)}
            for text in (shown(fe), (fe.run_dir / "tcpha_fe_conn").read_text()):
                head, *lines = text.splitlines()
                assert head.split() == list(rows[0])
                assert {line.split()[0] for line in lines} == clients and len(lines) == MANY
            told.kill()
            wait_for(lambda: fe.ctl("status")["live"] == 0, "the end of all flows", 60)
        assert fe.ctl("status")["counters"]["expired"] == MANY and fe.ctl("conns") == []
    finally:
        c.close()


@pytest.mark.parametrize("datapath", ["ebpf", "nfqueue"])
def test_a_back_end_that_is_started_anew_is_told_of_all(datapath: str) -> None:
    """They are more than a control connection's queue has room for."""
    c = Cluster(1, datapath=(datapath, datapath), rules=[(0, ".*")], start=False,
                fe_conf=f"maxflows = {2 * CROWD}")
    try:
        first = teller(c, CROWD)
        fe = Daemon(c.fe_host, "fe", c.fe_text())
        wait_for(lambda: fe.ctl("status")["counters"]["restored"] == CROWD, "all flows", 60)
        first.kill()
        first.wait()
        with modest(fe):
            assert heard(teller(c, CROWD)) == f"asked about {CROWD}\n"
    finally:
        c.close()
