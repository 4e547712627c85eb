# SPDX-License-Identifier: GPL-2.0-or-later
"""A checked configuration as TOML."""
from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import toml

from tcpha.config.model import ANY, Config, Rule, Server


def to_toml(config: Config) -> str:
    """What the file sets, as TOML; loading it gives the same values."""
    document: dict[str, Any] = {}
    for name in config.lines:
        value = config.values[name]
        if isinstance(value, list) and value and isinstance(value[0], Server | Rule):
            value = [_table(item) for item in value]
        document[name] = value
    return str(toml.dumps(document, _Encoder()))


class _Encoder(toml.TomlEncoder):  # type: ignore[misc]
    """The library's own way with strings spoils a backslash before an x."""

    def __init__(self) -> None:
        super().__init__()
        self.dump_funcs[str] = _string


def _string(text: str) -> str:
    """A literal string where it can be one: patterns are full of backslashes."""
    return f"'{text}'" if "\\" in text and "'" not in text else json.dumps(text,
                                                                          ensure_ascii=False)


def _table(item: Server | Rule) -> dict[str, Any]:
    """A BE's rule names no server unless the file does."""
    return {k: v for k, v in asdict(item).items() if (k, v) != ("server", ANY)}
