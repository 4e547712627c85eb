# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons leave a host as they found it, also after kill -9; and they are good Unix citizens."""
from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tcpha.daemon.control_socket import Refused
from tcpha.lab.bed import BIN, Bed, Cluster, Daemon, Host, sh, wait_for
from tests.support import hooks
from tests.support.host import state
from tests.support.modes import MODES
from tests.support.wire import arp_sent_by

# how packets travel is seldom the point
pytestmark = pytest.mark.modes("direct", "nfqueue-direct")
every_mode = pytest.mark.modes(*MODES)
MAC = r"(?:[0-9A-F]{2}:){5}[0-9A-F]{2}"


def loaded() -> set[int]:
    """Ids of all BPF programs in the kernel."""
    return {p["id"] for p in json.loads(sh("bpftool", "-j", "prog", "show").stdout)}


def programs(host: Host) -> set[int]:
    """Ids of the BPF programs that are attached to a host's interfaces."""
    return set(hooks.programs(host).values())


@pytest.fixture
def idle(mode: dict[str, Any]):
    c = Cluster(1, **mode, rules=[(0, ".*")], start=False)
    c.be_hosts[0].sysctl("net.ipv4.tcp_syncookies", "0")  # something to change and put back
    c.be_hosts[0].sysctl("net.ipv4.tcp_rfc1337", "1")
    c.nginx[0].file("index.html", b"x\n")
    yield c
    c.close()


@every_mode
def test_host_state_after_stop(idle: Cluster) -> None:
    hosts = [idle.fe_host, *idle.be_hosts]
    before = [state(h) for h in hosts]
    idle.start()
    assert idle.get("/") == "x\n"
    ours = programs(hosts[0]) | programs(hosts[1])
    # the front end has two for itself, one for the packet path and one for the Local Node
    fe, be = idle.datapath
    fast = idle.fastpath_key == "on"
    assert len(ours) == (3 + fast) * (fe == "ebpf") + 2 * (be == "ebpf")
    assert [state(h) for h in hosts] != before
    assert idle.fe and idle.fe.stop() == 0 and idle.be[0].stop() == 0
    assert [state(h) for h in hosts] == before
    wait_for(lambda: not ours & loaded(), "the programs' end")
    for d in (idle.fe, idle.be[0]):
        assert list(d.run_dir.iterdir()) == []


@every_mode
def test_host_state_after_kill_and_restart(idle: Cluster) -> None:
    hosts = [idle.fe_host, *idle.be_hosts]
    before = [state(h) for h in hosts]
    idle.start()
    assert idle.fe
    ours = programs(hosts[0]) | programs(hosts[1])
    for d in (idle.fe, idle.be[0]):
        d.kill()
        d.start()
    idle.connected()
    assert idle.get("/") == "x\n"
    ours |= programs(hosts[0]) | programs(hosts[1])
    assert idle.fe.stop() == 0 and idle.be[0].stop() == 0
    assert [state(h) for h in hosts] == before
    wait_for(lambda: not ours & loaded(), "the programs' end")


@pytest.mark.modes("fast-direct", "nfqueue-direct")
def test_capabilities(idle: Cluster) -> None:
    """No thread keeps more than docs/security.md says; and that is enough: what runs with these
    are the daemons of all other tests."""
    idle.start()
    assert idle.fe
    assert idle.get("/") == "x\n"
    for daemon in (idle.fe, idle.be[0]):
        threads = list(Path(f"/proc/{daemon.process.pid}/task").iterdir())
        assert len(threads) > 4
        for thread in threads:
            said = dict(line.split(":\t", 1)
                        for line in (thread / "status").read_text().splitlines() if ":\t" in line)
            assert int(said["CapEff"], 16) == int(said["CapPrm"], 16) == \
                int(said["CapBnd"], 16) == sum(1 << n for n in (10, 12, 13, 38, 39))
            assert int(said["CapInh"], 16) == int(said["CapAmb"], 16) == 0
            assert said["NoNewPrivs"] == "1"


@pytest.mark.modes("fast-direct", "nfqueue-direct")
def test_files_of_root_cannot_be_written(idle: Cluster, tmp_path: Path) -> None:
    """A daemon that somebody starts as root has its own files, and no others. By its access log,
    it would write any."""
    def log_to(path: Path) -> Path:
        idle.fe_conf = f"accesslog = {path}"
        assert idle.fe
        idle.fe.config.write_text(idle.fe_text())
        return path
    idle.start()
    assert idle.fe
    for path in (tmp_path / "new", Path("/proc/sys/kernel/core_pattern"), Path("/etc/passwd")):
        log_to(path)
        with pytest.raises(Refused, match="Permission denied"):
            idle.fe.ctl("reload")
    path = log_to(idle.fe.run_dir / "access.log")
    idle.fe.ctl("reload")
    assert idle.get("/") == "x\n"
    wait_for(lambda: path.read_text(), "a line")


