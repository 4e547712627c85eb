# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo: one client, one front end, two back ends with real nginx, on this machine."""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable

from tcpha.cli.ending import plain_ending
from tcpha.lab.bed import Cluster, program, sh, wait_for

PREFIX = "tcphademo"
RULES = [(1, "jpg$"), (1, r"\.(png|gif|mp4)(\?|$)"), (0, "^/api/"), (0, ".*")]
BIG = 64 << 20
FORM = "location = /api/form { return 200 accepted; }"

# (what, curl's arguments, request-target)
REQUESTS: list[tuple[str, list[str], str]] = [
    ("GET /", [], "/"),
    ("GET /index.html", [], "/index.html"),
    ("GET /photo.jpg", [], "/photo.jpg"),
    ("GET /photo.jpg?w=200", [], "/photo.jpg?w=200"),
    ("GET /clip.mp4?t=9", [], "/clip.mp4?t=9"),
    ("GET /api/jpg", [], "/api/jpg"),
    ("HEAD /photo.jpg", ["-I"], "/photo.jpg"),
    ("GET /logo.png", ["-H", "Range: bytes=0-9"], "/logo.png"),
    ("POST /api/form", ["-d", "a=1&b=2"], "/api/form"),
    ("PUT /up/file (1 MB)", ["-T"], "/up/file"),
    ("GET /index.html HTTP/1.0", ["-0"], "/index.html"),
    ("GET /nothing", [], "/nothing"),
]


def main() -> int:
    """Exit status 0 only if everything worked."""
    p = argparse.ArgumentParser(prog="demo", description=__doc__)
    p.add_argument("--keep", action="store_true", help="leave the cluster running")
    args = p.parse_args()
    if os.geteuid() != 0:
        print("the demo makes network namespaces: run it as root (sudo make demo)", file=sys.stderr)
        return 1
    clean_up()
    print("Starting 4 hosts: a client, a front end and two back ends with nginx ...", flush=True)
    cluster = Cluster(2, "direct", rules=RULES, prefix=PREFIX, nginx={"extra": FORM})
    failures: list[str] = []
    try:
        prepare(cluster)
        show_configuration(cluster)
        requests(cluster, failures)
        download(cluster, failures)
        if args.keep and not failures:
            say_how(cluster)
            return 0
        stop(cluster, failures)
    except BaseException:
        cluster.close()
        raise
    cluster.close()
    print("\n" + ("\n".join(f"FAILED: {f}" for f in failures) or "All of it worked."))
    return 1 if failures else 0


def clean_up() -> None:
    """Remove what an earlier demo with KEEP=1 left."""
    for line in sh("ip", "netns", "list").stdout.splitlines():
        name = line.split()[0]
        if name.startswith(f"{PREFIX}-"):
            pids = sh("ip", "netns", "pids", name).stdout.split()
            if pids:
                sh("kill", "-9", *pids, check=False)
            sh("ip", "netns", "del", name)


def prepare(c: Cluster) -> None:
    for server in c.nginx:
        for name in ("index.html", "photo.jpg", "clip.mp4", "logo.png", "api/jpg"):
            server.file(name, f"{name} from {server.host.name}\n".encode())
        server.file("big", size=BIG)


def show_configuration(c: Cluster) -> None:
    assert c.fe
    print(f"\nclient 192.168.1.50   front end 192.168.1.23   virtual address {c.VIP}\n"
          "back ends 192.168.1.33 (be1), 192.168.1.38 (be2)\n\ntcphafe.conf:")
    print("\n".join("    " + line for line in c.fe.config.read_text().split("\n") if line))
    print("tcphabe.conf of be1:")
    print("\n".join("    " + line for line in c.be[0].config.read_text().split("\n") if line))


