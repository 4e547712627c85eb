# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench: workloads against each way to the same nginx, in interleaved rounds.

Prints a table of medians with ratios to nginx reached directly and to HAProxy, and writes JSON.
Machines are shared and noisy: the ratios of one run count, absolute figures do not.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tcpha.lab.bed import Cluster, listening, wait_for

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


class Bench:
    """One cluster with HAProxy on the front end's host."""

    def __init__(self, datapath: str, fastpath: bool, forward: str, seconds: float):
        self.seconds = seconds
        self.cluster = c = Cluster(2, forward, fe_conf="maxclients = 4096",
                                   be_conf="maxclients = 20000",
                                   nginx={"log": False, "ports": (80, 8082, 8083, 8084)},
                                   datapath=(datapath, datapath), fastpath=fastpath)
        try:
            self._prepare(c)
        except BaseException:
            c.close()
            raise

    def _prepare(self, c: Cluster) -> None:
        for server in c.nginx:
            server.file("1k", size=1024)
            server.file("10k", size=10 << 10)
            server.file("1m", size=1 << 20)
            server.file("big", size=64 << 20)
        (c.fe_host.dir / "haproxy.cfg").write_text(HAPROXY)
        c.fe_host.start("haproxy", "-db", "-f", str(c.fe_host.dir / "haproxy.cfg"))
        wait_for(lambda: listening(c.fe_host, 8080), "haproxy")
        passing = c.be_hosts[0].start(sys.executable, "-c", PASS, stdout=-1)
        assert passing.stdout and passing.stdout.readline() == "ready\n"
        c.client.sysctl("net.ipv4.ip_local_port_range", "15000 60000")

    def wrk(self, base: str, path: str, connections: int, *options: str) -> float:
        """Requests per second."""
        out = self.cluster.client.run("wrk", "-t1", f"-c{connections}", f"-d{round(self.seconds)}s",
                                      *options, base + path).stdout
        errors = re.search(r"Socket errors.*|Non-2xx.*", out)
        if errors:
            print(f"  {base + path}: {errors.group()}", file=sys.stderr)
        found = re.search(r"Requests/sec:\s+([\d.]+)", out)
        return float(found.group(1)) if found else 0.0

    def big(self, base: str) -> float:
        """64 MB downloads, four at a time, MB/s."""
        start = time.monotonic()
        count = max(4, int(self.seconds) * 8)
        self.cluster.client.run("xargs", "-P4", "-n1", "curl", "-sSf", "-o", "/dev/null",
                                input="\n".join([f"{base}/big"] * count))
        return count * 64 / (time.monotonic() - start)

    @contextmanager
    def segmented(self) -> Iterator[None]:
        """The back end's TCP sends no packet larger than the MTU, as if its NIC could not cut."""
        be = self.cluster.be_hosts[0]
        be.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
        try:
            yield
        finally:
            be.run("ethtool", "-K", "eth0", "tso", "on", "gso", "on")

    def big_segmented(self, base: str) -> float:
        with self.segmented():
            return self.big(base)

    def first_byte(self, base: str) -> float:
        """Median microseconds from sending the request to the first byte of the answer."""
        host, _, port = base.removeprefix("http://").partition(":")

        def work() -> float:
            times = []
            for _ in range(int(150 * self.seconds)):
                with socket.create_connection((host, int(port or 80))) as s:
                    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    start = time.perf_counter()
                    s.sendall(b"GET /1k HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    s.recv(1)
                    times.append(time.perf_counter() - start)
                    while s.recv(65536):
                        pass
            return statistics.median(times) * 1e6
        return self.cluster.client.inside(work)


    def cpu(self, base: str) -> float:
        """Microseconds of CPU time that the front end's processes use for a connection."""
        def used() -> int:
            ticks = 0
            for process in self.cluster.fe_host.processes:
                for child in Path("/proc").glob("[0-9]*/stat"):
                    with contextlib.suppress(OSError):
                        fields = child.read_text().rpartition(")")[2].split()
                        if str(process.pid) in (child.parent.name, fields[1]):
                            ticks += int(fields[11]) + int(fields[12])
            return ticks
        before, begin = used(), time.monotonic()
        rate = self.wrk(base, "/1k", 32, "-H", "Connection: close")
        count = rate * (time.monotonic() - begin)
        return (used() - before) / os.sysconf("SC_CLK_TCK") * 1e6 / count if count else 0.0


LARGE = "64 MB downloads, c=4"
FE_CPU = "CPU of the front end's processes, a connection"


def workloads(b: Bench) -> dict[str, tuple[str, bool, Callable[[str], float]]]:
    """{name: (unit, more is better, measure)}"""
    close = ("-H", "Connection: close")
    return {
        LARGE: ("MB/s", True, b.big),
        f"{LARGE}, segmented": ("MB/s", True, b.big_segmented),
        "1 MB keep-alive, c=8": ("req/s", True, lambda base: b.wrk(base, "/1m", 8)),
        "10 KB keep-alive, c=32": ("req/s", True, lambda base: b.wrk(base, "/10k", 32)),
        "1 KB, a connection each, c=32": ("req/s", True,
                                          lambda base: b.wrk(base, "/1k", 32, *close)),
        "1 KB, a connection each, c=128": ("req/s", True,
                                           lambda base: b.wrk(base, "/1k", 128, *close)),
        "request to first byte, p50": ("us", False, b.first_byte),
        FE_CPU: ("us", False, b.cpu),
    }


def main() -> int:
    p = argparse.ArgumentParser(prog="bench", description=__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    p.add_argument("--output", type=Path, default=Path("bench/results/latest.json"))
    args = p.parse_args()
    beds: dict[str, Bench] = {}
    try:
        for name, datapath, fastpath in (("fast", "ebpf", True), ("ebpf", "ebpf", False),
                                         ("nfqueue", "nfqueue", False)):
            for forward in ("direct", "tunnel"):
                beds[f"{name} {forward}"] = Bench(datapath, fastpath, forward, args.seconds)
        samples = measure(beds, args.rounds)
    finally:
        for bench in beds.values():
            bench.cluster.close()
    report(samples, {n: u for n, (u, _, _) in workloads(beds["ebpf direct"]).items()}, args.output)
    return 0


def measure(beds: dict[str, Bench], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{workload: {way: values}}; each round measures every way, so that noise hits all alike."""
    vip = f"http://{Cluster.VIP}"
    ways: dict[str, tuple[Bench, str]] = {
        "nginx direct": (beds["ebpf direct"], "http://192.168.1.33"),
        **{f"tcpha {name}": (bed, vip) for name, bed in beds.items()},
        "haproxy http": (beds["ebpf direct"], "http://192.168.1.23:8080"),
        "haproxy tcp": (beds["ebpf direct"], "http://192.168.1.23:8081"),
    }
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
           output: Path) -> None:
    """The table on stdout and everything as JSON."""
    rows = [["workload", "way", "median", "spread", "to direct", "to haproxy http"]]
    results = []
    for name, by_way in samples.items():
        medians = {w: statistics.median(v) for w, v in by_way.items()}
        for way, values in by_way.items():
            m = medians[way]
            ratios = ratio(m, medians["nginx direct"]), ratio(m, medians["haproxy http"])
            rows.append([name if way == "nginx direct" else "", way,
                         f"{m:.{m < 100:d}f} {units[name]}",
                         f"{min(values):.0f}-{max(values):.0f}",
                         *("-" if r is None else f"{r:.2f}" for r in ratios)])
            results.append({"workload": name, "way": way, "unit": units[name], "median": m,
                            "samples": values, "to_direct": ratios[0],
                            "to_haproxy_http": ratios[1]})
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f.ljust(w) for f, w in zip(row, widths, strict=True)).rstrip())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"results": results}, indent=1))
    print(f"\n{output}")


if __name__ == "__main__":
    sys.exit(main())