@pytest.mark.parametrize("path, may", [
    ("/etc/passwd", False), ("/proc/sys/kernel/core_pattern", False), ("/dev/zero", False),
    ("/proc/sys/net/ipv4/tcp_sack", True), ("{}/there", True), ("{}/../other", False)])
def test_what_may_be_written(tmp_path: Path, path: str, may: bool) -> None:
    """Nothing is: files are opened only."""
    (tmp_path / "run").mkdir()
    for file in ("run/there", "other"):
        (tmp_path / file).touch()
    script = ("import os, sys; from tcpha.daemon import capabilities, landlock; "
              "capabilities.restrict(); landlock.write_only([sys.argv[1], '/proc/sys/net']); "
              "os.open(sys.argv[2], os.O_WRONLY)")
    done = sh(sys.executable, "-c", script, str(tmp_path / "run"), path.format(tmp_path / "run"),
              check=False)
    assert done.returncode == (0 if may else 1), done.stderr
    assert may or "denied" in done.stderr or "not permitted" in done.stderr


def test_addresses_of_the_administrator_are_kept(idle: Cluster) -> None:
    idle.fe_host.ip("addr", "add", f"{idle.VIP}/24", "dev", "eth0")
    idle.be_hosts[0].ip("addr", "add", f"{idle.VIP}/32", "dev", "lo")
    idle.be_hosts[0].sysctl("net.ipv4.conf.all.arp_ignore", "1")
    idle.start()
    assert idle.get("/") == "x\n"
    assert idle.fe and idle.fe.stop() == 0 and idle.be[0].stop() == 0
    assert f"{idle.VIP}/24" in idle.fe_host.ip("addr")
    assert f"{idle.VIP}/32" in idle.be_hosts[0].ip("addr")
    assert idle.be_hosts[0].sysctl("net.ipv4.conf.all.arp_ignore") == "1"


def test_filters_of_the_administrator_are_kept(idle: Cluster) -> None:
    fe = idle.fe_host
    fe.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    fe.run("tc", "filter", "add", "dev", "eth0", "ingress", "prio", "1", "protocol", "ip", "u32",
           "match", "u32", "0", "0", "flowid", "1:1")
    before = state(fe)
    idle.start()
    assert idle.get("/") == "x\n"
    assert idle.fe and idle.fe.stop() == 0
    assert state(fe) == before


@pytest.mark.parametrize("value", ["0", "1", "2"])
def test_reverse_path_filter(idle: Cluster, value: str) -> None:
    for h in (idle.fe_host, idle.be_hosts[0]):
        h.sysctl("net.ipv4.conf.all.rp_filter", value)
    idle.start()
    assert idle.get("/") == "x\n"


def test_back_ends_keep_the_vip_to_themselves(idle: Cluster) -> None:
    """A client that asks who has the VIP hears from the front end alone."""
    idle.start()
    assert idle.fe
    out = idle.client.run("arping", "-c", "3", "-I", "eth0", idle.VIP).stdout
    mac = json.loads(idle.fe_host.ip("-j", "link", "show", "eth0"))[0]["address"].upper()
    assert set(re.findall(MAC, out.upper())) == {mac}
    idle.fe.stop()
    out = idle.client.run("arping", "-c", "2", "-I", "eth0", idle.VIP, check=False).stdout
    assert not re.findall(MAC, out.upper())


@pytest.mark.parametrize("value", ["0", "2"])
def test_a_front_end_without_the_vip_answers_nobody(idle: Cluster, value: str) -> None:
    """Another one has it."""
    idle.fe_host.sysctl("net.ipv4.conf.all.rp_filter", value)
    idle.fe_conf = "announce = off"
    idle.start()
    out = idle.client.run("arping", "-c", "2", "-I", "eth0", idle.VIP, check=False).stdout
    assert not re.findall(MAC, out.upper())


def test_no_arp_of_a_back_end_tells_of_the_vip(idle: Cluster) -> None:
    """Whatever is started and stopped in whatever order, and whoever asks in whatever way."""
    be = idle.be_hosts[0]
    be.sysctl("net.ipv4.conf.eth0.arp_notify", "1")
    with arp_sent_by(be) as seen:
        idle.start()
        idle.get("/")
        for probe in ((), ("-D",), ("-U",)):
            idle.client.run("arping", *probe, "-c", "1", "-w", "1", "-I", "eth0", idle.VIP,
                            check=False)
        be.ip("link", "set", "eth0", "down")  # arp_notify: gratuitous ARP when it is up again
        be.ip("link", "set", "eth0", "up")
        idle.be[0].kill()
        idle.be[0].start()
        assert idle.fe
        idle.fe.stop()
        idle.client.run("arping", "-c", "1", "-w", "1", "-I", "eth0", idle.VIP, check=False)
        idle.be[0].stop()
        idle.be[0].start()
        idle.fe.start()
        idle.connected()
        idle.get("/")
        idle.be[0].stop()
    assert seen and not [packet for packet in seen if packet[1] == idle.VIP]


