# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench: workloads against each way to the same nginx, in interleaved rounds.

Prints a table of medians with ratios to nginx reached directly and to the best proxy, a verdict on
each target, and writes JSON and charts. Machines are shared and noisy: the ratios of one run count,
absolute figures do not.
"""
from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from bench import chart, locality, scale, wan
from tcpha.lab.bed import Cluster, Host, Nginx, listening, sh, wait_for

# The answers of three ports pass through queues that give back each packet as it came: the
# netfilterqueue package, and our own code with and without packets larger than the MTU.
PASS = """
from netfilterqueue import NetfilterQueue
from tcpha._fast.nfqueue import Queue
from tcpha.net import rules
class Journal:
    def will_undo(self, **change): pass
rules.install(Journal(), "bench", [rules.Rule("postrouting", sport=8081 + n, queue=(n, 1))
                                   for n in (1, 2, 3)])
for n in (2, 3):
    queue = Queue(n, gso=n == 3)
    queue.pass_all()
    queue.start()
def give_back(packet):
    packet.set_payload(packet.get_payload())
    packet.accept()
package = NetfilterQueue()
package.bind(1, give_back)
print("ready", flush=True)
package.run()
"""

HAPROXY = """
global
    maxconn 8000
    nbthread 2
defaults
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    maxconn 8000
listen tcp
    mode tcp
    bind 192.168.1.23:8081
    server be1 192.168.1.33:80
frontend http
    mode http
    bind 192.168.1.23:8080
    acl jpg path_reg jpg$
    use_backend be2 if jpg
    default_backend be1
backend be1
    mode http
    http-reuse always
    server be1 192.168.1.33:80
backend be2
    mode http
    http-reuse always
    server be2 192.168.1.38:80
