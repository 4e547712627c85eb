# SPDX-License-Identifier: GPL-2.0-or-later
"""Both configuration formats, their checks, and the files that we ship."""
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import toml
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpha.config import Config, ConfigError, Rule, Server, load, to_toml
from tcpha.lab.bed import BIN
from tests.support.configs import faults, read
from tests.support.tree import TOP

CONF = TOP / "conf"
FE = "vaddr = 10.0.0.100\nserver = 10.0.0.1 666\nrule = 10.0.0.1 .*\n"
BE = "vaddr = 10.0.0.100\nraddr = 10.0.0.1\nuaddr = 10.0.0.99\n"


def test_defaults_of_the_seed(tmp_path: Path) -> None:
    fe = read(tmp_path, FE)
    assert {k: fe.values[k] for k in (
        "raddr", "port", "startservers", "maxspareservers", "minspareservers", "maxclients",
        "connperbe", "redirectaddr", "redirectport", "dtcinterval", "headlimit", "headtimeout",
        "idletimeout", "datapath", "forward", "dbglevel")} == {
        "raddr": "0.0.0.0", "port": 80, "startservers": 5, "maxspareservers": 5,
        "minspareservers": 2, "maxclients": 256, "connperbe": 2, "redirectaddr": "0.0.0.0",
        "redirectport": 8080, "dtcinterval": 5, "headlimit": 16384, "headtimeout": 15,
        "idletimeout": 900, "datapath": "auto", "forward": "direct", "dbglevel": 0}
    be = read(tmp_path, BE, "be")
    assert {k: be.values[k] for k in (
        "port", "startservers", "maxspareservers", "minspareservers", "maxclients", "redirectaddr",
        "redirectport", "dregister", "feport")} == {
        "port": 666, "startservers": 5, "maxspareservers": 5, "minspareservers": 2,
        "maxclients": 256, "redirectaddr": "0.0.0.0", "redirectport": 80, "dregister": 0,
        "feport": 80}


def test_both_formats_say_the_same() -> None:
    for role in ("fe", "be"):
        name = f"tcpha{role}"
        legacy = load(role, str(CONF / f"{name}.conf"))
        detail = load(role, str(CONF / f"{name}.conf.detail"))
        tables = load(role, str(CONF / f"{name}.toml"))
        assert legacy.values == tables.values
        assert not legacy.warnings and not tables.warnings and not detail.warnings
    fe = load("fe", str(CONF / "tcphafe.conf"))
    assert fe.server == [Server("192.168.1.33", 666), Server("192.168.1.38", 666)]
    assert fe.rule == [Rule("192.168.1.38", "jpg$"), Rule("192.168.1.33", ".*")]


def test_detail_files_name_every_key_with_its_default() -> None:
    from tcpha.config.keys import KEYS, MEANINGLESS
    for role in ("fe", "be"):
        text = (CONF / f"tcpha{role}.conf.detail").read_text()
        for name, key in KEYS[role].items():
            if name in MEANINGLESS[role]:
                continue
            assert name in text, name
            if key.default is not None and f"#{name} = " in text:
                assert f"#{name} = {key.default}\n" in text, name


def test_all_faults_at_once(tmp_path: Path) -> None:
    got = faults(tmp_path, """vaddr = 10.0.0.100
raddr = 10.0.0.100
prot = 80
server = 10.0.0.1 666
server = 10.0.0.2 99999
rule = 10.0.0.1 jpg(
rule = 10.0.0.9 .*
minspareservers = 9
port = 1 2
maxclients = 0
nonsense
""")
    assert [line.split(": ", 2)[:2] for line in got] == [
        ["x.conf:1", "vaddr"], ["x.conf:3", "prot"], ["x.conf:5", "server"],
        ["x.conf:6", "rule"], ["x.conf:7", "rule"], ["x.conf:8", "minspareservers"],
        ["x.conf:9", "port"], ["x.conf:10", "maxclients"], ["x.conf:11", "nonsense"]]
    text = "\n".join(got)
    for words in ("did you mean 'port'?", "from 1 to 65535", "index 3", "10.0.0.9 is no server",
                  "the same as raddr", "above maxspareservers"):
        assert words in text


@pytest.mark.parametrize("line, words", [
    ("raddr = 10.0.0.300", "no IPv4 address"), ("port = 0", "out of range"),
    ("port = 80\nport = 81", "given twice"), ("startservers =", "value is missing"),
    ("datapath = fast", "write one of: auto, ebpf, nfqueue"), ("forward = nat", "direct, tunnel"),
    ("dbglevel = 7", "from 0 to 6"), ("server = 10.0.0.1", "listed twice"),
    ("rule = jpg$", "not 'ADDRESS PATTERN'"), ("rule = 10.0.0.1 a(?=b)", "does not compile"),
    ("redirectport = 80", "redirectport: 80 is the port that the FE itself listens on"),
    ("raddr = 10.0.0.9\nrule = 10.0.0.99 x", "no server"), ("fastpath = maybe", "on"),
    ("secret = /nonexistent", "openssl rand"), ("registration = no", "secret, open")])
