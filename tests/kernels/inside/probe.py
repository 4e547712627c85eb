# SPDX-License-Identifier: GPL-2.0-or-later
"""Which datapaths the daemons can open on this kernel: one document of JSON on stdout. To open one
is to load all its BPF programs and attach them, or to make its queues and rules."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tcpha.lab.bed import Cluster, Daemon, Host, wait_for

WAYS = {"auto": ("auto", True), "ebpf": ("ebpf", True), "ebpf, no packet path": ("ebpf", False),
        "nfqueue": ("nfqueue", True)}
LINES = 12  # of the end of a log: what the verifier said is long


def said(text: str) -> list[str]:
    """What a daemon's log says of its datapath, or if that is nothing, how it ends."""
    lines = [line.partition(": ")[2] or line for line in text.splitlines()]
    return [line for line in lines if line.startswith("datapath")] or lines[-LINES:]


def open_one(host: Host, role: str, text: str) -> tuple[Daemon | None, dict[str, Any]]:
    try:
        daemon = Daemon(host, role, text)
    except (RuntimeError, TimeoutError) as error:
        log = (host.dir / f"tcpha{role}.log").read_text()
        return None, {"datapath": "", "packet_path": False, "said": log.splitlines()[-LINES:],
                      "crashed": "Traceback" in log or isinstance(error, TimeoutError)}
    return daemon, {"datapath": daemon.ctl("status")["datapath"], "packet_path": False,
                    "said": said(daemon.log.read_text()), "crashed": False}


def open_both(way: str) -> dict[str, Any]:
    """A front end and a back end, at once; if both open, they must find each other."""
    datapath, fastpath = WAYS[way]
    c = Cluster(1, start=False, datapath=(datapath, datapath), fastpath=fastpath)
    try:
        with ThreadPoolExecutor(2) as both:
            be = both.submit(open_one, c.be_hosts[0], "be", c.be_text(c.be_hosts[0]))
            fe = both.submit(open_one, c.fe_host, "fe", c.fe_text())
        (front, front_says), (back, back_says) = fe.result(), be.result()
        if front and back:
            (server,) = wait_for(lambda: [
                s for s in front.ctl("servers") if s["connperbe"] == 2], "control connections")
            back_says["packet_path"] = bool(server["packet_path"])
            if server["packet_path"]:
                wait_for(lambda: front.ctl("status")["packet_path"], "the packet path")
                front_says["packet_path"] = True
        return {"fe": front_says, "be": back_says}
    finally:
        c.close()


if __name__ == "__main__":
    print(json.dumps({way: open_both(way) for way in WAYS}))
