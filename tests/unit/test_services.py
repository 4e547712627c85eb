# SPDX-License-Identifier: GPL-2.0-or-later
"""Several virtual addresses, ports and applications, and rules for some, in both formats."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcpha.config import (
    Condition,
    Config,
    ConfigError,
    Place,
    Rule,
    Service,
    registered_rule,
    to_toml,
)
from tcpha.config.keys import CONDITIONS, be_rule, fe_rule
from tests.support.configs import faults, read

FE = "vaddr = 10.0.0.100\nserver = 10.0.0.1 666\nrule = 10.0.0.1 .*\n"
BE = "vaddr = 10.0.0.100\nraddr = 10.0.0.1\nuaddr = 10.0.0.99\n"
MORE = "vaddr = 10.0.0.101\n"
SECOND = Condition("vaddr", "10.0.0.101")
EIGHTY = Condition("port", 80)


def again(config: Config, tmp_path: Path) -> Config:
    """It as TOML, and read."""
    return read(tmp_path, to_toml(config), config.role, "again.toml")


def test_one_of_each_as_ever(tmp_path: Path) -> None:
    fe = read(tmp_path, FE)
    assert (fe.vaddr, fe.vaddrs, fe.port, fe.ports) == (
        "10.0.0.100", ("10.0.0.100",), 80, (80,))
    assert fe.services == (Service("10.0.0.100", 80, "http"),)
    be = read(tmp_path, BE + "redirectaddr = 127.0.0.1\n", "be")
    assert (be.vaddr, be.vaddrs, be.port) == ("10.0.0.100", ("10.0.0.100",), 666)
    assert be.service == [] and be.places == (Place(0, "127.0.0.1", 80),)


@pytest.mark.parametrize("lines, ports", [
    ("", [80]), ("port = 8080\nredirectport = 1", [8080]), ("listen = 8000", [8000]),
    ("listen = 8000 http\nlisten = 80", [8000, 80]), ("listen = 8000\nport = 443", [443, 8000]),
    ("listen = 8000\nport = 443\nlisten = 443 http", [443, 8000])])
def test_ports_of_the_front_end(tmp_path: Path, lines: str, ports: list[int]) -> None:
    config = read(tmp_path, FE + MORE + lines + "\n")
    assert config.port == ports[0] and config.ports == tuple(ports)
    assert config.services == tuple(Service(vaddr, port, "http") for vaddr in
                                    ("10.0.0.100", "10.0.0.101") for port in ports)
    assert again(config, tmp_path).services == config.services


def test_places_of_the_back_end(tmp_path: Path) -> None:
    config = read(tmp_path, BE + MORE + "redirectport = 8080\nservice = 443 8443\n"
                                 "service = 8081 127.0.0.1:81\nservice = 82 0.0.0.0:83 # here\n",
                  "be")
    assert config.vaddrs == ("10.0.0.100", "10.0.0.101")
    assert config.service == [Place(443, "0.0.0.0", 8443), Place(8081, "127.0.0.1", 81),
                              Place(82, "0.0.0.0", 83)]
    assert config.places == (Place(0, "0.0.0.0", 8080), *config.service)
    assert again(config, tmp_path).places == config.places


def test_toml_has_values_lists_and_tables(tmp_path: Path) -> None:
    text = """vaddr = ["10.0.0.100", "10.0.0.101"]
