# SPDX-License-Identifier: GPL-2.0-or-later
"""Charts of a run, as SVG."""
from __future__ import annotations

from pathlib import Path
from typing import Any

WAYS = {
    "tcpha fast direct": ("tcpha", "#2368c4"),
    "tcpha ebpf direct": ("tcpha, socket path", "#7ba7de"),
    "tcpha nfqueue direct": ("tcpha, nfqueue", "#b9cfec"),
    "haproxy http": ("HAProxy http", "#c0562c"), "haproxy tcp": ("HAProxy tcp", "#dd9a7c"),
    "nginx proxy": ("nginx proxy", "#8a8f98")}
LABEL, BAR, GAP, WIDTH = 250, 13, 16, 860


def _text(x: float, y: float, text: str, more: str = "") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{text}</text>'


def _document(height: float, parts: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
            'fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n")


def ratios(results: list[dict[str, Any]]) -> str:
    """For each workload, each way's ratio to nginx reached directly; inverted where less is better,
    so that longer is better throughout."""
    by = {(r["workload"], r["way"]): r for r in results}
    names = [n for n in dict.fromkeys(r["workload"] for r in results)
             if by[n, "nginx direct"]["to_direct"]]
    scale = (WIDTH - LABEL - 60) / 1.25
    parts = [_text(12, 22, "Ratio to nginx reached directly; longer is better", 'font-size="15" '
                   'font-weight="bold"')]
    x = 12.0
    for name, color in WAYS.values():
        parts += [f'<rect x="{x:.0f}" y="34" width="12" height="12" fill="{color}"/>',
                  _text(x + 16, 45, name)]
        x += 30 + 7 * len(name)
    y = 62.0
    for n in names:
        parts.append(_text(LABEL - 10, y + len(WAYS) * BAR / 2 + 4, n, 'text-anchor="end"'))
        for way, (_, color) in WAYS.items():
            value = by[n, way]["to_direct"] or 0.0
            if by[n, way]["unit"] in ("us", "s") and value:
                value = 1 / value
            parts += [f'<rect x="{LABEL}" y="{y:.0f}" width="{min(value, 1.25) * scale:.0f}" '
                      f'height="{BAR - 2}" fill="{color}"/>',
                      _text(LABEL + min(value, 1.25) * scale + 5, y + BAR - 3, f"{value:.2f}",
                            'fill="#555"')]
            y += BAR
        y += GAP
    line = LABEL + scale
    parts.append(f'<path d="M{line:.0f} 56V{y - GAP + 4:.0f}" stroke="#222" '
                 'stroke-dasharray="4 3"/>')
    return _document(y, parts)


def growth(more: dict[str, Any]) -> str:
    """Throughput by the number of back ends."""
    by = more["scale-out"]
    top = max(v for values in by.values() for v in values.values())
    parts = [_text(12, 22, "Downloads, MB/s, where each link carries 100 Mbit/s",
                   'font-size="15" font-weight="bold"')]
    y = 40.0
    for n in by["tcpha"]:
        parts.append(_text(LABEL - 10, y + BAR + 4, f"{n} back ends", 'text-anchor="end"'))
        for way, color in (("tcpha", "#2368c4"), ("haproxy", "#c0562c")):
            width = by[way][n] / top * (WIDTH - LABEL - 140)
            parts += [f'<rect x="{LABEL}" y="{y:.0f}" width="{width:.0f}" height="{BAR - 2}" '
                      f'fill="{color}"/>',
                      _text(LABEL + width + 5, y + BAR - 3, f"{by[way][n]:.1f}  {way}",
                            'fill="#555"')]
            y += BAR
        y += GAP
    return _document(y, parts)


def write(results: list[dict[str, Any]], more: dict[str, Any], directory: Path) -> list[Path]:
    """Returns the files."""
    out = []
    for name, text in (("ratios.svg", ratios(results)), ("scale-out.svg", growth(more))):
        (directory / name).write_text(text)
        out.append(directory / name)
    return out
