# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes to the host, each undone when the daemon stops, and what has to stay as it is till then.

Every change is written to a journal before it is made, so that a daemon that was killed is cleaned
up after by the next one with the same run directory.
"""
from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from tcpha.owner import by_owner

log = logging.getLogger("tcpha")
Change = dict[str, Any]
# how a loss of what is kept shows; routes are not kept, only followed
LINK, NFT, POLLED, PROGRAM, SLOW, ROUTE = "link", "nft", "polled", "program", "slow", "route"


class HostError(Exception):
    """The host cannot be set up; the message says what to do."""


class Kind(NamedTuple):
    """Of changes. keys: what tells those of this kind apart."""

    keys: tuple[str, ...]
    undo: Callable[[Change], None]


@dataclass(frozen=True)
class Kept:
    """Something that has to stay as it is while we run. what: its name, for people. kind: LINK or
    NFT, a notification tells of its loss; POLLED, a cheap look each second does; PROGRAM, LINK's
    notifications may, and a look each second, which may have to wait; SLOW, a dear one does.
    """

    what: str
    kind: str
    missing: Callable[[], bool]
    restore: Callable[[], None]
    late: bool = False  # it is needed only since others have come: nobody took it away


def one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """The journal is written by the keeper's thread, too."""
    @wraps(method)
    def call(self: Changes, *args: Any, **kw: Any) -> Any:
        with self.lock:
            return method(self, *args, **kw)
    return call


def changes_in(journal: Path) -> list[Change]:
    """What a daemon has changed, oldest first. Raises ValueError."""
    with by_owner():
        return list(json.loads(journal.read_text())) if journal.exists() else []


class Changes:
    """Of one daemon. Several threads may use it. kinds: by the name that the journal has."""

    def __init__(self, journal: Path, kinds: dict[str, Kind]):
        self.journal = journal
        self.kinds = kinds
        self.lock = threading.RLock()
        self.undo: list[Change] = []
        self.inherited: list[Change] = []
        # by kind of the change and what tells it apart
        self.kept: dict[tuple[Any, ...], Kept] = {}
        self.followers: dict[str, list[tuple[str, Callable[[], None]]]] = {}

    def identity(self, change: Change) -> tuple[Any, ...]:
        return change["what"], *(change[key] for key in self.kinds[change["what"]].keys)

    def recover(self) -> None:
        """Learn what a killed predecessor left. It stays in force until there is something in its
        place, so that its connections go on: see settle()."""
        try:
            left = changes_in(self.journal)
        except ValueError:
            log.warning("%s is damaged; what a killed daemon left behind stays", self.journal)
            left = []
        if left:
            log.info("taking over from an earlier run that was killed")
        self.undo = list(left)
        self.inherited = list(left)

    def settle(self) -> None:
        """All of ours is in force: undo what else a killed predecessor changed."""
        self._forget(self.inherited)

    def forget_rules(self) -> None:
        """New rules are in force: take those of a killed predecessor away."""
        self._forget([change for change in self.inherited if change["what"] == "rules"])

    @one_at_a_time
    def _forget(self, changes: list[Change]) -> None:
        for change in reversed(list(changes)):
            self.inherited.remove(change)
            self.undo.remove(change)
            self._undo(change)
        self._write()

    @one_at_a_time
    def inherit(self, **change: Any) -> Change | None:
        """A predecessor's change, which is ours from now on; None: there is none like it."""
        for old in self.inherited:
            if all(old.get(key) == value for key, value in change.items()):
                self.inherited.remove(old)
                self.undo.remove(old)
                self.undo.append(old)
                self._write()
                return old
        return None

    @one_at_a_time
    def will_undo(self, **change: Any) -> None:
        """Note a change that is about to be made, in the place of one that has to be made again."""
        for n, old in enumerate(self.undo):
            if self.identity(old) == self.identity(change) and old not in self.inherited:
                self.undo[n] = change
                break
        else:
            self.undo.append(change)
        self._write()

    def keep(self, key: tuple[Any, ...], kept: Kept) -> None:
        """See to it that something stays until it is undone (see net/keeper.py). key: the identity
        of its change, whether or not one had to be made."""
        self.kept[key] = kept

    def follow(self, kind: str, what: str, work: Callable[[], None]) -> None:
        """Have something done whenever there may be news of a kind. It may wait for netlink."""
        self.followers.setdefault(kind, []).append((what, work))

    @one_at_a_time
    def forget(self, *key: Any) -> None:
        """What was kept is gone for good, and there is nothing to be undone."""
        self.kept.pop(key, None)
        self.undo[:] = [change for change in self.undo if self.identity(change) != key]
        self._write()

    def _undo(self, change: Change) -> None:
        try:
            self.kept.pop(self.identity(change), None)
            self.kinds[change["what"]].undo(change)
        except Exception as error:  # whatever it is, there are others to undo
            log.warning("cannot undo %s: %s", change, error)

    def _write(self) -> None:
        scratch = self.journal.with_suffix(".new")
        with by_owner():
            with open(scratch, "w") as f:
                json.dump(self.undo, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(scratch, self.journal)

    def _write_undone(self) -> None:
        """What is in the journal and undone already does no harm to who undoes it again."""
        try:
            self._write()
        except OSError as error:
            log.debug("%s: %s", self.journal, error.strerror)

    def remove_journal(self) -> None:
        with by_owner():
            for file in (self.journal, self.journal.with_suffix(".new")):
                file.unlink(missing_ok=True)

    @one_at_a_time
    def restore_to(self, mark: int) -> None:
        """Undo all changes but the first 'mark' ones."""
        while len(self.undo) > mark:
            self._undo(self.undo.pop())
            self._write_undone()

    @one_at_a_time
    def restore_since(self, before: list[Change]) -> None:
        """Undo what is not in an earlier copy of our changes, whatever became of those in it."""
        for change in [c for c in reversed(self.undo) if not any(c is b for b in before)]:
            self.undo.remove(change)
            self._undo(change)
            self._write_undone()