def test_faults(tmp_path: Path, line: str, words: str) -> None:
    text = "\n".join(faults(tmp_path, FE + line + "\n"))
    assert words in text
    assert ": " in text and text.startswith("x.conf:")


@pytest.mark.parametrize("lines, words", [
    ("dregister = 1", "feaddr: must be specified"), ("dregister = 1", "rule: must be specified"),
    ("dregister = 1\nfeaddr = 10.0.0.100\nrule = x", "write the FE's real one"),
    ("dregister = 1\nfeaddr = 10.0.0.7\nrule = 10.0.0.2 x", "10.0.0.2 is not this BE"),
    ("dregister = 1\nfeaddr = 10.0.0.7\nrule = x(", "does not compile")])
def test_faults_of_a_registration(tmp_path: Path, lines: str, words: str) -> None:
    assert words in "\n".join(faults(tmp_path, BE + lines + "\n", "be"))


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    for text, mode, words in (("x" * 32, 0o644, "can be read by everybody"),
                              ("short\n", 0o600, "holds 5 bytes, too few"),
                              ("x" * 5000, 0o600, "more than 4096 bytes")):
        file.write_text(text)
        file.chmod(mode)
        assert words in faults(tmp_path, FE + f"secret = {file}\n")[0]
    file.write_text("x" * 32)
    for text, role in ((FE, "fe"), (BE, "be")):
        assert read(tmp_path, text + f"secret = {file}\n", role).secret == str(file)


def test_missing_keys(tmp_path: Path) -> None:
    assert "vaddr: must be specified" in faults(tmp_path, "port = 80\n")[0]
    got = "\n".join(faults(tmp_path, "port = 80\n", "be"))
    assert "vaddr: must" in got and "raddr: must" in got and "uaddr: must" in got


def test_warnings(tmp_path: Path) -> None:
    config = read(tmp_path, "vaddr = 10.0.0.100\nserver = 10.0.0.1\nrule = 10.0.0.1 jpg$\n"
                            "uaddr = 10.0.0.5\n")
    text = "\n".join(map(str, config.warnings))
    assert "x.conf:3: rule: warning: the rules do not cover every request" in text
    assert "x.conf:4: uaddr: warning: means nothing on the FE" in text
    config = read(tmp_path, FE + "port = 8080\n")
    assert "x.conf:4: redirectport: warning: its default 8080 is the port" in \
        "\n".join(map(str, config.warnings))
    be = read(tmp_path, BE + "feaddr = 10.0.0.7\nheadlimit = 1000\n", "be")
    text = "\n".join(map(str, be.warnings))
    assert "feaddr: warning: ignored, since dregister is 0" in text
    assert "headlimit: warning: means nothing on the BE" in text


def test_comments_and_hashes(tmp_path: Path) -> None:
    config = read(tmp_path, "# a\n vaddr=10.0.0.100 # here\nserver = 10.0.0.1 # one\n"
                            "rule = 10.0.0.1 a#b\nrule = 10.0.0.1 .*\n")
    assert config.vaddr == "10.0.0.100" and config.rule[0].pattern == "a#b"


