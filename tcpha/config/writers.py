# SPDX-License-Identifier: GPL-2.0-or-later
"""A checked configuration as TOML."""
from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import toml

from tcpha.config.model import ANY, Config, Rule, Server


def to_toml(config: Config) -> str:
    """What the file sets, as TOML; loading it gives the same values. Raises ValueError if a text
    cannot be written so that the toml package reads it."""
    document: dict[str, Any] = {}
    for name in config.lines:
        value = config.values[name]
        if isinstance(value, list) and value and isinstance(value[0], Server | Rule):
            value = [_table(item) for item in value]
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


def _table(item: Server | Rule) -> dict[str, Any]:
    """A BE's rule names no server unless the file does."""
    return {k: v for k, v in asdict(item).items() if (k, v) != ("server", ANY)}
