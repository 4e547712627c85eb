# SPDX-License-Identifier: GPL-2.0-or-later
"""A front end and back ends that are machines of their own, with kernels of their own, on a Bed's
switch. The client is a namespace there."""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tcpha.lab.bed import NGINX, Bed, program, sh, wait_for
from tests.kernels.images import Kernel
from tests.kernels.machine import Machine

VIP = "192.168.1.36"
FRONT, BACKS = "192.168.1.23", ("192.168.1.33", "192.168.1.38")
READY = 120.0
CLIENTS = 2000  # that a back end has at one time


class Server(Machine):
    """A machine with a daemon; on back ends with nginx, too."""

    def __init__(self, bed: Bed, kernel: Kernel, name: str, address: str, logs: Path):
        tap = f"{bed.prefix}-{name}"
        sh("ip", "-n", bed.switch, "tuntap", "add", tap, "mode", "tap", "vnet_hdr")
        sh("ip", "-n", bed.switch, "link", "set", tap, "master", "br0", "up")
        super().__init__(kernel, name, logs, memory=2000, ns=bed.switch, tap=tap,
                         mac="02:00:" + ":".join(f"{int(n):02x}" for n in address.split(".")))
        self.address = address
        self.role = name[:2]
        self.run("bash", "-c", f"ip addr add {address}/24 dev eth0; ip link set eth0 up; "
                 "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$f; done")

    def put(self, path: str, text: str) -> None:
        self.run("dd", f"of={path}", "status=none", stdin=text)

    def configure(self, text: str) -> None:
        self.put(f"/run/tcpha{self.role}.conf", text)

    def start(self) -> None:
        """Start the daemon; it serves then."""
        self.run(program(f"tcpha{self.role}"), "-c", f"/run/tcpha{self.role}.conf",
                 "--run-dir", "/run/tcpha", seconds=READY)

    def kill(self) -> None:
        """kill -9, and it is gone."""
        self.run("bash", "-c", f"p=$(cat /run/tcpha/tcpha{self.role}.pid); kill -9 $p; "
                 "while kill -0 $p 2>/dev/null; do sleep 0.05; done")

    def ctl(self, *args: str) -> Any:
        """What 'tcphactl ROLE ARGS --json' says."""
        return json.loads(self.run(program("tcphactl"), "--run-dir", "/run/tcpha", "--json",
                                   self.role, *args).stdout)

    def serve(self, megabytes: int) -> None:
        """nginx on port 80, with files."""
        self.run("mkdir", "-p", "/run/n/www/up")
        self.put("/run/n/conf", NGINX.format(
            dir="/run/n", root="/run/n/www", name=self.name, workers=1, log="off", extra="",
            http="send_timeout 900s;", listen="listen 80 backlog=4096;"))
        self.put("/run/n/www/index.html", f"index of {self.name}\n")
        self.put("/run/n/www/a.jpg", f"picture of {self.name}\n")
        self.run("bash", "-c", f"cd /run/n/www; head -c {megabytes}M /dev/urandom >big; "
                 "head -c 256K /dev/urandom >256k; nginx -p /run/n -c /run/n/conf "
                 "</dev/null >/dev/null 2>&1 & "
                 "until ss -Hltn | grep -q :80; do sleep 0.1; done", seconds=READY)

    def digest(self, name: str) -> str:
        return self.run("sha256sum", f"/run/n/www/{name}").stdout.split()[0]


class Machines:
    """kernels: the front end's and those of the back ends, in the order of booting; age: seconds
    that the first one is older than the others."""

    def __init__(self, kernels: list[Kernel], logs: Path, megabytes: int = 64, age: float = 0,
                 datapath: tuple[str, str] = ("auto", "auto")):
        self.bed = Bed()
        self.all: list[Server] = []
        try:
            self.client = self.bed.host("client", "192.168.1.50")
            for n, kernel in enumerate(kernels):
                self.all.append(Server(self.bed, kernel, f"be{n}" if n else "fe",
                                       BACKS[n - 1] if n else FRONT, logs))
                if n == 0:
                    time.sleep(max(0.0, self.all[0].born + age - time.monotonic()))
            self.fe, *self.be = self.all
            for be in self.be:
                be.serve(megabytes)
                be.configure(f"raddr = {be.address}\nuaddr = 192.168.1.39\nvaddr = {VIP}\n"
                             f"datapath = {datapath[1]}\nmaxclients = {CLIENTS}\n"
                             "logfile = /run/tcphabe.log\n")
                be.start()
            self.fe.configure("\n".join(
                [f"raddr = {FRONT}", f"vaddr = {VIP}", "logfile = /run/tcphafe.log",
                 f"datapath = {datapath[0]}", "headtimeout = 60",
                 *(f"server = {be.address} 666" for be in self.be),
                 f"rule = {BACKS[1]} jpg$", f"rule = {BACKS[0]} .*", ""]))
            self.fe.start()
            self.fast = all(m.ctl("status")["fastpath"] == "on" for m in self.all)
            self.connected()
        except BaseException:
            self.close()
            raise

    def connected(self) -> None:
        """Wait until the front end has its back ends, and the packet path if that can be."""
        wait_for(lambda: all(s["connperbe"] == 2 and s["packet_path"] >= self.fast
                             for s in self.fe.ctl("servers")), "control connections", READY)
        wait_for(lambda: self.fe.ctl("status")["packet_path"] >= self.fast, "the packet path",
                 READY)

    def get(self, path: str, *args: str, seconds: int = 300) -> str:
        return self.client.run("curl", "-sS", "--max-time", str(seconds), *args,
                               f"http://{VIP}{path}").stdout

    def close(self) -> None:
        for machine in self.all:
            machine.close()
        self.bed.close()