def test_uaddr_stands_where_the_vip_would_show(idle: Cluster) -> None:
    """Also if somebody takes the sysctls back."""
    idle.start()
    be = idle.be_hosts[0]
    last = itertools.count(77)

    def provoke() -> str:
        for name in ("arp_ignore", "arp_announce"):  # they come back within a second
            be.sysctl(f"net.ipv4.conf.all.{name}", "0")
        asked = f"192.168.1.{next(last)}"
        with be.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
            s.bind((idle.VIP, 0))
            s.sendto(b"?", (asked, 9))
        idle.client.run("arping", "-c", "1", "-w", "1", "-I", "eth0", idle.VIP)
        return asked

    def shown() -> bool:
        with arp_sent_by(be) as seen:
            asked = provoke()
        sent.extend(seen)
        return (1, "192.168.1.39", asked) in seen
    sent: list[tuple[int, str, str]] = []
    wait_for(shown, "an ARP request with uaddr")
    assert not [packet for packet in sent if packet[1] == idle.VIP]


@pytest.mark.parametrize("uaddr, words", [
    ("192.168.1.50", r"uaddr 192\.168\.1\.50 is in use by ([0-9a-f]{2}:){5}[0-9a-f]{2} on eth0"),
    ("192.168.1.34", r"uaddr 192\.168\.1\.34 is an address of this host")])
def test_a_uaddr_in_use_is_refused(idle: Cluster, uaddr: str, words: str) -> None:
    be = idle.be_hosts[0]
    be.ip("addr", "add", "192.168.1.34/24", "dev", "eth0")
    before = state(be)
    idle.be_conf = f"uaddr = {uaddr}"
    with pytest.raises(RuntimeError, match=words):
        Daemon(be, "be", idle.be_text(be).replace("uaddr = 192.168.1.39\n", ""))
    assert state(be) == before


@every_mode
def test_nothing_reaches_the_vip_around_the_front_end(idle: Cluster) -> None:
    idle.start()
    be = idle.be_hosts[0]
    mac = json.loads(be.ip("-j", "link", "show", "eth0"))[0]["address"]
    idle.client.ip("neigh", "replace", idle.VIP, "lladdr", mac, "dev", "eth0", "nud", "permanent")
    try:
        with pytest.raises(TimeoutError):
            idle.client.connect(idle.VIP, timeout=1.5)
    finally:
        idle.client.ip("neigh", "del", idle.VIP, "dev", "eth0")
    assert idle.be[0].ctl("status")["packets"]["guarded"] >= 1
    assert idle.get("/") == "x\n"


# The commands

def test_daemonises_and_says_when_it_serves(idle: Cluster) -> None:
    config = idle.be_hosts[0].dir / "be.conf"
    config.write_text(idle.be_text(idle.be_hosts[0]))
    run = idle.be_hosts[0].dir / "run"
    done = idle.be_hosts[0].run(str(BIN / "tcphabe"), "-c", str(config), "--run-dir", str(run))
    assert done.returncode == 0
    pid = int((run / "tcphabe.pid").read_text())
    status = json.loads(idle.be_hosts[0].run(str(BIN / "tcphactl"), "--run-dir", str(run), "--json",
                                             "be", "status").stdout)
    assert status["redirectport"] == 80
    again = idle.be_hosts[0].run(str(BIN / "tcphabe"), "-c", str(config), "--run-dir", str(run),
                                 check=False)
    assert again.returncode == 1 and "running already" in again.stderr
    sh("kill", str(pid))
    wait_for(lambda: not (run / "tcphabe.pid").exists(), "the daemon's end")


def test_start_failures_name_the_reason(idle: Cluster) -> None:
    host = idle.fe_host
    before = state(host)
    config = host.dir / "bad.conf"
    config.write_text(idle.fe_text().replace("raddr = 192.168.1.23", "raddr = 192.168.1.99"))
    for extra in ((), ("-f",)):
        done = host.run(str(BIN / "tcphafe"), "-c", str(config), "--run-dir", str(host.dir / "r"),
                        *extra, check=False)
        assert done.returncode == 1 and "192.168.1.99 is no address of this host" in done.stderr
    host.start("python3", "-m", "http.server", "80", stderr=subprocess.DEVNULL)
    wait_for(lambda: ":80 " in host.run("ss", "-Hltn").stdout, "a server in the way")
    config.write_text(idle.fe_text())
    done = host.run(str(BIN / "tcphafe"), "-c", str(config), "--run-dir", str(host.dir / "r"),
                    check=False)
    assert done.returncode == 1 and "cannot listen on 192.168.1.36:80" in done.stderr
    assert state(host) == before


