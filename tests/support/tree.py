# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are in the source tree."""
from pathlib import Path

TOP = Path(__file__).parents[2]
