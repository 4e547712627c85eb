# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package, installed on bare Debian 12 and 13; and every command of the docs, run there.

It is built on the release that it is for: on this machine, or else in a root of that release.

Hosts are namespaces, each with a root of its own over one that Debian was installed in, and with
systemd as its first process.
"""
from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Bed, Host, sh, wait_for
from tests.support.docs import BLOCK, DOCS
from tests.support.tree import TOP

RELEASES = ("bookworm", "trixie")


def chroot(root: Path, *args: str, **kw: Any) -> subprocess.CompletedProcess[str]:
    return sh("chroot", str(root), *args, env={
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive",
        **{k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}}, **kw)


# What a root has of the kernel is its own: removing what a killed test left takes nothing from us.
KERNEL = """
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/net
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
while read name numbers; do mknod -m 666 dev/$name c $numbers; done <<END
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
net/tun 10 200
END
"""

# The first process of a host: all that it is to have mounted, then systemd. $1: its root.
BOOT = f"""
set -e
mount --bind "$1" "$1"
cd "$1"
{KERNEL}
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mkdir old
pivot_root . old
exec chroot . sh -c 'umount -l /old; exec env -i container=other \\
    PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=0' < /dev/null
"""


def mount(*args: str) -> None:
    sh("mount", *args)


def mount_kernel(root: Path) -> None:
    sh("sh", "-ec", KERNEL, cwd=root)


@pytest.fixture(scope="session", params=RELEASES)
def release(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def base(release: str) -> Iterator[Path]:
    """What debootstrap makes, for a package to be built over and installed on."""
    mirror = sh("apt-get", "indextargets", "--format", "$(REPO_URI)").stdout.split()[0]
    # not where pytest would one day remove it with all that is mounted there
    root = Path(tempfile.mkdtemp(prefix="tcpha-debian-"))
    try:
        sh("debootstrap", "--variant=minbase", release, str(root), mirror)
        (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
        yield root
    finally:
        sh("rm", "-rf", "--one-file-system", str(root))


def build(base: Path, into: Path) -> None:
    """'make deb' in a root of its own over that of a release, with what a fresh machine needs."""
    top = Path(tempfile.mkdtemp(prefix="tcpha-debian-"))
    root, upper, work = (top / d for d in ("root", "upper", "work"))
    for path in (root, upper, work):
        path.mkdir()
    mount("-t", "overlay", "overlay", "-o", f"lowerdir={base},upperdir={upper},workdir={work}",
          str(root))
    try:
        mount_kernel(root)
        own = Path("/usr/local/share/ca-certificates")  # pip may need what only this host trusts
        if own.exists():
            shutil.copytree(own, root / own.relative_to("/"), dirs_exist_ok=True)
        chroot(root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "git", "make",
               "python3")
        source = root / "root/tcpha"
        source.mkdir()
        sh("sh", "-ec", "git ls-files -z --cached --others --exclude-standard | "
           'xargs -0 cp --parents -t "$0"', str(source), cwd=TOP)
        chroot(root, "sh", "-ec", "cd /root/tcpha; git init -q; make deb")
        for made in (source / "dist").glob("*.deb"):
            shutil.copy(made, into)
    finally:
        sh("umount", "-Rl", str(root))
        sh("rm", "-rf", "--one-file-system", str(top))


@pytest.fixture(scope="session")
def package(release: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.freedesktop_os_release().get("VERSION_CODENAME") == release:
        into = TOP / "dist"
        sh("make", "deb", cwd=TOP)
    else:
        into = tmp_path_factory.mktemp(release)
        build(base, into)
    found = list(into.glob("tcpha_*_amd64.deb"))
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="session")
def bare(base: Path, package: Path) -> Iterator[Path]:
    """Debian with nothing but what a web server's host has."""
    root = base
    mount("--bind", str(root), str(root))  # 'ip netns' wants a root that is a mount
    try:
        mount("--make-private", str(root))
        mount_kernel(root)
        chroot(root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "systemd-sysv",
               "nginx-light", "curl", "iproute2", "iptables", "procps", "prometheus")
        for service in ("nginx", "prometheus"):
            (root / f"etc/systemd/system/multi-user.target.wants/{service}.service").unlink()
        (root / "root" / package.name).write_bytes(package.read_bytes())
        # the hosts have no way to a mirror
        chroot(root, "apt-get", "install", "-y", "-qq", "--download-only", f"/root/{package.name}")
        yield root
    finally:
        sh("umount", "-Rl", str(root))


