# SPDX-License-Identifier: GPL-2.0-or-later
"""The back ends that the front end knows: their places in the workers' table, and their health."""
from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import Any

from tcpha._fast.fe_worker import ALL_SERVICES, FrontEnd
from tcpha.config import MAX_BACKENDS, Server
from tcpha.config.keys import BE_PORT
from tcpha.control.hello import HelloError
from tcpha.daemon.control_socket import Refused
from tcpha.datapath import Frontend, Path
from tcpha.frontend.drained import Drained
from tcpha.frontend.localnode import INDEX as LOCAL_NODE
from tcpha.frontend.localnode import NAME
from tcpha.net.journal import HostError

log = logging.getLogger("tcpha")
MISSED = 2  # detection intervals without a sign of life
NOBODY_LISTENS = "nothing listens where its configuration says that can take connections"
HOST, PROCESS, UNUSABLE = "host dead", "process dead", "unusable"
# errors that a host's network stack, not its daemon, is to blame for
SILENT = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN}


class Peer:
    """A back end that is or was configured."""

    def __init__(self, index: int, server: Server):
        self.index = index
        self.server = server
        self.health = ""  # as last logged: "up", or what is dead
        self.why = "not connected yet"
        self.cause = PROCESS  # what is dead if there is no control connection
        self.timeout = HOST  # and if an attempt to connect takes too long, at its present step
        self.detail = ""  # how that showed
        self.instance = ""  # of its present run
        self.missed = False  # a connection broke: what it said of ended flows may be lost
        self.task: asyncio.Task[None] | None = None
        self.wake = asyncio.Event()
        self.tried = asyncio.Event()  # at least once, to connect
        self.fastpath = False
        self.path: Path | None = None  # as the datapath knows it
        self.mtu = 0  # that it has told us; 0: none
        self.ends = 0  # the least MTU of both ends' interfaces
        self.vaddrs: set[str] | None = None  # that it serves; None: not known yet


