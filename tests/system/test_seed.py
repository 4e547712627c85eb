# SPDX-License-Identifier: GPL-2.0-or-later
"""The README of TCPHA 0.1, sections 'Fastest setup' and 'How to use', followed to the letter: its
addresses, its files in /etc/tcpha, its order of starting and stopping, its 'echo' and 'cat'."""
from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tcpha.lab.bed import BIN, Bed, Host, Nginx, sh, wait_for
from tests.support.client import REQUEST, body, read_all
from tests.support.tree import TOP

CONF = TOP / "conf"
VIP = "192.168.1.36"


class Workstation:
    """A host with an /etc and a /run of its own, on which one types commands."""

    def __init__(self, bed: Bed, name: str, address: str):
        self.host: Host = bed.host(name, address)
        etc = self.host.dir / "etc"
        sh("cp", "-a", "/etc", str(etc))
        # what tunl0 was: an interface for an address, without ARP
        self.host.ip("tuntap", "add", "dev", "tunl0", "mode", "tun")
        self.init = subprocess.Popen(
            [*self.host.command("unshare", "--mount"), "sh", "-ec",
             f"mount --bind {etc} /etc; mount -t tmpfs tmpfs /run; echo ready\n"
             "exec sleep infinity"],
            stdout=subprocess.PIPE, text=True)
        self.host.processes.append(self.init)
        assert self.init.stdout and self.init.stdout.readline() == "ready\n"

    def shell(self, command: str, check: bool = True) -> str:
        """Shell>command"""
        return sh("nsenter", "-t", str(self.init.pid), "--mount", "--net", "env",
                  f"PATH={BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-ec", command,
                  check=check, cwd="/").stdout

    def ended(self) -> None:
        wait_for(lambda: not self.shell("ls /run/tcpha"), f"the daemon's end on {self.host.name}",
                 30)


@pytest.fixture(params=["ebpf", "nfqueue"])
def cluster(request: pytest.FixtureRequest) -> Iterator[tuple[Bed, str]]:
    bed = Bed()
    yield bed, request.param
    bed.close()


def test_the_seeds_readme(cluster: tuple[Bed, str]) -> None:
    bed, datapath = cluster
    client = bed.host("client", "192.168.1.50")
    fe = Workstation(bed, "fe", "192.168.1.23")
    backs = [Workstation(bed, "be1", "192.168.1.33"), Workstation(bed, "be2", "192.168.1.38")]

    def get(path: str, *options: str, check: bool = True) -> str:
        return client.run("curl", "-sS", "--max-time", "20", *options, f"http://{VIP}{path}",
                          check=check).stdout
    # Fastest setup: install tcpha_fe; 'you need only change the following'
    fe.shell(f"""mkdir /etc/tcpha; cp {CONF}/tcphafe.conf /etc/tcpha/
        cd /etc/tcpha
        sed -i 's/^raddr = .*/raddr = 192.168.1.23/; s/^vaddr = .*/vaddr = 192.168.1.36/' *.conf
        grep -Fx 'server = 192.168.1.33 666' tcphafe.conf
        grep -Fx 'server = 192.168.1.38 666' tcphafe.conf
        grep -Fx 'rule = 192.168.1.38 jpg$' tcphafe.conf
        grep -Fx 'rule = 192.168.1.33 .*' tcphafe.conf
        echo 'datapath = {datapath}' >> tcphafe.conf
        tcphafe -t""")
    # install tcpha_be
    for station in backs:
        station.shell(f"""mkdir /etc/tcpha; cp {CONF}/tcphabe.conf /etc/tcpha/
            cd /etc/tcpha
            sed -i 's/^raddr = .*/raddr = {station.host.address}/' tcphabe.conf
            sed -i 's/^uaddr = .*/uaddr = 192.168.1.39/' tcphabe.conf
            sed -i 's/^vaddr = .*/vaddr = 192.168.1.36/' tcphabe.conf
            echo 'datapath = {datapath}' >> tcphabe.conf
            tcphabe -t""")
    # How to use: start BE
    for station in backs:
        station.shell("tcphabe")
        station.shell("ip addr add 192.168.1.36/32 dev tunl0; ip link set tunl0 up")
        server = Nginx(station.host)
        for name in ("index.html", "a.jpg"):
            server.file(name, f"{station.host.name}\n".encode())
        server.file("1k", size=1024)
    # start FE
    fe.shell("ip addr add 192.168.1.36/32 dev tunl0; ip link set tunl0 up")
    fe.shell("tcphafe")
    assert get("/") == "be1\n" and get("/a.jpg") == "be2\n"
    # what may be looked at and changed while it runs
    with client.connect(VIP) as s:
        s.sendall(REQUEST.replace(b"close", b"keep-alive"))
        s.recv(65536)
        table = wait_for(lambda: [line.split() for line in fe.shell(
            "cat /run/tcpha/tcpha_fe_conn").splitlines()[1:] if "/1k" in line], "the table")
        assert table[0][:3] == [f"192.168.1.50:{s.getsockname()[1]}", f"{VIP}:80", "/1k"]
        fe.shell("echo 3 >> /run/tcpha/ktcphafe/dbglevel")
        fe.shell("echo 1 >> /run/tcpha/ktcphafe/dtcinterval")
        backs[0].shell("echo 2 >> /run/tcpha/ktcphabe/dbglevel")
        wait_for(lambda: fe.shell("cd /run/tcpha/ktcphafe; cat dbglevel dtcinterval").split()
                 == ["3", "1"], "the level and the interval")
        # Stop FE, in the seed's order; who is connected is served to the end
        fe.shell("ip link set tunl0 down")
        fe.shell("echo 1 >> /run/tcpha/ktcphafe/unload")
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024
    fe.ended()
    assert get("/", check=False) == ""
    # Stop BE
    for station in backs:
        station.shell("ip link set tunl0 down")
        station.shell("echo 1 >> /run/tcpha/ktcphabe/unload")
        station.ended()
    for station in (fe, *backs):
        assert VIP not in station.host.ip("addr", "show", "dev", "lo")
        assert "tcpha" not in station.host.run("nft", "list", "ruleset").stdout