class Machine(Host):
    """A host whose commands run in a root of its own, beside its systemd."""

    init = 0

    def __init__(self, bed: Bed, name: str, address: str, bare: Path):
        super().__init__(bed, name, address)
        self.root = self.dir / "root"
        upper, work, groups = (self.dir / d for d in ("upper", "work", "groups"))
        for path in (self.root, upper, work, groups):
            path.mkdir()
        mount("-t", "overlay", "overlay", "-o",
              f"lowerdir={bare},upperdir={upper},workdir={work}", str(self.root))
        mount("-t", "cgroup2", "cgroup2", str(groups))
        self.group = groups / self.ns
        self.group.mkdir()
        with open(self.dir / "console", "w") as console:
            self.boot = self.start(
                "sh", "-ec", f"echo $$ > {self.group}/cgroup.procs; exec unshare --mount --pid "
                "--fork --kill-child --uts --ipc --cgroup sh -c \"$1\" boot \"$2\"", "boot", BOOT,
                str(self.root), stdout=console, stderr=subprocess.STDOUT)
        children = Path(f"/proc/{self.boot.pid}/task/{self.boot.pid}/children")

        def first() -> int:
            pid = int((children.read_text().split() or ["0"])[0])
            return pid if pid and Path(f"/proc/{pid}/comm").read_text() == "systemd\n" else 0
        self.init = wait_for(first, f"systemd of {name}")
        wait_for(lambda: self.run("systemctl", "is-system-running", check=False).stdout in
                 ("running\n", "degraded\n"), f"{name} to boot")

    def command(self, *args: str) -> list[str]:
        if not self.init:
            return super().command(*args)
        return ["nsenter", "--target", str(self.init), "--all", "--root", "--wdns=/", *args]

    def close(self) -> None:
        if self.init:
            os.kill(self.init, signal.SIGKILL)  # and with it whatever runs there
            self.boot.wait(20)
            # those that were killed may take a moment to leave their groups
            wait_for(lambda: not sh("find", str(self.group), "-depth", "-type", "d", "-exec",
                                    "rmdir", "{}", "+", check=False).returncode, "its end")
        for path in (self.dir / "groups", self.dir / "root"):
            sh("umount", "-l", str(path), check=False)

    def do(self, block: str) -> str:
        """Run the commands of a document. Each must succeed."""
        return self.run("sh", "-ec", f"cd /root\n{block}", env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "xterm"}).stdout


class Three:
    """The hosts of docs/quickstart.md, with nginx on the back ends, and a client."""

    def __init__(self, bare: Path):
        self.bed = Bed()
        self.machines: dict[str, Machine] = {}
        try:
            for name, address in (("fe", "192.168.1.23"), ("be1", "192.168.1.33"),
                                  ("be2", "192.168.1.38"), ("client", "192.168.1.50")):
                self.machines[name] = Machine(self.bed, name, address, bare)
            for name in ("be1", "be2"):
                m = self.machines[name]
                (m.root / "var/www/html/index.html").write_text(f"page of {name}\n")
                (m.root / "var/www/html/a.jpg").write_text(f"picture of {name}\n")
                m.run("systemctl", "start", "nginx")
        except BaseException:
            self.close()
            raise

    def follow(self, document: str) -> dict[str, str]:
        """Do all that a document says; {host: what was printed}."""
        out: dict[str, str] = {}
        blocks = BLOCK.findall((TOP / "docs" / f"{document}.md").read_text())
        assert blocks
        for hosts, block in blocks:
            for host in hosts.split():
                out[host] = out.get(host, "") + self.machines[host].do(block)
        return out

    def connected(self) -> None:
        def up() -> bool:
            servers = json.loads(self.machines["fe"].run(
                "tcphactl", "--json", "fe", "servers").stdout)
            return bool(servers) and all(s["state"] == "up" for s in servers)
        wait_for(up, "both back ends")

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        self.bed.close()


