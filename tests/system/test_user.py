# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons that run as the user of the package's units, with the capabilities that those give; and
beside, before and after daemons that root starts by hand."""
from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, Daemon, sh, wait_for
from tests.support.host import state
from tests.support.tree import TOP

pytestmark = pytest.mark.modes("fast-direct", "nfqueue-direct")
USER = 64997  # nobody's
UNIT = (TOP / "debian/tcpha.tcphafe.service").read_text()
GIVEN = re.findall(r"CAP_(\w+)", next(line for line in UNIT.splitlines()
                                      if line.startswith("AmbientCapabilities=")))
KEPT = sum(1 << n for n in (10, 12, 13, 38, 39))
NET_ADMIN_AND_RAW = 1 << 12 | 1 << 13


# What users have elsewhere: /dev/net/tun, as udev makes it; and the interpreter of the tests, $1,
# which may be in somebody's home, $2.
REACHABLE = """
mount -t tmpfs -o mode=755 tmpfs /dev/net
mknod -m 666 /dev/net/tun c 10 200
if [ "$2" ]; then
    mount --bind "$1" /mnt
    mount -t tmpfs -o mode=755 tmpfs "$2"
    mkdir -p "$1"
    mount --move /mnt "$1"
fi
shift 2
exec "$@"
"""


def reachable() -> tuple[str, ...]:
    python = Path(sys.base_prefix)
    closed = [p for p in python.parents if not p.stat().st_mode & 1]
    return ("unshare", "--mount", "sh", "-ec", REACHABLE, "sh", str(python),
            str(closed[-1]) if closed else "")


def as_user(*without: str) -> tuple[str, ...]:
    """As a unit starts a daemon."""
    sets = "-all" + "".join(f",+{name.lower()}" for name in GIVEN if name not in without)
    return (*reachable(), "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups",
            "--no-new-privs", f"--inh-caps={sets}", f"--ambient-caps={sets}",
            f"--bounding-set={sets}")


def own(path: Path) -> Path:
    """Give the user a directory, as RuntimeDirectory= and LogsDirectory= do."""
    path.mkdir(exist_ok=True)
    os.chown(path, USER, USER)
    return path


@contextmanager
def idle(mode: dict[str, Any], **kw: Any) -> Iterator[Cluster]:
    """With run directories of the user."""
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False, **kw)
    try:
        c.bed.dir.chmod(0o755)
        for host, role in ((c.fe_host, "fe"), (c.be_hosts[0], "be")):
            own(host.dir / f"run-{role}")
        c.nginx[0].file("index.html", b"x\n")
        yield c
    finally:
        c.close()


def said(daemon: Daemon) -> dict[str, str]:
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


@pytest.mark.modes("direct", "tunnel", "fast-direct", "fast-tunnel", "nfqueue-direct",
                   "nfqueue-tunnel", "ebpf-nfqueue")
def test_all_is_done_as_the_units_user(mode: dict[str, Any]) -> None:
    """What the daemons do when they start, serve, are reloaded, killed and stopped."""
    with idle(mode, via=as_user()) as c:
        secret = c.bed.dir / "secret"
        secret.write_text(os.urandom(16).hex())
        secret.chmod(0o640)
        os.chown(secret, 0, USER)
        logs = own(c.bed.dir / "logs")
        c.fe_conf = f"secret = {secret}\nlogfile = {logs}/fe\naccesslog = {logs}/access\n" \
            "admin = 127.0.0.1:9110"
        c.be_conf = f"secret = {secret}\nlogfile = {logs}/be"
        hosts = [c.fe_host, c.be_hosts[0]]
        before = [state(h) for h in hosts]
        c.start()
        assert c.fe
        fe, be = c.fe, c.be[0]
        for daemon in (fe, be):
            status = said(daemon)
            assert status["Uid"].split() == [str(USER)] * 4
            assert {int(status[f"Cap{x}"], 16) for x in ("Prm", "Eff", "Bnd")} == {KEPT}
            assert int(status["CapAmb"], 16) == int(status["CapInh"], 16) == NET_ADMIN_AND_RAW
        assert c.get("/") == "x\n"
        wait_for(lambda: (logs / "access").read_text(), "a line")
        assert "tcpha_live" in c.fe_host.run("curl", "-sf", "http://127.0.0.1:9110/metrics").stdout
        sh("timeout", "5", "cat", str(fe.run_dir / "tcpha_fe_conn"))
        (fe.run_dir / "ktcphafe/dbglevel").open("a").write("6\n")
        wait_for(lambda: fe.ctl("status")["dbglevel"] == 6, "the level")
        fe.ctl("drain", "192.168.1.33")
        fe.ctl("undrain", "192.168.1.33")
        (logs / "access").rename(logs / "access.1")
        fe.process.send_signal(signal.SIGUSR1)
        fe.ctl("reload")
        assert c.get("/") == "x\n"
        wait_for(lambda: (logs / "access").exists() and (logs / "access").read_text(), "a new one")
        for daemon in (be, fe):  # a run that was killed is taken over
            daemon.kill()
            daemon.start()
        c.connected()
        assert c.get("/") == "x\n"
        for daemon in (fe, be):
            assert "ermission" not in daemon.log.read_text() and \
                "Traceback" not in daemon.log.read_text()
            assert daemon.stop() == 0
            assert "cannot undo" not in daemon.log.read_text()
        assert [state(h) for h in hosts] == before
        assert [p.name for d in (fe, be) for p in d.run_dir.iterdir()
                if not p.name.endswith(".drained")] == []


@pytest.mark.modes("direct")
def test_what_root_alone_can_read_is_refused_from_the_start(mode: dict[str, Any]) -> None:
    """And not at the first reload: what the unit may read at first is not for that."""
    with idle(mode, via=as_user()) as c:
        secret = c.bed.dir / "secret"
        secret.write_text(os.urandom(16).hex())
        secret.chmod(0o600)
        c.fe_conf = f"secret = {secret}"
        with pytest.raises(RuntimeError, match="cannot be read by the user that we run as"):
            c.start()


@pytest.mark.modes("nfqueue-direct")
@pytest.mark.parametrize("may", [True, False], ids=["may", "may not"])
def test_the_kernels_counters_of_queues(mode: dict[str, Any], may: bool) -> None:
    """They are root's alone to read. What cannot be read is missing, and is no zero."""
    with idle(mode, via=as_user(*([] if may else ["DAC_READ_SEARCH"]))) as c:
        c.start()
        be = c.be[0]
        counted = be.ctl("status")["packets"]
        assert ("queue_dropped" in counted) == may
        assert ("is counted nowhere" in be.log.read_text()) != may


