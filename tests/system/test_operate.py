# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator sees and uses: detection, logs, the connection table."""
from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, freeze, wait_for
from tests.support.client import KEEP, REQUEST, body, read_all
from tests.support.daemons import front
from tests.support.memory import MB, modest
from tests.support.state import settle

# whether packets travel in a tunnel is not the point
pytestmark = pytest.mark.modes("direct", "fast-direct", "nfqueue-direct")


@pytest.fixture(scope="module")
def watched(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Two back ends for every request; all logs on, and quick detection."""
    c = Cluster(2, **mode, rules=[(0, ".*"), (1, ".*")], start=False, be_conf="dbglevel = 6")
    c.fe_conf = (f"dtcinterval = 1\naccesslog = {c.fe_host.dir}/access.log\n"
                 f"logfile = {c.fe_host.dir}/fe.log\ndbglevel = 6")
    try:
        for server in c.nginx:
            server.file("1k", size=1024)
            server.file("name", f"{server.host.name}\n".encode())
        c.start()
        yield c
    finally:
        c.close()


def server(c: Cluster) -> dict[str, Any]:
    """The first back end as the front end sees it."""
    row: dict[str, Any] = front(c).ctl("servers")[0]
    return row


def process(c: Cluster) -> Callable[[], None]:
    c.be[0].kill()
    return c.be[0].start


def hung_process(c: Cluster) -> Callable[[], None]:
    freeze(c.be[0].process.pid)
    return lambda: c.be[0].process.send_signal(signal.SIGCONT)


def host(c: Cluster) -> Callable[[], None]:
    c.be_hosts[0].ip("link", "set", "eth0", "down")
    return lambda: str(c.be_hosts[0].ip("link", "set", "eth0", "up")) and None


def application(c: Cluster) -> Callable[[], None]:
    c.nginx[0].stop()
    return c.nginx[0].start


@pytest.mark.parametrize("kill, dead", [
    (process, "process dead"), (hung_process, "process dead"), (host, "host dead"),
    (application, "application dead")])
def test_what_is_dead_is_told_apart(watched: Cluster, kill: Callable[..., Any], dead: str) -> None:
    def said() -> list[str]:
        prefix = f"back end {watched.be_hosts[0].address}: "
        return [line.split(prefix)[1] for line in front(watched).log.read_text().splitlines()
                if prefix in line]
    before = len(said())
    mend = kill(watched)
    try:
        wait_for(lambda: server(watched)["state"] == "down", "detection")
        assert server(watched)["reason"].startswith(dead)
        assert {watched.get("/name") for _ in range(4)} == {"be2\n"}
    finally:
        mend()
    wait_for(lambda: server(watched)["state"] == "up", "recovery", 15)
    wait_for(lambda: "be1\n" in {watched.get("/name") for _ in range(4)}, "be1 in use again")
    assert [re.sub(r" \(.*", "", line) for line in said()[before:]] == [dead, "up"]
    settle(watched)


def test_without_detection_a_dead_application_is_found_by_refusals(watched: Cluster) -> None:
    fe = front(watched)
    fe.ctl("set", "dtcinterval", "0")
    mend = application(watched)
    try:
        wait_for(lambda: watched.be[0].ctl("status")["application"] == "dead", "the back end")
        refused = server(watched)["refused"]
        assert server(watched)["state"] == "up"
        assert {watched.get("/name") for _ in range(4)} == {"be2\n"}
        assert server(watched)["refused"] > refused
        fe.ctl("set", "dtcinterval", "1")
        wait_for(lambda: server(watched)["state"] == "down", "detection")
    finally:
        fe.ctl("set", "dtcinterval", "1")
        mend()
    wait_for(lambda: server(watched)["state"] == "up", "recovery", 15)
    settle(watched)


def test_access_log(watched: Cluster) -> None:
    path = Path(watched.fe_host.dir / "access.log")
    before = len(path.read_text().splitlines()) if path.exists() else 0
    long = "/1k?" + "x" * 5000
    s = watched.client.connect(watched.VIP)
    port = s.getsockname()[1]
    s.sendall(REQUEST.replace(b"/1k", long.encode()))
    assert len(body(read_all(s))) == 1024
    s.close()
    watched.get("/1k?none", "-o", "/dev/null")
    wait_for(lambda: len(path.read_text().splitlines()) == before + 2, "two lines")
    first, second = (line.split(" ") for line in path.read_text().splitlines()[before:])
    assert first[1:3] == [f"{watched.client.address}:{port}", long] and second[2] == "/1k?none"
    for when, _, _, rule, be, micros in (first, second):
        assert datetime.now(UTC) - datetime.fromisoformat(when) < timedelta(minutes=1)
        assert be == watched.be_hosts[int(rule)].address and 0 < int(micros) < 10**7
    settle(watched)


def test_logs_are_rotated(watched: Cluster) -> None:
    fe, folder = front(watched), watched.fe_host.dir
    for name in ("access.log", "fe.log"):
        (folder / name).rename(folder / f"{name}.1")
    watched.get("/1k", "-o", "/dev/null")  # goes to the old file still
    assert not (folder / "access.log").exists()
    fe.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: all((folder / n).exists() for n in ("access.log", "fe.log")), "new files")
    watched.get("/1k?rotated", "-o", "/dev/null")
    wait_for(lambda: "?rotated" in (folder / "access.log").read_text(), "the line")
    assert "?rotated" not in (folder / "access.log.1").read_text()
    assert "log files opened anew" in (folder / "fe.log").read_text()
    settle(watched)


def test_an_access_log_that_cannot_be_opened(watched: Cluster) -> None:
    fe = front(watched)
    text = fe.config.read_text()
    try:
        fe.config.write_text(text.replace("accesslog = ", "accesslog = /proc/none"))
        with pytest.raises(Exception, match=r"accesslog /proc/none.*mend the path"):
            fe.ctl("reload")
        watched.get("/1k?still", "-o", "/dev/null")
        wait_for(lambda: "?still" in (watched.fe_host.dir / "access.log").read_text(), "the line")
    finally:
        fe.config.write_text(text)
        fe.ctl("reload")
    settle(watched)


LEVELS = {1: "does not take it", 2: "handed over to", 3: "offered to", 4: "CLOSED from",
          5: "chosen: ", 6: "accepted|a first segment"}


@pytest.mark.parametrize("level", range(7))
def test_each_level_says_more_and_names_the_flow(watched: Cluster, level: int) -> None:
    fe = front(watched)
    fe.ctl("set", "dbglevel", str(level))
    fe.ctl("set", "dtcinterval", "0")  # or the dead application would be offered nothing
    mend = application(watched)
    try:
        wait_for(lambda: watched.be[0].ctl("status")["application"] == "dead", "the back end")
        at = len(fe.log.read_text())
        refused = server(watched)["refused"]
        clients = []
        while server(watched)["refused"] == refused:
            s = watched.client.connect(watched.VIP)
            clients.append(s)
            s.sendall(REQUEST)
            assert len(body(read_all(s))) == 1024
        names = {f"{s.getsockname()[0]}:{s.getsockname()[1]}" for s in clients}
        for s in clients:
            s.close()
        settle(watched)
    finally:
        fe.ctl("set", "dtcinterval", "1")
        fe.ctl("set", "dbglevel", "6")
        mend()
    wait_for(lambda: server(watched)["state"] == "up", "recovery", 15)
    said = [line for line in fe.log.read_text()[at:].splitlines() if "192.168.1.50" in line]
    for number, words in LEVELS.items():
        assert any(re.search(words, line) for line in said) == (number <= level), words
    assert all(any(f" {name}: " in line for name in names) for line in said)


def test_the_connection_table_as_a_file(watched: Cluster) -> None:
    fe = front(watched)
    path = fe.run_dir / "tcpha_fe_conn"
    head, *rows = path.read_text().splitlines()
    assert head.split() == ["client", "vaddr", "target", "rule", "server", "state", "age", "idle",
                            "packets", "bytes"] and not rows
    clients = [watched.client.connect(watched.VIP) for _ in range(3)]
    targets = ["/1k?0", '/1k?"\\"\'{[,', "/1k?" + "x" * 100]
    for target, s in zip(targets, clients, strict=True):
        s.sendall(KEEP.replace(b"/1k", target.encode()))
        assert s.recv(65536)
    wait_for(lambda: len(fe.ctl("conns")) == 3, "three flows")
    assert {r["target"] for r in fe.ctl("conns")} == {*targets[:2], targets[2][:56] + "..."}
    for _ in range(2):
        rows = watched.fe_host.run("cat", str(path)).stdout.splitlines()[1:]
        want = {f"{s.getsockname()[0]}:{s.getsockname()[1]}":
                t if len(t) <= 56 else t[:56] + "..."
                for t, s in zip(targets, clients, strict=True)}
        assert {r.split()[0]: r.split()[2] for r in rows} == want
    assert watched.fe_host.run("head", "-c1", str(path)).stdout == "c"  # a reader that goes early
    for s in clients:
        s.close()
    settle(watched)
    assert len(path.read_text().splitlines()) == 1


MANY = 50_000
CROWD = """
import resource, socket, sys
vip, address, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
held = []
while len(held) < count:
    batch = [socket.socket() for _ in range(min(200, count - len(held)))]
    for s in batch:
        s.settimeout(60)
        s.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        s.bind((address, 0))
        s.connect((vip, 80))
        s.sendall(b"GET /1k?%d HTTP/1.1\\r\\nHost: lab\\r\\n\\r\\n" % (first + len(held)))
        held.append(s)
    for s in batch:
        need = None
        data = b""
        while need is None or len(data) < need:
            piece = s.recv(65536)
            assert piece, "closed by the server"
            data += piece
            if need is None and b"\\r\\n\\r\\n" in data:
                assert data.startswith(b"HTTP/1.1 200 "), data[:80]
                need = data.index(b"\\r\\n\\r\\n") + 4 + 1024
print("all here", flush=True)
sys.stdin.read()
"""


def find_again(c: Cluster) -> None:
    """Nobody knows of the connections any more. Back ends look for their sockets."""
    fe = front(c)
    fe.stop()
    with ExitStack() as stack:
        for be in c.be:
            be.kill()
            be.start()
            stack.enter_context(modest(be, 5 * MB))
        fe.start()
        wait_for(lambda: fe.ctl("status")["counters"]["restored"] >= MANY, "all connections", 60)


@pytest.mark.parametrize("datapath", ["ebpf", "nfqueue"])
def test_the_connection_table_of_fifty_thousand(datapath: str) -> None:
    """It is right, requests are served while it is read, and it is found again."""
    c = Cluster(3, datapath=(datapath, datapath), rules=[(n, ".*") for n in range(3)],
                be_conf=f"maxclients = {MANY}", fe_conf="maxclients = 1024",
                nginx={"extra": "keepalive_timeout 900s;", "log": False})
    try:
        for n in c.nginx:
            n.file("1k", size=1024)
        # few may open so many files in one process, and ports of one address are soon scarce
        part, crowd = MANY // 5, []
        for n in range(5):
            c.client.ip("addr", "add", f"192.168.1.{51 + n}/24", "dev", "eth0")
            crowd.append(c.client.start(
                sys.executable, "-c", CROWD, c.VIP, f"192.168.1.{51 + n}", str(n * part), str(part),
                stdout=subprocess.PIPE, stdin=subprocess.PIPE))
        for process in crowd:
            assert process.stdout and process.stdout.readline() == "all here\n"
        with ThreadPoolExecutor(1) as pool, modest(front(c)):
            asked, served = pool.submit(front(c).ctl, "conns"), 0
            while not asked.done():
                with c.client.connect(c.VIP) as s:
                    s.sendall(REQUEST)
                    assert len(body(read_all(s))) == 1024
                served += 1
        assert served > 1
        rows = [r for r in asked.result() if "?" in r["target"]]
        assert {r["target"] for r in rows} == {f"/1k?{n}" for n in range(MANY)}
        assert len(rows) == len({r["client"] for r in rows}) == MANY
        shares = Counter(r["server"] for r in rows)
        assert max(shares.values()) - min(shares.values()) < MANY / 100, shares
        for be in c.be:
            with modest(be, 5 * MB):
                adopted = be.ctl("conns")
            assert sum(r["client"].startswith("192.168.1.5") for r in adopted) \
                >= shares[be.host.address]
        file = (front(c).run_dir / "tcpha_fe_conn").read_text().splitlines()
        assert sum("/1k?" in line for line in file) == MANY
        find_again(c)
        for process in crowd:
            process.communicate("", timeout=60)
        wait_for(lambda: front(c).ctl("status")["live"] == 0, "the end of all connections", 60)
        settle(c)
    finally:
        c.close()


def test_an_access_log_that_cannot_be_opened_anew() -> None:
    """What is said is what has become of it."""
    c = Cluster(1, rules=[(0, ".*")], start=False)
    try:
        place = c.fe_host.dir / "logs"
        place.mkdir()
        fe = c.fe = Daemon(c.fe_host, "fe", f"{c.fe_text()}\naccesslog = {place}/access\n")
        place.rename(place.with_name("away"))
        fe.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: f"accesslog {place}/access: No such file" in fe.log.read_text(), "the log")
        assert "until then lines go to the file that was open before" in fe.log.read_text()
        assert fe.ctl("status")["live"] == 0  # and all of it is said
        assert "opened anew" not in fe.log.read_text()
    finally:
        c.close()