listen = [8000, 8001]
[[server]]
address = "10.0.0.1"
port = 667
[[listen]]
"""
    with pytest.raises(ConfigError):  # a key and tables of one name
        read(tmp_path, text, name="x.toml")
    fe = read(tmp_path, text.rpartition("[[")[0] + '[[rule]]\nserver = "10.0.0.1"\nport = 8001\n'
              'vaddr = "10.0.0.101"\npattern = "x"\n', name="x.toml")
    assert fe.ports == (8000, 8001) and fe.rule == [
        Rule("10.0.0.1", "x", (Condition("port", 8001), SECOND))]
    fe = read(tmp_path, 'vaddr = "10.0.0.100"\n[[listen]]\nport = 8000\n[[listen]]\nport = 8001\n'
                        'protocol = "http"\n', name="x.toml")
    assert fe.ports == (8000, 8001)
    be = read(tmp_path, 'vaddr = ["10.0.0.100"]\nraddr = "10.0.0.1"\nuaddr = "10.0.0.9"\n'
                        '[[service]]\nvport = 443\nport = 8443\n'
                        '[[service]]\nvport = 81\naddress = "127.0.0.1"\nport = 82\n'
                        '[[rule]]\nport = 443\npattern = "x"\n', "be", "x.toml")
    assert be.service == [Place(443, "0.0.0.0", 8443), Place(81, "127.0.0.1", 82)]
    assert be.rule == [Rule("0.0.0.0", "x", (Condition("port", 443),))]


def test_faults_in_toml_name_the_line(tmp_path: Path) -> None:
    """A key inside a table is not the one of that name."""
    text = ('raddr = "10.0.0.7"\nvaddr = ["10.0.0.100", "10.0.0.7"]\n\n[[server]]\n'
            'address = "10.0.0.1"\n\n[[rule]]\nserver = "10.0.0.1"\nvaddr = "10.0.0.100"\n'
            'pattern = ".*"\n')
    assert faults(tmp_path, text, name="x.toml")[0].startswith("x.toml:2: vaddr: the same as raddr")


@pytest.mark.parametrize("lines, words", [
    ("vaddr = 10.0.0.100", "4: vaddr: 10.0.0.100 is listed twice; remove one"),
    ("".join(f"vaddr = 10.0.1.{n}\n" for n in range(8)),
     "11: vaddr: 9 virtual addresses are more than 8; remove some"),
    (MORE + "raddr = 10.0.0.101", "4: vaddr: the same as raddr"),
    (MORE + "server = 10.0.0.101", "5: server: is the virtual address"),
    ("listen = 8000\nlisten = 8000", "5: listen: 8000 is listed twice; remove one"),
    ("listen = 8000 tls", "4: listen: 'tls' is not known; write one of: http"),
    ("listen = 0", "4: listen: port 0 is out of range"),
    ("listen = 80 http 3", "4: listen: '80 http 3' is not 'PORT [PROTOCOL]', as in 8000 http"),
    ("listen = http", "4: listen: 'http' is no port"),
    (MORE + "".join(f"listen = {n}\n" for n in range(100, 133)),
     "37: listen: 2 virtual addresses with 33 ports each make 66 services, more than 64"),
    ("listen = 81\nredirectport = 81", "5: redirectport: 81 is the port that the FE itself"),
    (MORE + "listen = 81\nredirectaddr = 10.0.0.101\nredirectport = 81", "7: redirectport: 81"),
    ("rule = 10.0.0.1 port=81 x",
     "4: rule: port=81: we have 80; write one of these, or add 'listen = 80' and 'listen = 81'"),
    ("listen = 82\nrule = 10.0.0.1 port=81 x",
     "5: rule: port=81: we have 82; write one of these, or add 'listen = 81'"),
    (MORE + "rule = 10.0.0.1 vaddr=10.0.0.102 x", "5: rule: vaddr=10.0.0.102: we have 10.0.0.100, "
                                                  "10.0.0.101; write one of these, or add 'vaddr"),
    ("rule = 10.0.0.1 vaddr=10.0.0 x", "4: rule: '10.0.0' is no IPv4 address"),
    ("rule = 10.0.0.1 vaddr=fe80::1 x", "4: rule: 'fe80::1' is no IPv4 address"),
    ("rule = 10.0.0.1 port=65536 x", "4: rule: port 65536 is out of range"),
    ("rule = 10.0.0.1 port=80 port=81 x", "4: rule: has two conditions 'port='"),
    ("rule = 10.0.0.1 port=80 x(", "4: rule: pattern 'x(' does not compile")])
def test_faults_of_the_front_end(tmp_path: Path, lines: str, words: str) -> None:
    got = faults(tmp_path, FE + lines + "\n")
    assert len(got) == 1 and got[0].startswith(f"x.conf:{words}")


@pytest.mark.parametrize("lines, words", [
    ("vaddr = 10.0.0.100", "4: vaddr: 10.0.0.100 is listed twice; remove one"),
    ("vaddr = 10.0.0.99", "4: vaddr: the same as uaddr"),
    ("".join(f"vaddr = 10.0.1.{n}\n" for n in range(8)), "11: vaddr: 9 virtual addresses"),
    ("service = 80 81\nservice = 443 444\nservice = 80 82",
     "6: service: port 80 has a place of its own already, on line 4; remove one"),
    ("service = 80", "4: service: '80' is not 'PORT [ADDRESS:]PORT', as in 443 127.0.0.1:8443"),
    ("service = 80 here:81", "4: service: 'here' is no IPv4 address"),
    ("service = 0 81", "4: service: port 0 is out of range"),
    ("".join(f"service = {n} 80\n" for n in range(100, 165)), "68: service: 65 of them are more"),
    (MORE + "dregister = 1\nfeaddr = 10.0.0.101\nrule = x", "6: feaddr: is the virtual address"),
    ("dregister = 1\nfeaddr = 10.0.0.7\nrule = vaddr=10.0.0.101 x", "6: rule: vaddr=10.0.0.101"),
    ("dregister = 1\nfeaddr = 10.0.0.7\nrule = 10.0.0.2 port=81 x", "6: rule: 10.0.0.2 is not")])
def test_faults_of_the_back_end(tmp_path: Path, lines: str, words: str) -> None:
    got = faults(tmp_path, BE + lines + "\n", "be")
    assert len(got) == 1 and got[0].startswith(f"x.conf:{words}")


def test_as_many_as_there_may_be(tmp_path: Path) -> None:
    vaddrs = "".join(f"vaddr = 10.0.1.{n}\n" for n in range(7))
    assert len(read(tmp_path, FE + vaddrs + "".join(
        f"listen = {n}\n" for n in range(100, 108))).services) == 64
    assert len(read(tmp_path, BE + vaddrs + "".join(
        f"service = {n} 80\n" for n in range(100, 164)), "be").places) == 65


def test_warnings(tmp_path: Path) -> None:
    def warned(text: str, role: str = "fe") -> str:
        return "\n".join(map(str, read(tmp_path, text, role).warnings))
    assert warned(FE + MORE + "listen = 81\n") == ""
    assert "x.conf:5: redirectport: warning: its default 8080 is the port" in warned(
        FE + "port = 80\nlisten = 8080\n")
    # somebody has to take each request that comes to any of the services
    servers = ("vaddr = 10.0.0.100\nvaddr = 10.0.0.101\nserver = 10.0.0.1\nlisten = 80\n"
               "listen = 81\n")
    assert warned(servers + "rule = 10.0.0.1 port=80 .*\nrule = 10.0.0.1 port=81 .*\n") == ""
    assert "x.conf:7: rule: warning: the rules do not cover every request to 10.0.0.101:80," in \
        warned(servers + "rule = 10.0.0.1 port=81 .*\nrule = 10.0.0.1 vaddr=10.0.0.100 .*\n")
    assert "the rules do not cover every request, and" in warned(
        servers + "rule = 10.0.0.1 x\nrule = 10.0.0.1 port=80 x\n")
    for role, text, line in (("fe", FE, "service = 80 81\n"), ("be", BE, "listen = 80\n")):
        assert "warning: means nothing on the" in warned(text + line, role)


@pytest.mark.parametrize("words, conditions, pattern", [
    ("jpg$", (), "jpg$"), ("port=80 jpg$", (EIGHTY,), "jpg$"), ("port=80", (), "port=80"),
    ("port=80 port=80", (EIGHTY,), "port=80"), ("port=8.* x", (), "port=8.* x"),
    ("port= 80", (), "port= 80"), ("Port=80 x", (), "Port=80 x"), ("port=-1 x", (), "port=-1 x"),
    ("vaddr=10.0.0.101 port=80  a b", (SECOND, EIGHTY), "a b"), ("x port=80 y", (), "x port=80 y"),
    ("vaddr=1.* x", (), "vaddr=1.* x"), ("vaddr=here x", (), "vaddr=here x"),
    ("a=b port=80 x", (), "a=b port=80 x")])
def test_conditions_stand_before_the_pattern(
        words: str, conditions: tuple[Condition, ...], pattern: str) -> None:
    assert fe_rule(f"10.0.0.1 {words}") == Rule("10.0.0.1", pattern, conditions)
    assert be_rule(words) == Rule("0.0.0.0", pattern, conditions)
    assert be_rule(f"10.0.0.1 {words}") == Rule("10.0.0.1", pattern, conditions)
    assert registered_rule("10.0.0.1", words) == Rule("10.0.0.1", pattern, conditions)


def test_a_rule_shows_itself() -> None:
    rule = Rule("10.0.0.1", "jpg$", (EIGHTY, SECOND))
    assert str(rule) == "10.0.0.1 port=80 vaddr=10.0.0.101 jpg$"
    assert str(Rule("0.0.0.0", "jpg$")) == "jpg$"
    assert len({rule, Rule("10.0.0.1", "jpg$", (EIGHTY, SECOND)), Rule("10.0.0.1", "jpg$")}) == 2
    assert rule.holds_at(Service("10.0.0.101", 80, "http"))
    assert not rule.holds_at(Service("10.0.0.101", 81, "http"))
    assert not rule.holds_at(Service("10.0.0.100", 80, "http"))


@pytest.mark.parametrize("table", [
    {"pattern": "port=80 x"}, {"pattern": " x", "port": 80}, {"pattern": "vaddr=10.0.0.1 x"}])
def test_a_pattern_that_could_not_be_told_is_refused(table: dict[str, object]) -> None:
    """In TOML, conditions and pattern are apart. A back end writes them as one."""
    with pytest.raises(ValueError, match="would read"):
        be_rule(table)
    assert fe_rule(table | {"server": "10.0.0.1"}).pattern == table["pattern"]


@pytest.mark.parametrize("table", [{"pattern": "x", "host": "y"}, {"port": 80}])
def test_unknown_keys_of_a_rule(table: dict[str, object]) -> None:
    for reader in (be_rule, fe_rule):
        with pytest.raises(ValueError, match=r"a \[\[rule\]\] table has the key.* port and vaddr"):
            reader(table | {"server": "10.0.0.1"})


ADDRESSES = st.ip_addresses(v=4).map(str)
PORTS = st.integers(1, 65535)
WORDS = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"])
                | st.sampled_from("\\\"'#=[] x"), min_size=1)
PATTERNS = WORDS.map(str.strip).filter(bool)
CONDITION_LISTS = st.fixed_dictionaries({}, optional={"port": PORTS, "vaddr": ADDRESSES}).map(
    lambda found: tuple(Condition(kind, value) for kind, value in found.items()))
BE_RULES = st.builds(Rule, st.just("0.0.0.0") | ADDRESSES, PATTERNS, CONDITION_LISTS)


@settings(max_examples=500)
@given(st.lists(BE_RULES, max_size=3))
@example([Rule("10.0.0.1", "0.0.0.0")])
def test_rules_survive_toml(rules: list[Rule]) -> None:
    import toml
    document = toml.loads(to_toml(Config("fe", "x", {"rule": rules}, {"rule": 1})))
    assert [fe_rule({"server": "0.0.0.0"} | table) for table in document["rule"]] == rules


@settings(max_examples=500)
@given(ADDRESSES, st.lists(PATTERNS, min_size=1, max_size=3).map(" ".join))
def test_what_is_no_condition_is_the_pattern(who: str, words: str) -> None:
    """As in TCPHA 0.1, where all behind the address was."""
    if not words.startswith(tuple(f"{kind}=" for kind in CONDITIONS)):
        assert fe_rule(f"{who} {words}") == Rule(who, words)


@settings(max_examples=500)
@given(BE_RULES)
def test_rules_as_text(rule: Rule) -> None:
    """What a file or a back end that registers says is what the front end makes of it, unless the
    pattern itself begins with a condition."""
    if registered_rule("0.0.0.0", rule.pattern).conditions:
        return
    assert registered_rule(rule.server, rule.text) == rule
    assert fe_rule(f"{rule.server} {rule.text}") == rule
    if rule.server != "0.0.0.0":
        assert be_rule(str(rule)) == rule


@settings(max_examples=100, deadline=None)
@given(st.lists(ADDRESSES, min_size=1, max_size=8, unique=True),
       st.lists(PORTS, max_size=8, unique=True), st.none() | PORTS,
       st.lists(st.builds(Place, PORTS, ADDRESSES, PORTS), max_size=8,
                unique_by=lambda place: place.vport))
def test_services_survive_toml(
        tmp_path_factory: pytest.TempPathFactory, vaddrs: list[str], listen: list[int],
        port: int | None, places: list[Place]) -> None:
    tmp_path = tmp_path_factory.mktemp("services")
    text = "".join(f"vaddr = {vaddr}\n" for vaddr in vaddrs)
    lines = [f"listen = {number}" for number in listen] + [f"port = {port}"] * bool(port)
    try:
        fe = read(tmp_path, text + "redirectaddr = 127.0.0.1\n" + "\n".join(lines))
        be = read(tmp_path, text + "raddr = 10.0.0.1\nuaddr = 10.0.0.2\n" + "".join(
            f"service = {p.vport} {p.address}:{p.port}\n" for p in places), "be")
    except ConfigError as error:
        assert set(vaddrs) & {"10.0.0.1", "10.0.0.2", "0.0.0.0"} or "services" in str(error)
        return
    ports = list(dict.fromkeys(([port] if port else []) + listen)) or [80]
    assert fe.services == tuple(Service(v, p, "http") for v in vaddrs for p in ports)
    assert be.places == (Place(0, "0.0.0.0", 80), *places)
    assert again(fe, tmp_path).services == fe.services
    assert again(be, tmp_path).places == be.places


def test_the_order_of_conditions_means_nothing() -> None:
    one, other = (fe_rule(f"10.0.0.1 {conditions} x").group
                  for conditions in ("port=80 vaddr=10.0.0.9", "vaddr=10.0.0.9 port=80"))
    assert one == other
