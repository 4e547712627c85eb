# SPDX-License-Identifier: GPL-2.0-or-later
"""How cost grows: with rules, with back ends, with open connections."""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcpha.lab.bed import Cluster, Host, listening, wait_for

RULES = (10, 100, 1000, 10_000)
BACKENDS = (1, 2, 4, 8)
OPEN = {"tcphafe": 20_000, "haproxy": 9_500}  # connections: HAProxy needs two descriptors for each
STALLED = 4000  # in the middle of a download
ROUNDS = 3
RATE = "100mbit"


def cpu_seconds(host: Host) -> float:
    """CPU time that a host's processes and their children have used."""
    ticks = 0
    parents = {str(p.pid) for p in host.processes}
    for child in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = child.read_text().rpartition(")")[2].split()
            if child.parent.name in parents or fields[1] in parents:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def requests_a_second(host: Host, url: str, connections: int, seconds: int, *more: str) -> float:
    """By wrk. What it says of errors goes to stderr."""
    text = host.run("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *more, url).stdout
    if errors := re.search(r"Socket errors.*|Non-2xx.*", text):
        print(f"  {url}: {errors.group()}", file=sys.stderr)
    found = re.search(r"Requests/sec:\s+([\d.]+)", text)
    return float(found.group(1)) if found else 0.0


def rules() -> dict[str, float]:
    """{how many rules: microseconds of tcphafe's CPU time for a request that a worker reads},
    medians of interleaved rounds. The last rule is the one that matches."""
    samples: dict[int, list[float]] = {n: [] for n in RULES}
    beds: dict[int, Cluster] = {}
    try:
        for n in RULES:
            beds[n] = c = Cluster(1, rules=[*((0, f"^/site{i}/.*[.]jpg$") for i in range(n - 1)),
                                            (0, ".*")], nginx={"log": False},
                                  fe_conf="verdictcache = off", be_conf="maxclients = 20000")
            c.nginx[0].file("1k", size=1024)
        for _ in range(ROUNDS):
            for n, c in beds.items():
                before = cpu_seconds(c.fe_host)
                begin = time.monotonic()
                rate = requests_a_second(c.client, f"http://{c.VIP}/1k", 32, 2, "-H",
                                         "Connection: close")
                count = rate * (time.monotonic() - begin)
                samples[n].append((cpu_seconds(c.fe_host) - before) / count * 1e6)
    finally:
        for c in beds.values():
            c.close()
    return {str(n): sorted(s)[ROUNDS // 2] for n, s in samples.items()}


def _proxy(c: Cluster) -> None:
    n = len(c.be_hosts)
    text = "global\n    maxconn 9900\ndefaults\n    mode http\n    timeout connect 5s\n" \
           "    timeout client 600s\n    timeout server 600s\n    maxconn 9900\n" \
           "frontend f\n    bind 192.168.1.23:8080\n"
    text += "".join(f"    use_backend b{i} if {{ path_beg /be{i + 1}/ }}\n" for i in range(n))
    text += "    default_backend b0\n"
    text += "".join(f"backend b{i}\n    http-reuse always\n    server s {h.address}:80\n"
                    for i, h in enumerate(c.be_hosts))
    (c.fe_host.dir / "haproxy.cfg").write_text(text)
    c.fe_host.start("haproxy", "-db", "-f", str(c.fe_host.dir / "haproxy.cfg"))
    wait_for(lambda: listening(c.fe_host, 8080), "haproxy")


def out() -> dict[str, dict[str, float]]:
    """{way: {how many back ends: MB/s}}, where each host's link but the client's carries RATE."""
    most = BACKENDS[-1]
    c = Cluster(most, rules=[(i, f"^/be{i + 1}/") for i in range(most)], nginx={"log": False})
    result: dict[str, dict[str, float]] = {"tcpha": {}, "haproxy": {}}
    try:
        _proxy(c)
        for i, server in enumerate(c.nginx):
            server.file(f"be{i + 1}/big", size=12 << 20)
        for host in (c.fe_host, *c.be_hosts):
            host.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE,
                     "burst", "128kb", "latency", "100ms")
        for n in BACKENDS:
            for way, base in (("tcpha", f"http://{c.VIP}"), ("haproxy", "http://192.168.1.23:8080")):
                urls = "\n".join(f"{base}/be{i + 1}/big" for i in range(n))
                begin = time.monotonic()
                c.client.run("xargs", f"-P{n}", "-n1", "curl", "-sSf", "-o", "/dev/null",
                             input=urls)
                result[way][str(n)] = n * 12 * 1.048576 / (time.monotonic() - begin)
    finally:
        c.close()
    return result


class MemoryGroup:
    """A memory cgroup: what is started inside the 'with' is charged to it, kernel memory too."""

    def __init__(self, name: str):
        self.old = Path("/sys/fs/cgroup/memory")
        self.two = not (self.old / "cgroup.procs").exists()
        self.top = Path("/sys/fs/cgroup") if self.two else self.old
        self.path = self.top / f"tcpha-{os.getpid()}-{name}"
        self.path.mkdir()
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(x for x in lines if x.startswith("0::" if self.two else "")
                   and (self.two or "memory" in x.split(":")[1].split(",")))
        self.home = self.top / own.split(":", 2)[2].lstrip("/")

    def __enter__(self) -> MemoryGroup:
        (self.path / "cgroup.procs").write_text("0")
        return self

    def __exit__(self, *what: object) -> None:
        (self.home / "cgroup.procs").write_text("0")

    def used(self) -> int:
        """Bytes, without the page cache."""
        stat = dict(x.split() for x in (self.path / "memory.stat").read_text().splitlines())
        if self.two:
            return int((self.path / "memory.current").read_text()) - int(stat["file"])
        return (int((self.path / "memory.usage_in_bytes").read_text()) - int(stat["cache"])
                + int((self.path / "memory.kmem.tcp.usage_in_bytes").read_text()))

    def remove(self) -> None:
        with contextlib.suppress(OSError):  # somebody is in it: the machine's next boot removes it
            self.path.rmdir()


def _socket_bytes(host: Host) -> int:
    """Of TCP sockets themselves, which the kernel charges to nobody."""
    size = next(int(x.split()[3]) for x in Path("/proc/slabinfo").read_text().splitlines()
                if x.startswith("TCP "))
    line = next(x for x in host.run("cat", "/proc/net/sockstat").stdout.splitlines()
                if x.startswith("TCP:"))
    return size * int(line.split()[2])


def _hold(c: Cluster, base: tuple[str, int], count: int, path: str, ready: Any, done: Any) -> None:
    """In a process of its own: open connections, one request each, and keep them; of the answer
    nothing is read but its beginning."""
    def work() -> None:
        held = []
        for _ in range(count):
            s = socket.create_connection(base, timeout=60)
            s.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            s.recv(4096)
            held.append(s)
        ready.set()
        done.wait()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    c.client.inside(work)


def _growth(c: Cluster, base: tuple[str, int], count: int, path: str,
            used: Callable[[], int]) -> float:
    """Bytes for each of 'count' connections, which two clients hold."""
    before = used()
    done = multiprocessing.Event()
    events, processes = [], []
    for n in (count // 2, count - count // 2):
        events.append(multiprocessing.Event())
        processes.append(multiprocessing.Process(
            target=_hold, args=(c, base, n, path, events[-1], done)))
        processes[-1].start()
    try:
        if not all(ready.wait(300) for ready in events):
            raise TimeoutError("the connections did not come about")
        return (used() - before) / count
    finally:
        done.set()
        for process in processes:
            process.join()


def _memory_of(name: str, count: int, path: str) -> float:
    c = Cluster(1, rules=[(0, ".*")], fe_conf="maxclients = 4096", be_conf="maxclients = 40000",
                nginx={"log": False, "extra": "keepalive_timeout 600s;", "workers": 2})
    group = MemoryGroup(name)
    try:
        assert c.fe
        c.client.sysctl("net.ipv4.ip_local_port_range", "15000 60000")
        c.nginx[0].file("index.html", b"x\n")
        c.nginx[0].file("big", size=64 << 20)
        base = (c.VIP, 80)
        c.fe.stop()
        with group:
            if name == "haproxy":
                base = ("192.168.1.23", 8080)
                _proxy(c)
            else:
                c.fe.start()
        if name == "tcphafe":
            c.connected()
        return _growth(c, base, count, path, lambda: group.used() + _socket_bytes(c.fe_host))
    finally:
        c.close()
        group.remove()


def memory() -> dict[str, float]:
    """Bytes of the front end's memory, the kernel's included, for each open connection: idle ones,
    and ones in the middle of a download that the client does not read."""
    result = {}
    for name, idle in OPEN.items():
        result[name] = _memory_of(name, idle, "/index.html")
        result[f"{name}, in a download"] = _memory_of(name, STALLED, "/big")
    return result


def rows(more: dict[str, Any]) -> list[list[str]]:
    out_rows = [["what grows", "with", "cost"]]
    out_rows += [["rules", n, f"{v:.1f} us of CPU time a request"]
                 for n, v in more["rules"].items()]
    out_rows += [[f"back ends, {way}", n, f"{v:.1f} MB/s"]
                 for way, by in more["scale-out"].items() for n, v in by.items()]
    out_rows += [["open connections", name, f"{v:.0f} bytes each on the front end"]
                 for name, v in more["memory"].items()]
    return out_rows
