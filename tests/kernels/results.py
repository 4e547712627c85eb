# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel, or an arrangement of three, came to; and the table of all."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

CAN_ADOPT, CAN_FRONT = (6, 9), (5, 17)  # docs/kernels.md


@dataclass
class Result:
    """failed: texts, the first line of each names it."""

    name: str
    chosen: str = ""  # by the front end and the back end, with datapath = auto
    ways: list[str] = field(default_factory=list)
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, good: bool, what: str) -> None:
        if good:
            self.passed += 1
        else:
            self.failed.append(what)

    def take_junit(self, xml: str) -> None:
        """Add the results of pytest."""
        for case in ElementTree.fromstring(xml).iter("testcase"):
            troubles = [*case.iter("failure"), *case.iter("error")]
            if case.find("skipped") is None:
                self.check(not troubles, case.get("name", "?") + "".join(
                    f"\n{t.text or t.get('message')}" for t in troubles))

    def take_probe(self, number: tuple[int, int], probe: dict[str, dict[str, Any]]) -> None:
        """Judge what the daemons could open. What a kernel has not must be refused in words."""
        self.chosen = " / ".join(probe["auto"][role]["datapath"] or "none"
                                 for role in ("fe", "be"))
        for way, roles in probe.items():
            for role, found in roles.items():
                want = expected(number, role, way)
                got = "fast" if found["packet_path"] else found["datapath"]
                text = " | ".join(found["said"])
                self.said.append(f"{role}, {way}: {got or 'does not start'}: {text}")
                self.check(got in want and not found["crashed"],
                           f"tcpha{role}, {way}: {got or 'does not start'} instead of "
                           f"{' or '.join(want)}\n" + "\n".join(found["said"]))
        self.ways = ways(probe)


def expected(number: tuple[int, int], role: str, way: str) -> tuple[str, ...]:
    """What a role may come to: 'fast' is ebpf with the packet path, '' that it refuses to start."""
    if way == "nfqueue":
        return ("nfqueue",)
    if number >= CAN_ADOPT:
        return ("ebpf",) if way == "ebpf, no packet path" else ("fast",)
    if role == "fe" and number >= CAN_FRONT:
        return ("ebpf",)
    if role == "fe":  # older ones are welcome, too
        return ("ebpf", "nfqueue" if way == "auto" else "")
    return ("nfqueue",) if way == "auto" else ("",)


def ways(probe: dict[str, dict[str, Any]]) -> list[str]:
    """Ways of inside/conftest.py that this kernel has and that differ in what they use, the best
    one first, the one that every kernel has last."""
    def opens(way: str, role: str, key: str = "datapath") -> bool:
        return bool(probe[way][role][key])
    found = ["fast-direct", "fast-tunnel"] if opens("ebpf", "fe", "packet_path") else []
    bare = "ebpf, no packet path"
    if opens(bare, "fe") and opens(bare, "be"):
        found.append("direct")
    elif opens(bare, "fe") and opens("nfqueue", "be"):
        found.append("ebpf-nfqueue")
    if opens("nfqueue", "fe") and opens("nfqueue", "be"):
        found.append("nfqueue-direct")
    return found


def table(results: list[Result]) -> str:
    rows = [("kernel", "front end / back end", "ways", "passed", "failed", "seconds")]
    rows += [(r.name, r.chosen, " ".join(r.ways), str(r.passed), str(len(r.failed)),
              f"{r.seconds:.0f}") for r in results]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def report(results: list[Result]) -> str:
    """The table, what failed, and the closing line."""
    lines = []
    for r in results:
        lines += [f"{r.name}: {said}" for said in r.said]
    for r in results:
        lines += [f"\nFAILED on {r.name}: {failure}" for failure in r.failed]
    passed, failed = sum(r.passed for r in results), sum(len(r.failed) for r in results)
    return "\n".join([*lines, "", table(results), "", f"{passed} passed, {failed} failed"])
