# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts on one machine: network namespaces on one switch, with real servers in them.

For the demo, the tests and the benchmarks. Everything is removed by Bed.close().
"""
from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tcpha.daemon.control_socket import ask

T = TypeVar("T")
START = 120.0  # seconds for a daemon to serve: ten thousand rules take a while to compile
CLONE_NEWNET = 0x40000000
BIN = Path(sys.executable).parent
# The clocks of hosts, by turns, as TCPHA_LAB_CLOCK takes them (nanoseconds ahead of the machine's,
# and parts per million faster): tests set them apart, as those of real machines are.
CLOCKS = ["0:0"]
SERIAL = (f"{x:x}" for x in itertools.count())


def sh(*args: str, check: bool = True, **kw: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, its output kept; on failure the output is in the exception's text."""
    done = subprocess.run(args, capture_output=True, text=True, **kw)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def program(name: str) -> str:
    """Path of one of our commands: beside the interpreter that runs this, or as installed."""
    beside = BIN / name
    return str(beside if beside.exists() else shutil.which(name, path="/usr/sbin:/usr/bin") or name)


def wait_for(what: Callable[[], Any], why: str, seconds: float = 30.0) -> Any:
    """Poll until what() is true and return its value; TimeoutError names why."""
    end = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for: {why}")
        time.sleep(0.02)


