# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written twice, as C and as Cython, is the same."""
from __future__ import annotations

import re

import pytest

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
