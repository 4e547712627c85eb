# SPDX-License-Identifier: GPL-2.0-or-later
"""What others take away from a host while we run is put back at once, and said.

Network managers, agents of container networks and administrators reload what they know of, and
what we added is none of that. The kernel tells of links, addresses, routes, tc and nft; sysctls and
tcx are looked at.
"""
from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tcpha.net.host import Host
from tcpha.net.journal import LINK, NFT, POLLED, PROGRAM, ROUTE, SLOW, Kept
from tcpha.tasks import died, persist

log = logging.getLogger("tcpha")
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
RTNLGRP_LINK, RTNLGRP_TC, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, NFNLGRP_NFTABLES = 1, 4, 5, 7, 7
GROUPS = {LINK: (NETLINK_ROUTE, (RTNLGRP_LINK, RTNLGRP_TC, RTNLGRP_IPV4_IFADDR)),
          ROUTE: (NETLINK_ROUTE, (RTNLGRP_IPV4_ROUTE,)),
          NFT: (NETLINK_NETFILTER, (NFNLGRP_NFTABLES,))}
PAUSE_FIRST, PAUSE_MOST = 0.02, 0.5  # seconds between two looks; doubled while there is much told
SLOWLY = 10.0  # seconds between two dear looks, which are at all there is
QUIET = 60.0   # seconds between two lines about the same thing
BEFORE_US = "have it let them pass (TC_ACT_UNSPEC, TCX_NEXT, XDP_PASS), or attach it behind ours"


@dataclass
class Loss:
    """What became of something that was missing. error: why it is not back."""

    times: int = 0
    last: float = 0.0
    said: float = float("-inf")
    untold: int = 0
    error: str = ""


class Keeper:
    """Belongs to the loop's thread but for look(), which runs in another one: it asks netlink.
    also: called after each look at links, there."""

    def __init__(self, host: Host, also: Callable[[], None]):
        self.host = host
        self.also = also
        self.losses: dict[str, Loss] = {}
        self.in_front: dict[str, list[str]] = {}  # by interface
        self.kinds = {LINK}  # to look at next; there was a time when nobody watched
        self.wake = asyncio.Event()
        self.ending = asyncio.Event()
        self.sockets: list[socket.socket] = []
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        loop = asyncio.get_running_loop()
        for kind, (protocol, groups) in GROUPS.items():
            if kind == ROUTE and ROUTE not in self.host.followers:
                continue  # routers have many
            try:
                s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC
                                  | socket.SOCK_NONBLOCK, protocol)
            except OSError:
                continue  # a kernel without nf_tables has none of its tables
            self.sockets.append(s)
            s.bind((0, 0))
            for group in groups:
                s.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            loop.add_reader(s.fileno(), self._told, s, kind)
        self._ask(LINK, NFT, ROUTE)
        self.task = loop.create_task(persist("keeper", self._run))

    async def end(self) -> None:
        """When this returns nothing is put back any more."""
        for s in self.sockets:
            asyncio.get_running_loop().remove_reader(s.fileno())
            s.close()
        self.ending.set()
        self.wake.set()
        if self.task:
            await asyncio.gather(self.task, return_exceptions=True)

    def tick(self) -> None:
        """To be called every second."""
        if any(k.missing() for k in list(self.host.kept.values()) if k.kind == POLLED):
            self._ask(POLLED)
        self._ask(PROGRAM)

    def look_at_all(self) -> None:
        """To be called every SLOWLY seconds."""
        self._ask(LINK, NFT, ROUTE, SLOW)

    def _ask(self, *kinds: str) -> None:
        self.kinds |= {*kinds}
        self.wake.set()

    def _told(self, s: socket.socket, kind: str) -> None:
        """Something has changed; what, the look will show."""
        while True:
            try:
                s.recv(1)
            except BlockingIOError:
                break
            except OSError:
                continue  # ENOBUFS: more than there was room for
        self._ask(kind)

    async def _run(self) -> None:
        pause = PAUSE_FIRST
        while not self.ending.is_set():
            pause = min(pause * 2, PAUSE_MOST) if self.wake.is_set() else PAUSE_FIRST
            await self.wake.wait()
            self.wake.clear()
            kinds, self.kinds = self.kinds, set()
            try:
                await asyncio.to_thread(self.look, kinds)
            except Exception as error:  # no thread to be had: the next look may have one
                died("keeper", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), pause)

    def look(self, kinds: set[str]) -> None:
        """Put back what is missing, and let follow what has to."""
        if LINK in kinds:
            kinds = kinds | {PROGRAM}
            self._try("interfaces", self._join_late)
        for kept in list(self.host.kept.values()):
            if kept.kind in kinds:
                self._try(kept.what, partial(self._look_at, kept))
        if LINK in kinds:
            self._try("interfaces", self._join_late)  # one of the same name as one that is gone
            self._try("tc", self._look_in_front)
            self._try("links", self.also)
        for kind in kinds:
            for what, work in self.host.followers.get(kind, ()):
                self._try(what, work)

    def _join_late(self) -> None:
        for index in self.host.late():
            try:
                self.host.join(index)
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.ENXIO):  # gone again
                    raise

    def _try(self, what: str, work: Callable[[], None]) -> None:
        loss = self.losses.get(what)
        try:
            work()
        except Exception as error:  # whatever it is, there are other things to look at
            loss = self.losses.setdefault(what, Loss())
            if not loss.error:
                log.error("%s: cannot be put in place: %s", what, error)
            loss.error = str(error)
        else:
            if loss:
                loss.error = ""

    def _look_at(self, kept: Kept) -> None:
        if kept.missing():
            kept.restore()
            if not kept.late:
                self._back(kept.what)

    def _look_in_front(self) -> None:
        """What comes before us may keep packets, and we see nothing."""
        found = self.host.in_front()
        for name, before in found.items():
            if before and before != self.in_front.get(name):
                log.warning("tc on %s: %s before ours: packets that it takes or accepts do not "
                            "reach us; %s", name, " and ".join(before), BEFORE_US)
        self.in_front = found

    def _back(self, what: str) -> None:
        now = time.monotonic()
        loss = self.losses.setdefault(what, Loss())
        loss.times += 1
        loss.untold += 1
        loss.last = now
        if now < loss.said + QUIET:
            return
        often = f", {loss.untold} times since this was said" if loss.untold > 1 else ""
        log.warning("%s: somebody took it away%s; it is back", what, often)
        loss.said, loss.untold = now, 0

    def report(self) -> dict[str, Any]:
        """What is missing and why, and what was put back: for 'status' and 'doctor'."""
        now = time.monotonic()
        losses = dict(self.losses)
        return {"missing": [{"what": what, "why": x.error} for what, x in losses.items()
                            if x.error],
                "taken": [{"what": what, "times": x.times, "ago": round(now - x.last, 1)}
                          for what, x in losses.items() if x.times],
                "in_front": [{"interface": name, "what": before}
                             for name, before in dict(self.in_front).items() if before]}