def test_toml_faults(tmp_path: Path) -> None:
    got = faults(tmp_path, 'vaddr = "10.0.0.100"\nport = 99999\n\n[[server]]\naddress = "x"\n\n'
                           '[[rule]]\nserver = "10.0.0.1"\n', name="x.toml")
    assert [g.split(": ")[0] for g in got] == ["x.toml:2", "x.toml:4", "x.toml:7"]
    assert faults(tmp_path, "vaddr = \n", name="x.toml")[0].startswith("x.toml:1: TOML:")
    # on this the toml package stumbles instead of saying so
    got = faults(tmp_path, 'vaddr = "10.0.0.9"\nserver = "10.0.0.1"\n[[server]]\n', name="x.toml")
    assert got[-1].startswith("x.toml:3: TOML: ") and "mend" in got[-1], got


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load("fe", str(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"vaddr = \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load("fe", str(tmp_path / "latin"))


def test_a_kernel_without_the_function_is_named(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The probe asks the running kernel; here for a function that none has."""
    from tcpha.datapath import DatapathError, opening

    def ways(role: str, requested: str) -> tuple[list[tuple[str, bool]], str]:
        file = tmp_path / f"{role}.conf"
        file.write_text((FE if role == "fe" else BE) + f"datapath = {requested}\n")
        return opening.choose(role, load(role, str(file)))
    fast, socket_path, queues = ("ebpf", True), ("ebpf", False), ("nfqueue", False)
    for role in ("fe", "be"):
        found, why = ways(role, "auto")
        assert found == [fast, socket_path, queues] and "bpf_sk_assign_tcp_reqsk" in why
        assert ways(role, "ebpf")[0] == [fast] and ways(role, "nfqueue")[0] == [queues]
    monkeypatch.setattr(opening, "ADOPT_KFUNC", "bpf_no_such_function")
    with pytest.raises(DatapathError, match="the kernel has no bpf_no_such_function"):
        ways("be", "ebpf")
    assert ways("fe", "ebpf")[0] == [socket_path]
    found, why = ways("be", "auto")
    assert found == [queues] and why.startswith("the kernel has no bpf_no_such_function")
    assert opening.describe(queues, "auto", why).startswith("datapath nfqueue (auto): the kernel")


def test_command_checks_a_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.conf", tmp_path / "bad.conf"
    good.write_text(FE)
    bad.write_text(FE + "prot = 1\n")
    done = subprocess.run([BIN / "tcphafe", "-t", "-c", good], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([BIN / "tcphafe", "-t", "-c", bad], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{bad}:4: prot: unknown key; did you mean 'port'?")


@settings(max_examples=2000)
@given(st.lists(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"])
                        | st.sampled_from("\\\"'#=[]x"), min_size=1), max_size=2))
def test_patterns_survive_toml(patterns: list[str]) -> None:
    rules = [Rule("10.0.0.1", p) for p in patterns]
    document = toml.loads(to_toml(Config("fe", "x", {"rule": rules}, {"rule": 1})))
    assert [Rule(r["server"], r["pattern"]) for r in document["rule"]] == rules


LEGACY = FE + r"""raddr = 10.0.0.5
port = 8000
datapath = nfqueue
interface = eth0
interface = eth1
server = 10.0.0.2
rule = 10.0.0.2 ^/a\.b\\c"d'#e\x41[^/]+\d$
rule = 10.0.0.2 ä€
logfile = /var/log/x y.log
"""


@pytest.mark.parametrize("role, text", [
    ("fe", LEGACY), ("fe", (CONF / "tcphafe.conf").read_text()),
    ("fe", (CONF / "tcphafe.conf.detail").read_text()),
    ("be", (CONF / "tcphabe.conf").read_text()), ("be", (CONF / "tcphabe.conf.detail").read_text()),
    ("be", BE + "redirectport = 8080\nrule = jpg$\nrule = 10.0.0.1 .*\n")])
def test_legacy_becomes_toml(tmp_path: Path, role: str, text: str) -> None:
    old, new = tmp_path / "x.conf", tmp_path / "x.toml"
    old.write_text(text)
    done = subprocess.run([BIN / f"tcpha{role}", "-t", "--print-toml", "-c", old],
                          capture_output=True, text=True, check=True)
    new.write_text(done.stdout)
    before, after = load(role, str(old)), load(role, str(new))
    assert after.values == before.values and set(after.lines) == set(before.lines)
    old.write_text(text + "prot = 1\n")
    done = subprocess.run([BIN / f"tcpha{role}", "--print-toml", "-c", old],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def front_end(servers: int, *more: str) -> str:
    return "\n".join(["vaddr = 10.1.0.100", *more, *(
        f"server = 10.0.{n >> 8}.{n & 255}" for n in range(1, servers + 1)), ""])


@pytest.mark.parametrize("text, what", [
    (front_end(256), "2: server: 256 back ends are more than 255; remove some"),
    (front_end(205, "connperbe = 5"), "2: connperbe: 205 back ends with 5 control connections each "
                                      "make 1025, more than 1023; lower connperbe to 4")],
    ids=["back ends", "connections"])
def test_sums_are_checked(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "fe.conf"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load("fe", str(file))
    assert f"{file}:{what}" in str(error.value)


@pytest.mark.parametrize("text", [front_end(255), front_end(204, "connperbe = 5")],
                         ids=["back ends", "connections"])
def test_as_many_as_there_may_be(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fe.conf"
    file.write_text(text)
    load("fe", str(file))


def test_rules_that_no_registration_has_room_for(tmp_path: Path) -> None:
    file = tmp_path / "be.conf"
    file.write_text("vaddr = 10.0.0.100\nraddr = 10.0.0.2\nuaddr = 10.0.0.3\ndregister = 1\n"
                    "feaddr = 10.0.0.1\n" + f"rule = {'x' * 700}\n" * 93)
    with pytest.raises(ConfigError, match=r"98: rule: the rules make .* has room for 65488"):
        load("be", str(file))
    file.write_text(file.read_text().rpartition("rule")[0])
    load("be", str(file))