class Peers:
    """All of them. Used in the loop's thread only. interval: of detection, in seconds."""

    def __init__(self, core: FrontEnd, datapath: Frontend, drained: Drained, interval: int):
        self.core = core
        self.datapath = datapath
        self.drained = drained
        self.interval = interval
        self.listed: dict[str, Peer] = {}  # that may get connections, by address
        self.gone: list[Peer] = []
        self.left: dict[str, tuple[int, int]] = dict(datapath.left)

    # Places

    def all(self) -> list[Peer]:
        return [*self.listed.values(), *self.gone]

    def add(self, server: Server) -> Peer:
        for peer in self.gone:  # back again: its flows are still known by this place
            if peer.server.address == server.address:
                self.gone.remove(peer)
                index = peer.index
                break
        else:
            index = self._place(server.address)
        peer = self.listed[server.address] = Peer(index, server)
        # what it said to an earlier run of connections that ended may be lost
        peer.missed = self.core.backend_stats(index)["live"] > 0
        self.core.backend_open(index, server.address)
        if server.address in self.drained:
            self.core.backend_flags(index, draining=ALL_SERVICES)
            log.info("back end %s: still draining", server.address)
        return peer

    def _place(self, address: str) -> int:
        """An index for a new back end. Connections of an earlier run know it by the one it had."""
        if address in self.left:
            index, live = self.left.pop(address)
            self.core.backend_has(index, live)
            return index
        used = {p.index for p in self.all()} | {index for index, _ in self.left.values()}
        free = [i for i in range(MAX_BACKENDS) if i not in used]
        if not free:
            raise Refused(f"more than {MAX_BACKENDS} back ends")
        return free[0]

    def keep_left(self) -> None:
        """Back ends of an earlier run that no server line lists: what they have goes on."""
        for address, (_, live) in list(self.left.items()):
            if live:
                self.remove(self.add(Server(address, BE_PORT)))
            else:
                self.datapath.set_backend(self.left.pop(address)[0], None)

    def remove(self, peer: Peer) -> None:
        """No new connections; the flows that it has go on."""
        del self.listed[peer.server.address]
        if peer.task:
            peer.task.cancel()
        self.core.backend_flags(peer.index, draining=ALL_SERVICES)
        self.gone.append(peer)

    def _forget_gone(self) -> None:
        """Free the places of removed back ends whose last connection has ended."""
        for peer in list(self.gone):
            links = [(i, up) for i, whose, up, _ in self.core.links() if whose == peer.index]
            if self.core.backend_stats(peer.index)["live"]:
                continue
            if not links:
                self.gone.remove(peer)
                self.core.backend_close(peer.index)
                self.datapath.set_backend(peer.index, None)
            for index, up in links:
                if up:
                    self.core.break_link(index)

    def drain(self, address: str, draining: bool, of_file: bool) -> dict[str, Any]:
        """of_file: it has a server line there."""
        peer = self.listed.get(address)
        if peer is None and address in self.drained and not draining:
            self.drained.forget(address)  # it may register again
            return {"server": address, "draining": False, "live": 0}
        if peer is None:
            raise Refused(f"{address} is no server; the servers are "
                          f"{', '.join(self.listed) or 'none'}")
        self.core.backend_flags(peer.index, draining=ALL_SERVICES if draining else 0)
        if draining:
            self.drained.add(address, of_file)
        else:
            self.drained.forget(address)
        log.info("back end %s: %s", address, "draining" if draining else "taking connections again")
        return {"server": address, "draining": draining,
                "live": self.core.backend_stats(peer.index)["live"]}

    # Health

    def failed(self, peer: Peer, error: OSError | HelloError | HostError) -> None:
        """No control connection came about."""
        peer.detail = str(error) or "no answer"
        if isinstance(error, HelloError | HostError):
            peer.cause = UNUSABLE
        elif isinstance(error, TimeoutError) and error.errno is None:
            peer.cause = peer.timeout
        else:
            peer.cause = HOST if error.errno in SILENT else PROCESS
            peer.detail = os.strerror(error.errno or 0)
        self.judge(peer)

    def note_addresses(self, peer: Peer, vaddrs: list[str]) -> None:
        """It serves these. Requests for others are not for it, from its first link on."""
        peer.vaddrs = set(vaddrs)
        self.core.backend_flags(peer.index, lacking=self._unserved(peer)[1])

    def judge_all(self) -> None:
        for peer in self.listed.values():
            self.judge(peer)

    def judge(self, peer: Peer) -> None:
        """Log a change of health, and let the workers know whether the application is there."""
        stats = self.core.backend_stats(peer.index)
        deaf, lacking = self._unserved(peer)
        self.core.backend_flags(peer.index, app_down=deaf, lacking=lacking)
        if self.datapath.fastpath:
            self.datapath.set_down(peer.index, not stats["links"])
        if not stats["links"] and not peer.detail:
            return  # nothing is known yet
        if not stats["links"]:
            health, why = peer.cause, peer.detail
        elif deaf and deaf == self._open():
            health, why = "application dead", NOBODY_LISTENS
        elif deaf | lacking and not self._open() & ~(deaf | lacking):
            health, why = UNUSABLE, self._gaps(deaf, lacking)
        else:
            health, why = "up", self._gaps(deaf, lacking)
        changed = health != peer.health or (health == "up" and why != peer.why)
        peer.health, peer.why = health, why
        if changed:
            say = log.info if health == "up" and not why else log.warning
            say("back end %s: %s%s", peer.server.address, health, f" ({why})" if why else "")

    def _open(self) -> int:
        """Bits of the services that take new connections, by number."""
        return sum(1 << number for number, _, _, listening, _ in self.core.services() if listening)

    def _unserved(self, peer: Peer) -> tuple[int, int]:
        """Bits of services that it does not serve: those for which nothing listens there, and those
        whose address it does not have."""
        lacking = sum(1 << number for number, vaddr, *_ in self.core.services()
                      if peer.vaddrs is not None and vaddr not in peer.vaddrs)
        deaf = self._open() & ~self.core.backend_listens(peer.index) if self.interval else 0
        return deaf, lacking

    def _gaps(self, deaf: int, lacking: int) -> str:
        """What a back end does not serve, though it is up."""
        names = {number: f"{vaddr}:{port}" for number, vaddr, port, *_ in self.core.services()}
        return "; ".join(
            f"{what} {', '.join(name for number, name in names.items() if bits >> number & 1)}"
            for what, bits in (("nothing listens there for", deaf & ~lacking),
                               ("it has no vaddr for", lacking & self._open())) if bits)

    def look_at_links(self) -> set[int]:
        """Links broke, or a back end did not answer an offer in time. Returns whose links broke."""
        for peer in self.listed.values():
            if self.core.backend_stats(peer.index)["dead"]:
                self._give_up(peer, "did not answer a handoff in time")
        errors = {whose: self.core.link_error(i) for i, whose, up, _ in self.core.links()
                  if not up}
        broken = {whose for _, whose in self.core.reap_links()}
        for peer in self.listed.values():
            peer.missed |= peer.index in broken
            if errors.get(peer.index) in SILENT:
                peer.cause, peer.detail = HOST, os.strerror(errors[peer.index])
            self.judge(peer)
        return broken

    def _give_up(self, peer: Peer, why: str) -> None:
        """Break all links to a back end: what it may still find in them is void."""
        links = [i for i, whose, up, _ in self.core.links() if up and whose == peer.index]
        if links:
            peer.detail = why
            # its kernel acknowledges what we send, or does not even do that
            peer.cause = PROCESS if any(self.core.link_unacked(i) == 0 for i in links) else HOST
        self.core.backend_flags(peer.index, dead=True)
        for index in links:
            self.core.break_link(index)

    def detect(self, interval: int) -> None:
        """Give up back ends that gave no sign of life for MISSED intervals. 0: never, and whether
        the application listens is not looked at."""
        if bool(interval) != bool(self.interval):
            self.interval = interval
            self.judge_all()
        self.interval = interval
        self._forget_gone()
        if not interval:
            return
        for peer in self.listed.values():
            ages = [age for _, whose, up, age in self.core.links() if up and whose == peer.index]
            if ages and min(ages) > MISSED * interval:
                self._give_up(peer, f"silent for {min(ages):.0f} seconds")

    # For people, and for tables

    def live(self) -> int:
        return sum(self.core.backend_stats(p.index)["live"] for p in self.all())

    def dead(self) -> set[int]:
        return {p.index for p in self.all() if self.core.backend_stats(p.index)["links"] == 0}

    def address(self, index: int) -> str:
        if index == LOCAL_NODE:
            return NAME
        return next((p.server.address for p in self.all() if p.index == index), "?")

    def addresses(self) -> list[str]:
        """By index."""
        out = ["?"] * (LOCAL_NODE + 1)
        for peer in self.all():
            out[peer.index] = peer.server.address
        out[LOCAL_NODE] = NAME
        return out

    def channels(self) -> list[dict[str, Any]]:
        """Control connections: whose, whether up, and seconds since a sign of life."""
        return [{"server": self.address(whose), "up": up, "silent": age}
                for _, whose, up, age in self.core.links() if whose != LOCAL_NODE]

    def row(self, peer: Peer, registered: bool) -> dict[str, Any]:
        stats = self.core.backend_stats(peer.index)
        down = peer.health != "up"
        state = "draining" if stats["draining"] else "down" if down else "up"
        reason = f"{peer.health}: {peer.why}" if peer.health and down else peer.why
        return {"server": peer.server.address, "port": peer.server.port, "state": state,
                "reason": reason, "connperbe": stats["links"],
                "packet_path": stats["fast"], "mtu": peer.path.mtu if peer.path else 0,
                "registered": registered, "live": stats["live"], "handed": stats["handed"],
                "refused": stats["refused"], "returned": stats["returned"],
                "closed": stats["closed"]}
