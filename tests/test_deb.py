# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package, installed on a bare Debian 12; and every command of the docs, run there.

Hosts are network namespaces, each with a root of its own over one that Debian was installed in.
There is no systemd in them: 'systemctl' is done by hand, with what the units say.
"""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpha.lab.bed import Bed, Host, sh, wait_for

pytestmark = pytest.mark.xdist_group("deb")
TOP = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- on: ([a-z0-9 ]+) -->\n```sh\n(.*?)```\n", re.S)
DOCS = ("quickstart", "networks", "kernels", "tuning", "upgrade", "troubleshooting", "migration",
        "monitoring")


def chroot(root: Path, *args: str, **kw: Any) -> subprocess.CompletedProcess[str]:
    return sh("chroot", str(root), *args, env={
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive",
        **{k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}}, **kw)


def mount(*args: str) -> None:
    sh("mount", *args)


def mount_kernel(root: Path) -> None:
    for name in ("proc", "sys", "dev"):
        mount("--rbind", f"/{name}", f"{root}/{name}")
        mount("--make-rslave", f"{root}/{name}")


@pytest.fixture(scope="session")
def package() -> Path:
    sh("make", "deb", cwd=TOP)
    found = list((TOP / "dist").glob("tcpha_*_amd64.deb"))
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="session")
def bare(package: Path) -> Iterator[Path]:
    """Debian 12 with nothing but what a web server's host has."""
    mirror = sh("apt-get", "indextargets", "--format", "$(REPO_URI)").stdout.split()[0]
    # not where pytest would one day remove it with all that is mounted there
    root = Path(tempfile.mkdtemp(prefix="tcpha-debian-"))
    sh("debootstrap", "--variant=minbase", "bookworm", str(root), mirror)
    mount("--bind", str(root), str(root))  # 'ip netns' wants a root that is a mount
    mount("--make-private", str(root))
    mount_kernel(root)
    try:
        chroot(root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "nginx-light",
               "curl", "iproute2", "procps")
        (root / "root" / package.name).write_bytes(package.read_bytes())
        # the hosts have no way to a mirror
        chroot(root, "apt-get", "install", "-y", "-qq", "--download-only", f"/root/{package.name}")
        yield root
    finally:
        sh("umount", "-Rl", str(root))
        sh("rm", "-rf", "--one-file-system", str(root))


class Machine(Host):
    """A host whose commands run in a root of its own."""

    root = Path("/")

    def __init__(self, bed: Bed, name: str, address: str, bare: Path):
        super().__init__(bed, name, address)
        self.root = self.dir / "root"
        upper, work = self.dir / "upper", self.dir / "work"
        for path in (self.root, upper, work):
            path.mkdir()
        mount("-t", "overlay", "overlay", "-o",
              f"lowerdir={bare},upperdir={upper},workdir={work}", str(self.root))
        mount_kernel(self.root)
        self.services: dict[str, subprocess.Popen[str]] = {}

    def command(self, *args: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.ns}", "chroot", str(self.root), *args]

    def close(self) -> None:
        for process in self.services.values():
            process.terminate()
            process.wait(20)
        if self.root != Path("/"):
            sh("umount", "-Rl", str(self.root))

    def systemctl(self, verb: str, name: str) -> None:
        """What systemd would do by the unit."""
        unit = (self.root / f"lib/systemd/system/{name}.service").read_text()
        run = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
        if verb == "reload":
            assert run["ExecReload"] == "/bin/kill -HUP $MAINPID"
            self.services[name].send_signal(signal.SIGHUP)
            return
        if name in self.services:
            self.services[name].terminate()
            assert self.services.pop(name).wait(20) == 0
        self.run(*run["ExecStartPre"].split())
        (self.root / "run" / run["RuntimeDirectory"]).mkdir(exist_ok=True)
        log = open(self.dir / f"{name}.log", "a")  # noqa: SIM115
        self.services[name] = self.start(*run["ExecStart"].split(), stderr=log)
        pid = self.root / f"run/tcpha/{name}.pid"
        wait_for(lambda: pid.exists() and pid.read_text().strip(), f"{name} to serve")

    def do(self, block: str) -> str:
        """Run the commands of a document. Each must succeed."""
        out = ""
        for match in re.finditer(r".*<<'(\w+)'\n(?:.*\n)*?\1\n|.+\n", block):
            text = match.group(0)
            if service := re.match(r"systemctl (?:enable --now|(restart|reload)) (\w+)$", text):
                self.systemctl(service[1] or "start", service[2])
            else:
                out += self.run("sh", "-ec", f"cd /root\n{text}", env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "xterm"}).stdout
        return out


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
                m.start("nginx", "-g", "daemon off;", stderr=subprocess.DEVNULL)
                wait_for(lambda m=m: ":80 " in m.run("ss", "-Hltn").stdout, "nginx")
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
    m = serving.machines
    wait_for(lambda: "2" in json.dumps([s["connperbe"] for s in json.loads(m["fe"].run(
        "tcphactl", "--json", "fe", "servers").stdout)]), "control connections")
    assert m["client"].run("curl", "-sf", "http://192.168.1.36/").stdout == "page of be1\n"


def test_all_blocks_of_the_docs_are_followed() -> None:
    """A command that no test runs stands in no document for operators."""
    for path in (TOP / "docs").glob("*.md"):
        text = path.read_text()
        if path.stem in DOCS:
            assert text.count("```sh") == len(BLOCK.findall(text)), path
        else:
            assert "```sh" not in text, path


def test_connections_live_through_an_upgrade(serving: Three) -> None:
    """The package is installed once more, as an upgrade is, and its daemons start anew."""
    m = serving.machines
    (m["be1"].root / "var/www/html/big").write_bytes(os.urandom(1 << 20) * 32)
    s = m["client"].connect("192.168.1.36")
    s.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    got = bytearray(s.recv(1000))
    m["fe"].run("dpkg", "-i", *(f"/root/{p.name}" for p in (m["fe"].root / "root").glob("*.deb")))
    m["fe"].systemctl("restart", "tcphafe")
    while more := s.recv(1 << 20):
        got += more
    s.close()
    assert got.partition(b"\r\n\r\n")[2] == (m["be1"].root / "var/www/html/big").read_bytes()


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


def test_man_pages_name_every_key_and_command(bare: Path) -> None:
    from tcpha.cli.tcphactl import COMMANDS
    from tcpha.config.keys import KEYS, MEANINGLESS
    for role, keys in KEYS.items():
        text = (TOP / f"man/tcpha{role}.conf.5").read_text()
        for key in keys:
            assert key in text or key in MEANINGLESS[role], key
    text = (TOP / "man/tcphactl.8").read_text().replace("\\-", "-")
    assert all(c in text for commands in COMMANDS.values() for c in commands)


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
