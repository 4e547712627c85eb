# SPDX-License-Identifier: GPL-2.0-or-later
"""What people look at: tcphactl's tables, live screen and doctor, the status page in a browser."""
from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpha.lab.bed import BIN, Cluster, Host, wait_for

CTL = str(BIN / "tcphactl")
pytestmark = pytest.mark.xdist_group("tools")


@pytest.fixture(scope="module")
def shown() -> Iterator[Cluster]:
    c = Cluster(2, rules=[(1, "jpg$"), (0, ".*"), (1, ".*")], fe_conf="admin = 127.0.0.1:9110")
    try:
        for server in c.nginx:
            server.file("a.jpg", b"picture\n")
            server.file("index.html", b"page\n")
        yield c
    finally:
        c.close()


def ctl(host: Host, run_dir: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return host.run(CTL, "--run-dir", str(run_dir), *args, check=False)


def fe(c: Cluster, *args: str) -> subprocess.CompletedProcess[str]:
    assert c.fe
    return ctl(c.fe_host, c.fe.run_dir, *args)


def on_terminal(host: Host, columns: int, *args: str) -> str:
    """What a command prints on a terminal of so many columns."""
    ours, its = pty.openpty()
    process = host.start(*args, stdout=its, stderr=its, stdin=its, env=os.environ | {
        "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "60"})
    os.close(its)
    out = b""
    try:
        while more := os.read(ours, 65536):
            out += more
    except OSError:  # EIO: it has ended
        pass
    os.close(ours)
    assert process.wait(20) == 0, out
    return out.decode()


def test_tables(shown: Cluster) -> None:
    assert shown.fe
    for command in (("status",), ("servers",), ("rules",), ("conns",), ("stats",),
                    ("test-request", "GET", "/a.jpg", "-H", "X: 1")):
        done = fe(shown, "fe", *command)
        assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr
        assert json.loads(fe(shown, "--json", "fe", *command).stdout) is not None
    assert "192.168.1.38" in fe(shown, "fe", "test-request", "GET", "/a.jpg").stdout
    wide = on_terminal(shown.fe_host, 100, CTL, "--run-dir", str(shown.fe.run_dir), "fe", "servers")
    assert "\x1b[" in wide  # colours
    narrow = on_terminal(shown.fe_host, 60, CTL, "--run-dir", str(shown.fe.run_dir), "fe", "rules")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", narrow)
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 60


def test_exit_codes_and_usage(shown: Cluster) -> None:
    for args, code in ((("fe", "nonsense"), 2), (("fe",), 2), (("nobody", "status"), 2),
                       (("fe", "test-request", "GET"), 2), (("fe", "top", "fast"), 2),
                       (("lab", "sideways"), 2), (("lab", "up", "99"), 2), (("doctor", "-x"), 2),
                       (("fe", "drain", "1.2.3.4"), 1), (("fe", "set", "dbglevel", "9"), 1)):
        done = fe(shown, *args)
        assert done.returncode == code and done.stderr, args
    assert ctl(shown.fe_host, Path("/nowhere"), "fe", "status").returncode == 1
    text = fe(shown, "--help").stdout
    assert "test-request METHOD TARGET" in text and "exit status" in text
    assert fe(shown, "fe", "rules", "--json").stdout == fe(shown, "--json", "fe", "rules").stdout


def test_each_command_explains_itself(shown: Cluster) -> None:
    from tcpha.cli.tcphactl import COMMANDS
    commands = [("doctor",)] + [(role, name) for role in COMMANDS for name in COMMANDS[role]]
    for words in [("fe",), ("be",), ("lab",), *commands]:
        done = fe(shown, *words, "-h")
        assert done.returncode == 0 and not done.stderr, words
        assert done.stdout.startswith(f"usage: tcphactl {' '.join(words)}"), words
    assert "--backends" in fe(shown, "lab", "up", "--help").stdout
    # a wrong word is named, with what is right
    assert "'99' is not a number from 1 to 16" in fe(shown, "lab", "up", "--backends", "99").stderr
    assert re.search("'speed' .choose from '?dbglevel", fe(shown, "be", "set", "speed", "1").stderr)


def test_a_reader_that_is_gone(shown: Cluster) -> None:
    """Tools end as others do (head, less): by SIGPIPE, without a word."""
    assert shown.fe
    fe_run, be_run = ("--run-dir", str(shown.fe.run_dir)), ("--run-dir", str(shown.be[0].run_dir))
    conf = ("-c", str(shown.fe.config))
    for args in (*((CTL, *fe_run, "fe", *words) for words in (
                     ("status",), ("servers",), ("rules",), ("conns",), ("stats",),
                     ("top", "1", "1"), ("test-request", "GET", "/"), ("set", "dbglevel", "0"),
                     ("doctor", *conf), ("conns", "--json"), ("rules", "--json"),
                     ("doctor", *conf, "--json"))),
                 (CTL, *be_run, "be", "status"), (str(BIN / "tcphafe"), "-t", *conf),
                 (str(BIN / "tcphafe"), "--print-toml", *conf)):
        reader, writer = os.pipe()
        os.close(reader)
        process = shown.fe_host.start(*args, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (-signal.SIGPIPE, ""), args


def test_a_disk_that_is_full(shown: Cluster) -> None:
    assert shown.fe
    for command in ("status", "conns"):
        with open("/dev/full", "w") as full:
            process = shown.fe_host.start(CTL, "--run-dir", str(shown.fe.run_dir), "fe", command,
                                          stdout=full, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (
            1, "tcphactl: [Errno 28] No space left on device\n")


def test_top(shown: Cluster) -> None:
    assert shown.fe
    for n in range(10):
        shown.get(f"/a.jpg?{n}")
    out = fe(shown, "fe", "top", "0.2", "2").stdout
    assert out.count("q: quit") == 2
    for text in ("handoffs", "192.168.1.38", "jpg$", "slowest", "/a.jpg?", "99 % within"):
        assert text in out, text
    live = on_terminal(shown.fe_host, 120, CTL, "--run-dir", str(shown.fe.run_dir), "fe", "top",
                       "0.2", "3")
    assert "\x1b[?1049h" in live and "back end" in live  # a screen of its own


def test_doctor(shown: Cluster) -> None:
    """It finds nothing where all is well, and each harm that is done."""
    assert shown.fe
    be, host = shown.be[0], shown.be_hosts[0]

    def findings(where: Host, role: str, config: Path, run_dir: Path) -> tuple[int, str]:
        done = ctl(where, run_dir, "--json", role, "doctor", "-c", str(config))
        assert done.stdout, done.stderr
        rows = json.loads(done.stdout)
        bad = [r for r in rows if r["state"] == "fault"]
        assert all(r["what to do"] for r in bad)
        return done.returncode, " ".join(f"{r['check']} {r['finding']}" for r in bad)

    def of_be() -> tuple[int, str]:
        return findings(host, "be", be.config, be.run_dir)

    def of_fe() -> tuple[int, str]:
        assert shown.fe
        return findings(shown.fe_host, "fe", shown.fe.config, shown.fe.run_dir)
    assert of_fe() == (0, "") and of_be() == (0, "")
    shown.nginx[0].stop()
    try:
        code, said = of_be()
        assert code == 1 and "nothing listens" in said
    finally:
        shown.nginx[0].start()
    be.stop()
    try:
        wait_for(lambda: "down" in of_fe()[1], "the end to be known")
        assert f"{host.address}:666: Connection refused" in of_fe()[1]
        host.ip("addr", "add", "192.168.1.36/32", "dev", "eth0")
        said = of_be()[1]
        assert "192.168.1.36 is on eth0" in said and "arp_ignore = 0" in said
        host.ip("addr", "del", "192.168.1.36/32", "dev", "eth0")
    finally:
        be.start()
        shown.connected()
    bad = shown.fe_host.dir / "bad.conf"
    bad.write_text("vaddr = 192.168.1.36\nprot = 80\n")
    assert "bad.conf:2" in findings(shown.fe_host, "fe", bad, shown.fe.run_dir)[1]
    assert of_fe() == (0, "")


def test_status_page_in_a_browser(shown: Cluster, tmp_path: Path) -> None:
    """Nothing is fetched from elsewhere; what it shows is what there is."""
    for n in range(10):
        shown.get(f"/a.jpg?{n}")
    picture = Path(os.environ.get("TCPHA_SCREENSHOT", tmp_path / "page.png"))

    def chromium(*args: str) -> str:
        return shown.fe_host.run(
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path}/profile", "--window-size=1180,1150",
            "--virtual-time-budget=4000", *args, "http://127.0.0.1:9110/").stdout
    page = chromium("--dump-dom")
    text = re.sub(r"<[^>]+>", " ", page[page.index("<body"):])
    for part in ("192.168.1.38", "jpg$", "Handoffs", "packet path in use", "serving", "/a.jpg?"):
        assert part in text, part
    assert 'id="gone" style="display: none;"' in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    chromium(f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
