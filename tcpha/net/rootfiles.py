# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of /proc/net that root alone can read, for a daemon that a service manager runs as a user.

It opens them while it may. The kernel makes what is in them anew for each one who reads from the
beginning.
"""
from __future__ import annotations

import contextlib
import os
from pathlib import Path

QUEUES = "/proc/net/netfilter/nfnetlink_queue"
TABLES = "/proc/net/ip_tables_names"  # of legacy iptables
_held: dict[str, int] = {}


def hold() -> None:
    """Open those that are there, for later. Takes CAP_DAC_READ_SEARCH, or to be root."""
    for path in (QUEUES, TABLES):
        with contextlib.suppress(OSError):
            _held[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read(path: str) -> str:
    """Raises OSError. PermissionError: it is one that came after hold()."""
    try:
        return Path(path).read_text()
    except PermissionError:
        if path not in _held:
            raise
    data = b""
    while more := os.pread(_held[path], 65536, len(data)):
        data += more
    return data.decode()