def freeze(*pids: int) -> None:
    """Stop processes, and wait until none of their threads runs: those of a busy machine may go on
    for a while after the signal."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for pid in pids
                         for stat in Path(f"/proc/{pid}/task").glob("*/stat")), "a standstill")


def inside(ns: str, work: Callable[[], T]) -> T:
    """Run a function in a thread that is in a network namespace; sockets made there stay there."""
    def enter() -> T:
        with open(f"/run/netns/{ns}") as f:
            if ctypes.CDLL(None, use_errno=True).setns(f.fileno(), CLONE_NEWNET) < 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {ns}")
        return work()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter).result()


class Host:
    """A network namespace with one interface, eth0."""

    def __init__(self, bed: Bed, name: str, address: str, mtu: int = 1500):
        self.bed = bed
        self.name = name
        self.address = address
        self.clock = CLOCKS[len(bed.hosts) % len(CLOCKS)]
        self.ns = f"{bed.prefix}-{name}"
        self.dir = bed.dir / name
        self.dir.mkdir()
        self.processes: list[subprocess.Popen[str]] = []
        port = f"{bed.prefix}{len(bed.hosts)}"
        self.port = port
        self.mtu = mtu
        sh("ip", "netns", "add", self.ns)
        self.plug("eth0", port)
        for scope in ("all", "default"):  # no addresses that come by themselves
            self.sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", "1")
        self.ip("link", "set", "lo", "up")
        self.ip("addr", "add", f"{address}/24", "dev", "eth0")
        self.link_up("eth0")
        bed.hosts.append(self)

    def plug(self, device: str, port: str) -> None:
        """Give it an interface on the switch, which is not up yet."""
        sh("ip", "-n", self.bed.switch, "link", "add", port, "type", "veth",
           "peer", "name", device, "netns", self.ns)
        sh("ip", "-n", self.bed.switch, "link", "set", port, "master", "br0", "mtu", str(self.mtu),
           "up")

    def link_up(self, device: str) -> None:
        self.ip("link", "set", device, "mtu", str(self.mtu), "up")
        wait_for(lambda: "state UP" in self.ip("link", "show", device), f"the cable of {self.name}")

    def mac(self, device: str = "eth0") -> str:
        return str(json.loads(self.ip("-j", "link", "show", device))[0]["address"])

    def now_ns(self) -> int:
        """This host's CLOCK_MONOTONIC, as the daemons on it see it (tcpha/_bpf/clock.h)."""
        ahead, ppm = (int(x) for x in self.clock.split(":"))
        now = time.monotonic_ns()
        return now + ahead + now // 1_000_000 * ppm

    def ip(self, *args: str) -> str:
        return sh("ip", "-n", self.ns, *args).stdout

    def command(self, *args: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.ns}", *args]

    def run(self, *args: str, check: bool = True, **kw: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on this host and wait for it."""
        return sh(*self.command(*args), check=check, **kw)

    def start(self, *args: str, **kw: Any) -> subprocess.Popen[str]:
        """Start a command on this host; it is killed with the bed. It may outlive us, and must not
        keep open what we were started with."""
        kw = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL} | kw
        process = subprocess.Popen(self.command(*args), text=True, **kw)
        self.processes.append(process)
        return process

    def inside(self, work: Callable[[], T]) -> T:
        """Run a function on this host; sockets made there stay there."""
        return inside(self.ns, work)

    def connect(self, address: str, port: int = 80, mss: int = 0,
                timeout: float = 30.0) -> socket.socket:
        """A TCP connection from this host."""
        def dial() -> socket.socket:
            s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            s.settimeout(timeout)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if mss:
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)
            s.connect((address, port))
            return s
        return self.inside(dial)

    def nft(self, rules: str) -> None:
        """Replace this host's test ruleset ('' removes it)."""
        self.run("nft", "-f", "-", input="table ip lab\ndelete table ip lab\n" + rules)

    def nft_counter(self, name: str) -> int:
        out = json.loads(self.run("nft", "-j", "list", "counter", "ip", "lab", name).stdout)
        return int(next(x["counter"]["packets"] for x in out["nftables"] if "counter" in x))

    def sysctl(self, name: str, value: str | None = None) -> str:
        if value is not None:
            self.run("sysctl", "-qw", f"{name}={value}")
        return self.run("sysctl", "-n", name).stdout.strip()

    def counter(self, name: str) -> int:
        """A statistic of eth0: rx_bytes, tx_packets and so on."""
        links = json.loads(self.ip("-j", "-s", "link", "show", "eth0"))
        side, field = name.split("_", 1)
        return int(links[0]["stats64"][side][field])


class Bed:
    """A switch and the hosts on it. dir holds each host's files."""

    def __init__(self, prefix: str = ""):
        self.prefix = prefix or f"tb{os.getpid() % 100000}{next(SERIAL)}"
        self.dir = Path(tempfile.mkdtemp(prefix="tcpha-bed-"))
        self.hosts: list[Host] = []
        self.switch = f"{self.prefix}-sw"
        sh("ip", "netns", "add", self.switch)
        # bridged packets must not meet this namespace's iptables
        sh("nsenter", f"--net=/run/netns/{self.switch}", "sysctl", "-qw",
           "net.bridge.bridge-nf-call-iptables=0", check=False)
        sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self.switch, "link", "set", "br0", "up")

    def host(self, name: str, address: str, mtu: int = 1500) -> Host:
        return Host(self, name, address, mtu)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """What comes out of a cable waits for NAPI, as in a NIC's queue. Else each CPU delivers
        what it has sent itself, and two of them swap packets of one flow: those of a process, and
        those that an ACK lets go."""
        def switch(gro: str, tso: str) -> None:
            for h in self.hosts:
                for ns, device in (h.ns, "eth0"), (self.switch, h.port):
                    sh("nsenter", f"--net=/run/netns/{ns}", "ethtool", "-K", device,
                       "gro", gro, "tso", tso)
        switch("on", "off")  # what TSO might cut does not wait
        try:
            yield
        finally:
            switch("off", "on")

    def close(self) -> None:
        for host in self.hosts:
            for process in host.processes:
                if process.poll() is None:
                    process.terminate()
        for host in self.hosts:
            for process in host.processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                for stream in (process.stdout, process.stderr, process.stdin):
                    if stream:
                        stream.close()
        for name in [*(h.ns for h in self.hosts), self.switch]:
            pids = sh("ip", "netns", "pids", name, check=False).stdout.split()
            if pids:
                sh("kill", "-9", *pids, check=False)
            sh("ip", "netns", "del", name, check=False)
        shutil.rmtree(self.dir, ignore_errors=True)


NGINX = """
user root;
daemon off;
pid {dir}/nginx.pid;
error_log {dir}/error.log warn;
worker_processes {workers};
worker_rlimit_nofile 20000;
events {{ worker_connections 20000; }}
http {{
    log_format seen '$remote_addr $remote_port $server_addr $server_port $status $request_length '
                    '$bytes_sent "$request"';
    access_log {log};
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_max_body_size 1g;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    dav_methods PUT;
    default_type text/plain;
    {http}
    server {{
        {listen}
        root {root};
        add_header X-Served-By {name};
        {extra}
    }}
}}
"""


