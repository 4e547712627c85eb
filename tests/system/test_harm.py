# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that runs out of something, or breaks, under daemons that go on."""
from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, freeze, listening, sh, wait_for
from tests.support.client import KEEP, REQUEST, body, read_all
from tests.support.daemons import lines
from tests.support.memory import no_kernel_memory
from tests.support.state import settle


@contextmanager
def serving(mode: dict[str, Any], backends: int = 1, **more: Any) -> Iterator[Cluster]:
    c = Cluster(backends, **mode, rules=[(n, ".*") for n in range(backends)], **more)
    try:
        for n in c.nginx:
            n.file("1k", size=1024)
            n.file("big", size=16 << 20)
        yield c
    finally:
        c.close()


def request(c: Cluster, data: bytes = KEEP) -> socket.socket:
    s = c.client.connect(c.VIP)
    s.sendall(data)
    return s


def answer(s: socket.socket) -> bytes:
    """The first line of what comes."""
    got = b""
    while b"\r\n" not in got and (more := s.recv(65536)):
        got += more
    return got.partition(b"\r\n")[0]


def served(c: Cluster) -> bool:
    with request(c, REQUEST) as s:
        return len(body(read_all(s))) == 1024


def test_full_flow_table(mode: dict[str, Any]) -> None:
    """Whoever finds no place is told at once; all is well again when others have left."""
    with serving(mode, fe_conf="maxflows = 64") as c:
        assert c.fe
        for _ in range(2):
            held = [request(c) for _ in range(64)]
            assert {answer(s) for s in held} == {b"HTTP/1.1 200 OK"}
            more = [request(c) for _ in range(20)]
            assert {answer(s) for s in more} == {b"HTTP/1.1 503 Service Unavailable"}
            for s in held:  # nobody lost his place
                s.sendall(REQUEST)
                assert b"200 OK" in read_all(s)
            for s in [*held, *more]:
                s.close()
            settle(c)
        assert c.fe.ctl("status")["counters"]["table_full"] == 40
        wait_for(lambda: c.fe and lines(c.fe, "over: the flow table is full"), "the end of it")
        assert lines(c.fe, ": the flow table is full") <= 2
        assert served(c)


def descriptors(d: Daemon, spare: int | None) -> None:
    """Let a daemon have so many more file descriptors than it has open, or as many as before."""
    have = max(int(n) for n in os.listdir(f"/proc/{d.process.pid}/fd"))
    _, hard = resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE,
                     (hard if spare is None else have + 1 + spare, hard))


def test_out_of_file_descriptors(mode: dict[str, Any]) -> None:
    """Clients wait, what was handed over goes on, and nothing is left of it afterwards."""
    with serving(mode, be_conf="") as c:
        assert c.fe
        fe, be = c.fe, c.be[0]
        held = [request(c) for _ in range(8)]
        assert {answer(s) for s in held} == {b"HTTP/1.1 200 OK"}
        slow = []
        for d in (fe, be):
            descriptors(d, 0)
        try:
            slow = [request(c, KEEP[:20]) for _ in range(40)]  # each needs a socket of ours
            wait_for(lambda: lines(fe, "out of file descriptors"), "a word of it")
            for s in held:
                s.sendall(REQUEST)
                assert b"200 OK" in read_all(s)
        finally:
            for d in (fe, be):
                descriptors(d, None)
        for s in slow:
            s.sendall(KEEP[20:])
        assert {answer(s) for s in slow} == {b"HTTP/1.1 200 OK"}
        for s in [*held, *slow]:
            s.close()
        settle(c)
        assert served(c)
        wait_for(lambda: lines(fe, "over: out of file descriptors"), "the end of it")
        assert lines(fe, ": out of file descriptors") <= 2
        c.connected()


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path))
    try:
        yield path
    finally:
        sh("umount", "-l", str(path))