@pytest.fixture(scope="module")
def three(bare: Path) -> Iterator[Three]:
    hosts = Three(bare)
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def serving(three: Three) -> Three:
    """They serve, after what the quick start says."""
    three.said = three.follow("quickstart")  # type: ignore[attr-defined]
    return three


def test_the_quick_start_can_be_followed(serving: Three) -> None:
    said: dict[str, str] = serving.said  # type: ignore[attr-defined]
    assert "page of be1" in said["client"] and "picture of be2" in said["client"]
    assert "fault" not in "".join(said.values())
    assert "192.168.1.38" in said["fe"] and "handed over" in said["fe"]
    log = (serving.machines["be2"].root / "var/log/nginx/access.log").read_text()
    assert log.startswith("192.168.1.50 ")
    for name in ("fe", "be1"):  # nothing came along that builds or fetches
        packages = serving.machines[name].run("dpkg-query", "-W", "-f", "${Package}\n").stdout
        assert not {"gcc", "clang", "python3-pip", "make"} & set(packages.split())


@pytest.mark.parametrize("document", DOCS[1:])
def test_commands_of_the_docs(serving: Three, document: str) -> None:
    said = serving.follow(document)
    assert all(said.values()) or document == "networks"
    serving.connected()
    pages(serving)


def test_prometheus_reads_metrics_alerts_and_dashboard(serving: Three) -> None:
    fe, be2 = serving.machines["fe"], serving.machines["be2"]
    (fe.root / "root/alerts.yml").write_bytes((TOP / "docs/alerts.yml").read_bytes())
    (fe.root / "root/prometheus.yml").write_text("""
global: {scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}
rule_files: [alerts.yml]
scrape_configs: [{job_name: tcpha, static_configs: [{targets: ["127.0.0.1:9110"]}]}]
""")
    fe.run("sh", "-ec", "cd /etc/tcpha; sed -i /^admin/d tcphafe.conf; "
           "echo 'admin = 127.0.0.1:9110' >> tcphafe.conf; systemctl restart tcphafe")
    serving.connected()
    fe.run("sh", "-ec", "cd /root; promtool check config prometheus.yml; "
           "curl -sf http://127.0.0.1:9110/metrics | promtool check metrics")
    fe.run("systemd-run", "--unit=watcher", "prometheus", "--config.file=/root/prometheus.yml",
           "--storage.tsdb.path=/root/watched", "--web.listen-address=127.0.0.1:9090")

    def ask(what: str, *args: str) -> Any:
        return json.loads(fe.run("curl", "-sS", "--get", *args,
                                 f"http://127.0.0.1:9090/api/v1/{what}").stdout)["data"]

    def query(text: str) -> Any:
        return ask("query", "--data-urlencode", f"query={text}")["result"]
    try:
        wait_for(lambda: not fe.run("curl", "-sf", "http://127.0.0.1:9090/-/ready",
                                    check=False).returncode, "Prometheus")
        wait_for(lambda: query("rate(tcpha_paths_total[1m])"), "two samples")
        pages(serving)
        be2.run("systemctl", "stop", "tcphabe")
        wait_for(lambda: [a["labels"]["server"] for a in ask("alerts")["alerts"]
                          if a["labels"]["alertname"] == "TcphaBackEndDown"] == ["192.168.1.38"],
                 "the alert")
        be2.run("systemctl", "start", "tcphabe")
        serving.connected()
        wait_for(lambda: not ask("alerts")["alerts"], "the end of it")
        known = set(ask("label/__name__/values"))
        groups = ask("rules")["groups"]
        assert all(r["health"] == "ok" for g in groups for r in g["rules"])
        texts = [r["query"] for g in groups for r in g["rules"]]
        panels = json.loads((TOP / "docs/grafana.json").read_text())["panels"]
        shown = [t["expr"].replace("$instance", ".*") for p in panels for t in p["targets"]]
        for text in shown:
            assert query(text), text
        for text in texts + shown:
            assert set(re.findall(r"tcpha_\w+", text)) <= known, text
    finally:
        fe.run("systemctl", "stop", "watcher")


