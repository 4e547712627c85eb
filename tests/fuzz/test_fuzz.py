# SPDX-License-Identifier: GPL-2.0-or-later
"""A short run of each fuzzer of run.py, which see for longer ones."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"
pytestmark = pytest.mark.xdist_group("fuzz")  # they share what they compile


def fuzz(target: str, *options: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(RUN), target, "--seed", "1", *options],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    return done.returncode, done.stdout[-4000:]


@pytest.mark.parametrize("target, runs", [("head", 50_000), ("messages", 50_000),
                                          ("packet", 50_000), ("smuggling", 20_000),
                                          ("config", 500)])
def test_fuzz(target: str, runs: int) -> None:
    status, out = fuzz(target, "--runs", str(runs))
    assert status == 0, out
    done = re.search(r"stat::number_of_executed_units: (\d+)", out)
    assert done and int(done[1]) >= runs, out  # more, if a longer run has left more inputs


def test_a_byte_too_far_is_found() -> None:
    """Or the others would prove nothing."""
    status, out = fuzz("proof", "--runs", "1000")
    assert status != 0 and "heap-buffer-overflow" in out, out
