# SPDX-License-Identifier: GPL-2.0-or-later
"""Text for people."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
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
    widths = _widths(cells)
    return [indent + _line(row, widths) for row in cells]


def _widths(cells: list[list[str]]) -> list[int]:
    return [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()


def rows(first: list[dict[str, Any]], rest: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The same of a table that is never here as a whole. Its first rows say how wide columns are;
    what is longer pushes the rest of its row."""
    columns = list(first[0])
    widths = _widths([columns, *([str(v) for v in row.values()] for row in first)])
    yield _line(columns, widths)
    for row in chain(first, rest):
        yield _line([str(v) for v in row.values()], widths)
