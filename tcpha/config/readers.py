# SPDX-License-Identifier: GPL-2.0-or-later
"""The two readers. Each turns a file into (key, value, line) items and judges syntax only."""
from __future__ import annotations

import re
import tomllib
from typing import Any

import toml

from tcpha.config.model import ConfigError, Fault

Item = tuple[str, Any, int]


def read_legacy(file: str, content: str) -> tuple[list[Item], list[Fault]]:
    """TCPHA 0.1's 'key = value' lines. '#' begins a comment, but not inside a rule's pattern."""
    items: list[Item] = []
    faults: list[Fault] = []
    for number, raw in enumerate(content.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            faults.append(Fault(file, number, line.split()[0],
                                "not a 'key = value' line; write one setting a line"))
            continue
        if key != "rule":
            value = re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip()
        if not value:
            faults.append(Fault(file, number, key,
                                "a value is missing; write it after the equals sign"))
            continue
        items.append((key, value, number))
    return items, faults


def read_toml(file: str, content: str) -> tuple[list[Item], list[Fault]]:
    """TOML: the same keys, and tables for what has several parts."""
    try:
        document = toml.loads(content)
    except toml.TomlDecodeError as error:
        return [], [Fault(file, error.lineno, "TOML", f"{error.msg}; mend the syntax")]
    except Exception:  # what the toml package stumbles over inside: it promises no kind of error
        return [], [_stumbled(file, content)]
    lines = content.splitlines()
    items: list[Item] = []
    for key, value in document.items():
        places = _places(lines, key)
        values = value if isinstance(value, list) else [value]
        for n, one in enumerate(values):
            items.append((key, one, places[min(n, len(places) - 1)] if places else 1))
    return items, []


def _stumbled(file: str, content: str) -> Fault:
    """The fault in a text on which the toml package breaks, as the standard library sees it."""
    try:
        tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"(.*) \(at line (\d+), column \d+\)", str(error))
        if place:
            return Fault(file, int(place[2]), "TOML", f"{place[1]}; mend the syntax")
        return Fault(file, len(content.splitlines()), "TOML", f"{error}; mend the syntax")
    return Fault(file, 1, "TOML", "cannot be read; write it more plainly, a setting a line")


def _places(lines: list[str], key: str) -> list[int]:
    """Lines on which a key or the tables of that name stand; the toml library keeps none. What
    stands behind the first table's name is a key of a table."""
    table = re.compile(rf"\s*\[\[?\s*{re.escape(key)}\s*\]")
    plain = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
    tables = next((n for n, line in enumerate(lines)
                   if re.match(r"\s*\[\[?\s*\w+\s*\]", line)), len(lines))
    return [n + 1 for n, line in enumerate(lines)
            if table.match(line) or (n < tables and plain.match(line))]


def read(file: str) -> tuple[list[Item], list[Fault]]:
    """Read a file by its name: '.toml' is TOML, any other the legacy format."""
    try:
        with open(file, encoding="utf-8") as f:
            content = f.read()
    except PermissionError:
        raise ConfigError([Fault(file, 0, "file", "cannot be read by the user that we run as; "
                                 f"'chgrp tcpha {file}; chmod 640 {file}'")]) from None
    except OSError as error:
        raise ConfigError([Fault(file, 0, "file", f"cannot be read: {error.strerror}; "
                                                  "name another with -c")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Fault(file, 0, "file", f"is not UTF-8 text (byte {error.start}); "
                                                  "save it as UTF-8")]) from None
    return (read_toml if file.endswith(".toml") else read_legacy)(file, content)
