# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons of a cluster: how they are started, and what they have said."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tcpha.lab.bed import Cluster, Daemon

REGISTER = "dregister = 1\nfeaddr = 192.168.1.23\n"


def front(c: Cluster) -> Daemon:
    assert c.fe
    return c.fe


def start_front(c: Cluster, *lines: str) -> None:
    text = c.fe_text().replace(f"server = {c.be_hosts[1].address} 666\n", "")
    c.fe = Daemon(c.fe_host, "fe", text + "\n".join(lines) + "\n")


def start_back(c: Cluster, n: int, *lines: str) -> Daemon:
    be = Daemon(c.be_hosts[n], "be", c.be_text(c.be_hosts[n]) + "\n".join(lines) + "\n")
    c.be.append(be)
    return be


def secret_file(c: Cluster, name: str, text: str = "") -> Path:
    path = c.bed.dir / name
    path.write_text((text or os.urandom(16).hex()) + "\n")
    path.chmod(0o600)
    return path


def joined(c: Cluster) -> list[str]:
    return [s["server"] for s in front(c).ctl("servers") if s["registered"] and s["state"] == "up"]


def logged(daemon: Daemon, text: str) -> Callable[[], bool]:
    return lambda: text in daemon.log.read_text()


def lines(d: Daemon, what: str) -> int:
    return d.log.read_text().count(what)
