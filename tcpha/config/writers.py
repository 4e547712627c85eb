# SPDX-License-Identifier: GPL-2.0-or-later
"""A checked configuration as TOML."""
from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import Any

import toml

from tcpha.config.model import ANY, Config, Rule, Server


def to_toml(config: Config) -> str:
    """What the file sets, as TOML; loading it gives the same values. Raises ValueError if a text
    cannot be written so that the toml package reads it."""
    document: dict[str, Any] = {}
    for name in config.lines:
        value = config.values[name]
        if isinstance(value, list):
            value = [_table(item) if is_dataclass(item) else item for item in value]
            if len(value) == 1 and not isinstance(value[0], dict):
                value = value[0]
        document[name] = value
    return str(toml.dumps(document, _Encoder()))


class _Encoder(toml.TomlEncoder):  # type: ignore[misc]
    """The package's own way with strings spoils a backslash before an x."""

    def __init__(self) -> None:
        super().__init__()
        self.dump_funcs[str] = _string


def _string(text: str) -> str:
    """The first of TOML's kinds of strings that the package, which stumbles over some mixtures of
    quotes and backslashes, reads as it was meant."""
    plain = json.dumps(text, ensure_ascii=False)
    for form in (plain, f"'{text}'", f"'''{text}'''", f'""{plain}""'):
        try:
            if toml.loads(f"x = {form}\n") == {"x": text}:
                return form
        except (toml.TomlDecodeError, IndexError, ValueError):
            continue
    raise ValueError(f"no way to write {plain}")


def _table(item: Any) -> dict[str, Any]:
    """What stands for any, as where a BE's rule names no server, is left out."""
    table = asdict(item)
    if isinstance(item, Rule):
        del table["conditions"]
        table |= {condition.kind: condition.value for condition in item.conditions}
    for name in ("server", "address"):
        if not isinstance(item, Server) and table.get(name) == ANY:
            del table[name]
    return table