class Download:
    """A large file, of which all but the first bytes are read at the end."""

    def __init__(self, hosts: Three):
        path = hosts.machines["be1"].root / "var/www/html/big"
        if not path.exists():
            path.write_bytes(os.urandom(1 << 20) * 32)
        self.want = path.read_bytes()
        self.s = hosts.machines["client"].connect("192.168.1.36")
        self.s.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        self.got = bytearray(self.s.recv(1000))

    def finish(self) -> None:
        with self.s:
            while more := self.s.recv(1 << 20):
                self.got += more
        assert self.got.partition(b"\r\n\r\n")[2] == self.want


def pages(hosts: Three) -> None:
    client = hosts.machines["client"]
    assert client.run("curl", "-sf", "http://192.168.1.36/").stdout == "page of be1\n"
    assert client.run("curl", "-sf", "http://192.168.1.36/a.jpg").stdout == "picture of be2\n"


@pytest.mark.parametrize("datapath", ["nfqueue", "ebpf"])
def test_what_the_units_leave_is_enough(serving: Three, datapath: str) -> None:
    """The daemons serve, are restarted when they are killed, and keep what they have."""
    m = serving.machines
    daemons = (("be1", "tcphabe"), ("be2", "tcphabe"), ("fe", "tcphafe"))
    for name, daemon in daemons:
        m[name].run("sh", "-ec", f"sed -i '/^datapath/d' /etc/tcpha/{daemon}.conf; "
                    f"echo 'datapath = {datapath}' >> /etc/tcpha/{daemon}.conf; "
                    f"systemctl restart {daemon}")
    serving.connected()
    pages(serving)
    download = Download(serving)
    for name, daemon in daemons:
        def unit(key: str, m: Machine = m[name], daemon: str = daemon) -> str:
            return m.run("systemctl", "show", "-P", key, daemon).stdout.strip()
        before = int(unit("NRestarts"))
        status = m[name].run("cat", f"/proc/{unit('MainPID')}/status").stdout
        for kept in ("CapPrm", "CapBnd"):  # the five of docs/security.md
            assert f"{kept}:\t000000c000003400\n" in status
        assert "CapAmb:\t0000000000003000\n" in status  # for iptables
        user = m[name].run("id", "-u", "tcpha").stdout.strip()
        assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status and user != "0"
        assert "\nSeccomp:\t2\n" in status
        m[name].run("systemctl", "kill", "-s", "KILL", daemon)
        wait_for(lambda before=before, unit=unit: int(unit("NRestarts")) == before + 1 and
                 unit("ActiveState") == "active", f"{daemon} to be restarted")
    serving.connected()
    download.finish()
    pages(serving)
    for name, daemon in daemons:
        status = json.loads(m[name].run("tcphactl", "--json", daemon[-2:], "status").stdout)
        assert status["datapath"] == datapath
        assert datapath == "ebpf" or "queue_dropped" in status["packets"]
        log = m[name].run("journalctl", "-u", daemon).stdout
        assert "serving" in log and "Traceback" not in log


