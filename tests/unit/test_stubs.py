# SPDX-License-Identifier: GPL-2.0-or-later
"""The stubs of the Cython modules, by which Python's code is checked, say what those have."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import pytest

from tests.support.tree import TOP

FAST = TOP / "tcpha" / "_fast"
STUBS = {f.stem: f for f in sorted(FAST.glob("*.pyi"))}
Parameters = list[tuple[str, bool]]  # names, and whether there is a default
Function = ast.FunctionDef


def compiled(name: str) -> ModuleType:
    return importlib.import_module(f"tcpha._fast.{name}")


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Public names of a stub, or of a class in it."""
    found = {(n.target.id if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
              else getattr(n, "name", "_")): n for n in body}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def of_stub(function: ast.FunctionDef) -> Parameters:
    args = function.args.args
    first = len(args) - len(function.args.defaults)
    return [(a.arg, n >= first) for n, a in enumerate(args)]


def of_module(function: Any) -> Parameters:
    return [(p.name, p.default is not p.empty)
            for p in inspect.signature(function).parameters.values()]


def of_source(module: str, name: str) -> Parameters:
    """What a class is made with: only its source tells, or one of the parts of that."""
    text = (FAST / f"{module}.pyx").read_text()
    parts = re.findall(r'^include "(.*)"', text, re.M)
    text += "".join((FAST / part).read_text() for part in parts)
    own = re.search(rf"^cdef class {name}\b.*?(?=^\S|\Z)", text, re.M | re.S)
    assert own, name
    made = re.search(r"def __cinit__\((.*?)\):", own[0], re.S)
    return [(p.partition("=")[0].split()[-1], "=" in p)
            for p in re.split(r",\s*", made[1])] if made else [("self", False)]


@pytest.mark.parametrize("name", STUBS)
def test_a_stub_has_what_its_module_has(name: str) -> None:
    module, stub = compiled(name), declared(ast.parse(STUBS[name].read_text()).body)
    for what, node in stub.items():
        assert hasattr(module, what), f"{name} has no {what}"
        if isinstance(node, Function):
            assert of_stub(node) == of_module(getattr(module, what)), what
        elif isinstance(node, ast.ClassDef):
            of_class(name, getattr(module, what), node)
    functions = {n for n, v in vars(module).items() if not n.startswith("_")
                 and getattr(v, "__module__", "") == module.__name__ and not isinstance(v, type)}
    assert functions <= stub.keys(), f"{name}.pyi lacks some"


def of_class(module: str, cls: type, node: ast.ClassDef) -> None:
    if issubclass(cls, Exception):  # what it has is in each one, not in its class
        return
    stub = declared(node.body)
    there = {n for n in vars(cls) if not n.startswith("_")}
    assert there == stub.keys(), cls
    for what, method in stub.items():
        if isinstance(method, Function) and not method.decorator_list:
            assert of_stub(method) == of_module(vars(cls)[what]), f"{cls}.{what}"
        else:
            assert not callable(vars(cls)[what]), f"{cls}.{what}"
    made = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
    if made:
        assert of_stub(made) == of_source(module, cls.__name__), cls


def test_each_module_that_python_uses_has_a_stub() -> None:
    used = set()
    for file in (TOP / "tcpha").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tcpha._fast"):
                names = [str(node.module)] if node.module != "tcpha._fast" else \
                    [f"tcpha._fast.{alias.name}" for alias in node.names]
                used |= {n.rpartition(".")[2] for n in names}
    assert used <= STUBS.keys()
