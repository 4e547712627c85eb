# SPDX-License-Identifier: GPL-2.0-or-later
"""The back end: its set-up, its life, and its commands."""
from __future__ import annotations

import asyncio
import logging
import socket
import time
from functools import partial
from typing import Any

from tcpha._fast.be_worker import FAST, BackEnd
from tcpha._fast.core import MOST_LINKS
from tcpha._fast.message import clock
from tcpha._fast.rows import ADOPTED, AdoptedRows
from tcpha.application import Application, Watch, ways_to
from tcpha.backend import arp
from tcpha.backend.registration import Registration
from tcpha.backend.tunnels import Tunnels
from tcpha.config import Config
from tcpha.control.hello import (
    PATIENCE,
    Hello,
    HelloError,
    accept_each,
    answer,
    check,
    give_up_after,
    new_instance,
)
from tcpha.daemon.control_socket import Command, Table
from tcpha.daemon.logs import MEMBERS, Sparing
from tcpha.daemon.periodic import EACH_TICK, TICK, Every
from tcpha.daemon.rundir import RunDir
from tcpha.daemon.service import SECOND, Service
from tcpha.daemon.strangers import Strangers
from tcpha.daemon.web import Pages
from tcpha.datapath import Backend, allow_adoption
from tcpha.datapath.opening import open_backend
from tcpha.net.journal import HostError
from tcpha.undoing import Undoing

log = logging.getLogger("tcpha")
LEAVE = 2.0  # seconds for front ends to hear that we go; one that is stalled is not waited for
SILENT = 4.0  # seconds without a sign of life after which a front end is suspected to be gone
UNHEARD = 5.0  # seconds for which its kernel may acknowledge nothing


