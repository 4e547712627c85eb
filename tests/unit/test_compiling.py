# SPDX-License-Identifier: GPL-2.0-or-later
"""Patterns are compiled once, and beside everything else."""
from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tcpha._fast.match import Matcher, PatternError
from tcpha.config import ConfigError, load
from tcpha.frontend.compiling import Compiling
from tests.support.patterns import MANY


def test_other_threads_run_while_patterns_are_compiled() -> None:
    turns = 0
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(Matcher, MANY)
        while not done.done():
            time.sleep(0.001)
            turns += 1
    assert done.result().matches(b"/site699/abc699") == [699] and turns > 20


def test_lists_are_compiled_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of who has gone meanwhile; who comes again finds what was compiled for him."""
    at_once = most = 0

    def counted(patterns: list[str]) -> Matcher:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return Matcher(patterns)
        finally:
            at_once -= 1

    async def work() -> None:
        compiling = Compiling()
        asked = [asyncio.create_task(compiling.matcher(MANY[n:])) for n in range(3)]
        await asyncio.sleep(0)
        asked[0].cancel()
        again = asyncio.create_task(compiling.matcher(MANY))
        await asyncio.wait([*asked, again])
        assert most == 1
        assert [len(t.result().patterns) for t in asked[1:]] == [len(MANY) - 1, len(MANY) - 2]
        assert again.result().patterns == MANY
        with pytest.raises(PatternError):
            await compiling.matcher(["jpg("])
        done = await compiling.matcher(MANY)
        assert await compiling.matcher(list(MANY)) is done
    monkeypatch.setattr("tcpha.frontend.compiling.Matcher", counted)
    asyncio.run(work())


def test_patterns_are_compiled_once(tmp_path: Path) -> None:
    """And not again for a file that has the same ones."""
    file = tmp_path / "fe.conf"
    servers = "".join(f"server = 10.0.0.{n}\n" for n in (1, 2))
    file.write_text(f"vaddr = 10.0.0.100\n{servers}rule = 10.0.0.1 ^/a\nrule = 10.0.0.2 ^/a\n"
                    "rule = 10.0.0.1 jpg$\n")
    first = load("fe", str(file))
    assert first.matcher and first.matcher.patterns == ["^/a", "jpg$"]
    assert "do not cover" in str(first.warnings[0])
    file.write_text(file.read_text().replace("0.1 jpg$", "0.2 jpg$"))
    assert load("fe", str(file), None, first.matcher).matcher is first.matcher
    file.write_text(file.read_text() + "rule = 10.0.0.1 .*\n")
    assert load("fe", str(file), None, first.matcher).matcher.patterns == ["^/a", "jpg$", ".*"]


def test_each_rule_with_a_bad_pattern_is_named(tmp_path: Path) -> None:
    file = tmp_path / "fe.conf"
    file.write_text("vaddr = 10.0.0.100\nserver = 10.0.0.1\nrule = 10.0.0.1 a(\n"
                    "rule = 10.0.0.1 b\nrule = 10.0.0.1 c[\nrule = 10.0.0.1 a(\n")
    with pytest.raises(ConfigError) as error:
        load("fe", str(file))
    assert [f.line for f in error.value.faults] == [3, 5, 6]