"""

PROXY_UPSTREAMS = """upstream be1 { server 192.168.1.33:80; keepalive 64; }
    upstream be2 { server 192.168.1.38:80; keepalive 64; }"""
PROXY_LOCATIONS = """proxy_http_version 1.1;
        proxy_set_header Connection "";
        location ~ jpg$ { proxy_pass http://be2; }
        location / { proxy_pass http://be1; }"""


class Bench:
    """One cluster with HAProxy on the front end's host."""
    clusters: ClassVar[list[Cluster]] = []  # of all benches that run

    def __init__(self, datapath: str, fastpath: bool, forward: str, seconds: float):
        self.seconds = seconds
        self.processes: dict[str, float] = {}  # of the last cpu(), by its argument
        # a worker for each core, as anybody would have: one alone bounds keep-alive traffic
        self.cluster = c = Cluster(2, forward, fe_conf="maxclients = 4096",
                                   be_conf="maxclients = 20000",
                                   nginx={"log": False, "workers": 2,
                                          "ports": (80, 8082, 8083, 8084)},
                                   datapath=(datapath, datapath), fastpath=fastpath)
        self.clusters.append(c)
        try:
            self._prepare(c)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.clusters.remove(self.cluster)
        self.cluster.close()

    def _prepare(self, c: Cluster) -> None:
        for server in c.nginx:
            server.file("1k", size=1024)
            server.file("10k", size=10 << 10)
            server.file("1m", size=1 << 20)
            server.file("big", size=64 << 20)
        (c.fe_host.dir / "haproxy.cfg").write_text(HAPROXY)
        c.fe_host.start("haproxy", "-db", "-f", str(c.fe_host.dir / "haproxy.cfg"))
        wait_for(lambda: listening(c.fe_host, 8080), "haproxy")
        Nginx(c.fe_host, ("192.168.1.23:8083",), log=False, workers=2, http=PROXY_UPSTREAMS,
              extra=PROXY_LOCATIONS)
        self.upload = c.client.dir / "upload"
        self.upload.write_bytes(os.urandom(16 << 20))
        passing = c.be_hosts[0].start(sys.executable, "-c", PASS, stdout=-1)
        assert passing.stdout and passing.stdout.readline() == "ready\n"
        c.client.sysctl("net.ipv4.ip_local_port_range", "15000 60000")

    def wrk(self, base: str, path: str, connections: int, *options: str) -> float:
        """Requests per second."""
        return scale.requests_a_second(self.cluster.client, base + path, connections,
                                       round(self.seconds), *options)

    def big(self, base: str, at_once: int = 4) -> float:
        """64 MB downloads, so many at a time, MB/s."""
        start = time.monotonic()
        count = max(4, int(self.seconds) * 8)
        self.cluster.client.run("xargs", f"-P{at_once}", "-n1", "curl", "-sSf", "-o", "/dev/null",
                                input="\n".join([f"{base}/big"] * count))
        return count * 64 / (time.monotonic() - start)

    def uploads(self, base: str) -> float:
        """PUTs of 16 MB, four at a time, MB/s."""
        start = time.monotonic()
        count = max(4, int(self.seconds) * 8)
        self.cluster.client.run("xargs", "-P4", "-n1", "curl", "-sSf", "-o", "/dev/null", "-T",
                                str(self.upload),
                                input="\n".join(f"{base}/up/{n}" for n in range(count)))
        return count * 16 / (time.monotonic() - start)

    @contextmanager
    def segmented(self) -> Iterator[None]:
        """The back end's TCP sends no packet larger than the MTU, as if its NIC could not cut."""
        be = self.cluster.be_hosts[0]
        be.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
        try:
            yield
        finally:
            be.run("ethtool", "-K", "eth0", "tso", "on", "gso", "on")

    def big_segmented(self, base: str, at_once: int = 4) -> float:
        with self.segmented():
            return self.big(base, at_once)

    def loaded(self, base: str, percentile: int) -> float:
        """first_byte() beside 16 other clients."""
        load = self.cluster.client.start("wrk", "-t1", "-c16", "-d30s", "-H", "Connection: close",
                                         f"{base}/1k", stdout=subprocess.DEVNULL)
        try:
            return self.first_byte(base, percentile)
        finally:
            load.terminate()
            load.wait()

    def first_byte(self, base: str, percentile: int) -> float:
        """Microseconds from sending the request to the first byte of the answer."""
        host, _, port = base.removeprefix("http://").partition(":")

        def work() -> float:
            times = []
            for _ in range(int(500 * self.seconds)):
                with socket.create_connection((host, int(port or 80))) as s:
                    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    start = time.perf_counter()
                    s.sendall(b"GET /1k HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    s.recv(1)
                    times.append(time.perf_counter() - start)
                    while s.recv(65536):
                        pass
            return statistics.quantiles(times, n=100)[percentile - 1] * 1e6
        return self.cluster.client.inside(work)

    @contextmanager
    def apart(self) -> Iterator[int]:
        """Give the front end's host a CPU that nobody else here uses, for its processes and, by
        RPS, for the packets that it receives. Its number. Packets are sent by whoever sends."""
        cpus = os.sched_getaffinity(0)
        own = max(cpus)
        try:
            self._steer({own}, cpus - {own} or cpus)
            yield own
        finally:
            self._steer(cpus, cpus)

    def _steer(self, own: set[int], others: set[int]) -> None:
        def netns(host: Host) -> int:
            return os.stat(f"/run/netns/{host.ns}").st_ino
        c = self.cluster
        where = {netns(host): others for cluster in self.clusters for host in cluster.bed.hosts}
        where[netns(c.fe_host)] = own
        os.sched_setaffinity(0, others)
        for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if cpus := where.get((task / "ns/net").stat().st_ino):
                    os.sched_setaffinity(int(task.name), cpus)
        for host in c.bed.hosts:
            received = own if host is c.fe_host else others
            receive_on(host.ns, "eth0", received if own != others else set())
            receive_on(c.bed.switch, host.port, others if own != others else set())

    def cpu(self, base: str) -> float:
        """Seconds that the front end's CPU works for 10,000 connections."""
        with self.apart() as own:
            processes = scale.cpu_seconds(self.cluster.fe_host)
            before, begin = busy(own), time.monotonic()
            rate = self.wrk(base, "/1k", 32, "-H", "Connection: close")
            count = rate * (time.monotonic() - begin)
            after = busy(own)
        processes = scale.cpu_seconds(self.cluster.fe_host) - processes
        self.processes[base] = processes * 1e4 / count if count else 0.0
        return (after - before) * 1e4 / count if count else 0.0

    def cpu_without_cache(self, base: str) -> float:
        """The same, and each request visits a worker."""
        fe = self.cluster.fe
        assert fe
        text = fe.config.read_text()
        fe.config.write_text(f"{text}\nverdictcache = off\n")
        fe.ctl("reload")
        try:
            return self.cpu(base)
        finally:
            fe.config.write_text(text)
            fe.ctl("reload")

    def cpu_of_a_gigabyte(self, base: str) -> float:
        """Seconds that the front end's CPU works for each GB that is served."""
        with self.apart() as own:
            before, begin = busy(own), time.monotonic()
            rate = self.big(base)
            return (busy(own) - before) / (rate * (time.monotonic() - begin) / 1000)


def busy(cpu: int) -> float:
    """Seconds that a CPU was not idle, from any moment on: its idle time, unlike its others, is
    measured and not sampled by the tick (kernel: get_cpu_idle_time())."""
    ticks = next(line.split() for line in Path("/proc/stat").read_text().splitlines()
                 if line.startswith(f"cpu{cpu} "))
    idle = sum(int(ticks[n]) for n in (4, 5, 8))  # idle, iowait, steal
    return time.monotonic() - idle / os.sysconf("SC_CLK_TCK")


def receive_on(ns: str, device: str, cpus: set[int]) -> None:
    """Have a device's packets received on some CPUs; without any, on that of the sender."""
    bits, words = sum(1 << n for n in cpus), []
    while bits or not words:
        words.insert(0, f"{bits & 0xffffffff:x}".rjust(8, "0"))
        bits >>= 32
    sh("ip", "netns", "exec", ns, "tee", f"/sys/class/net/{device}/queues/rx-0/rps_cpus",
       input=",".join(words))


LARGE, ALONE = "64 MB downloads, c=4", "64 MB downloads, c=1, segmented"
FE_CPU, FE_CPU_GB = "FE CPU for 10,000 connections", "FE CPU for a GB served"
FE_CPU_UNCACHED, FE_PROCESSES = f"{FE_CPU}, no cached verdicts", "of this, the FE's processes"
SHORT = "1 KB, a connection each, c={}"
FIRST, P99 = "request to first byte, p50", "the same, p99 under load"


def workloads(b: Bench) -> dict[str, tuple[str, bool, Callable[[str], float]]]:
    """{name: (unit, more is better, measure)}"""
    close = ("-H", "Connection: close")
    return {
        LARGE: ("MB/s", True, b.big),
        f"{LARGE}, segmented": ("MB/s", True, b.big_segmented),
        ALONE: ("MB/s", True, lambda base: b.big_segmented(base, 1)),
        "1 MB keep-alive, c=8": ("req/s", True, lambda base: b.wrk(base, "/1m", 8)),
        "10 KB keep-alive, c=32": ("req/s", True, lambda base: b.wrk(base, "/10k", 32)),
        SHORT.format(32): ("req/s", True, lambda base: b.wrk(base, "/1k", 32, *close)),
        SHORT.format(128): ("req/s", True, lambda base: b.wrk(base, "/1k", 128, *close)),
        SHORT.format(256): ("req/s", True, lambda base: b.wrk(base, "/1k", 256, *close)),
        "16 MB uploads, c=4": ("MB/s", True, b.uploads),
        FIRST: ("us", False, lambda base: b.first_byte(base, 50)),
        "the same, p99": ("us", False, lambda base: b.first_byte(base, 99)),
        "the same, p50 under load": ("us", False, lambda base: b.loaded(base, 50)),
        P99: ("us", False, lambda base: b.loaded(base, 99)),
        FE_CPU: ("s", False, b.cpu),
        FE_CPU_UNCACHED: ("s", False, b.cpu_without_cache),
        FE_PROCESSES: ("s", False, lambda base: b.processes[base]),
        FE_CPU_GB: ("s", False, b.cpu_of_a_gigabyte),
    }


def main() -> int:
    p = argparse.ArgumentParser(prog="bench", description=__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    p.add_argument("--output", type=Path, default=Path("bench/results/latest.json"))
    args = p.parse_args()
    more: dict[str, Any] = {"rules": scale.rules(), "scale-out": scale.out(),
                            "memory": scale.memory(), "locality": locality.measure()}
    beds: dict[str, Bench] = {}
    try:
        for name, datapath, fastpath in (("fast", "ebpf", True), ("ebpf", "ebpf", False),
                                         ("nfqueue", "nfqueue", False)):
            for forward in ("direct", "tunnel"):
                beds[f"{name} {forward}"] = Bench(datapath, fastpath, forward, args.seconds)
        samples = measure(beds, args.rounds)
        more["wan"] = wan.measure({w: way for w, way in ways_of(beds).items() if w in FAR})
    finally:
        for bench in beds.values():
            bench.close()
    units = {n: u for n, (u, _, _) in workloads(beds["ebpf direct"]).items()}
    report(samples, units, more, args.output)
    return 0


def ways_of(beds: dict[str, Bench]) -> dict[str, tuple[Bench, str]]:
    vip = f"http://{Cluster.VIP}"
    return {
        "nginx direct": (beds["ebpf direct"], "http://192.168.1.33"),
        **{f"tcpha {name}": (bed, vip) for name, bed in beds.items()},
        "haproxy http": (beds["ebpf direct"], "http://192.168.1.23:8080"),
        "haproxy tcp": (beds["ebpf direct"], "http://192.168.1.23:8081"),
        "nginx proxy": (beds["ebpf direct"], "http://192.168.1.23:8083"),
    }


def measure(beds: dict[str, Bench], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{workload: {way: values}}; each round measures every way, so that noise hits all alike."""
    ways = ways_of(beds)
    queues = {"pass netfilterqueue": 8082, "pass ours, no GSO": 8083, "pass ours": 8084}
    passed = {w: (beds["ebpf direct"], f"http://192.168.1.33:{p}") for w, p in queues.items()}
    samples: dict[str, dict[str, list[float]]] = {}
    for n in range(rounds):
        for name in workloads(beds["ebpf direct"]):
            for way, (bench, base) in (ways | passed if name == LARGE else ways).items():
                value = workloads(bench)[name][2](base)
                samples.setdefault(name, {}).setdefault(way, []).append(value)
        print(f"round {n + 1} of {rounds} done", file=sys.stderr)
    return samples


def ratio(ours: float, other: float) -> float | None:
    return ours / other if other else None


def report(samples: dict[str, dict[str, list[float]]], units: dict[str, str],
           more: dict[str, Any], output: Path) -> None:
    """Tables on stdout, everything as JSON, and charts."""
    rows = [["workload", "way", "median", "spread", "to direct", "to best proxy"]]
    results = []
    for name, by_way in samples.items():
        medians = {w: statistics.median(v) for w, v in by_way.items()}
        for way, values in by_way.items():
            m = medians[way]
            best = (min if units[name] in ("us", "s") else max)(medians[p] for p in PROXIES)
            # without a front end its CPU has nothing to do, and that says nothing of ours
            direct = 0.0 if units[name] == "s" else medians["nginx direct"]
            ratios = ratio(m, direct), ratio(m, best)
            rows.append([name if way == "nginx direct" else "", way,
                         f"{m:.{2 if m < 10 else m < 100:d}f} {units[name]}",
                         f"{min(values):.3g}-{max(values):.3g}",
                         *("-" if r is None else f"{r:.2f}" for r in ratios)])
            results.append({"workload": name, "way": way, "unit": units[name], "median": m,
                            "samples": values, "to_direct": ratios[0],
                            "to_best_proxy": ratios[1]})
    show(rows)
    for table in (scale.rows(more), locality.rows(more["locality"]), wan.rows(more["wan"])):
        print()
        show(table)
    by = {(r["workload"], r["way"]): r for r in results}
    verdicts = judge(by, more)
    print()
    show([["target", "wanted", "reached", "verdict"], *verdicts])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"results": results, "more": more, "verdicts": verdicts},
                                 indent=1))
    charts = chart.write(results, more, output.parent)
    print("\n" + "\n".join(map(str, (output, *charts))))


def show(rows: list[list[str]]) -> None:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f.ljust(w) for f, w in zip(row, widths, strict=True)).rstrip())


FAR = ("nginx direct", "tcpha fast direct", "tcpha ebpf direct", "tcpha nfqueue direct",
       "haproxy http")
PROXIES = ("haproxy http", "haproxy tcp", "nginx proxy")
# (workload, ratio to: direct or the best proxy, at least or at most)
TARGETS: list[tuple[str, str, str, float]] = [
    (LARGE, "to_direct", ">=", 0.97), (LARGE, "to_best_proxy", ">=", 1.5),
    ("1 MB keep-alive, c=8", "to_direct", ">=", 0.97),
    ("1 MB keep-alive, c=8", "to_best_proxy", ">=", 1.5),
    ("10 KB keep-alive, c=32", "to_direct", ">=", 0.95),
    ("10 KB keep-alive, c=32", "to_best_proxy", ">=", 1.1),
    (SHORT.format(32), "to_direct", ">=", 0.95), (SHORT.format(32), "to_best_proxy", ">=", 1.2),
    (SHORT.format(256), "to_direct", ">=", 0.95), (SHORT.format(256), "to_best_proxy", ">=", 1.2),
    ("16 MB uploads, c=4", "to_direct", ">=", 0.9),
    ("16 MB uploads, c=4", "to_best_proxy", ">=", 1.1),
    (FIRST, "to_direct", "<=", 2.0), (FIRST, "to_best_proxy", "<=", 1.0),
    (P99, "to_best_proxy", "<=", 1.0), (FE_CPU_GB, "to_best_proxy", "<=", 0.1),
    (FE_CPU, "to_best_proxy", "<=", 0.25)]
NFQUEUE_TARGETS = [(LARGE, 0.45), (ALONE, 0.9)]  # at least, to direct


def judge(by: dict[tuple[str, str], dict[str, Any]], more: dict[str, Any]) -> list[list[str]]:
    """A row for each target, of the packet path with direct forwarding where no other is named."""
    def verdict(value: float | None, how: str, wanted: float) -> str:
        met = value is not None and (value >= wanted if how == ">=" else value <= wanted)
        return "reached" if met else "NOT REACHED"
    rows = []
    for workload, to, how, wanted in TARGETS:
        value = by[workload, "tcpha fast direct"][to]
        rows.append([f"{workload}, {to.replace('_', ' ')}", f"{how} {wanted}",
                     "-" if value is None else f"{value:.2f}", verdict(value, how, wanted)])
    for workload, wanted in NFQUEUE_TARGETS:
        value = by[workload, "tcpha nfqueue direct"]["to_direct"]
        rows.append([f"nfqueue: {workload}, to direct", f">= {wanted}",
                     "-" if value is None else f"{value:.2f}", verdict(value, ">=", wanted)])
    memory = more["memory"]
    per, against = memory["tcphafe"], memory["tcphafe"] / memory["haproxy"]
    stalled = memory["tcphafe, in a download"] / memory["haproxy, in a download"]
    near, away = more["wan"]["nginx direct"], more["wan"]["tcpha fast direct"]
    cached = more["locality"]
    grown = more["rules"]["10000"] / more["rules"]["10"]
    spread = more["scale-out"]["tcpha"]["8"] / more["scale-out"]["tcpha"]["1"]
    for what, value, how, wanted in (
            ("FE memory of an open connection, bytes", per, "<=", 512),
            ("the same, to HAProxy, idle", against, "<=", 0.02),
            ("the same, to HAProxy, in a download", stalled, "<=", 0.02),
            *((f"first request, RTT {r} ms, 100 KB, to direct", away[r][1] / near[r][1], "<=", 1.05)
              for r in near),
            ("locality: requests by target, to in turns", cached["tcpha, by request-target"][
                "requests"] / cached["tcpha, in turns"]["requests"], ">=", 1.5),
            ("10,000 rules to 10, cost of a request", grown, "<=", 1.5),
            ("eight back ends to one", spread, ">=", 7.5)):
        rows.append([what, f"{how} {wanted}", f"{value:.3g}", verdict(value, how, wanted)])
    return rows


if __name__ == "__main__":
    sys.exit(main())
