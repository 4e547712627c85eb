# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings of the kernel (sysctl), those of networks."""
from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tcpha.net.journal import POLLED, Change, Changes, Kept

log = logging.getLogger("tcpha")


class Sysctls(Changes):
    """Of this network namespace, by name, with slashes."""

    def sysctl(self, name: str, value: str) -> None:
        """Set a sysctl, if it is not so already, and keep it so."""
        if self.set_sysctl(name, value):
            self._keep_sysctl(name, value, lambda now: now.split() != value.split())

    def sysctl_on(self, name: str) -> None:
        """Set a sysctl to 1, if it is 0: other values mean more than that. Keep it from 0."""
        value = self.read_sysctl(name)
        if value and self.set_sysctl(name, "1" if value == "0" else value):
            self._keep_sysctl(name, "1", lambda now: now == "0")

    def _keep_sysctl(self, name: str, value: str, wrong: Callable[[str], bool]) -> None:
        self.keep(("sysctl", name), Kept(
            f"sysctl {name.replace('/', '.')} = {value}", POLLED,
            lambda: wrong(self.read_sysctl(name)), lambda: self._set_again(name, value)))

    def _set_again(self, name: str, value: str) -> None:
        """Somebody has changed it, and that is what it shall be when we are gone."""
        self.will_undo(what="sysctl", name=name, old=self.read_sysctl(name))
        (Path("/proc/sys") / name).write_text(value)

    def set_sysctl(self, name: str, value: str) -> bool:
        """Set a sysctl, if it is not so already. Returns whether there is such a one."""
        path = Path("/proc/sys") / name
        try:
            old = path.read_text().strip()
        except FileNotFoundError:
            return False
        inherited = self.inherit(what="sysctl", name=name)
        if old.split() == value.split():
            return True
        if inherited:
            path.write_text(value)
            return True
        log.info("sysctl %s: %s, was %s", name.replace("/", "."), value, old)
        self.will_undo(what="sysctl", name=name, old=old)
        path.write_text(value)
        return True

    def read_sysctl(self, name: str) -> str:
        try:
            return (Path("/proc/sys") / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def undo_sysctl(self, change: Change) -> None:
        parts = change["name"].split("/")
        if parts[0] != "net" or ".." in parts:
            raise KeyError(change["name"])  # none that we change
        path = Path("/proc/sys", *parts)
        if path.exists():
            path.write_text(change["old"])
