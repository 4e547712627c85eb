# SPDX-License-Identifier: GPL-2.0-or-later
"""One typed model, two readers, one set of checks. load() is all that others need."""
from __future__ import annotations

import difflib
import os
from typing import Any

from tcpha._fast.match import Matcher, PatternError
from tcpha.config.keys import KEYS, MEANINGLESS, PATHS
from tcpha.config.model import (
    ANY,
    MAX_BACKENDS,
    Config,
    ConfigError,
    Fault,
    Rule,
    Server,
    patterns_of,
    too_many,
)
from tcpha.config.readers import read
from tcpha.config.writers import to_toml
from tcpha.control.hello import MOST_HELLO, new_instance, registration
from tcpha.control.secret import read_secret

__all__ = ["ANY", "MAX_BACKENDS", "Config", "ConfigError", "Fault", "Rule", "Server", "load",
           "patterns_of", "to_toml", "too_many"]


def load(role: str, file: str, directory: str | None = None,
         known: Matcher | None = None) -> Config:
    """Read and check a file for a role ('fe' or 'be'). Paths in it are taken as relative to
    'directory', or else to the current one. Raises ConfigError with all faults. known: of an
    earlier file's patterns, which are not compiled again if this one has the same."""
    directory = directory or os.getcwd()
    items, faults = read(file)
    keys = KEYS[role]
    values: dict[str, Any] = {name: [] if key.repeated else key.default
                              for name, key in keys.items()}
    lines: dict[str, int] = {}
    places: dict[str, list[int]] = {name: [] for name, key in keys.items() if key.repeated}
    warnings: list[Fault] = []
    for name, raw, line in items:
        key = keys.get(name)
        if key is None:
            other = KEYS["be" if role == "fe" else "fe"]
            if name in other:
                warnings.append(Fault(file, line, name, f"means nothing on the {role.upper()}; "
                                                        "remove it", True))
                continue
            near = difflib.get_close_matches(name, keys, 1, 0.5)
            faults.append(Fault(file, line, name, "unknown key; " + (
                f"did you mean '{near[0]}'?" if near else "see the .detail file for all keys")))
            continue
        if name in lines and not key.repeated:
            faults.append(Fault(file, line, name, f"given twice, first on line {lines[name]}; "
                                                  "remove one"))
            continue
        lines.setdefault(name, line)
        try:
            value = key.read(raw)
        except ValueError as error:
            faults.append(Fault(file, line, name, str(error)))
            continue
        if name in MEANINGLESS[role]:
            warnings.append(Fault(file, line, name, f"means nothing on the {role.upper()}; "
                                                    "remove it", True))
        if key.repeated:
            values[name].append(value)
            places[name].append(line)
        else:
            values[name] = value
    for name, key in keys.items():
        if key.required and name not in lines:
            faults.append(Fault(file, 1, name, "must be specified; add a line "
                                               f"'{name} = x.x.x.x'"))
    if values["secret"]:
        try:
            read_secret(os.path.join(directory, values["secret"]))
        except ValueError as error:
            faults.append(Fault(file, lines["secret"], "secret", str(error)))
    matcher = _compile(file, values["rule"], places["rule"], faults, known)
    _check(role, file, values, matcher, lines, places, faults, warnings)
    if faults:
        raise ConfigError(sorted(faults + warnings, key=lambda f: f.line))
    for name in PATHS:
        if values[name]:
            values[name] = os.path.normpath(os.path.join(directory, values[name]))
    return Config(role, file, values, lines, warnings, directory, matcher)


