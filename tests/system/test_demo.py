# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo is what a newcomer sees first."""
from __future__ import annotations

import subprocess
import sys

from tcpha.lab.bed import sh
from tcpha.lab.demo import PREFIX


def test_demo() -> None:
    done = subprocess.run([sys.executable, "-m", "tcpha.lab.demo"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("192.168.1.50:") == 12 and "All of it worked." in done.stdout
    assert PREFIX not in sh("ip", "netns", "list").stdout
