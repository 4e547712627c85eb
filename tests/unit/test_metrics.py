# SPDX-License-Identifier: GPL-2.0-or-later
"""Each counter of the front end is in one of the families."""
from __future__ import annotations

import re
from pathlib import Path

from tcpha._fast.fe_worker import FrontEnd
from tcpha.admin import metrics

DOCS = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
# by back end in tcpha_handoffs, by path in tcpha_paths
IN_OTHERS = {"handed", "refused", "returned", "closed"}


def page() -> tuple[dict[str, int], str]:
    core = FrontEnd(16, 4096, 1.0)
    counters = {name: 1 << n for n, name in enumerate(core.counters())}
    status = {
        "datapath": "nfqueue", "vaddr": "10.0.0.1", "vaddrs": ["10.0.0.1"], "services": [],
        "workers": {"busy": 0, "idle": 1}, "live": 0,
        "maxclients": 16, "deaths": {}, "unloading": False, "packets": {"forwarded_bytes": 0},
        "counters": counters, "servers": [], "in_hand": 0, "packet_path": False, "localnode": {
            "listening": False, "handed": 0, "refused": 0, "returned": 0, "closed": 0, "live": 0}}
    stats = {"stages": core.stages(), "channels": []}
    return counters, metrics.text(lambda: metrics.frontend(status, [], stats)).decode()


def test_each_counter_of_the_front_end_is_in_the_metrics() -> None:
    counters, text = page()
    sums = [int(float(value)) for value in re.findall(r"^\S+ ([\d.e+]+)$", text, re.MULTILINE)]
    missing = [name for name, bit in counters.items()
               if name not in IN_OTHERS and not any(v & bit for v in sums)]
    assert not missing


def test_each_family_is_described() -> None:
    families = re.findall(r"^# TYPE (\S+) ", page()[1], re.MULTILINE)
    assert len(families) > 15
    assert [f for f in families if f not in DOCS and f != "tcpha_info"] == []