def test_the_units_are_tight(serving: Three) -> None:
    """As systemd sees them; and by what a program in their place may write."""
    fe = serving.machines["fe"]
    for daemon in ("tcphafe", "tcphabe"):
        unit = f"/usr/lib/systemd/system/{daemon}.service"
        said = fe.run("systemd-analyze", "security", "--offline=true", "--no-pager", unit).stdout
        level = re.search(r"Overall exposure level for .*: ([0-9.]+)", said)
        assert level and float(level[1]) <= 2.9, said
    drop = "/run/systemd/system/tcphafe.service.d"
    fe.run("sh", "-ec", f"""mkdir -p {drop}; cat > {drop}/tries.conf <<'END'
[Service]
ExecStartPre=sh -c 'for f in /etc/passwd /etc/tcpha/tcphafe.conf /proc/sys/kernel/core_pattern \
    /sys/kernel/uevent_helper /run/tries /proc/sys/net/ipv4/tcp_sack /run/tcpha/tries \
    /var/log/tcpha/tries; do if true >> $f; then echo $f; fi; done 2>/dev/null > /run/tcpha/tries'
END
systemctl daemon-reload; systemctl restart tcphafe""")
    serving.connected()
    assert fe.run("cat", "/run/tcpha/tries").stdout.split() == [
        "/proc/sys/net/ipv4/tcp_sack", "/run/tcpha/tries", "/var/log/tcpha/tries"]
    fe.run("sh", "-ec", f"rm -r {drop} /run/tcpha/tries; systemctl daemon-reload")


def test_legacy_iptables_works_in_the_units(serving: Three) -> None:
    """With what a daemon leaves its programs; the lock of all iptables is one that it can open."""
    serving.machines["fe"].run("sh", "-ec", """cd /run/systemd/system
sed '/^AmbientCapabilities/s/=.*/=CAP_NET_ADMIN CAP_NET_RAW/; s/^Type=.*/Type=oneshot/; /^Restart/d
    s/^ExecStart=.*/ExecStart=iptables-legacy -w -t raw -N tries/' \\
    /usr/lib/systemd/system/tcphafe.service > tries.service
systemctl daemon-reload; systemctl start tries
iptables-legacy -t raw -X tries; rm tries.service""")


# one that is killed takes a while to end, and has its files and devices until then
END_AND_START = ("pid=$(cat /run/tcpha/tcphafe.pid); kill -{} $pid; "
                 "while kill -0 $pid 2> /dev/null; do sleep 0.1; done; systemctl start tcphafe")


def test_daemons_that_root_starts_by_hand(serving: Three) -> None:
    """Before the unit, and after it, on its run directory; one is killed, one stops."""
    fe = serving.machines["fe"]
    for end in ("KILL", "TERM"):
        fe.run("sh", "-ec", "systemctl stop tcphafe; tcphafe")
        serving.connected()
        pages(serving)
        assert "tcpha" in fe.run("stat", "-c", "%U", "/run/tcpha/tcphafe.pid").stdout
        fe.run("sh", "-ec", END_AND_START.format(end))
        serving.connected()
        pages(serving)
    fe.run("sh", "-ec", "systemctl stop tcphafe; rm -r /run/tcpha; tcphafe; "
           "tcphactl fe drain 192.168.1.38; tcphactl fe undrain 192.168.1.38")
    fe.run("sh", "-ec", END_AND_START.format("KILL"))
    serving.connected()
    pages(serving)


def test_connections_live_through_an_upgrade(serving: Three) -> None:
    """The package is installed once more, as an upgrade is, and its daemons start anew."""
    m = serving.machines
    download = Download(serving)
    before = m["fe"].run("cat", "/run/tcpha/tcphafe.pid").stdout
    m["fe"].run("dpkg", "-i", *(f"/root/{p.name}" for p in (m["fe"].root / "root").glob("*.deb")))
    assert m["fe"].run("systemctl", "is-active", "tcphafe").stdout == "active\n"
    assert m["fe"].run("cat", "/run/tcpha/tcphafe.pid").stdout != before
    download.finish()
    serving.connected()
    pages(serving)