READ_AGAIN = """
from tcpha._fast.nfqueue import open_queues
from tcpha.daemon import capabilities
from tcpha.datapath import nfqueue
from tcpha.net import rootfiles
nfqueue.load()
with capabilities.reading():
    rootfiles.hold()
capabilities.restrict()
assert rootfiles.read(rootfiles.QUEUES) == ""
queues = open_queues(2, 100)
assert len(rootfiles.read(rootfiles.QUEUES).splitlines()) == 2
"""


@pytest.mark.modes("direct")
def test_a_file_that_was_opened_in_time_is_read_anew(mode: dict[str, Any]) -> None:
    with idle(mode) as c:
        c.fe_host.run(*as_user(), sys.executable, "-c", READ_AGAIN)


def with_legacy(where: Path) -> dict[str, str]:
    """An environment in which iptables is the older kind; its lock is one that the user can open,
    as the package makes it."""
    found = shutil.which("iptables-legacy")
    assert found
    (where / "iptables").symlink_to(found)
    lock = where / "lock"
    lock.touch(0o640)
    os.chown(lock, 0, USER)
    return {"PATH": f"{where}:{os.environ['PATH']}", "XTABLES_LOCKFILE": str(lock)}


@pytest.mark.modes("nfqueue-direct")
@pytest.mark.parametrize("may", [True, False], ids=["may", "may not"])
def test_nat_rules_of_legacy_iptables_are_found(mode: dict[str, Any], may: bool) -> None:
    """Those who cannot know take them for there."""
    def pinned(c: Cluster) -> bool:
        return "type nat" in c.be_hosts[0].run("nft", "list", "ruleset").stdout
    with idle(mode, via=as_user(*([] if may else ["DAC_READ_SEARCH"]))) as c:
        c.start()
        be = c.be[0]
        assert pinned(c) != may
        assert ("iptables is taken for used" in be.log.read_text()) != may
        assert be.stop() == 0
        be.host.run("iptables-legacy", "-t", "nat", "-A", "PREROUTING", "-d", "192.0.2.1", "-p",
                    "tcp", "-j", "REDIRECT", "--to-ports", "1")
        be.start()
        c.connected()
        assert pinned(c)
        assert c.get("/") == "x\n"


