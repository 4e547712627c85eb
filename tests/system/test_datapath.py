# SPDX-License-Identifier: GPL-2.0-or-later
"""Which datapath a daemon takes where its kernel's verifier refuses programs. Which ones a kernel
refuses is not known before it is tried: here it refuses what stands in the place of ours."""
from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from tcpha.lab.bed import Cluster, Daemon, Host, sh
from tests.support.client import REQUEST, body, read_all
from tests.support.hooks import programs

REFUSED = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
const volatile char conf[SIZE] SEC(".rodata.conf");
const volatile char lab_clock[16] SEC(".rodata.clock");
const volatile int own SEC(".rodata.own");
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, int);
    __type(value, int);
} flows SEC(".maps"), verdicts SEC(".maps"), rule_hits SEC(".maps"), frontends SEC(".maps"),
  listeners SEC(".maps");
SEC("tc") int beyond(struct __sk_buff *skb)
{
    return conf[0] + lab_clock[0] + *(char *)(long)skb->data;
}
char LICENSE[] SEC("license") = "GPL";
"""
SIZES = {"fe": 16, "fe_socket": 16, "be": 156}  # of struct tcpha_fe_conf and _be_conf


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Objects that each verifier refuses, by the name of ours."""
    directory = tmp_path_factory.mktemp("bpf")
    source = directory / "refused.bpf.c"
    source.write_text(REFUSED)
    made = {}
    for name, size in SIZES.items():
        made[name] = directory / f"{name}.bpf.o"
        sh("clang", "-O2", "-g", "-target", "bpf", f"-DSIZE={size}",
           f"-I/usr/include/{platform.machine()}-linux-gnu", "-c", str(source), "-o",
           str(made[name]))
    return made


class Deprived(Daemon):
    """A daemon that finds other files in the place of some of its objects."""

    def __init__(self, host: Host, role: str, config: str, instead: dict[str, Path]):
        self.instead = instead
        super().__init__(host, role, config)

    def start(self) -> None:
        mounts = [f"mount --bind {made} {resources.files('tcpha._bpf') / name}.bpf.o"
                  for name, made in self.instead.items()]
        self.environment = ["unshare", "-m", "sh", "-c",
                            " && ".join([*mounts, 'exec "$0" "$@"'])]
        super().start()


@pytest.fixture
def hosts() -> Iterator[Cluster]:
    c = Cluster(1, rules=[(0, ".*")], start=False)
    try:
        c.nginx[0].file("1k", size=1024)
        yield c
    finally:
        c.close()


TAKEN = [  # what is refused; the front end's and the back end's datapath, and if with a packet path
    (("fe",), ("ebpf", "off"), ("ebpf", "on")),
    (("fe", "fe_socket"), ("nfqueue", "off"), ("ebpf", "on")),
    (("be",), ("ebpf", "on"), ("nfqueue", "off")),
    (("fe", "fe_socket", "be"), ("nfqueue", "off"), ("nfqueue", "off"))]


@pytest.mark.parametrize(("names", "fe", "be"), TAKEN, ids=["+".join(t[0]) for t in TAKEN])
def test_auto_takes_what_works(hosts: Cluster, refused: dict[str, Path], names: tuple[str, ...],
                               fe: tuple[str, str], be: tuple[str, str]) -> None:
    c = hosts
    instead = {name: refused[name] for name in names}
    of = {role: {n: p for n, p in instead.items() if n.startswith(role)} for role in ("fe", "be")}
    c.be = [Deprived(c.be_hosts[0], "be", c.be_text(c.be_hosts[0]), of["be"])]
    c.fe = Deprived(c.fe_host, "fe", c.fe_text(), of["fe"])
    c.connected()
    for _ in range(5):
        s = c.client.connect(c.VIP)
        s.sendall(REQUEST)
        assert len(body(read_all(s))) == 1024
        s.close()
    for daemon, want, lacks in ((c.fe, fe, of["fe"]), (c.be[0], be, of["be"])):
        status = daemon.ctl("status")
        assert (status["datapath"], status["fastpath"]) == want
        chosen = status["chosen"]
        lines = [x for x in daemon.log.read_text().splitlines() if "datapath " in x]
        assert chosen.startswith(f"datapath {want[0]} (auto)") and chosen in lines[0]
        assert len(lines) == 1 and "\n" not in chosen
        for name in lacks:  # in its place, what the verifier said last
            assert re.search(rf"{name}.bpf.o does not load: [^;]*\(R\d[^;]*packet\)", chosen)
    c.fe.stop()
    c.be[0].stop()
    for host in (c.fe_host, c.be_hosts[0]):
        assert "tcpha" not in host.ip("link") and "192.168.1.36" not in host.ip("addr")
        assert not programs(host) and "clsact" not in host.run("tc", "qdisc").stdout


@pytest.mark.parametrize("role", ["fe", "be"])
def test_ebpf_alone_is_refused(hosts: Cluster, refused: dict[str, Path], role: str) -> None:
    """It says which program, and the verifier's last lines; nothing stays behind."""
    c = hosts
    host = c.fe_host if role == "fe" else c.be_hosts[0]
    text = c.fe_text() if role == "fe" else c.be_text(host)
    before = host.run("sysctl", "-a", "-e").stdout.count("\n"), host.ip("addr"), host.ip("link")
    with pytest.raises(RuntimeError) as error:
        Deprived(host, role, text.replace("= auto", "= ebpf"), {role: refused[role]})
    said = str(error.value)
    assert f"cannot serve: datapath ebpf: [Errno 13] {role}.bpf.o does not load" in said
    assert "'datapath = auto' takes what works" in said
    assert re.search(rf"tcpha{role}: +\d+: \(71\) r\d = \*\(u8 \*\)", said), said  # the instruction
    assert (host.run("sysctl", "-a", "-e").stdout.count("\n"), host.ip("addr"),
            host.ip("link")) == before
    assert not os.listdir(host.dir / f"run-{role}") or not any(
        f.endswith((".sock", ".pid")) for f in os.listdir(host.dir / f"run-{role}"))
