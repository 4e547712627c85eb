# SPDX-License-Identifier: GPL-2.0-or-later
"""One line in the log when something begins to go wrong, and one when it is over."""
from __future__ import annotations

import logging

log = logging.getLogger("tcpha")
QUIET = 5.0  # seconds without another one, after which it is over


class Troubles:
    """Counters that should stand still. texts: {counter: (what is wrong; how to mend it)}."""

    def __init__(self, texts: dict[str, tuple[str, str]]):
        self.texts = texts
        self.counts: dict[str, int] = {}
        self.began: dict[str, int] = {}    # the count before, of those that rise
        self.last: dict[str, float] = {}   # when they rose last

    def look(self, counts: dict[str, int], now: float) -> None:
        """To be called every second or so. counts: of all that texts names."""
        for name, (what, mend) in self.texts.items():
            before, count = self.counts.get(name, 0), counts[name]
            self.counts[name] = count
            if count != before:
                if name not in self.began:
                    self.began[name] = before
                    log.warning("%s; %s", what, mend)
                self.last[name] = now
            elif name in self.began and now - self.last[name] >= QUIET:
                log.info("over: %s (%d times)", what, count - self.began.pop(name))
