# SPDX-License-Identifier: GPL-2.0-or-later
"""Configurations, and what is wrong with them."""
from __future__ import annotations

from pathlib import Path

import pytest

from tcpha.config import Config, ConfigError, load


def read(tmp_path: Path, text: str, role: str = "fe", name: str = "x.conf") -> Config:
    file = tmp_path / name
    file.write_text(text)
    return load(role, str(file))


def faults(tmp_path: Path, text: str, role: str = "fe", name: str = "x.conf") -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text, role, name)
    return [str(f).removeprefix(str(tmp_path) + "/") for f in error.value.faults]
