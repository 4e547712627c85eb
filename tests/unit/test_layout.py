# SPDX-License-Identifier: GPL-2.0-or-later
"""How the Python modules lie: none is large, and none imports itself by way of others."""
from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.tree import TOP

LOADING, LATER, TYPES = "when it is loaded", "in functions", "for type checkers"
MOST = 500  # lines
# each imports what stands with it or behind it; all of them the modules that import nothing of ours
LAYERS = ("cli lab", "frontend backend", "admin", "daemon", "datapath", "application", "config net",
          "control", "_fast", "beside owner tasks undoing")


def name_of(file: Path) -> str:
    parts = file.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(f): f for f in sorted((TOP / "tcpha").rglob("*.py"))}


def imported(node: ast.AST, when: str = LOADING) -> Iterator[tuple[str, str]]:
    """Names of modules, and when they are imported. What a module has by 'from' may be one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module and not child.level, "imports are absolute"
            yield child.module, when
            yield from ((f"{child.module}.{alias.name}", when) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(child, LATER if when == LOADING else when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imported(child, TYPES)
        else:
            yield from imported(child, when)


@pytest.mark.parametrize("also", [(), (LATER,), (LATER, TYPES)],
                         ids=["loaded", "in functions", "for type checkers"])
def test_no_module_imports_itself_by_others(also: tuple[str, ...]) -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, file in FILES.items():
        graph[module] |= {name for name, when in imported(ast.parse(file.read_text()))
                          if name in FILES and name != module and when in (LOADING, *also)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1]))


def test_layers_import_only_downwards() -> None:
    ranks = {part: n for n, layer in enumerate(LAYERS) for part in layer.split()}
    for module, file in FILES.items():
        for name in {name for name, _ in imported(ast.parse(file.read_text()))}:
            own, other = module.split("."), name.split(".")
            if other[0] == "tcpha" and len(other) > 1 and len(own) > 1 and other[1] in ranks:
                assert ranks[own[1]] <= ranks[other[1]], f"{module} imports {name}"


def test_files_are_small() -> None:
    made = {f.with_suffix(".c") for f in (TOP / "tcpha/_fast").glob("*.pyx")}
    for kind in ("py", "pyi", "pyx", "pxi", "pxd", "h", "c"):
        for file in sorted({*(TOP / "tcpha").rglob(f"*.{kind}")} - made):
            lines = file.read_text().count("\n")
            assert lines <= MOST, f"{file.relative_to(TOP)} has {lines} lines"


def test_modules_say_what_they_are_for() -> None:
    for module, file in FILES.items():
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree) or not tree.body, f"{module} says nothing of itself"