def answers_through_fe(c: Cluster, work: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """Bytes that the front end and each back end sent while work() ran."""
    hosts = [c.fe_host, *c.be_hosts]
    before = [h.counter("tx_bytes") for h in hosts]
    work()
    sent = [h.counter("tx_bytes") - b for h, b in zip(hosts, before, strict=True)]
    return sent[0], dict(zip([h.name for h in c.be_hosts], sent[1:], strict=True))


def requests(c: Cluster, failures: list[str]) -> None:
    upload = c.bed.dir / "upload"
    upload.write_bytes(os.urandom(1 << 20))
    # counts response packets that leave the FE or pass it, other than its own handshakes
    c.fe_host.nft(f"""table ip lab {{
        counter answers {{ }}
        chain out {{ type filter hook output priority 0;
            ip saddr {c.VIP} tcp sport 80 ip length > 100 counter name answers
        }}
        chain in {{ type filter hook prerouting priority 0;
            ip saddr {c.VIP} tcp sport 80 counter name answers
        }}
    }}""")
    rows = [("request", "status", "rule that matched", "served by", "client seen by nginx",
             "response sent by")]
    for what, options, target in REQUESTS:
        options = [*options, str(upload)] if options == ["-T"] else options
        rule = next((n, p) for n, p in RULES if re.search(p, target))
        crossed = c.fe_host.nft_counter("answers")
        sent_before = [h.counter("tx_packets") for h in c.be_hosts]
        # '%{local_port}' names our end of the connection
        done = c.curl(*options, "-o", "/dev/null", "-D", "-", "-w",
                      "\nPORT %{local_ip}:%{local_port} %{http_code}", f"http://{c.VIP}{target}")
        local, code = done.stdout.rsplit("PORT ", 1)[1].split()
        served = (re.findall(r"(?im)^x-served-by: (\S+)", done.stdout) or ["?"])[-1]
        expected = c.be_hosts[rule[0]].name

        def entry(local: str = local, n: int = rule[0]) -> str:
            return next((f"{r['client']}:{r['client_port']}" for r in reversed(c.nginx[n].seen())
                         if f"{r['client']}:{r['client_port']}" == local), "")
        seen = wait_for(entry, f"nginx's log line for {what}")
        crossed = c.fe_host.nft_counter("answers") - crossed
        grew = [h.counter("tx_packets") - b for h, b in zip(c.be_hosts, sent_before, strict=True)]
        sender = expected if crossed == 0 and grew[rule[0]] > 0 else "front end"
        if int(code) >= 400 and target != "/nothing":
            failures.append(f"{what}: status {code}")
        if served not in (expected, "?") or seen != local or sender != expected:
            failures.append(f"{what}: served by {served}, seen as {seen}, sent by {sender}")
        rows.append((what, code, rule[1], expected if served == "?" else served, seen, sender))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    print()
    for n, row in enumerate(rows):
        print("  ".join(f.ljust(w) for f, w in zip(row, widths, strict=True)).rstrip())
        if n == 0:
            print("  ".join("-" * w for w in widths))
    print("\n'response sent by': the front end's packet counters saw no response, the back end's "
          "interface sent it.")


def download(c: Cluster, failures: list[str]) -> None:
    out = c.bed.dir / "big"
    want = hashlib.sha256((c.nginx[0].root / "big").read_bytes()).hexdigest()
    start = time.monotonic()
    through_fe, by = answers_through_fe(c, lambda: c.get("/big", "-o", str(out)))
    seconds = time.monotonic() - start
    same = hashlib.sha256(out.read_bytes()).hexdigest() == want
    print(f"\n64 MB download: {BIG / seconds / 1e6:.0f} MB/s, hash {'equal' if same else 'WRONG'}; "
          f"be1 sent {by['be1'] / 1e6:.1f} MB, the front end {through_fe / 1e6:.2f} MB "
          "(the client's acknowledgements, forwarded)")
    if not same or through_fe > BIG / 20 or by["be1"] < BIG:
        failures.append("the download")


def stop(c: Cluster, failures: list[str]) -> None:
    assert c.fe
    fe = c.fe
    wait_for(lambda: fe.ctl("status")["live"] == 0, "the end of all connections")
    counters = fe.ctl("status")["counters"]
    print(f"front end: {counters['handed']} connections handed over, {counters['closed']} closed")
    for daemon in [fe, *c.be]:
        code = daemon.stop()
        if code:
            failures.append(f"tcpha{daemon.role} on {daemon.host.name}: exit status {code}")
        left = json.loads(daemon.host.ip("-j", "addr"))
        if any(a.get("local") == c.VIP for link in left for a in link["addr_info"]):
            failures.append(f"{daemon.host.name} still has the virtual address")
    print("stopped; the hosts are as they were before")


def say_how(c: Cluster) -> None:
    assert c.fe
    print(f"""
The cluster is left running. Try:
  ip netns exec {c.client.ns} curl -i http://{c.VIP}/photo.jpg
  {program("tcphactl")} --run-dir {c.fe.run_dir} fe status
  {program("tcphactl")} --run-dir {c.be[0].run_dir} be conns
  tail -f {c.nginx[0].log}
Stop it:
  make demo            (cleans up first), or
  for n in $(ip netns list | grep -o '^{PREFIX}-[a-z0-9]*'); do
    ip netns pids $n | xargs -r kill -9; ip netns del $n; done; rm -rf {c.bed.dir}""")


if __name__ == "__main__":
    with plain_ending("demo"):
        sys.exit(main())