class BackEndService(Service):
    role = "be"
    core: BackEnd
    datapath: Backend

    def __init__(self, config: Config, run: RunDir, foreground: bool):
        super().__init__(config, run, foreground)
        self.core = BackEnd(config.maxclients)
        self.instance = new_instance()
        self.frontends: list[tuple[str, str]] = []  # (instance, address) by peer index
        self.know_places: set[int] = set()  # links of those that know the message PLACE
        self.strangers = Strangers("hello", self.spawn)
        self.members = Sparing("front ends", logging.INFO, MEMBERS)
        self.losses = Sparing("front ends lost", most=MEMBERS)
        self.silent: set[int] = set()  # links, when we looked last
        self.searched = False  # for what an earlier run adopted
        self.searching = asyncio.Lock()
        self.registration = Registration(config, self.secret, self.instance)
        self.registering: asyncio.Task[None] | None = None
        self.leaving: asyncio.Task[None] | None = None
        self.checking: asyncio.Task[None] | None = None  # what has ended, for who is new

    def lacking(self) -> str:
        if self.host.holder(self.config.raddr) is not None:
            return ""
        return f"raddr {self.config.raddr} is no address of this host; mend it or add the address"

    def open(self) -> None:
        config, host = self.config, self.host
        if lacking := self.lacking():
            raise HostError(lacking)
        self.watch = Watch(config, host, ways_to(config, config.places))
        arp.set_up(config, host)
        allow_adoption(host)
        self.listener = self._listen()
        try:
            self.datapath = open_backend(config, host)
            self.tunnels = Tunnels(self.datapath, time.monotonic())
            for vaddr in config.vaddrs:  # only now, behind the guard
                host.add_address(vaddr, lambda: socket.if_nametoindex("lo"))
            self.core.start(self.datapath.table)
        except BaseException:
            self.listener.close()
            raise

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.config.raddr, self.config.port))
        except OSError as error:
            listener.close()
            raise HostError(
                f"cannot listen on {self.config.raddr}:{self.config.port}: {error.strerror}; stop "
                "what holds the port or change 'port'") from None
        listener.listen(64)
        listener.setblocking(False)
        return listener

    async def begin(self) -> None:
        self._look_at_applications()
        self.spawn("accept", lambda: accept_each(self.listener, self._meet))
        if self.config.dregister:
            self.registering = self.spawn("registration", self.registration.run)

    async def shut(self) -> None:
        undoing = Undoing()
        undoing.push("sock_diag", self.watch.close)
        undoing.push("listener", self.listener.close)
        if not self.leaving or self.leaving.cancelled():  # by who could not wait for its end
            undoing.push("packet path", self._leave)
        await undoing.undo()

    def periodic(self) -> list[Every]:
        return [*super().periodic(), Every(EACH_TICK, self._look_if_incomplete),
                Every(SECOND, self._look_at_applications), Every(SECOND, self._look_at_frontends)]

    def _look_at_frontends(self) -> None:
        """One that is gone, or hangs, must not pass for alive. It answers our PING each second. Two
        looks have to find it silent: if it was we who stood still, there is something to read by
        the second one."""
        links = self.core.links()
        silent = {i for i, _, up, age in links if up and age > SILENT}
        for index in silent & self.silent:
            self.core.break_link(index)
        self.silent = silent
        self.tunnels.look({self.frontends[peer][1] for _, peer, up, _ in links if up}, self._owns,
                          time.monotonic())

    def _owns(self, address: str) -> bool:
        """Whether a front end has, or may have, connections here. Nobody has told us yet of one
        that an earlier run met."""
        self.core.catch_up()
        met = [n for n, (_, a) in enumerate(self.frontends) if a == address]
        return not met or any(self.core.has_any_of(n) for n in met)

    def _look_if_incomplete(self) -> None:
        if not self.watch.complete:  # clients are being turned away
            self._look_at_applications()

    def _look_at_applications(self) -> None:
        """Tell front ends when one begins to listen or no longer does."""
        for application in self.watch.look(self.datapath):
            self._report(application)
            if application.usable != bool(application.said & 1) or not application.said:
                application.said = clock() << 1 | application.usable
                self._say(application)

    def _report(self, application: Application) -> None:
        found = application.found
        assert found is not None
        where = f"{application.address}:{application.port}"
        if found.trouble:
            level = logging.INFO if application.optional and found.absent else logging.WARNING
            log.log(level, "%s; %s", found.trouble, found.remedy)
            return
        if not application.said & 1:
            log.info("the application listens on %s", where)
        if found.device:
            log.info("the application on %s is bound to the device %s", where,
                     socket.if_indextoname(found.device))

    def _say(self, application: Application) -> None:
        if application is self.watch.first:
            self.core.tell_server(application.said)
        for way in application.ways:
            self.core.tell_place(application.said, way.vaddr, way.vport, self.know_places)

    def _places(self) -> list[list[Any]]:
        return [[way.vaddr, way.vport, application.said]
                for application in self.watch.applications for way in application.ways]

    def _mtu(self, address: str) -> int:
        """Of the interface at which a front end reaches us."""
        index = self.host.holder(address)
        return 0 if index is None else self.host.mtu(index)

    def _meet(self, sock: socket.socket, address: str) -> None:
        self.strangers.meet(sock, address, self._greet)

    async def _judge(self, hello: Hello) -> None:
        if self.unloading:
            raise HelloError("this back end is unloading")
        if len(self.core.links()) >= MOST_LINKS:
            raise HelloError(f"this back end has {MOST_LINKS} control connections already; lower "
                             "connperbe")
        check(hello, "fe", self.config.vaddrs)

    async def _greet(self, sock: socket.socket, address: str) -> None:
        mine = Hello("be", self.config.vaddr, self.config.port,
                     datapath=self.datapath.name, instance=self.instance,
                     fastpath=self.datapath.fastpath, server=self.watch.first.said,
                     mtu=self._mtu(sock.getsockname()[0]), vaddrs=list(self.config.vaddrs),
                     places=self._places())
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            give_up_after(sock, UNHEARD)
            async with asyncio.timeout(PATIENCE):
                hello, channel = await answer(sock, mine, self.secret, self._judge)
        except (TimeoutError, OSError, HelloError) as error:
            self.strangers.refuse(address, str(error) or "no HELLO")
            return
        index = self._index(hello.instance, address)
        try:
            link = self.core.add_link(sock, index, hello.clock, channel)
        except RuntimeError as error:
            self.strangers.refuse(address, error)
            return
        (self.know_places.add if hello.ports else self.know_places.discard)(link)
        if self._places() != mine.places:  # one has changed since our HELLO
            for application in self.watch.applications:
                self._say(application)
        self.tunnels.meet(address, hello.forward == "tunnel", time.monotonic())
        if self.checking:
            self.checking.cancel()  # who comes now is told of all, too
        self.checking = self.spawn("check", self._check)

    async def _check(self) -> None:
        at: int | None = 0
        while at is not None:
            at = self.core.check(at)
            await asyncio.sleep(0)

    def _index(self, instance: str, address: str) -> int:
        """The index of a front end. The packet path has FAST of them: there, one that is gone, and
        has left no connection here, gives way to a new one, or to one that had to go without."""
        known = [a for _, a in self.frontends]
        news = "" if (instance, address) in self.frontends else \
            "a new run" if address in known else "connected"
        linked = {peer for _, peer, _, _ in self.core.links()}
        index = known.index(address) if address in known else len(known)
        if index >= FAST and index not in linked:
            index = next((i for i in range(FAST)
                          if i not in linked and self.core.release(i)), index)
            if index < FAST:
                self.tunnels.forget(known[index])
            elif self.datapath.fastpath:
                news = f"{news}; {FAST} others have the packet path, it has to go without"
        self.frontends[index:index + 1] = [(instance, address)]
        if news:
            self.members.say(f"front end {address}: {news}")
        return index

    async def _tell(self, index: int, gen: int, peer: int, number: int) -> None:
        """A front end asks for earlier connections. The first time we may not know all of them
        either, but the kernel does."""
        async with self.searching:
            if not self.searched:
                await self._search(peer)
        at: int | None = 0
        while at is not None:
            begun, at = at, self.core.tell_flows(index, gen, number, at)
            await asyncio.sleep(TICK if at == begun else 0)

    async def _search(self, peer: int) -> None:
        self.core.catch_up()
        try:
            await asyncio.to_thread(self.core.claim, peer)
            self.searched = True
        except OSError as error:
            log.warning("%s; what an earlier run adopted is not found", error)

    def on_notice(self) -> None:
        for question in self.core.asked():
            self.spawn("tell", partial(self._tell, *question))
        for _, peer in self.core.reap_links():
            if not any(up and p == peer for _, p, up, _ in self.core.links()):
                self.losses.say(f"front end {self.frontends[peer][1]}: control connections lost")

    def live(self) -> int:
        if self.unloading:  # what the packet path has adopted up to now counts
            self.core.catch_up()
        leaving = self.leaving is not None and not self.leaving.done()
        return int(self.core.counters()["live"]) + int(leaving)

    def begin_unload(self) -> None:
        if self.registering:
            self.registering.cancel()
        self.core.refuse_all()
        if not self.leaving:
            self.leaving = self.spawn("leave", self._leave)

    async def _leave(self) -> None:
        """A request on its way when we go would be lost: let front ends hear that they must not
        send more. Each control connection is read in order, so what answers a PING has heard."""
        if not self.datapath.fastpath:
            return
        loop = asyncio.get_running_loop()
        begin, said = loop.time(), clock()
        self.core.leave_fast_path()
        for index, _, up, _ in self.core.links():
            if up:
                self.core.ping(index)
        while loop.time() < begin + LEAVE and any(
                up and self.core.ponged(i) < said for i, _, up, _ in self.core.links()):
            await asyncio.sleep(TICK / 4)
        await asyncio.sleep(TICK)  # what a worker there had in its hands when it heard

    async def apply(self, config: Config) -> None:
        self.config = config
        self.set_level(config.dbglevel)
        self.workers.limits(config.minspareservers, config.maxspareservers)
        self.files.refresh()

    def commands(self) -> dict[str, Command]:
        return super().commands() | {"status": self.status, "conns": self.conns}

    async def status(self) -> dict[str, Any]:
        config = self.config
        self.core.catch_up()
        return await super().status() | {
            "raddr": config.raddr, "vaddr": config.vaddr, "uaddr": config.uaddr,
            "port": config.port, "redirectaddr": config.redirectaddr,
            "redirectport": config.redirectport, "datapath": self.datapath.name,
            "chosen": self.datapath.chosen,
            "fastpath": "on" if self.datapath.fastpath else "off",
            "dregister": config.dregister, "registered": self.registration.registered,
            "application": "listening" if self.watch.first.usable else "dead",
            "trouble": self.watch.first.trouble, "vaddrs": list(config.vaddrs),
            "places": [way._asdict() | {"listening": one.usable, "trouble": one.trouble,
                                        "optional": one.optional}
                       for one in self.watch.applications for way in one.ways],
            "live": self.live(), "counters": self.core.counters(),
            "packets": self.datapath.counters(),
            "frontends": [{"address": a, "tunnel": a in self.tunnels.seen, "connections": sum(
                1 for _, p, up, _ in self.core.links() if up and p == n)}
                for n, (_, a) in enumerate(self.frontends)]}

    def pages(self) -> Pages:
        from tcpha.admin import metrics
        return {"/metrics": (metrics.CONTENT_TYPE, lambda: metrics.text(
            lambda: metrics.backend(*self.ask_loop(self.status))))}

    async def conns(self) -> Table:
        self.core.catch_up()
        return Table(ADOPTED, AdoptedRows(self.core, [a for _, a in self.frontends]))