HAND_OVER = """
mkdir upper work bin logs; touch theirs; printf '#!/bin/sh\n' > bin/adduser; chmod 755 bin/adduser
mount -t overlay overlay -o lowerdir=/etc,upperdir=upper,workdir=work /etc
echo tcpha:x:64997:64997::/nonexistent:/usr/sbin/nologin >> /etc/passwd
echo tcpha:x:64997: >> /etc/group
mkdir /etc/tcpha; touch logs/log; ln -s "$PWD/theirs" logs/link
printf 'secret = %s\nlogfile = %s\naccesslog = %s\n' \
    /etc/tcpha/secret "$PWD/logs/log" "$PWD/logs/link" > /etc/tcpha/tcphafe.conf
touch /etc/tcpha/secret; chmod 600 /etc/tcpha/*
PATH=$PWD/bin:$PATH sh "$1" configure $2
stat -c %n:%U:%G:%a /etc/tcpha/secret /etc/tcpha/tcphafe.conf logs/log theirs
"""


@pytest.mark.parametrize("version, given", [("", False), ("1.0.0", True), ("1.1.0", False)])
def test_what_was_roots_is_given_to_the_user_once(tmp_path: Path, version: str,
                                                  given: bool) -> None:
    """Later, who runs as that user may have put something else in its place."""
    said = sh("unshare", "--mount", "sh", "-ec", HAND_OVER, "sh",
              str(TOP / "debian/tcpha.postinst"), version, cwd=tmp_path).stdout
    assert "theirs:root:root:644\n" in said
    assert said.count("root:tcpha:640\n") == 2 * given
    assert ("logs/log:tcpha:root:644\n" in said) == given


def test_removal_stops_what_runs(serving: Three) -> None:
    be2 = serving.machines["be2"]
    assert "192.168.1.36" in be2.run("ip", "addr").stdout
    be2.run("dpkg", "--remove", "tcpha")
    assert "192.168.1.36" not in be2.run("ip", "addr").stdout
    assert be2.run("systemctl", "is-active", "tcphabe", check=False).stdout == "inactive\n"


def test_the_lab_of_the_package(bare: Path, package: Path) -> None:
    chroot(bare, "apt-get", "install", "-y", "-qq", "--no-install-recommends",
           f"/root/{package.name}")
    try:
        up = chroot(bare, "tcphactl", "lab", "up", "3").stdout
        assert "192.168.1.43" in up and "fe top" in up
        assert chroot(bare, "tcphactl", "lab", "up", check=False).returncode == 1
        lab = json.loads(chroot(bare, "tcphactl", "--json", "lab", "status").stdout)
        assert len(lab["backends"]) == 3 and all(s["state"] == "up" for s in lab["servers"])
        page = chroot(bare, "ip", "netns", "exec", lab["client"], "curl", "-sf",
                      f"http://{lab['vaddr']}/photo.jpg").stdout
        assert page == "photo.jpg from be3\n"
    finally:
        assert chroot(bare, "tcphactl", "lab", "down", check=False).stdout == "removed\n"
    assert "tcphalab" not in sh("ip", "netns", "list").stdout


def test_completion(serving: Three, tmp_path: Path) -> None:
    script = (TOP / "completion/tcpha.bash").read_text() + """
COMP_WORDS=(%s); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); compopt() { :; }
%s; printf '%%s\\n' "${COMPREPLY[@]}"
"""
    fe = serving.machines["fe"]

    def complete(words: str, function: str = "_tcphactl") -> set[str]:
        return set(fe.run("bash", "-c", script % (words, function)).stdout.split())
    assert {"fe", "be", "lab", "doctor"} <= complete("tcphactl ''")
    assert complete("tcphactl fe dr") == {"drain"}
    assert complete("tcphactl fe drain ''") == {"192.168.1.33", "192.168.1.38"}
    assert complete("tcphafe --datapath ''", "_tcpha_daemon") == {"auto", "ebpf", "nfqueue"}


def test_lintian_has_nothing_to_say(package: Path) -> None:
    assert sh("lintian", "--fail-on", "error,warning", str(package), check=False).stdout == ""


def test_purge_leaves_nothing(bare: Path) -> None:
    """Runs last: the package goes."""
    chroot(bare, "dpkg", "--purge", "tcpha")
    left = chroot(bare, "find", "/etc", "/usr", "/lib", "/var/lib", "/run", "-name", "*tcpha*",
                  "-print").stdout
    assert left == ""
