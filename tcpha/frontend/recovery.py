# SPDX-License-Identifier: GPL-2.0-or-later
"""What back ends have of an earlier run of ours, or of another front end: asked, told, rebuilt."""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from tcpha._fast.fe_worker import FrontEnd
from tcpha._fast.scan import Questions
from tcpha.datapath import Frontend
from tcpha.frontend.peers import Peer, Peers

log = logging.getLogger("tcpha")
REBUILD = 20.0  # seconds after which a back end that does not say what it has is not waited for
# seconds that back ends have to register anew, and another front end for what it has in its hands
REJOIN = 5.0
BUSY_WAIT = 0.01  # seconds for what can wait, at a time, where a link is busy


class Recovery:
    """shared: another front end may have the virtual address, and hand over what we know nothing
    of."""

    def __init__(self, core: FrontEnd, datapath: Frontend, peers: Peers,
                 spawn: Callable[..., asyncio.Task[None]], shared: bool):
        self.core = core
        self.datapath = datapath
        self.peers = peers
        self.spawn = spawn
        self.shared = shared
        # addresses of ours that are here; where nobody else moves them, that need not be looked at
        self.here: frozenset[str] | None = frozenset() if shared else None
        self.rebuilding = bool(datapath.fresh) or shared
        self.since = 0.0
        self.restored = 0  # connections, when it began
        self.whose = "an earlier run"
        self.started = False
        self.registers = False  # back ends may register
        if self.rebuilding:
            core.drop_unknown(True)

    def begin(self) -> None:
        self.started = True
        self.since = asyncio.get_running_loop().time()

    @property
    def holding(self) -> bool:
        """Whether clients' packets come here."""
        return self.here is None or bool(self.here)

    def hold(self, here: frozenset[str]) -> None:
        """Which of the virtual addresses, which somebody else moves, are on this host."""
        if self.here != here:
            self.here = here
            self._rebuild()

    def _rebuild(self) -> None:
        """What another front end hands over, or has, back ends know. Until they have said it,
        packets of connections that we do not know wait, by being dropped. They do so before the
        virtual address comes: there would be no time for it then."""
        self.rebuilding = True
        self.since = asyncio.get_running_loop().time()
        self.restored = self.core.counters()["restored"]
        self.whose = "another front end"
        self.core.drop_unknown(True)
        if self.holding:
            for peer in self.peers.all():
                self._ask(peer)

    def _ask(self, peer: Peer) -> None:
        """Have a back end tell what it has. What began here since the address came is newer than
        what it may have had of the same client's port before."""
        self.core.ask_all(peer.index, asyncio.get_running_loop().time() - self.since)

    def _cut_off(self) -> bool:
        """Whether we reach no back end. Another front end may, and take the virtual address,
        without us losing ours."""
        return self.shared and not any(self.core.backend_stats(p.index)["links"]
                                       for p in self.peers.listed.values())

    def look(self) -> None:
        """Once all back ends have said what they have of an earlier run of ours, which had no time
        to leave us its table, or of another front end, what they do not have is nobody's."""
        now = asyncio.get_running_loop().time()
        if not self.rebuilding or not self.started:
            return
        if not self.holding or self._cut_off():
            self.since = now
            return
        age = now - self.since
        told = all(self.core.backend_stats(p.index)["told"] for p in self.peers.listed.values())
        at_least = REJOIN if self.registers or self.shared else 0.0
        if age <= REBUILD and not (told and age > at_least):
            return
        self.rebuilding = False
        self.core.drop_unknown(False)
        found = self.core.counters()["restored"] - self.restored
        if found:
            log.info("%d connections of %s go on", found, self.whose)

    def met(self, peer: Peer, instance: str, before: dict[str, int]) -> None:
        """There is a new link to a back end. before: what the core knew of it without that."""
        forgetful = peer.missed or peer.instance not in ("", instance)
        asked = not before["links"] and self.holding and (
            self.shared or (self.datapath.fresh and not before["told"]))
        if forgetful:
            peer.missed = False
            self._begin_reminding(peer, asked)
        elif asked:
            self._ask(peer)

    def lost(self, broken: set[int]) -> None:
        """Links have broken: a question, or its answer, may be lost."""
        if self.rebuilding and self.holding:
            for peer in self.peers.listed.values():
                if peer.index in broken:
                    self._ask(peer)
        if not self.rebuilding and self._cut_off():  # by now: a worker may be at it still
            self._rebuild()
        for peer in self.peers.all():
            if self.core.backend_missed(peer.index):  # it took links for alive that we had given up
                self._begin_reminding(peer, False)

    def _begin_reminding(self, peer: Peer, asked: bool) -> None:
        self.spawn("remind", partial(self._remind, peer, asked))

    async def _remind(self, peer: Peer, asked: bool) -> None:
        """Tell a back end which connections it has: it was started anew, or does not know that we
        have not heard of their ends. They may be more than a link's queue has room for. asked: then
        have it tell what else it has, since it knows the ids of what is ours."""
        owned = Questions(self.datapath.table, backend=peer.index)
        while await asyncio.to_thread(owned.find):
            self.core.ask(owned)
            while self._is_busy(peer):
                await asyncio.sleep(BUSY_WAIT)
        if asked:
            self._ask(peer)

    def _is_busy(self, peer: Peer) -> bool:
        return any(up and whose == peer.index and self.core.is_busy(i)
                   for i, whose, up, _ in self.core.links())