@pytest.mark.modes("direct")
def test_full_disk_for_logs(mode: dict[str, Any], tmp_path: Path) -> None:
    """Nobody waits for the disk. The log says so once where it still can, and goes on after."""
    with small_disk(tmp_path / "disk") as disk, serving(
            mode, fe_conf=f"logfile = {disk}/log\naccesslog = {disk}/access") as c:
        assert c.fe
        fe = c.fe
        assert served(c)
        wait_for(lambda: b"/1k" in (disk / "access").read_bytes(), "a line")
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as f:
            while True:
                f.write(b"x" * 512)
        size = (disk / "access").stat().st_size, (disk / "log").stat().st_size
        assert all(served(c) for _ in range(100))
        wait_for(lambda: lines(fe, "the accesslog cannot be written"), "a word of it")
        for level in range(7):
            fe.ctl("set", "dbglevel", str(level))
            assert all(served(c) for _ in range(20))
        wait_for(lambda: lines(fe, f"logfile {disk}/log: No space left on device"), "a word of it")
        fe.ctl("set", "dbglevel", "0")
        assert lines(fe, f"logfile {disk}/log: No space left on device") == 1
        assert "Traceback" not in fe.log.read_text()
        filler.unlink()
        assert served(c)
        wait_for(lambda: lines(fe, "over: the accesslog cannot be written"), "the end of it")
        wait_for(lambda: "lines were lost" in (disk / "log").read_text(), "the log again")
        now = (disk / "access").stat().st_size, (disk / "log").stat().st_size
        assert now > size
        for name, whole in (("access", r"20\d\d-\S+Z \S+ /1k \d+ \S+ \d+"),
                            ("log", r"20\d\d-[^:]+:\d\d:\d\d,\d+ tcphafe\[\d+\]: .+")):
            for line in (disk / name).read_text().splitlines():
                assert re.fullmatch(whole, line) and line.count(" tcphafe[") < 2, line
        assert fe.stop() == 0


@pytest.mark.modes("direct", "nfqueue-direct")
def test_no_memory_for_a_connection_that_was_accepted(mode: dict[str, Any]) -> None:
    """The kernel keeps it, and tells nobody once more that it is there."""
    with serving(mode) as c:
        assert c.fe
        with no_kernel_memory(c.fe, "accept4", when="1"):
            assert served(c)


@pytest.mark.modes("direct", "tunnel")
@pytest.mark.parametrize("dies", [False, True], ids=["server lives", "server dies"])
def test_no_memory_when_a_back_end_has_adopted(mode: dict[str, Any], dies: bool) -> None:
    """What clients send is kept until the kernel has memory for what lets it pass; and if a
    connection ends before, it is counted as over."""
    with serving(mode, fe_conf="dbglevel = 3") as c:
        assert c.fe
        fe, be, server = c.fe, c.be[0], c.nginx[0]
        processes = [server.process.pid, *server.worker_pids()] if dies else []
        freeze(be.process.pid, *processes)
        try:
            clients = [request(c) for _ in range(4)]
            wait_for(lambda: lines(fe, "offered to") == 4, "the offers")
            with no_kernel_memory(fe, "writev", "-P", "/dev/net/tun"):
                be.process.send_signal(signal.SIGCONT)
                wait_for(lambda: lines(fe, "cannot divert the flow") == 4, "all four adopted")
                for s in clients:
                    s.sendall(REQUEST)
                for pid in processes:  # the connections are in the accept queue
                    os.kill(pid, signal.SIGKILL)
                wait_for(lambda: be.ctl("status")["live"] == (0 if dies else 4), "their end")
        finally:
            be.process.send_signal(signal.SIGCONT)
        for s in clients:
            if dies:
                with pytest.raises(ConnectionResetError):
                    s.recv(1)
            else:
                assert read_all(s).count(b"HTTP/1.1 200 OK") == 2
            s.close()
        settle(c)
        counters = fe.ctl("status")["counters"]
        assert counters["handed"] == counters["closed"] == 4


@pytest.mark.modes("direct")
def test_log_directory_removed(mode: dict[str, Any], tmp_path: Path) -> None:
    where = tmp_path / "logs"
    where.mkdir()
    # what is made anew is written to where that is beneath a directory that may be written to
    with serving(mode, fe_conf=f"logfile = {where}/log\naccesslog = {tmp_path}/access") as c:
        assert c.fe
        fe = c.fe
        (where / "log").unlink()
        where.rmdir()
        fe.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: lines(fe, f"logfile {where}/log: No such file"), "a word of it")
        assert served(c)
        where.mkdir()
        fe.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: (where / "log").exists(), "the log again")
        assert served(c)
        assert lines(fe, "internal error") == 0


