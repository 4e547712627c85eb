# SPDX-License-Identifier: GPL-2.0-or-later
"""Locality: a working set larger than one back end's cache, before an origin behind a slow link."""
from __future__ import annotations

import re
from typing import Any

from tcpha.lab.bed import Cluster, Nginx, listening, wait_for

BACKENDS = 4
OBJECTS, SIZE = 400, 64 << 10
ORIGIN = "192.168.1.90"
RATE = "100mbit"
ZONE = "32k"  # so many keys that about half of the objects have room
SECONDS = 4

CACHE = f"""proxy_cache_path {{dir}}/cache keys_zone=small:{ZONE} inactive=1h max_size=1g;
    log_format cache '$upstream_cache_status';"""
LOCATION = f"""location / {{{{
            proxy_pass http://{ORIGIN};
            proxy_cache small;
            proxy_cache_valid 200 1h;
        }}}}
        access_log {{dir}}/cache.log cache;"""

RANDOM = """
math.randomseed(tonumber(os.getenv("SEED")))
function request()
    return wrk.format("GET", "/o/" .. string.format("%03d", math.random(0, OBJECTS - 1)), nil, nil)
end
""".replace("OBJECTS", str(OBJECTS))

HAPROXY = """
global
    maxconn 4000
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
"""


def measure() -> dict[str, dict[str, float]]:
    """{way: {"requests": per second, "hits": share of what the caches answered}}"""
    return {name: _run(way) for name, way in (
        ("tcpha, by request-target", "content"), ("tcpha, in turns", "turns"),
        ("haproxy, balance uri", "uri"), ("haproxy, balance roundrobin", "roundrobin"))}


def _run(way: str) -> dict[str, float]:
    digits = ["".join(d for d in "0123456789" if int(d) % BACKENDS == n) for n in range(BACKENDS)]
    rules = [(n, f"^/o/..[{d}]$" if way == "content" else ".*") for n, d in enumerate(digits)]
    c = Cluster(BACKENDS, rules=rules, nginx={"log": False}, fe_conf="maxclients = 4096",
                be_conf="maxclients = 20000")
    try:
        origin = c.bed.host("origin", ORIGIN)
        content = Nginx(origin)
        for n in range(OBJECTS):
            content.file(f"o/{n:03d}", size=SIZE)
        origin.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE,
                   "burst", "256kb", "latency", "200ms")
        for i, server in enumerate(c.nginx):
            server.stop()
            c.nginx[i] = _cache(server)
        base = f"http://{c.VIP}"
        if way in ("uri", "roundrobin"):
            text = HAPROXY + (f"listen l\n    bind 192.168.1.23:8080\n    balance {way}\n"
                              "    http-reuse always\n")
            text += "".join(f"    server s{i} {h.address}:80\n" for i, h in enumerate(c.be_hosts))
            (c.fe_host.dir / "haproxy.cfg").write_text(text)
            c.fe_host.start("haproxy", "-db", "-f", str(c.fe_host.dir / "haproxy.cfg"))
            wait_for(lambda: listening(c.fe_host, 8080), "haproxy")
            base = "http://192.168.1.23:8080"
        script = c.client.dir / "random.lua"
        script.write_text(RANDOM)

        def wrk(seed: int, seconds: int) -> float:
            text = c.client.run("env", f"SEED={seed}", "wrk", "-t1", "-c32", f"-d{seconds}s", "-H",
                                "Connection: close", "-s", str(script), base).stdout
            found = re.search(r"Requests/sec:\s+([\d.]+)", text)
            return float(found.group(1)) if found else 0.0
        wrk(1, SECONDS)  # fills the caches
        logs = [h.dir / "cache.log" for h in c.be_hosts]
        before = [log.stat().st_size for log in logs]
        rate = wrk(2, SECONDS)
        hits = total = 0
        for log, size in zip(logs, before, strict=True):
            words = log.read_bytes()[size:].split()
            total += len(words)
            hits += words.count(b"HIT")
        return {"requests": rate, "hits": hits / total if total else 0.0}
    finally:
        c.close()


def _cache(old: Nginx) -> Nginx:
    """The same host's nginx, as a cache before the origin."""
    (old.root / "up").rmdir()
    old.root.rmdir()
    directory = str(old.host.dir)
    return Nginx(old.host, log=False, http=CACHE.format(dir=directory),
                 extra=LOCATION.format(dir=directory))


def rows(found: dict[str, Any]) -> list[list[str]]:
    return [["locality", "requests a second", "answered by a cache"],
            *[[way, f"{v['requests']:.0f}", f"{v['hits']:.0%}"] for way, v in found.items()]]
