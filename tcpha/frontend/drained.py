# SPDX-License-Identifier: GPL-2.0-or-later
"""Which back ends an operator has drained. It is kept in a file of the run directory, so that
neither a restart nor a kill puts a back end into service behind the operator's back."""
from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from tcpha.owner import by_owner

log = logging.getLogger("tcpha")


class Drained:
    """The drained addresses, in the file as they change."""

    def __init__(self, path: Path):
        self.path = path
        self.listed: dict[str, bool] = self._read()  # by address: whether the file lists it

    def __contains__(self, address: str) -> bool:
        return address in self.listed

    def _read(self) -> dict[str, bool]:
        try:
            with by_owner():
                found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or not all(isinstance(v, bool) for v in found.values()):
            log.warning("%s is damaged: which back ends were drained is lost; drain them again",
                        self.path)
            return {}
        return found

    def add(self, address: str, listed: bool) -> None:
        self._keep(self.listed | {address: listed})

    def forget(self, address: str) -> None:
        self._keep({a: listed for a, listed in self.listed.items() if a != address})

    def configured(self, servers: set[str], registered: set[str]) -> None:
        """Forget what has been taken out of the configuration. A back end that registers may come
        back at any time."""
        self._keep({a: a in servers for a, listed in self.listed.items()
                    if a in servers or a in registered or not listed})

    def _keep(self, listed: dict[str, bool]) -> None:
        if listed == self.listed:
            return
        self.listed = listed
        scratch = self.path.with_name(f"{self.path.name}.new")  # the journal has one of its own
        try:
            with by_owner():
                scratch.write_text(json.dumps(listed))
                os.replace(scratch, self.path)
        except OSError as error:
            log.warning("%s: %s; which back ends are drained is forgotten when we stop", self.path,
                        error.strerror)
