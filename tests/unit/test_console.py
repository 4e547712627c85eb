# SPDX-License-Identifier: GPL-2.0-or-later
"""Values as people see them."""
from __future__ import annotations

from typing import Any

import pytest

from tcpha.admin.console import cell


@pytest.mark.parametrize("key, value, text", [
    ("idle", 5, "5"), ("silent", 0, "0"),  # workers; connections on which nothing came
    ("idle", 5.0, "5.0 s"), ("silent", 0.0, "0 s"), ("age", 0.25, "250.0 ms"),
    ("dtcinterval", 5, "5.0 s"), ("dtcinterval", 0, "0 s"),
    ("forwarded_bytes", 1500, "1.5 kB"), ("state", "", "-"), ("packet_path", True, "yes"),
])
def test_cells(key: str, value: Any, text: str) -> None:
    assert cell(key, value).plain == text
