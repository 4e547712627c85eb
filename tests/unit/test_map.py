# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/map.md names functions and files that exist."""
import re
from pathlib import Path

TOP = Path(__file__).parents[2]
TEXT = (TOP / "docs/map.md").read_text()
FOLDERS = (TOP, TOP / "tcpha/_bpf", TOP / "tcpha/_fast")
FILE = r"[\w/.]+\.(?:bpf\.h|bpf\.c|h|pxi|pyx|pxd|py)"


def find(name: str) -> Path:
    found = [folder / name for folder in FOLDERS if (folder / name).is_file()]
    assert len(found) == 1, f"{name} is {found or 'nowhere'}"
    return found[0]


def defined(name: str, source: str) -> bool:
    """At the beginning of a line, a function's head; or an indented one, of a method."""
    return re.search(rf"^(?:\w.*[ *]| +def ){name}\(", source, re.MULTILINE) is not None


def test_each_function_is_there() -> None:
    named = set(re.findall(rf"({FILE}):(\w+)", TEXT))
    assert len(named) > 80
    missing = [f"{file}:{name}" for file, name in sorted(named)
               if not defined(name, find(file).read_text())]
    assert not missing


def test_each_file_is_there() -> None:
    for name in set(re.findall(rf"`({FILE})[`:]", TEXT)):
        find(name)
