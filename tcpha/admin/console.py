# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands answer, for people: tables that fit the terminal, with units."""
from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tcpha.admin import render

STATE_STYLES = {"up": "green", "down": "red", "draining": "yellow", "listening": "green",
                "dead": "red", "good": "green", "warning": "yellow", "fault": "bold red",
                "forward": "green", "hold": "yellow", "pending": "yellow"}
BYTES = {"bytes", "forwarded_bytes"}
SECONDS = {"age", "idle", "uptime", "silent"}  # where it is no count, which is an int
MANY = 2000  # rows, more of which are printed as they are: laying them out would take long
WIDE = 100_000  # columns, where no terminal limits them


def amount(n: float) -> str:
    """With a unit of 1000."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(n) < 1000 or unit == " T":
            return f"{n:.0f}{unit}" if n == int(n) and not unit else f"{n:.1f}{unit}"
        n /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """In the unit that fits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h} h" if days else f"{h} h {m} min" if h else f"{m} min {s} s"


def cell(key: str, value: Any) -> Text:
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if key in BYTES and isinstance(value, int):
        return Text(f"{amount(value)}B" if value >= 1000 else f"{value} B")
    if key == "dtcinterval" or (key in SECONDS and isinstance(value, float)):
        return Text(duration(value) if value else "0 s")
    if value in ({}, [], None, ""):
        return Text("-", style="dim")
    text = str(value)
    return Text(text, style=STATE_STYLES.get(text, ""))


def table(rows: Sequence[dict[str, Any]], columns: Iterable[str] = (), title: str = "") -> Table:
    columns = list(columns) or (list(rows[0]) if rows else [])
    out = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold",
                pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        number = bool(rows) and all(isinstance(r[name], int | float) for r in rows)
        out.add_column(name, justify="right" if number else "left",
                       no_wrap=name not in ("reason", "target", "pattern", "what to do"),
                       overflow="fold")
    for row in rows:
        out.add_row(*(cell(name, row[name]) for name in columns))
    return out


def document(data: dict[str, Any]) -> Group:
    """Plain values first, then a table for each list and each group of values."""
    plain = Table(box=None, show_header=False, pad_edge=False)
    plain.add_column(style="bold", no_wrap=True)
    plain.add_column(overflow="fold")
    rest: list[RenderableType] = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
            grid.add_column(no_wrap=True)
            grid.add_column(justify="right" if all(isinstance(v, int | float)
                                                   for v in value.values()) else "left")
            for k, v in value.items():
                grid.add_row(f"  {k}", cell(k, v))
            rest += ["", Text(key, style="bold"), grid]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            rest += ["", Text(key, style="bold"), table(value)]
        else:
            plain.add_row(key, cell(key, value))
    return Group(plain, *rest)


def console() -> Console:
    """Of stdout: colours and a width on a terminal only."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, no_color=True, width=WIDE, force_terminal=False)


def show(data: Any) -> None:
    """Print what a command has answered; the rows of a large table, as they come."""
    if isinstance(data, Iterator):
        first = list(islice(data, MANY + 1))
        if len(first) > MANY:
            for line in render.rows(first, data):
                print(line)
            return
        data = first
    if isinstance(data, list) and (len(data) > MANY or not data):
        print("\n".join(render.table(data)))
        return
    thing: RenderableType = table(data) if isinstance(data, list) else document(data)
    write(thing)


def write(thing: RenderableType) -> None:
    """Print it at once, and by ourselves: the console has an idea of its own of what to do if
    nobody reads that."""
    out = console()
    with out.capture() as captured:
        out.print(thing)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)
