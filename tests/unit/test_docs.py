# SPDX-License-Identifier: GPL-2.0-or-later
"""What documents, man pages and units say of the program."""
from __future__ import annotations

import re

import pytest

from tests.support.docs import BLOCK, DOCS
from tests.support.tree import TOP


def test_all_blocks_of_the_docs_are_followed() -> None:
    """A command that no test runs stands in no document for operators."""
    for path in (TOP / "docs").glob("*.md"):
        text = path.read_text()
        if path.stem in DOCS:
            assert text.count("```sh") == len(BLOCK.findall(text)), path
        else:
            assert "```sh" not in text, path


def test_man_pages_name_every_key_and_command() -> None:
    from tcpha.cli.tcphactl import COMMANDS
    from tcpha.config.keys import KEYS, MEANINGLESS
    for role, keys in KEYS.items():
        text = (TOP / f"man/tcpha{role}.conf.5").read_text()
        for key in keys:
            assert key in text or key in MEANINGLESS[role], key
    text = (TOP / "man/tcphactl.8").read_text().replace("\\-", "-")
    assert all(c in text for commands in COMMANDS.values() for c in commands)


@pytest.mark.parametrize("role", ["fe", "be"])
def test_the_units_never_give_up(role: str) -> None:
    """But for a configuration that somebody has to mend first."""
    unit = (TOP / f"debian/tcpha.tcpha{role}.service").read_text()
    assert "\nStartLimitIntervalSec=0\n" in unit.partition("[Service]")[0]
    assert "\nRestart=on-failure\n" in unit and "\nRestartPreventExitStatus=2\n" in unit


def test_the_table_has_no_empty_cell_and_names_tests_that_exist() -> None:
    rows = [line.strip("|").split(" | ") for line in
            (TOP / "docs" / "tcpha-0.1.md").read_text().splitlines()
            if line.startswith("| ")][1:]
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 3 and all(cell.strip() for cell in row), row
        for part in row[2].split(";"):
            file, *tests = re.findall(r"`([\w.]+)`", part)
            text = "".join(p.read_text() for p in (TOP / "tests").glob(f"*/{file}"))
            assert text and all(f"def test_{name}(" in text for name in tests), part