def test_control_files_and_commands(idle: Cluster) -> None:
    idle.start()
    assert idle.fe
    files = idle.fe.run_dir / "ktcphafe"
    for name, value in (("dbglevel", "3"), ("dtcinterval", "7")):
        sh("sh", "-c", f"echo {value} >> {files / name}")
        wait_for(lambda n=name, v=value: idle.fe and str(idle.fe.ctl("status")[n]) == v, name)
        wait_for(lambda n=name, v=value: (files / n).read_text() == f"{v}\n", "the file's content")
    sh("sh", "-c", f"echo 9 >> {files / 'dbglevel'}")
    wait_for(lambda: (files / "dbglevel").read_text() == "3\n", "the old value again")
    assert idle.fe.ctl("set", "dtcinterval", "0") == {"dtcinterval": 0}
    assert [r["pattern"] for r in idle.fe.ctl("rules")] == [".*"]
    bad = idle.fe_host.run(str(BIN / "tcphactl"), "--run-dir", str(idle.fe.run_dir), "fe", "drain",
                           "1.2.3.4", check=False)
    assert bad.returncode == 1 and "1.2.3.4 is no server" in bad.stderr
    assert idle.fe_host.run(str(BIN / "tcphactl"), "fe", "nonsense", check=False).returncode == 2
    assert (idle.fe.run_dir / "tcphafe.sock").stat().st_mode & 0o777 == 0o600


def test_every_write_to_a_control_file_counts(idle: Cluster) -> None:
    """Also one that meets the file while it is being replaced: after the last write of many its
    value holds. So it does if a writer had the file open before that."""
    idle.start()
    assert idle.fe
    files = idle.fe.run_dir / "ktcphafe"

    def value(name: str) -> int:
        assert idle.fe
        return int(idle.fe.ctl("status")[name])
    for last in range(1, 11):
        for n in range(30):
            for name in ("dbglevel", "dtcinterval"):
                with open(files / name, "a") as f:
                    f.write(f"{last if n == 29 else n % 7}\n" if name == "dtcinterval" else
                            f"{last % 7 if n == 29 else n % 7}\n")
        wait_for(lambda n=last: value("dtcinterval") == n, "the last interval")
        wait_for(lambda n=last: value("dbglevel") == n % 7, "the last level")
    with open(files / "dbglevel", "a") as early:
        idle.fe.ctl("set", "dbglevel", "1")
        early.write("4\n")
    wait_for(lambda: value("dbglevel") == 4, "the level of who came early")


def test_workers_stay_within_their_limits(idle: Cluster) -> None:
    idle.fe_conf = "startservers = 9\nminspareservers = 2\nmaxspareservers = 4"
    idle.start()
    assert idle.fe
    fe = idle.fe
    assert fe.ctl("status")["startservers"] == 9
    wait_for(lambda: 2 <= fe.ctl("status")["workers"]["total"] <= 5, "retired workers", 30)
    assert idle.get("/") == "x\n"


def test_datapath_option(idle: Cluster) -> None:
    """The option overrides the file."""
    wanted = {"ebpf": "nfqueue", "nfqueue": "ebpf"}[idle.datapath[0]]
    idle.fe = Daemon(idle.fe_host, "fe", idle.fe_text(), options=("--datapath", wanted))
    assert idle.fe.ctl("status")["datapath"] == wanted
    assert f"datapath {wanted}" in idle.fe.log.read_text()
    assert idle.fe.stop() == 0


def test_two_instances_on_one_host() -> None:
    """Two VIPs, two run directories, one front end host."""
    bed = Bed()
    try:
        fe = bed.host("fe", "192.168.1.23")
        text = "raddr = 192.168.1.23\nvaddr = 192.168.1.{}\n"
        before = state(fe)
        daemons = []
        for n in (36, 37):
            (fe.dir / str(n)).mkdir()
            d = Daemon.__new__(Daemon)
            d.host, d.role, d.options, d.environment, d.via = fe, "fe", (), [], ()
            d.config, d.run_dir = fe.dir / f"{n}.conf", fe.dir / str(n)
            d.log = fe.dir / f"{n}.log"
            d.config.write_text(text.format(n))
            d.start()
            daemons.append(d)
        assert daemons[0].stop() == 0
        assert "192.168.1.37/32" in fe.ip("addr") and "192.168.1.36/32" not in fe.ip("addr")
        assert daemons[1].stop() == 0
        assert state(fe) == before
    finally:
        bed.close()