def download(c: Cluster, count: int) -> tuple[ThreadPoolExecutor, list[Any]]:
    """Downloads in the background whose readers take their time."""
    want = (c.nginx[0].root / "big").read_bytes()

    def one() -> bool:
        with request(c, REQUEST.replace(b"1k", b"big")) as s:
            return body(read_all(s)) == want
    pool = ThreadPoolExecutor(count)
    return pool, [pool.submit(one) for _ in range(count)]


@pytest.mark.parametrize("where", ["switch", "host"])
def test_front_end_link_flap(mode: dict[str, Any], where: str) -> None:
    """The front end's cable is pulled, or its device set down, again and again."""
    with serving(mode, backends=2) as c:
        (c.nginx[1].root / "big").write_bytes((c.nginx[0].root / "big").read_bytes())
        for n in c.nginx:
            n.file("1k", size=1024)
        pool, work = download(c, 4)
        ns = c.bed.switch if where == "switch" else c.fe_host.ns
        port = c.fe_host.port if where == "switch" else "eth0"
        with pool:
            for _ in range(5):
                sh("ip", "-n", ns, "link", "set", port, "down")
                wait_for(lambda: "state UP" not in c.fe_host.run(
                    "ip", "link", "show", "eth0").stdout, "no carrier")
                sh("ip", "-n", ns, "link", "set", port, "up")
                wait_for(lambda: served(c), "service again")
            assert all(w.result() for w in work)
        settle(c)


def test_server_crash(mode: dict[str, Any]) -> None:
    """Its connections end, as they would without us; it is in use again when it is back."""
    with serving(mode, fe_conf="dtcinterval = 1") as c:
        s = request(c, REQUEST.replace(b"1k", b"big"))
        assert answer(s) == b"HTTP/1.1 200 OK"
        master = c.nginx[0].process
        workers = c.nginx[0].worker_pids()
        master.kill()  # first: it would replace its workers
        master.wait()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while more := s.recv(65536):
                got += len(more)
        assert got < 16 << 20
        s.close()
        # its connections may end before its listener does
        wait_for(lambda: not listening(c.be_hosts[0], 80), "the end of the server")
        wait_for(lambda: answer(request(c)) == b"HTTP/1.1 503 Service Unavailable", "503")
        c.nginx[0].start()
        wait_for(lambda: answer(request(c)) == b"HTTP/1.1 200 OK", "service again")


def test_reload_storm(mode: dict[str, Any]) -> None:
    """SIGHUP after SIGHUP, to both daemons, under load."""
    with serving(mode) as c:
        assert c.fe
        ended = threading.Event()

        def storm() -> None:
            while not ended.wait(0.01):
                for d in (c.fe, c.be[0]):
                    assert d
                    d.process.send_signal(signal.SIGHUP)
        with ThreadPoolExecutor(1) as pool:
            storming = pool.submit(storm)
            try:
                done = c.client.run("ab", "-q", "-n", "3000", "-c", "16", f"http://{c.VIP}/1k")
            finally:
                ended.set()
                storming.result()
        assert "Complete requests:      3000" in done.stdout
        assert "Failed requests:        0" in done.stdout, done.stdout
        settle(c)
        assert lines(c.fe, "configuration reloaded") > 5 and lines(c.fe, "internal error") == 0


FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


@pytest.mark.parametrize("jump", ["+1d", "-1d", "+11000d"])
def test_clock_jumps(mode: dict[str, Any], tmp_path: Path, jump: str) -> None:
    """The time of day jumps on all hosts; nothing here is measured by it."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(clock),
                   "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                   "DONT_FAKE_MONOTONIC": "1"}
    key = tmp_path / "secret"
    key.write_text("0123456789abcdef0123456789abcdef\n")
    key.chmod(0o600)
    with serving(mode, environment=environment, fe_conf=f"dtcinterval = 1\nsecret = {key}",
                 be_conf=f"secret = {key}") as c:
        held = [request(c) for _ in range(8)]
        assert {answer(s) for s in held} == {b"HTTP/1.1 200 OK"}
        clock.write_text(jump)
        assert all(served(c) for _ in range(20))
        c.be[0].kill()
        c.be[0].start()
        c.connected()
        assert all(served(c) for _ in range(20))
        for s in held:
            s.sendall(REQUEST)
            assert b"200 OK" in read_all(s)
            s.close()
        settle(c)
        there = datetime.now() + timedelta(days=int(jump.rstrip("d")))
        assert there.strftime("%Y-%m-%d") in c.be[0].log.read_text(), "the clock did not jump"
