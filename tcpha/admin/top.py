# SPDX-License-Identifier: GPL-2.0-or-later
"""tcphactl fe top: a live screen."""
from __future__ import annotations

import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tcpha.admin.console import amount, console, duration, table, write
from tcpha.daemon.control_socket import Refused, ask

BARS = " ▁▂▃▄▅▆▇█"
HISTORY = 60  # samples of a spark line
ROWS = 8  # of rules, slowest handoffs and events


def _services(status: dict[str, Any]) -> str:
    """Those that take new connections: each address with its ports."""
    ports: dict[str, list[str]] = {}
    for s in status["services"]:
        if s["state"] == "open":
            ports.setdefault(s["vaddr"], []).append(str(s["port"]))
    return " ".join(f"{vaddr}:{','.join(of_it)}" for vaddr, of_it in ports.items()) or "closed"


class Sample:
    """All that the front end says at one moment."""

    def __init__(self, socket: Path):
        self.status = ask(socket, "status", [])
        self.rules: list[dict[str, Any]] = ask(socket, "rules", [])
        self.stats = ask(socket, "stats", [])
        self.at = time.monotonic()


def quantile(histogram: dict[str, Any], q: float) -> str:
    """Within what time so much of all lay: the limit of a bucket."""
    buckets = histogram["buckets"]
    total = buckets[-1][1]
    if not total:
        return "-"
    limit = next(limit for limit, count in buckets if count >= q * total)
    return "more" if limit is None else duration(limit)


def spark(values: deque[float]) -> str:
    top = max(values, default=0) or 1
    return "".join(BARS[min(8, int(v / top * 8 + 0.5))] for v in values)