PROGRAM = """
from tcpha.daemon import capabilities
from tcpha.net import rootfiles, rules
from tcpha.net.rules import Rule
class Journal:
    def will_undo(self, **change): pass
    def keep(self, *args): pass
with capabilities.reading():
    rootfiles.hold()
capabilities.restrict()
print(rules.keep(Journal(), "tcphafe_test", [
    Rule("prerouting", destination="192.168.1.36", dport=80, queue=(7, 2))], (rules.IPTABLES,)))
assert rules._iptables_stand("tcphafe_test", [Rule("prerouting", queue=(7, 2))])
"""


@pytest.mark.modes("direct")
def test_programs_that_we_start_can_do_their_work(mode: dict[str, Any]) -> None:
    """iptables of either kind, by a user who is not root."""
    with idle(mode) as c:
        host = c.fe_host
        tools = own(c.bed.dir / "tools")
        for kind, env in (("nft", {}), ("legacy", with_legacy(tools))):
            run = ["env", *(f"{k}={v}" for k, v in env.items()), *as_user(),
                   sys.executable, "-c"]
            listed = f"iptables-{kind}", "-t", "raw", "-S"
            assert host.run(*run, PROGRAM).stdout == "iptables\n"
            assert "--queue-balance 7:8" in host.run(*listed).stdout
            host.run(*run, PROGRAM.partition("print")[0] + "rules.remove('tcphafe_test')")
            assert "tcpha" not in host.run(*listed).stdout


# Who root is by hand: the package's user is known, and /run/tcpha is what the test gives.
BY_HAND = """
mount --bind "$1" /etc/passwd
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/tcpha
mount --bind "$2" /run/tcpha
shift 2
exec "$@" --run-dir /run/tcpha
"""


def on_the_units_directory(c: Cluster, run_dir: Path, *more: str) -> tuple[str, ...]:
    users = c.bed.dir / "passwd"
    users.write_text(Path("/etc/passwd").read_text() +
                     f"tcpha:x:{USER}:{USER}::/nonexistent:/usr/sbin/nologin\n")
    return ("unshare", "--mount", "sh", "-ec", BY_HAND, "sh", str(users), str(run_dir), *more)


@pytest.mark.modes("fast-direct", "nfqueue-direct")
@pytest.mark.parametrize("end", ["stopped", "killed"])
@pytest.mark.parametrize("first", ["unit", "by hand"])
def test_root_and_the_unit_share_a_run_directory(mode: dict[str, Any], first: str,
                                                 end: str) -> None:
    """By turns: the second one and the third do all that they do elsewhere."""
    with idle(mode) as c:
        run_dirs = {role: h.dir / f"run-{role}"
                    for role, h in (("fe", c.fe_host), ("be", c.be_hosts[0]))}
        if first == "by hand":  # which makes the directory
            for path in run_dirs.values():
                os.chown(path, 0, 0)
        before = [state(h) for h in (c.fe_host, c.be_hosts[0])]
        turns = [(), as_user(), ()] if first == "by hand" else [as_user(), (), as_user()]
        for n, turn in enumerate(turns):
            be_via, fe_via = (on_the_units_directory(c, run_dirs[r], *turn) for r in ("be", "fe"))
            c.be = [Daemon(c.be_hosts[0], "be", c.be_text(c.be_hosts[0]), via=be_via)]
            c.fe = fe = Daemon(c.fe_host, "fe", c.fe_text(), via=fe_via)
            assert said(fe)["Uid"].split()[0] == (str(USER) if turn else "0")
            c.connected()
            assert c.get("/") == "x\n"
            sh("timeout", "5", "cat", str(fe.run_dir / "tcpha_fe_conn"))
            (fe.run_dir / "ktcphafe/dbglevel").open("a").write("1\n")
            wait_for(lambda fe=fe: fe.ctl("status")["dbglevel"] == 1, "the level")
            fe.ctl("drain", "192.168.1.33")
            assert '"192.168.1.33": true' in (fe.run_dir / "tcphafe.drained").read_text()
            fe.ctl("undrain", "192.168.1.33")
            for daemon in (c.be[0], fe):
                found = [daemon.run_dir, *daemon.run_dir.rglob("*")]
                assert len(found) > 4 and {p.stat().st_uid for p in found} == {USER}
                if end == "killed" and n < 2:
                    daemon.kill()
                else:
                    assert daemon.stop() == 0
                assert "ermission" not in daemon.log.read_text()
        assert [state(h) for h in (c.fe_host, c.be_hosts[0])] == before
        assert [p.name for d in run_dirs.values() for p in d.iterdir()] == ["tcphafe.drained"]
