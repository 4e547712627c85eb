# SPDX-License-Identifier: GPL-2.0-or-later
"""One typed model, two readers, one set of checks. load() is all that others need."""
from __future__ import annotations

import difflib
import os
from typing import Any

from tcpha._fast.match import Matcher, PatternError
from tcpha.config.checks import check
from tcpha.config.keys import KEYS, MEANINGLESS, PATHS, registered_rule
from tcpha.config.model import (
    ANY,
    HTTP,
    MAX_BACKENDS,
    MAX_SERVICES,
    Condition,
    Config,
    ConfigError,
    Fault,
    Group,
    Listen,
    Place,
    Rule,
    Server,
    Service,
    groups_of,
    patterns_of,
    too_many,
)
from tcpha.config.readers import read
from tcpha.config.writers import to_toml
from tcpha.control.secret import read_secret

__all__ = ["ANY", "HTTP", "MAX_BACKENDS", "MAX_SERVICES", "Condition", "Config", "ConfigError",
           "Fault", "Group", "Listen", "Place", "Rule", "Server", "Service", "groups_of", "load",
           "patterns_of", "registered_rule", "to_toml", "too_many"]


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
    at: dict[str, list[int]] = {name: [] for name, key in keys.items() if key.repeated}
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
            at[name].append(line)
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
    if role == "fe" and values["listen"] and "port" not in lines:
        values["port"] = values["listen"][0].port
    matcher = _compile(file, values["rule"], at["rule"], faults, known)
    config = Config(role, file, values, lines, warnings, directory, matcher)
    faults += check(config, at)
    if faults:
        raise ConfigError(sorted(faults + warnings, key=lambda f: f.line))
    for name in PATHS:
        if values[name]:
            values[name] = os.path.normpath(os.path.join(directory, values[name]))
    return config


def _compile(file: str, rules: list[Rule], at: list[int], faults: list[Fault],
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
    faults += [Fault(file, line, "rule", f"pattern '{rule.pattern}' does not compile: "
                                          f"{bad[rule.pattern]} Mend the expression.")
               for rule, line in zip(rules, at, strict=True) if rule.pattern in bad]
    return None if bad else matcher