class Screen:
    """Keeps what rates need. rows: lines that the terminal has."""

    def __init__(self) -> None:
        self.before: Sample | None = None
        self.history: dict[str, deque[float]] = {
            name: deque(maxlen=HISTORY) for name in ("handed", "live", "bytes", "refused")}

    def draw(self, now: Sample) -> Group:
        s, c = now.status, now.status["counters"]
        before = self.before or now
        took = max(now.at - before.at, 1e-9)
        if now.stats["uptime"] < before.stats["uptime"]:
            before = now  # another run

        def rate(new: float, old: float) -> float:
            return max(0.0, (new - old) / took)
        old = before.status
        self.history["handed"].append(rate(c["handed"], old["counters"]["handed"]))
        self.history["live"].append(s["live"])
        self.history["bytes"].append(rate(s["packets"]["forwarded_bytes"],
                                          old["packets"]["forwarded_bytes"]))
        self.history["refused"].append(rate(
            c["refused"] + c["answered_503"],
            old["counters"]["refused"] + old["counters"]["answered_503"]))
        self.before = now
        path = "packet path" if s["packet_path"] else "socket path"
        head = Text.assemble(
            ("tcphafe ", "bold"), f"{_services(s)}  {s['datapath']}, {s['forward']}, "
            f"{path}  up {duration(now.stats['uptime'])}  workers {s['workers']['busy']} busy of "
            f"{s['workers']['total']}  in hand {s['in_hand']} of {s['maxclients']}",
            ("  UNLOADING" if s["unloading"] else "", "bold red"))
        return Group(head, "", self._rates(), "", self._servers(now, before, rate), "",
                     *self._rules(now, before, rate), *self._stages(now), *self._slow(now),
                     *self._answers(c), *self._events(now),
                     Text("q: quit", style="dim"))

    def _rates(self) -> Table:
        out = Table(box=None, show_header=False, pad_edge=False)
        for _ in range(2):
            out.add_column(no_wrap=True)
            out.add_column(justify="right", no_wrap=True, min_width=10)
            out.add_column(no_wrap=True, overflow="crop", style="cyan")
        shown = (("handoffs", "handed", "/s"), ("live", "live", ""),
                 ("forwarded", "bytes", "B/s"), ("refused, 503", "refused", "/s"))
        cells = [(Text(name, style="bold"), f"{amount(self.history[key][-1])}{unit}",
                  spark(self.history[key])[-28:]) for name, key, unit in shown]
        for i in (0, 2):
            out.add_row(*cells[i], *cells[i + 1])
        return out

    def _servers(self, now: Sample, before: Sample, rate: Any) -> Table:
        old = {b["server"]: b for b in before.status["servers"]}
        rows = []
        for b in now.status["servers"]:
            was = old.get(b["server"], b)
            rows.append({"back end": b["server"], "state": b["state"], "live": b["live"],
                         "handed/s": f"{rate(b['handed'], was['handed']):.0f}",
                         "refused/s": f"{rate(b['refused'], was['refused']):.0f}",
                         "handed": amount(b["handed"]), "links": b["connperbe"],
                         "reason": b["reason"]})
        local = now.status["localnode"]
        if local["listening"] or local["handed"]:
            was = before.status["localnode"]
            rows.append({"back end": "localnode", "state": "up" if local["listening"] else "down",
                         "live": local["live"],
                         "handed/s": f"{rate(local['handed'], was['handed']):.0f}",
                         "refused/s": f"{rate(local['refused'], was['refused']):.0f}",
                         "handed": amount(local["handed"]), "links": 1, "reason": ""})
        return table(rows) if rows else table([{"back end": "none"}])

    def _rules(self, now: Sample, before: Sample, rate: Any) -> list[RenderableType]:
        old = {(r["server"], r["pattern"]): r["handed"] for r in before.rules}
        rows = [{"rule": r["rule"], "pattern": r["pattern"], "server": r["server"],
                 "hits/s": f"{rate(r['handed'], old.get((r['server'], r['pattern']), 0)):.0f}",
                 "hits": r["handed"]} for r in now.rules]
        rows.sort(key=lambda r: (-float(r["hits/s"]), -r["hits"]))
        shown = [r | {"hits": amount(r["hits"])} for r in rows[:ROWS]]
        return [table(shown), ""] if shown else []

    def _stages(self, now: Sample) -> list[RenderableType]:
        names = {"total": "socket path, accept to handed over", "offer": "offer to adopted",
                 "head": "until the head is whole", "fast": "packet path, by a worker"}
        rows = []
        for key, name in names.items():
            h = now.stats["stages"][key]
            if h["buckets"][-1][1]:
                rows.append({"stage": name, "50 % within": quantile(h, 0.5),
                             "99 % within": quantile(h, 0.99),
                             "handoffs": amount(h["buckets"][-1][1])})
        return [table(rows), ""] if rows else []

    def _slow(self, now: Sample) -> list[RenderableType]:
        rows = [{"slowest": duration(r["seconds"]), "ago": duration(r["ago"]),
                 "client": r["client"], "target": r["target"], "server": r["server"]}
                for r in now.stats["slowest"][:4]]
        return [table(rows), ""] if rows else []

    def _answers(self, c: dict[str, int]) -> list[RenderableType]:
        shown = [(k.removeprefix("answered_"), c[k]) for k in
                 ("answered_400", "answered_408", "answered_431", "answered_503", "lost",
                  "silent", "expired", "table_full", "no_descriptors") if c[k]]
        if not shown:
            return []
        return [Text("own answers and errors: " + "  ".join(f"{k} {amount(v)}" for k, v in shown)),
                ""]

    def _events(self, now: Sample) -> list[RenderableType]:
        out = Table(box=None, show_header=False, pad_edge=False)
        out.add_column(no_wrap=True, style="dim")
        out.add_column(no_wrap=True, overflow="ellipsis")
        for e in now.stats["events"][-4:]:
            out.add_row(datetime.fromtimestamp(e["time"]).strftime("%H:%M:%S"),
                        Text(e["text"], style="" if e["level"] == "info" else "yellow"))
        return [out]


@contextmanager
def _keys() -> Iterator[None]:
    """Single keys are readable from stdin, if it is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    old = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, old)


def _wait(seconds: float) -> bool:
    """False: somebody pressed q."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return True
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return not (ready and sys.stdin.read(1) in "qQ")


def run(socket: Path, interval: float, count: int) -> None:
    """Show the screen until q, Ctrl-C, or 'count' times (0: no end). Without a terminal, samples
    are printed below each other. Raises Refused and NoAnswer for the first sample only."""
    screen = Screen()
    first = Sample(socket)
    if not sys.stdout.isatty():
        shown = 0
        while True:
            write(screen.draw(first))
            shown += 1
            if shown == count:
                return
            time.sleep(interval)
            first = Sample(socket)
    try:
        with _keys(), Live(screen.draw(first), console=console(), screen=True,
                           auto_refresh=False) as live:
            shown = 1
            while shown != count and _wait(interval):
                try:
                    live.update(screen.draw(Sample(socket)), refresh=True)
                except (OSError, Refused):
                    live.update(Text("the front end does not answer", style="bold red"),
                                refresh=True)
                shown += 1
    except KeyboardInterrupt:
        pass
