# SPDX-License-Identifier: GPL-2.0-or-later
"""Which back ends are drained is kept in a file."""
from __future__ import annotations

from pathlib import Path

from tcpha.frontend.drained import Drained


def test_journal_and_drained_back_ends_share_no_file(tmp_path: Path) -> None:
    """They are written by different threads."""
    (tmp_path / "tcphafe.journal").with_suffix(".new").mkdir()
    Drained(tmp_path / "tcphafe.drained").add("10.0.0.1", True)
    assert "10.0.0.1" in Drained(tmp_path / "tcphafe.drained")
