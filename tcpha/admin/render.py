# SPDX-License-Identifier: GPL-2.0-or-later
"""Text for people."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def document(data: Any, indent: str = "") -> list[str]:
    """'key: value' lines, and tables for lists of objects."""
    if isinstance(data, list):
        return table(data, indent=indent)
    lines = []
    for key, value in data.items():
        if isinstance(value, dict | list) and value:
            lines += [f"{indent}{key}:", *document(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {'none' if value in ({}, [], None) else value}")
    return lines


def table(rows: list[Any], columns: Sequence[str] = (), indent: str = "") -> list[str]:
    """Aligned columns under their names. columns: show these even if there are no rows."""
    if not columns:
        if not rows:
            return [f"{indent}none"]
        if not isinstance(rows[0], dict):
            return [f"{indent}{row}" for row in rows]
        columns = list(rows[0])
    cells = [list(columns), *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return [indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells]
