# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents for operators, and the commands in them."""
from __future__ import annotations

import re

BLOCK = re.compile(r"<!-- on: ([a-z0-9 ]+) -->\n```sh\n(.*?)```\n", re.S)
DOCS = ("quickstart", "networks", "kernels", "tuning", "upgrade", "troubleshooting", "migration",
        "monitoring")
