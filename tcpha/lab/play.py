# SPDX-License-Identifier: GPL-2.0-or-later
"""tcphactl lab: a cluster on this machine to play with, in network namespaces."""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tcpha.admin import console
from tcpha.daemon.control_socket import Refused, ask
from tcpha.lab.bed import Cluster, program, sh

PREFIX = "tcphalab"
NOTE = Path("/run/tcpha-lab.json")  # what 'up' has made
FILES = ("index.html", "photo.jpg", "clip.mp4", "api/list")


def _rules(backends: int) -> list[tuple[int, str]]:
    """Pictures to the last back end, the API to the first, and all the rest to whoever has least
    to do."""
    return [(backends - 1, r"\.(jpg|png|gif|mp4)(\?|$)"), (0, "^/api/"),
            *((n, ".*") for n in range(backends))]


def main(command: str, backends: int, as_json: bool) -> int:
    """Exit status: 0 done, 1 it failed (and why is on stderr). backends: for 'up'."""
    if os.geteuid() != 0:
        return _say("the lab makes network namespaces: run it as root (sudo)")
    if command == "down":
        return _down()
    if command == "up":
        return _up(backends, as_json)
    return _status(as_json)


def _say(text: str) -> int:
    print(f"tcphactl lab: {text}", file=sys.stderr)
    return 1


def _left() -> list[str]:
    return [line.split()[0] for line in sh("ip", "netns", "list").stdout.splitlines()
            if line.startswith(f"{PREFIX}-")]


def _up(backends: int, as_json: bool) -> int:
    if _left():
        return _say("it is up already; 'tcphactl lab status' says how to use it, 'down' removes it")
    if not shutil.which("nginx"):
        return _say("nginx is missing; 'apt install nginx-light' (it need not run)")
    if not shutil.which("curl"):
        return _say("curl is missing; 'apt install curl'")
    cluster: Cluster | None = None
    try:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                      console=console.console(), transient=False,
                      disable=as_json) as progress:
            def step(what: str) -> Any:
                return progress.add_task(what, total=1)
            task = step(f"hosts: a client, a front end, {backends} back ends with nginx")
            cluster = Cluster(backends, rules=_rules(backends), prefix=PREFIX, start=False)
            for server in cluster.nginx:
                for name in FILES:
                    server.file(name, f"{name} from {server.host.name}\n".encode())
            progress.advance(task)
            task = step("tcphabe on each back end, tcphafe on the front end")
            cluster.start()
            progress.advance(task)
            task = step("a request through the virtual address")
            if "from be" not in cluster.get("/index.html"):
                raise RuntimeError("the first request was not served")
            progress.advance(task)
    except BaseException as error:
        if cluster:
            cluster.close()
        if isinstance(error, Exception):
            return _say(f"it did not come up, and was removed again: {error}")
        raise
    assert cluster.fe
    NOTE.write_text(json.dumps({
        "directory": str(cluster.bed.dir), "vaddr": cluster.VIP, "client": cluster.client.ns,
        "frontend": {"host": cluster.fe_host.ns, "address": cluster.fe_host.address,
                     "run_dir": str(cluster.fe.run_dir), "config": str(cluster.fe.config),
                     "log": str(cluster.fe.log)},
        "backends": [{"host": h.ns, "address": h.address, "run_dir": str(be.run_dir),
                      "log": str(be.log), "nginx_log": str(n.log)}
                     for h, be, n in zip(cluster.be_hosts, cluster.be, cluster.nginx,
                                         strict=True)]}))
    return _status(as_json)


def _status(as_json: bool) -> int:
    if not _left() or not NOTE.exists():
        return _say("it is not up; 'tcphactl lab up' builds it")
    lab = json.loads(NOTE.read_text())
    fe = lab["frontend"]
    try:
        servers = ask(Path(fe["run_dir"]) / "tcphafe.sock", "servers", [])
        rules = ask(Path(fe["run_dir"]) / "tcphafe.sock", "rules", [])
    except (OSError, Refused):
        return _say("its front end does not answer; 'tcphactl lab down' removes it, 'up' builds it "
                    "anew")
    if as_json:
        print(json.dumps(lab | {"servers": servers, "rules": rules}))
        return 0
    ctl = f"{program('tcphactl')} --run-dir {fe['run_dir']}"
    console.show(servers)
    print()
    console.show(rules)
    inside = f"ip netns exec {lab['client']}"
    print(f"""
Virtual address {lab['vaddr']}, front end {fe['address']}. Try, as root:
  {inside} curl -i http://{lab['vaddr']}/index.html
  {inside} curl -i http://{lab['vaddr']}/photo.jpg
  {ctl} fe top
  {ctl} fe test-request GET /api/list
  {ctl} fe drain {lab['backends'][0]['address']}
  tail -f {lab['backends'][0]['nginx_log']}
The configuration is {fe['config']}; after a change: {ctl} fe reload
Remove it all: {program('tcphactl')} lab down""")
    return 0


def _down() -> int:
    names = _left()
    if not names and not NOTE.exists():
        return _say("it is not up")
    for name in names:
        pids = sh("ip", "netns", "pids", name).stdout.split()
        if pids:
            sh("kill", "-9", *pids, check=False)
        sh("ip", "netns", "del", name)
    if NOTE.exists():
        shutil.rmtree(json.loads(NOTE.read_text())["directory"], ignore_errors=True)
        NOTE.unlink()
    print("removed")
    return 0