class Nginx:
    """An unmodified nginx on a host. Files are served from 'root'; PUT stores below /up/. extra and
    http: more for its configuration, in the server and in front of that. inherits: makes the socket
    that it is started with, for its one port, as by systemd."""

    def __init__(self, host: Host, ports: tuple[int | str, ...] = (80,), log: bool = True,
                 extra: str = "", workers: int = 1, backlog: int = 4096, http: str = "",
                 inherits: Callable[[], socket.socket] | None = None):
        self.host = host
        self.inherits = inherits
        self.root = host.dir / "www"
        (self.root / "up").mkdir(parents=True)
        self.log = host.dir / "access.log"
        self.conf = host.dir / "nginx.conf"
        self.ports = ports
        self.conf.write_text(NGINX.format(
            dir=host.dir, root=self.root, name=host.name, workers=workers,
            log=f"{self.log} seen" if log else "off", extra=extra, http=http,
            listen=" ".join(f"listen {p} backlog={backlog};" for p in ports)))
        self.start()

    def start(self) -> None:
        kw: dict[str, Any] = {"stderr": subprocess.DEVNULL}
        listener = self.host.inside(self.inherits) if self.inherits else None
        if listener:
            kw |= {"pass_fds": [listener.fileno()],
                   "env": {**os.environ, "NGINX": f"{listener.fileno()};"}}
        self.process = self.host.start("nginx", "-p", str(self.host.dir), "-c", str(self.conf),
                                       **kw)
        if listener:
            listener.close()
        port = str(self.ports[0]).rpartition(":")[2].split()[0]
        wait_for(lambda: listening(self.host, port), f"nginx on {self.host.name}")
        self.worker_pids()  # nginx forgets a signal that comes before them

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def worker_pids(self) -> list[int]:
        """Of its workers, once there are some: it listens before."""
        return [int(pid) for pid in wait_for(lambda: sh(
            "pgrep", "-P", str(self.process.pid), check=False).stdout.split(), "nginx's workers")]

    def file(self, name: str, content: bytes | None = None, size: int = 0) -> Path:
        """A file to serve: given bytes, or so many pseudo-random ones."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            block = os.urandom(1 << 20)
            with open(path, "wb") as f:
                while size > 0:
                    f.write(block[:min(size, len(block))])
                    size -= len(block)
        else:
            path.write_bytes(content)
        return path

    def seen(self) -> list[dict[str, str]]:
        """The access log: client address and port, server address and port, and so on."""
        rows = []
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            left, _, request = line.partition('"')
            fields = left.split()
            rows.append(dict(zip(("client", "client_port", "server", "server_port", "status",
                                  "request_length", "bytes"), fields, strict=True),
                             request=request.rstrip('"')))
        return rows


def listening(host: Host, port: int | str) -> bool:
    return f":{port} " in host.run("ss", "-Hltn", f"sport = :{port}").stdout


class Daemon:
    """tcphafe or tcphabe on a host, in the foreground of a background process. via: a command
    before it, which becomes it."""

    def __init__(self, host: Host, role: str, config: str, suffix: str = ".conf",
                 options: tuple[str, ...] = (), environment: dict[str, str] | None = None,
                 via: tuple[str, ...] = ()):
        self.host = host
        self.via = via
        self.role = role
        # tests/sanitize.py has the daemons of whole test runs preload something
        self.environment = [*os.environ.get("TCPHA_LAB_DAEMONS", "").split(),
                            *(f"{key}={value}" for key, value in (environment or {}).items())]
        self.config = host.dir / f"tcpha{role}{suffix}"
        self.config.write_text(config)
        self.run_dir = host.dir / f"run-{role}"
        self.log = host.dir / f"tcpha{role}.log"
        self.options = options
        self.start()

    def start(self) -> None:
        """Start, and wait until it serves."""
        with open(self.log, "a") as log:
            self.process = self.host.start(
                "env", f"TCPHA_LAB_CLOCK={self.host.clock}", *self.environment, *self.via,
                program(f"tcpha{self.role}"), "-f", "-c", str(self.config), "--run-dir",
                str(self.run_dir), *self.options, stderr=log)
        wait_for(self._ready, f"tcpha{self.role} on {self.host.name}", START)

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"tcpha{self.role} ended:\n{self.log.read_text()}")
        pid = self.run_dir / f"tcpha{self.role}.pid"
        return pid.exists() and pid.read_text().strip() == str(self.process.pid)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ctl(self, *args: str) -> Any:
        """What 'tcphactl ROLE ARGS --json' would print, decoded, without starting it."""
        return ask(self.run_dir / f"tcpha{self.role}.sock", args[0], list(args[1:]))


class Cluster:
    """A client, a front end and back ends on one switch, with the seed's example addresses."""

    VIP = "192.168.1.36"

    def __init__(self, backends: int = 2, forward: str = "direct", fe_conf: str = "",
                 be_conf: str = "", rules: list[tuple[int, str]] | None = None, prefix: str = "",
                 nginx: dict[str, Any] | None = None, mtu: int = 1500, start: bool = True,
                 datapath: tuple[str, str] = ("auto", "auto"), fastpath: bool = True,
                 environment: dict[str, str] | None = None, via: tuple[str, ...] = ()):
        self.forward = forward
        self.datapath = datapath  # the FE's, the BEs'
        self.fastpath = fastpath and datapath == ("ebpf", "ebpf")
        self.fastpath_key = "on" if fastpath else "off"
        self.bed = Bed(prefix)
        try:
            self.client = self.bed.host("client", "192.168.1.50", mtu)
            self.fe_host = self.bed.host("fe", "192.168.1.23", mtu)
            self.be_hosts = [self.bed.host(f"be{i + 1}", f"192.168.1.{33 + 5 * i}", mtu)
                             for i in range(backends)]
            self.nginx = [Nginx(h, **(nginx or {})) for h in self.be_hosts]
            self.rules = [(1 % backends, "jpg$"), (0, ".*")] if rules is None else rules
            self.fe_conf = fe_conf
            self.be_conf = be_conf
            self.environment = environment  # of the daemons, what it has more
            self.via = via
            self.be: list[Daemon] = []
            self.fe: Daemon | None = None
            if start:
                self.start()
        except BaseException:
            self.close()
            raise

    def fe_text(self) -> str:
        lines = ["raddr = 192.168.1.23", f"vaddr = {self.VIP}", f"forward = {self.forward}",
                 f"datapath = {self.datapath[0]}", f"fastpath = {self.fastpath_key}"]
        lines += [f"server = {h.address} 666" for h in self.be_hosts]
        lines += [f"rule = {self.be_hosts[n].address} {p}" for n, p in self.rules]
        return "\n".join([*lines, self.fe_conf, ""])

    def be_text(self, host: Host) -> str:
        return "\n".join([f"raddr = {host.address}", "uaddr = 192.168.1.39", f"vaddr = {self.VIP}",
                          f"datapath = {self.datapath[1]}", f"fastpath = {self.fastpath_key}",
                          self.be_conf, ""])

    def start(self) -> None:
        self.be = [Daemon(h, "be", self.be_text(h), environment=self.environment,
                          via=self.via)
                   for h in self.be_hosts]
        self.fe = Daemon(self.fe_host, "fe", self.fe_text(), environment=self.environment,
                         via=self.via)
        self.connected()

    def connected(self) -> None:
        """Wait until the front end has all its control connections, and the packet path is in use
        if it can be."""
        assert self.fe is not None
        fe = self.fe
        fast = all(d.ctl("status")["fastpath"] == "on" for d in (fe, *self.be))
        wait_for(lambda: all(s["connperbe"] == 2 and s["packet_path"] >= fast
                             for s in fe.ctl("servers")), "control connections")
        wait_for(lambda: fe.ctl("status")["packet_path"] >= fast, "the packet path")

    def curl(self, *args: str, check: bool = True, **kw: Any) -> subprocess.CompletedProcess[str]:
        return self.client.run("curl", "-sS", "--max-time", "120", *args, check=check, **kw)

    def get(self, path: str, *args: str) -> str:
        return self.curl(*args, f"http://{self.VIP}{path}").stdout

    def close(self) -> None:
        self.bed.close()