def _check(role: str, file: str, v: dict[str, Any], matcher: Matcher | None, lines: dict[str, int],
           places: dict[str, list[int]], faults: list[Fault], warnings: list[Fault]) -> None:
    """What needs more than one key to judge."""
    def fault(key: str, text: str) -> None:
        faults.append(Fault(file, lines.get(key, 1), key, text))

    if v["minspareservers"] > v["maxspareservers"]:
        fault("minspareservers" if "minspareservers" in lines else "maxspareservers",
              f"minspareservers {v['minspareservers']} is above maxspareservers "
              f"{v['maxspareservers']}; lower it or raise the other")
    for key in ("raddr", "uaddr"):
        if v["vaddr"] is not None and v.get(key) == v["vaddr"]:
            fault("vaddr", f"the same as {key}; the virtual address is one of its own, shared by "
                           "the cluster")
    if role == "be":
        if v["uaddr"] is not None and v["uaddr"] == v["raddr"]:
            fault("uaddr", "the same as raddr; name an address that the cluster does not use")
        for key in ("feaddr", "feport", "rule"):
            if key in lines and not v["dregister"]:
                warnings.append(Fault(file, lines[key], key, "ignored, since dregister is 0", True))
            elif v["dregister"] and key != "feport" and key not in lines:
                faults.append(Fault(file, lines["dregister"], key, "must be specified, since "
                                                                   "dregister is 1"))
        if v["feaddr"] is not None and v["feaddr"] == v["vaddr"]:
            fault("feaddr", "is the virtual address; write the FE's real one")
        for n, rule in enumerate(v["rule"]):
            if rule.server not in (ANY, v["raddr"]):
                faults.append(Fault(file, places["rule"][n], "rule", f"{rule.server} is not this "
                                    "BE; write 'rule = PATTERN'"))
        if v["dregister"] and v["vaddr"] is not None:
            patterns = [rule.pattern for rule in v["rule"]]
            size = len(registration(v["vaddr"], v["port"], patterns, new_instance()).body())
            if size > MOST_HELLO:
                faults.append(Fault(file, places["rule"][-1], "rule", f"the rules make {size} "
                                    f"bytes, and a registration has room for {MOST_HELLO}; join "
                                    "some with '|', or write them on the FE"))
        return

    if v["redirectport"] == v["port"] and v["redirectaddr"] in (ANY, v["vaddr"]):
        text = f"{v['port']} is the port that the FE itself listens on; write the one of the " \
               "Local Node's server"
        if "redirectport" in lines:
            fault("redirectport", text)
        else:
            warnings.append(Fault(file, lines["port"], "redirectport",
                                  f"its default {text}, or there is no Local Node", True))
    servers: list[Server] = v["server"]
    known = {s.address for s in servers}
    own = {v["vaddr"], v["raddr"]} - {ANY}
    for n, server in enumerate(servers):
        line = places["server"][n]
        if server.address in [s.address for s in servers[:n]]:
            faults.append(Fault(file, line, "server", f"{server.address} is listed twice; "
                                                      "remove one"))
        if server.address == v["vaddr"]:
            faults.append(Fault(file, line, "server", "is the virtual address; write the BE's "
                                                      "real one"))
    if trouble := too_many(len(servers), v["connperbe"]):
        fault("connperbe" if len(servers) <= MAX_BACKENDS and "connperbe" in lines else "server",
              trouble)
    if "server" not in lines and not v["secret"] and v["registration"] == "secret":
        warnings.append(Fault(file, 1, "server", "no back end is listed: every request goes to the "
                                                 "Local Node; add 'server = ADDRESS PORT'", True))
    for n, rule in enumerate(v["rule"]):
        if rule.server not in known | own:
            near = difflib.get_close_matches(rule.server, sorted(known), 1, 0.7)
            faults.append(Fault(
                file, places["rule"][n], "rule", f"{rule.server} is no server; " +
                (f"did you mean {near[0]}?" if near else
                 f"add a line 'server = {rule.server} PORT'")))
    if matcher is not None and servers:
        _check_cover(file, matcher, places["rule"], warnings)


def _compile(file: str, rules: list[Rule], places: list[int], faults: list[Fault],
             known: Matcher | None) -> Matcher | None:
    """The rules' patterns; None if one of them does not compile."""
    left = patterns_of(rules)
    if known is not None and known.patterns == left:
        return known
    bad: dict[str, PatternError] = {}
    while True:
        try:
            matcher = Matcher(left)
            break
        except PatternError as error:
            bad[left.pop(max(error.pattern, 0))] = error
    faults += [Fault(file, place, "rule", f"pattern '{rule.pattern}' does not compile: "
                                          f"{bad[rule.pattern]} Mend the expression.")
               for rule, place in zip(rules, places, strict=True) if rule.pattern in bad]
    return None if bad else matcher


def _check_cover(file: str, matcher: Matcher, places: list[int], warnings: list[Fault]) -> None:
    """The seed: 'The rules must contain all the cases'. Odd targets stand for all of them."""
    samples = [b"/", b"/~qz.7_/Zx-0?y=%41&k", b"*", b"http://q.invalid:1/w"]
    if not all(matcher.matches(sample) for sample in samples):
        warnings.append(Fault(
            file, places[-1] if places else 1, "rule", "the rules do not cover every request, and "
            "what none matches goes to the Local Node, or is answered 503; add a last one 'rule = "
            "x.x.x.x .*'", True))
