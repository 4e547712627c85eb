# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written twice, as C, Cython or Python, is the same."""
from __future__ import annotations

import re
from collections import Counter

import pytest

from tcpha.config import model
from tcpha.control import hello
from tcpha.datapath import ebpf
from tcpha.frontend import localnode
from tests.support import bpf
from tests.support.tree import TOP

TREE = TOP / "tcpha"
DEFS = (TREE / "_fast" / "defs.pxd").read_text()
TYPES = {"__u8": "uint8_t", "__u16": "uint16_t", "__be16": "uint16_t", "__u32": "uint32_t",
         "__s32": "int32_t", "__u64": "uint64_t", "char": "char"}


def of_c(header: str) -> dict[str, dict[str, str]]:
    """{struct: {member: type and dimensions}}"""
    text = re.sub(r"/\*.*?\*/", "", (TREE / "_bpf" / header).read_text(), flags=re.DOTALL)
    text = re.sub(r"union \{(.*?)\};", r"\1", text, flags=re.DOTALL)
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        members = re.findall(r"(?:struct )?(\w+) (\w+)((?:\[\w+\])*);", body)
        found[name] = {m: TYPES.get(kind, kind) + size for kind, m, size in members}
    return found


def of_cython(header: str) -> dict[str, dict[str, str]]:
    block, = re.findall(rf'^cdef extern from "{re.escape(header)}" nogil:\n((?:(?:    .*)?\n)+)',
                        DEFS, re.MULTILINE)
    found = {}
    for name, body in re.findall(r"^    struct (\w+):\n((?:        .*\n)+)", block, re.MULTILINE):
        members = re.findall(r"^        (\w+) (\w+)((?:\[\w+\])*)$", body, re.MULTILINE)
        assert len(members) == body.count("\n")
        found[name] = {m: kind + size for kind, m, size in members}
    return found


@pytest.mark.parametrize("header", re.findall(r'^cdef extern from "(\w+\.h)"', DEFS, re.MULTILINE))
def test_structs(header: str) -> None:
    """Cython takes sizes from C; who reads or checks a bound goes by what is written there."""
    ours, theirs = of_cython(header), of_c(header)
    assert ours.keys() <= theirs.keys()
    for name, members in ours.items():
        assert {m: theirs[name].get(m) for m in members} == members, name


def numbers(*where: str) -> dict[str, int]:
    """What these files say of names that have one value in all of them."""
    found: dict[str, set[int]] = {}
    for file in (file for pattern in where for file in TREE.glob(pattern)):
        for name, value in re.findall(
                r"^(?:#define|    |\t)\s*([A-Z]\w+)(?: =)? (0x[0-9a-f]+|\d+)\b", file.read_text(),
                re.MULTILINE):
            found.setdefault(name, set()).add(int(value, 0))
    return {name: value for name, (value, *more) in found.items() if not more}


OURS = numbers("_fast/*.pxd", "_fast/*.pyx")
NUMBERS = OURS | numbers("_bpf/*.h")
SAME = {
    "TCPHA_LOCAL_NODE": (localnode.INDEX, model.MAX_BACKENDS),
    "TCPHA_MAX_BACKENDS": (model.MAX_BACKENDS + 1, OURS["TRIED_WORDS"] * 64),
    "MSG_MAGIC": (hello.MAGIC,),
    "FAST_QUEUES": (ebpf.MAX_QUEUES,), "TCPHA_MAX_VIPS": (model.MAX_VADDRS,),
    "OPT_TS": (ebpf.TIMESTAMPS,), "OPT_SACK": (ebpf.SACK,), "OPT_WSCALE": (ebpf.WSCALE,),
    "OPT_ECN": (ebpf.ECN,),
    "MSS_MIN": (536, OURS["TCP_MSS_LOW"]),
    **{f"TCPHA_{name}": (getattr(bpf, name),)
       for name in ("HELD", "DRAINING", "FORWARD", "PENDING", "REPLACING", "LINGERING", "GONE",
                    "F_FIN", "F_RST", "F_NEW_SYN", "F_FAST")},
}


@pytest.mark.parametrize("name", SAME)
def test_numbers(name: str) -> None:
    assert set(SAME[name]) == {NUMBERS[name]}


def test_sizes_of_maps() -> None:
    text = (TREE / "_bpf/be_maps.bpf.h").read_text()
    rings = re.findall(r"RINGBUF\);\n\s+__uint\(max_entries, 1 << (\d+)\)", text)
    assert rings == re.findall(r"RING = 1 << (\d+)", (TREE / "_fast/ebpf.pyx").read_text())
    assert f"__uint(max_entries, {OURS['FRONTENDS']});" in text


def test_an_entry_as_tests_read_it() -> None:
    members = of_c("tcpha.h")["tcpha_entry"]
    members.pop("held")  # shares its place
    known = bpf.state_of(bytes(100))
    assert [m.removesuffix("_ns") for m in members][:len(known) - 2] == [
        k for k in known if k not in ("state", "older")]
    sizes = Counter(members[m] for m in list(members)[:len(known) - 2])
    assert sizes == {"uint64_t": 6, "uint32_t": 12, "uint16_t": 2}
