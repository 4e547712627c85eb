# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of both roles. Names and defaults of TCPHA 0.1 hold exactly."""
from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tcpha.config.model import ANY, PROTOCOLS, Condition, Key, Listen, Place, Rule, Server

BE_PORT = 666


def address(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Address(str(value)))
    except ValueError:
        raise ValueError(f"'{value}' is no IPv4 address; write four numbers from 0 to 255, "
                         "as in 192.168.1.36") from None


def integer(low: int, high: int, what: str = "number") -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]+", str(value)):
            raise ValueError(f"'{value}' is no {what}; write one from {low} to {high}")
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"{what} {number} is out of range; write one from {low} to {high}")
        return number
    return read


def choice(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value is True:
            value = "on"
        elif value is False:
            value = "off"
        if value not in words:
            raise ValueError(f"'{value}' is not known; write one of: {', '.join(words)}")
        return str(value)
    return read


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a value is missing; write it after the equals sign")
    return value


def endpoint(value: Any) -> str:
    """'ADDRESS:PORT', or 'PORT' of 127.0.0.1."""
    where, _, number = str(value).rpartition(":")
    if not number:
        raise ValueError(f"'{value}' is not 'ADDRESS:PORT', as in 127.0.0.1:9110")
    return f"{address(where or '127.0.0.1')}:{port(number)}"


def server(value: Any) -> Server:
    """'ADDRESS [PORT]', or a TOML table with the keys address and port."""
    if isinstance(value, dict):
        unknown = set(value) - {"address", "port"}
        if unknown or "address" not in value:
            raise ValueError("a [[server]] table has the keys address and port (default 666)")
        parts = [value["address"], *([value["port"]] if "port" in value else [])]
    else:
        parts = str(value).split()
        if not 1 <= len(parts) <= 2:
            raise ValueError(f"'{value}' is not 'ADDRESS [PORT]', as in 192.168.1.33 666")
    return Server(address(parts[0]), port(parts[1]) if len(parts) > 1 else BE_PORT)


def listen(value: Any) -> Listen:
    """'PORT [PROTOCOL]', or a TOML table with the keys port and protocol."""
    if isinstance(value, dict):
        if not {"port"} <= set(value) <= {"port", "protocol"}:
            raise ValueError(f"a [[listen]] table has the keys port and protocol (default "
                             f"{PROTOCOLS[0]})")
        parts = [value["port"], *([value["protocol"]] if "protocol" in value else [])]
    else:
        parts = str(value).split()
        if not 1 <= len(parts) <= 2:
            raise ValueError(f"'{value}' is not 'PORT [PROTOCOL]', as in 8000 {PROTOCOLS[0]}")
    return Listen(port(parts[0]), protocol(parts[1]) if len(parts) > 1 else PROTOCOLS[0])


def service(value: Any) -> Place:
    """'PORT [ADDRESS:]PORT', or a TOML table with the keys vport, address and port."""
    if isinstance(value, dict):
        if not {"vport", "port"} <= set(value) <= {"vport", "address", "port"}:
            raise ValueError("a [[service]] table has the keys vport, port, and address (default: "
                             "the virtual address itself)")
        return Place(port(value["vport"]), address(value.get("address", ANY)), port(value["port"]))
    parts = str(value).split()
    if len(parts) != 2:
        raise ValueError(f"'{value}' is not 'PORT [ADDRESS:]PORT', as in 443 127.0.0.1:8443")
    where, _, number = parts[1].rpartition(":")
    return Place(port(parts[0]), address(where or ANY), port(number))


port = integer(1, 65535, "port")
protocol = choice(*PROTOCOLS)


@dataclass(frozen=True)
class Kind:
    """Of conditions. like: what a value looks like; another word belongs to the pattern."""

    like: str
    read: Callable[[Any], str | int]


# A condition is 'NAME=VALUE' before a rule's pattern, and a key of a [[rule]] table.
CONDITIONS = {
    "port": Kind(r"[0-9]+", port),
    "vaddr": Kind(r"[0-9]+(?:\.[0-9]+)+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*", address),
}


def _read_rule(who: str, words: str) -> Rule:
    """A rule by what stands behind its server: '[CONDITION ...] PATTERN'. The last word is never a
    condition."""
    found: dict[str, Condition] = {}
    while match := re.match(r"(\w+)=(\S+)\s+(?=\S)", words):
        name, value = match.groups()
        kind = CONDITIONS.get(name)
        if kind is None or not re.fullmatch(kind.like, value):
            break
        if name in found:
            raise ValueError(f"has two conditions '{name}='; write a rule for each")
        found[name] = Condition(name, kind.read(value))
        words = words[match.end():]
    return Rule(who, words, tuple(found.values()))


def _table_rule(who: str, table: dict[str, Any]) -> Rule:
    return Rule(who, text(table["pattern"]), tuple(
        Condition(name, CONDITIONS[name].read(value)) for name, value in table.items()
        if name in CONDITIONS))


def registered_rule(who: str, words: str) -> Rule:
    """What a back end says of a rule of its own (Rule.text) as it registers."""
    return _read_rule(who, text(words))


def fe_rule(value: Any) -> Rule:
    """'ADDRESS [CONDITION ...] PATTERN', or a TOML table with the keys server, pattern and those of
    CONDITIONS."""
    if isinstance(value, dict):
        if not {"server", "pattern"} <= set(value) <= {"server", "pattern", *CONDITIONS}:
            raise ValueError("a [[rule]] table has the keys server and pattern, and may have "
                             f"{' and '.join(CONDITIONS)}")
        return _table_rule(address(value["server"]), value)
    parts = str(value).split(None, 1)
    if len(parts) != 2:
        raise ValueError(f"'{value}' is not 'ADDRESS PATTERN', as in 192.168.1.38 jpg$")
    return _read_rule(address(parts[0]), parts[1])


def be_rule(value: Any) -> Rule:
    """'[CONDITION ...] PATTERN' or 'OWN-ADDRESS [CONDITION ...] PATTERN'."""
    if isinstance(value, dict):
        if not {"pattern"} <= set(value) <= {"server", "pattern", *CONDITIONS}:
            raise ValueError("a [[rule]] table has the key pattern, and may have "
                             f"{' and '.join(CONDITIONS)}")
        rule = _table_rule(address(value.get("server", ANY)), value)
        if registered_rule(rule.server, rule.text) != rule:
            raise ValueError(f"the front end would read '{rule.text}' otherwise; write the pattern "
                             "without a space at its beginning, and [=] for '=' in its first word")
        return rule
    parts = str(value).split(None, 1)
    if len(parts) == 2:
        try:
            who = address(parts[0])
        except ValueError:
            pass
        else:
            return _read_rule(who, parts[1])
    return registered_rule(ANY, value)


SHARED = {
    "vaddr": Key(address, required=True, repeated=True),
    "startservers": Key(integer(1, 1000), 5),
    "maxspareservers": Key(integer(1, 1000), 5),
    "minspareservers": Key(integer(1, 1000), 2),
    "datapath": Key(choice("auto", "ebpf", "nfqueue"), "auto"),
    "forward": Key(choice("direct", "tunnel"), "direct"),
    "fastpath": Key(choice("on", "off"), "on"),
    "secret": Key(text),
    "dbglevel": Key(integer(0, 6, "level"), 0),
    "logfile": Key(text),
    "accesslog": Key(text),
    "headlimit": Key(integer(256, 65536), 16384),
    "headtimeout": Key(integer(1, 3600), 15),
    "idletimeout": Key(integer(1, 10 ** 6), 900),
    "maxflows": Key(integer(64, 16 * 2 ** 20), 262144),
    "queuelen": Key(integer(16, 2 ** 20), 8192),
    "admin": Key(endpoint),
    "adminname": Key(text, repeated=True),
    "interface": Key(text, repeated=True),
}

PATHS = ("logfile", "accesslog", "secret")  # relative to where the daemon was started

KEYS: dict[str, dict[str, Key]] = {
    "fe": SHARED | {
        "raddr": Key(address, ANY),
        "port": Key(port, 80),
        "listen": Key(listen, repeated=True),
        "maxclients": Key(integer(1, 65535), 256),
        "connperbe": Key(integer(1, 16), 2),
        "announce": Key(choice("on", "off"), "on"),
        "verdictcache": Key(choice("on", "off"), "on"),
        "redirectaddr": Key(address, ANY),
        "redirectport": Key(port, 8080),
        "dtcinterval": Key(integer(0, 3600), 5),
        "registration": Key(choice("secret", "open"), "secret"),
        "server": Key(server, repeated=True),
        "rule": Key(fe_rule, repeated=True),
    },
    "be": SHARED | {
        "raddr": Key(address, required=True),
        "uaddr": Key(address, required=True),
        "port": Key(port, BE_PORT),
        "maxclients": Key(integer(1, 2 ** 24), 256),
        "redirectaddr": Key(address, ANY),
        "redirectport": Key(port, 80),
        "service": Key(service, repeated=True),
        "dtcinterval": Key(integer(0, 3600), 0),
        "dregister": Key(integer(0, 1), 0),
        "feaddr": Key(address),
        "feport": Key(port, 80),
        "rule": Key(be_rule, repeated=True),
    },
}

# Keys that one role accepts but has no use for.
MEANINGLESS = {
    "fe": set[str](),
    "be": {"accesslog", "forward", "headlimit", "headtimeout", "idletimeout", "maxflows",
           "dtcinterval"},
}
