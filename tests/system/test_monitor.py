# SPDX-License-Identifier: GPL-2.0-or-later
"""What watches a cluster: metrics, the status page's data, and what a request would meet."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tcpha.lab.bed import Cluster, Host, wait_for
from tests.support.client import read_all
from tests.support.state import settle

pytestmark = pytest.mark.modes("direct", "fast-direct", "nfqueue-direct")
FE, BE = "http://127.0.0.1:9110", "http://127.0.0.1:9111"


@pytest.fixture(scope="module")
def watched(mode: dict[str, Any]) -> Iterator[Cluster]:
    c = Cluster(2, **mode, rules=[(1, "jpg$"), (0, "^/[a-z]"), (1, "^/[a-z]")],
                fe_conf="admin = 127.0.0.1:9110\nheadlimit = 1024", be_conf="admin = 9111")
    try:
        for server in c.nginx:
            server.file("a.jpg", b"picture\n")
            server.file("page", b"page\n")
        yield c
    finally:
        c.close()


def fetch(host: Host, url: str, *args: str) -> str:
    return host.run("curl", "-sSf", *args, url).stdout


def metrics(host: Host, url: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """{(sample's name, its labels' values in order of their names): value}"""
    text = fetch(host, f"{url}/metrics")
    return {(s.name, tuple(v for _, v in sorted(s.labels.items()))): s.value
            for family in text_string_to_metric_families(text) for s in family.samples}


def test_metrics_count_exactly(watched: Cluster) -> None:
    c = watched
    settle(c)
    before = metrics(c.fe_host, FE), [metrics(h, BE) for h in c.be_hosts]
    for path in ("/a.jpg", "/page"):
        for _ in range(20):
            c.get(path)
        settle(c)
    c.curl(f"http://{c.VIP}/1")  # no rule
    c.curl("-H", "Host:", f"http://{c.VIP}/page")
    c.curl("-H", f"X: {'x' * 2000}", f"http://{c.VIP}/page")
    settle(c)
    after = metrics(c.fe_host, FE), [metrics(h, BE) for h in c.be_hosts]

    def grew(name: str, *labels: str, be: int | None = None) -> float:
        a, b = (after[0], before[0]) if be is None else (after[1][be], before[1][be])
        return a.get((name, labels), 0) - b.get((name, labels), 0)
    be1, be2 = (h.address for h in c.be_hosts)
    assert grew("tcpha_rule_handoffs_total", "jpg$", "0", be2) == 20
    pages = [grew("tcpha_rule_handoffs_total", "^/[a-z]", str(n), s)
             for n, s in ((1, be1), (2, be2))]
    assert sum(pages) == 20 and min(pages) >= 5  # the load is shared
    handed = [grew("tcpha_handoffs_total", "handed", s) for s in (be1, be2)]
    assert handed == [pages[0], 20 + pages[1]]
    assert [grew("tcpha_handoffs_total", "closed", s) for s in (be1, be2)] == handed
    assert [grew("tcpha_closed_total", be=n) for n in (0, 1)] == handed
    assert [sum(grew("tcpha_adoptions_total", path, be=n) for path in ("socket", "packet"))
            for n in (0, 1)] == handed
    for code in ("400", "431", "503"):
        assert grew("tcpha_answers_total", code) == 1, code
    packet = grew("tcpha_paths_total", "packet")
    assert packet == (40 if c.fastpath else 0)
    assert grew("tcpha_paths_total", "socket") == 40 - packet
    total = grew("tcpha_stage_seconds_count", "total")
    assert total == grew("tcpha_stage_seconds_count", "offer") == 40 - packet
    assert packet == grew("tcpha_stage_seconds_count", "fast") + \
        grew("tcpha_packets_total", "cached")
    assert after[0][("tcpha_stage_seconds_bucket", ("+Inf", "total"))] >= total
    assert grew("tcpha_forwarded_bytes_total") > 0
    assert grew("tcpha_packets_total", "forwarded") > 0
    for s in (be1, be2):
        assert after[0][("tcpha_server_up", (s,))] == 1
        assert after[0][("tcpha_control_connections", (s,))] == 2
        assert after[0][("tcpha_control_silence_seconds", (s,))] < 10
    assert after[0][("tcpha_live_connections", ())] == 0
    assert after[0][("tcpha_workers", ("idle",))] >= 1
    assert after[1][0][("tcpha_application_up", ())] == 1
    assert after[1][0][("tcpha_place_up", ("any", c.VIP))] == 1


def test_counts_of_rules_outlive_a_reload(watched: Cluster) -> None:
    """Also of a rule that is elsewhere in the list then."""
    c = watched
    assert c.fe
    text = c.fe.config.read_text()

    def use() -> dict[str, int]:
        assert c.fe
        return {r["pattern"]: r["handed"] for r in c.fe.ctl("rules") if r["server"] != "x"}
    settle(c)
    c.get("/a.jpg")
    settle(c)
    before = use()["jpg$"]
    try:
        c.fe.config.write_text(text.replace(f"rule = {c.be_hosts[1].address} jpg$",
                                            f"rule = {c.be_hosts[0].address} ^/never\n"
                                            f"rule = {c.be_hosts[1].address} jpg$"))
        c.fe.ctl("reload")
        assert use()["jpg$"] == before and use()["^/never"] == 0
        c.get("/a.jpg")
        wait_for(lambda: use()["jpg$"] == before + 1, "the rule's next use")
        assert use()["^/never"] == 0
    finally:
        c.fe.config.write_text(text)
        c.fe.ctl("reload")
    assert use()["jpg$"] == before + 1


def test_status_as_json(watched: Cluster) -> None:
    c = watched
    c.get("/page")
    d = json.loads(fetch(c.fe_host, f"{FE}/status.json"))
    assert d["status"]["vaddr"] == c.VIP and len(d["rules"]) == 3
    assert {e["text"] for e in d["stats"]["events"]} >= {"serving"}
    assert "<title>TCPHA front end</title>" in fetch(c.fe_host, f"{FE}/")
    head = c.fe_host.run("curl", "-sSI", f"{FE}/").stdout
    assert "Content-Security-Policy: default-src 'none'" in head
    missing = c.fe_host.run("curl", "-sS", "-w", "%{http_code}", f"{FE}/etc/passwd").stdout
    assert missing.endswith("404") and "/metrics" in missing
    refused = c.fe_host.run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST",
                            f"{FE}/").stdout
    assert refused == "501"


def test_slow_handoffs_are_remembered(watched: Cluster) -> None:
    c = watched
    assert c.fe
    for n in range(40):
        c.get(f"/page?{n}")
    rows = c.fe.ctl("stats")["slowest"]
    assert 1 <= len(rows) <= 16
    assert [r["seconds"] for r in rows] == sorted((r["seconds"] for r in rows), reverse=True)
    assert all(r["target"].startswith(("/page", "/a.jpg")) and r["rule"] for r in rows), rows


def test_what_a_request_would_meet(watched: Cluster) -> None:
    """'test-request' says what then happens, and sends nothing."""
    c = watched
    assert c.fe
    fe = c.fe
    handed = fe.ctl("status")["counters"]["accepted"]
    be1, be2 = (h.address for h in c.be_hosts)

    def ask(*words: str) -> dict[str, Any]:
        answer: dict[str, Any] = fe.ctl("test-request", *words)
        return answer
    assert ask("GET", "/a.jpg")["server"] == be2
    assert ask("GET", "/a.jpg")["rule"] == 0
    assert [r["rule"] for r in ask("GET", "/a.jpg")["rules"]] == [0, 1, 2]
    assert ask("GET", "/1")["outcome"] == "503"
    assert ask("GET", "/a.jpg", "Host : x")["outcome"] == "400"
    assert ask("GET", "/a.jpg", "X: " + "x" * 2000)["outcome"] == "431"
    fe.ctl("drain", be2)
    try:
        drained = ask("GET", "/a.jpg")
        assert drained["server"] == be1 and drained["rule"] == 1
        assert drained["rules"][0]["reason"] == "draining"
    finally:
        fe.ctl("undrain", be2)
    c.nginx[0].stop()
    c.nginx[1].stop()
    last = "is asked all the same, and refuses unless its server is back"
    wait_for(lambda: last in ask("GET", "/a.jpg")["reason"], "both servers to be missed")
    assert ask("GET", "/a.jpg")["outcome"] == "503" == c.curl(
        "-o", "/dev/null", "-w", "%{http_code}", f"http://{c.VIP}/a.jpg").stdout
    handed = fe.ctl("status")["counters"]["accepted"]
    for server in c.nginx:
        server.start()
    wait_for(lambda: all(s["state"] == "up" for s in fe.ctl("servers")), "both servers again")
    c.be[1].process.terminate()
    c.be[1].process.wait()
    wait_for(lambda: not ask("GET", "/a.jpg")["rules"][0]["usable"], "the end to be known")
    assert ask("GET", "/a.jpg")["server"] == be1
    assert fe.ctl("status")["counters"]["accepted"] == handed
    assert c.curl("-o", "/dev/null", "-w", "%{http_code} %header{x-served-by}",
                  f"http://{c.VIP}/a.jpg").stdout == "200 be1"
    c.be[1].start()
    c.connected()


# What rules see of a request-target, and where it goes then

SEEN = [(1, "^/img/"), (0, "^/$"), (1, r"^/\?"), (0, r"^\*$"), (1, ":443$"), (0, "^/")]
METHODS = st.sampled_from(["GET", "HEAD", "OPTIONS", "CONNECT"])
PATHS = st.sampled_from(["", "/", "/img/x", "/x", "//img/", "/x/img/", "/http://a/"])
QUERIES = st.sampled_from(["", "?", "?x", "?/img/", "?http://a/img/"])
AUTHORITIES = st.sampled_from(["a", "a:80", "a:443", "[::1]", "[::1]:443", "192.168.1.36", "img",
                               "user@a", "user:word@[::1]:80", ""])
SCHEMES = st.sampled_from(["http://", "HTTP://", "hTtPs://", "ftp://", "http:/"])
TARGETS = st.one_of(
    st.tuples(SCHEMES, AUTHORITIES, PATHS, QUERIES).map("".join), AUTHORITIES, st.just("*"),
    st.tuples(PATHS, QUERIES).map("".join))


def origin_form(method: str, target: str) -> str | None:
    """What rules see, by RFC 9112 section 3.2; None: such a request is refused."""
    if method == "CONNECT":
        return target if re.fullmatch(r"[^/?@]+", target) else None
    if target.startswith("/") or (method, target) == ("OPTIONS", "*"):
        return target
    parts = re.fullmatch(r"(?i:https?)://([^/?@]+)(/[^?]*|)([?].*|)", target)
    if parts is None:
        return None
    if method == "OPTIONS" and not parts[2] + parts[3]:
        return "*"
    return (parts[2] or "/") + parts[3]


def test_rules_see_path_and_query_of_any_form(mode: dict[str, Any]) -> None:
    """What a worker decides, the packet path's program (once it has seen a request twice) and
    'test-request' are of one opinion."""
    c = Cluster(2, **mode, rules=SEEN)
    try:
        assert c.fe
        fe = c.fe

        def used() -> dict[int, int]:
            return {row["rule"]: row["handed"] for row in fe.ctl("rules")}

        def sent(method: str, target: str) -> bytes:
            with c.client.connect(c.VIP) as s:
                s.sendall(f"{method} {target} HTTP/1.1\r\nHost: lab\r\n"
                          "Connection: close\r\n\r\n".encode())
                return read_all(s)

        @settings(max_examples=80)
        @given(METHODS, TARGETS)
        @example("GET", "http://a/img/x")
        @example("GET", "http://a")
        @example("GET", "HTTP://[::1]:443?x")
        @example("OPTIONS", "https://a")
        @example("OPTIONS", "https://a/")
        def agree(method: str, target: str) -> None:
            said = fe.ctl("test-request", method, target, "Host: lab", "Connection: close")
            see = origin_form(method, target)
            assert said.get("rules_see") == see
            want = [n for n, (_, pattern) in enumerate(SEEN) if re.search(pattern, see or "")]
            assert said.get("rule") == (want[0] if want else None)
            before = used()
            answers = [sent(method, target) for _ in range(4)]
            if want:
                wait_for(lambda: sum(used().values()) == sum(before.values()) + 4, "the count")
                before[want[0]] += 4
            else:
                status = b"400" if see is None else b"503"
                assert all(a.startswith(b"HTTP/1.1 " + status) for a in answers)
            assert used() == before
        agree()
        assert (fe.ctl("status")["packets"].get("cached", 0) > 40) == c.fastpath
        assert c.nginx[1].seen()[0]["request"] == "GET http://a/img/x HTTP/1.1"
    finally:
        c.close()


def test_admin_address_in_use(watched: Cluster) -> None:
    host = watched.be_hosts[0]
    config = host.dir / "second.conf"
    config.write_text(watched.be_text(host).replace("9111", "80"))
    from tcpha.lab.bed import BIN
    done = host.run(str(BIN / "tcphabe"), "-f", "-c", str(config), "--run-dir",
                    str(host.dir / "second"), check=False)
    assert done.returncode == 1 and "admin: cannot listen on 127.0.0.1:80" in done.stderr
