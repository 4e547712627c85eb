# SPDX-License-Identifier: GPL-2.0-or-later
"""TCPHA: content-aware request distribution by TCP handoff."""
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tcpha")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "unknown"
