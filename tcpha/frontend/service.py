# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end: its set-up, its life, and its commands."""
from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Iterable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.fe_worker import FrontEnd
from tcpha._fast.rows import FLOWS, FlowRows
from tcpha._fast.scan import Questions
from tcpha.config import ANY, Config
from tcpha.daemon import logs
from tcpha.daemon.control_socket import Command, Refused, Table
from tcpha.daemon.periodic import EACH_TICK, TICK, Every
from tcpha.daemon.rundir import RunDir
from tcpha.daemon.service import SECOND, Service, number
from tcpha.daemon.table_file import TableFile
from tcpha.daemon.web import Pages, as_json
from tcpha.datapath import Frontend
from tcpha.datapath.opening import open_frontend
from tcpha.frontend.drained import Drained
from tcpha.frontend.localnode import LocalNode
from tcpha.frontend.registration import Registrar
from tcpha.frontend.registry import Registry
from tcpha.frontend.services import Listeners, Services, bind, close
from tcpha.net.announcer import Announcer
from tcpha.net.journal import HostError
from tcpha.net.pathmtu import PathMtu
from tcpha.undoing import Undoing, each

log = logging.getLogger("tcpha")
MOVE = 6.0  # seconds for somebody else to take the virtual address away when we stop
PAGE = Path(__file__).with_name("status.html")
SILENT = 1.0  # seconds after which a client that has not sent its request gets a socket of ours
DOUBT = 5.0  # seconds of silence after which a back end is asked whether it got a request
SPARE_DESCRIPTORS = 1024  # for all but clients: control connections, maps, files
SLOW_FOR = 300.0  # seconds for which the slowest handoffs are remembered
DEAD_IDLE = 60.0  # seconds of silence after which a dead back end's flow is forgotten


class FrontEndService(Service):
    role = "fe"
    core: FrontEnd
    datapath: Frontend
    TROUBLES: ClassVar[dict[str, tuple[str, str]]] = {
        **Service.TROUBLES,
        "no_descriptors": ("out of file descriptors: clients wait in the backlog",
                           "raise LimitNOFILE or lower maxclients"),
        "table_full": ("the flow table is full: connections are answered 503",
                       "raise maxflows or lower idletimeout"),
        "access_lost": ("the accesslog cannot be written: lines are lost",
                        "make room or mend the path")}
    reloadable = Service.reloadable | {
        "vaddr", "port", "listen", "server", "rule", "headlimit", "headtimeout", "idletimeout",
        "dtcinterval", "accesslog", "verdictcache"}

    def __init__(self, config: Config, run: RunDir, foreground: bool):
        super().__init__(config, run, foreground)
        self.core = FrontEnd(config.maxclients, config.headlimit, config.headtimeout)
        self.dtcinterval = config.dtcinterval
        self.wary = False
        self.table_full = 0
        self.asked = time.monotonic()
        self.emptying = False  # the accept queue, before we unload
        self.began = time.monotonic()
        self.table: TableFile | None = None
        self.path_mtu: PathMtu | None = None

    def _allow_descriptors(self, count: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
        if hard < count:
            log.warning("maxclients %d needs %d file descriptors, and the limit is %d; raise "
                        "LimitNOFILE or lower maxclients", self.config.maxclients, count, hard)

    def open(self) -> None:
        config, host = self.config, self.host
        self._allow_descriptors(config.maxclients + SPARE_DESCRIPTORS)
        self.homes: dict[str, str] = {}  # interfaces, by virtual address
        self._find_homes(config.vaddrs)
        self.datapath = open_frontend(config, host)
        log.info("forward %s", config.forward)
        try:
            # only now: our stack would answer packets of connections that back ends have with a RST
            self._add_addresses(config.vaddrs)
            self._serve_at()
        except BaseException:
            self.datapath.close()
            raise
        self.registry = Registry(self.core, self.datapath, host, config, self.secret, self.spawn,
                                 Drained(self.run_dir.path / f"{self.run_dir.name}.drained"))
        assert config.matcher is not None  # load() sees to that
        self.registry.configure(config, config.matcher)
        self.registry.peers.keep_left()
        self.registrations = self._registrations() if self._registers() else None
        self.registry.recovery.registers = self.registrations is not None

    def _serve_at(self) -> None:
        config = self.config
        listeners = bind(self.host, config.services)
        try:
            self.announce(self.look_at_places())
            self._open_access_log(config.accesslog)
            self.local = LocalNode(config, self.core, self.datapath, self.host)
            self.core.start(self.datapath.table)
            self.services = Services(self.core, self.datapath, self.spawn)
            self.services.open(listeners)
        except BaseException:
            close(listeners)
            raise

    def _find_homes(self, vaddrs: Iterable[str]) -> None:
        """Raises HostError."""
        for vaddr in vaddrs:
            if vaddr not in self.homes:
                self.homes[vaddr] = self.host.interface(self._device(vaddr))

    def _add_addresses(self, vaddrs: Iterable[str]) -> None:
        if self.config.announce == "off":
            return
        for vaddr in vaddrs:
            where = partial(self._device_now, vaddr)
            self.announcers.append(Announcer(self.host, vaddr, where))
            self.host.add_address(vaddr, where)

    def _device(self, vaddr: str) -> int:
        """The interface for a virtual address: raddr's, else the one whose network holds it."""
        if self.config.raddr != ANY:
            index = self.host.holder(self.config.raddr)
            if index is None:
                raise HostError(f"raddr {self.config.raddr} is no address of this host; mend it or "
                                "add the address")
            return index
        index = self.host.holder(vaddr)
        return index if index is not None else self.host.route(vaddr).ifindex

    def lacking(self) -> str:
        try:
            for vaddr in self.config.vaddrs:
                self._device(vaddr)
        except HostError as error:
            return str(error)
        return ""

    def _device_now(self, vaddr: str) -> int | None:
        """The same while we run, as it may change: None while there is none. Without raddr, it is
        where it was: the address itself, once a device of ours has it, shows another one."""
        try:
            if self.config.raddr != ANY:
                return self._device(vaddr)
            holder = self.host.holder(vaddr)
            return socket.if_nametoindex(self.homes[vaddr]) if holder is None else holder
        except (HostError, OSError):
            return None

    def _registers(self) -> bool:
        return self.secret is not None or self.config.registration == "open"

    def _registrations(self) -> socket.socket | None:
        """Listen for back ends that register, on our own port at our real address."""
        address = self.config.raddr
        if address == ANY:
            device = self._device(self.config.vaddr)
            address = self.host.address_beside(device, self.config.vaddr) or ANY
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, self.config.port))
        except OSError as error:
            listener.close()
            log.warning("back ends cannot register: cannot listen on %s:%d: %s; stop what holds "
                        "the port", address, self.config.port, error.strerror)
            return None
        listener.listen(64)
        listener.setblocking(False)
        return listener

    async def begin(self) -> None:
        self.table = TableFile(self.run_dir.path / "tcpha_fe_conn", self._table)
        self.local.begin(self.forward_log)
        if self.config.forward == "tunnel":
            self.path_mtu = PathMtu(self.registry.connector.look_at_mtus)
        await self.registry.begin()
        self.services.begin()
        if self.registrations:
            self.spawn("accept", Registrar(self.registrations, self.registry, self.secret,
                                           self.spawn).run)

    async def shut(self) -> None:
        undoing = Undoing()
        if self.path_mtu:
            undoing.push("ICMP errors", self.path_mtu.close)
        undoing.push("listeners", self.services.stop)
        if self.registrations:
            undoing.push("registrations", self.registrations.close)
        if self.table:
            undoing.push("connection table", self.table.close)
        if self.config.announce == "off":
            undoing.push("virtual address", self._let_address_go)
        await undoing.undo()

    async def _let_address_go(self) -> None:
        """As long as the virtual address is here, and we are not, our stack refuses what clients
        send. Whoever moves it (keepalived) finds by now that we answer no more."""
        end = self.loop.time() + MOVE
        while staying := await asyncio.to_thread(self._here):
            if self.loop.time() > end:
                log.warning("%s stays on this host: connections to it are refused from now on",
                            ", ".join(sorted(staying)))
                break
            await asyncio.sleep(0.1)

    def close(self) -> None:
        # while the datapath still takes their packets: connections go on if we are started again
        each(("Local Node", lambda: self.local.close(self.end_log)),
             ("virtual address", self.host.withdraw))

    def _table(self) -> FlowRows:
        return self._rows(aligned=True)

    def _rows(self, aligned: bool = False) -> FlowRows:
        return FlowRows(self.datapath.table, [r.text for r in self.registry.rules.in_force],
                        self.registry.peers.addresses(), aligned)

    def reopen(self) -> None:
        try:
            self._open_access_log(self.config.accesslog)
        except HostError as error:
            logs.reopen()
            log.error("%s; until then lines go to the file that was open before", error)
        else:
            super().reopen()

    def _open_access_log(self, path: str | None) -> None:
        """Raises HostError, and leaves the one in use."""
        try:
            self.core.access_log(path)
        except OSError as error:
            raise HostError(f"accesslog {path}: {error.strerror}; mend the path") from None

    def set_level(self, dbglevel: int) -> None:
        super().set_level(dbglevel)
        self.local.level(dbglevel)
        self._cache_verdicts()

    def _cache_verdicts(self) -> None:
        """Not while each handoff is to leave a line in a log."""
        self.core.cache_verdicts(self.config.verdictcache == "on" and self.core.dbglevel < 2
                                 and not self.config.accesslog)

    def on_notice(self) -> None:
        self.registry.on_notice()

    def periodic(self) -> list[Every]:
        registry = self.registry
        works = [
            *super().periodic(), Every(EACH_TICK, self.local.tick),
            Every(EACH_TICK, self._answer_syns), Every(SECOND, registry.recovery.look),
            Every(SECOND, self.local.look), Every(SECOND, registry.connector.change_keys),
            Every(SECOND, self._look_at_guesses), Every(SECOND, self._detect),
            Every(SECOND, registry.connector.look_at_mtus), Every(SECOND, self.datapath.refresh),
            Every(self._expiry, self._expire, "expire")]
        if self.datapath.fastpath:
            works += [Every(SILENT / 4, self._take_silent, "silent"),
                      Every(DOUBT / 2, self._ask, "ask")]
        return works

    def _answer_syns(self) -> None:
        self.core.answer_syns(not self.unloading and self.core.fast_backends() > 0)

    def _detect(self) -> None:
        self.registry.peers.detect(self.dtcinterval)

    def look_at_links(self) -> None:
        connector, recovery = self.registry.connector, self.registry.recovery
        self.loop.call_soon_threadsafe(connector.reroute, connector.routes())
        if self.config.announce == "off":
            self.loop.call_soon_threadsafe(recovery.hold, self._here())
        super().look_at_links()

    def _here(self) -> frozenset[str]:
        """The virtual addresses that are on this host."""
        return frozenset(v for v in self.config.vaddrs if self.host.takes(v))

    def trouble_counts(self) -> dict[str, int]:
        return {**super().trouble_counts(), **self.core.counters()}

    def _look_at_guesses(self) -> None:
        """Say when cookies of clients without timestamps do not count, and when they do again."""
        wary = self.datapath.wary()
        if wary == self.wary:
            return
        self.wary = wary
        if wary:
            log.warning("hundreds of segments in a second with a wrong cookie: somebody may be "
                        "guessing; until it is calm, clients without timestamps take the socket "
                        "path")
        else:
            log.info("it is calm: clients without timestamps take the packet path again")

    async def _take_silent(self) -> None:
        """The packet path keeps no state of a client that says nothing; so we do after a while."""
        await asyncio.to_thread(self.datapath.take_silent, SILENT)

    async def _ask(self) -> None:
        """Nobody says that a back end has adopted what the packet path sent it. The client repeats
        what was lost, but it may be gone."""
        await self._ask_about(Questions(self.datapath.table, DOUBT, doubtful=True))

    async def _ask_about(self, questions: Questions) -> None:
        while await asyncio.to_thread(questions.find):
            self.core.ask(questions)
            await asyncio.sleep(TICK)

    async def _expire(self) -> None:
        """An entry goes when its back end no longer has the connection: it is asked about silent
        ones. Without asking go those of back ends that are gone, and when the table is full."""
        idle = float(self.config.idletimeout)
        full, self.table_full = self.table_full, self.core.counters()["table_full"]
        limits = dict.fromkeys(self.registry.peers.dead(), min(DEAD_IDLE, idle))
        n = await asyncio.to_thread(self.core.expire, inf if full == self.table_full else idle,
                                    limits)
        if n:
            log.info("%d idle flows expired", n)
        if time.monotonic() > self.asked + idle:
            self.asked = time.monotonic()
            await self._ask_about(Questions(self.datapath.table, idle, doubtful=False))
        if self.datapath.fastpath:
            await asyncio.to_thread(self.core.drop_pending)

    def _expiry(self) -> float:
        return max(1.0, min(10.0, float(self.config.idletimeout) / 4))

    def live(self) -> int:
        return self.core.in_hand() + self.registry.peers.live() + self.local.live() + \
            int(self.emptying)

    def begin_unload(self) -> None:
        self.core.answer_syns(False)
        self.emptying = True
        self.spawn("unload", self._empty)

    async def _empty(self) -> None:
        await self.services.empty()
        self.emptying = False

    async def apply(self, config: Config) -> None:
        listeners = await self.services.prepare(
            self.host, [] if self.unloading else config.services,
            partial(self._find_homes, config.vaddrs))
        try:
            await self.registry.reconfigure(config, lambda: self._take_over(config, listeners))
        except BaseException:
            close(listeners)
            raise
        if not self.unloading:
            self.services.begin()
            await asyncio.to_thread(self._add_more_addresses)
            await asyncio.to_thread(self.look_at_links)
        self._detect()
        self.files.refresh()

    def _add_more_addresses(self) -> None:
        known = [announcer.address for announcer in self.announcers]
        try:
            self._add_addresses([v for v in self.config.vaddrs if v not in known])
        except (NetlinkError, HostError) as error:
            log.warning("%s; it is tried again", error)  # by the keeper

    def _take_over(self, config: Config, listeners: Listeners) -> None:
        if config.accesslog != self.config.accesslog:
            self._open_access_log(config.accesslog)  # first: if it fails, nothing is changed
        if self.unloading:
            close(listeners)
        else:
            self.services.open(listeners)
            self.services.close_others(config.services)
            self.registry.peers.judge_all()  # not each back end may serve what is new
        if config.port != self.config.port and self.registrations:
            log.warning("back ends register at port %d until a restart", self.config.port)
        self.config = config
        self.set_level(config.dbglevel)  # and what depends on the access log
        self.core.set_limits(config.headlimit, float(config.headtimeout))
        self.dtcinterval = config.dtcinterval
        self.workers.limits(config.minspareservers, config.maxspareservers)

    # Commands

    def commands(self) -> dict[str, Command]:
        return super().commands() | {
            "status": self.status, "conns": self.conns, "servers": self.servers,
            "rules": self.rules, "reload": self.reload, "drain": self.drain,
            "undrain": self.undrain, "stats": self.stats, "test-request": self.test_request}

    def control_files(self) -> dict[str, tuple[Any, Any]]:
        async def interval(text: str) -> None:
            await self.set("dtcinterval", text)
        return super().control_files() | {"dtcinterval": (lambda: self.dtcinterval, interval)}

    async def set(self, name: str, value: str) -> dict[str, Any]:
        if name == "dtcinterval":
            self.dtcinterval = number(value, 0, 3600, "interval")
            log.info("dtcinterval %d", self.dtcinterval)
            self._detect()
            self.files.refresh()
            return {"dtcinterval": self.dtcinterval}
        if name != "dbglevel":
            raise Refused(f"'{name}' cannot be set; 'dbglevel' and 'dtcinterval' can")
        return await super().set(name, value)

    async def status(self) -> dict[str, Any]:
        config = self.config
        return await super().status() | {
            "vaddr": config.vaddr, "raddr": config.raddr, "port": config.port,
            "vaddrs": list(config.vaddrs), "services": self.services.table(),
            "datapath": self.datapath.name, "chosen": self.datapath.chosen,
            "forward": config.forward,
            "fastpath": "on" if self.datapath.fastpath else "off",
            "packet_path": self.core.answers_syns(), "wary": self.datapath.wary(),
            "dtcinterval": self.dtcinterval, "awaiting": self.registry.recovery.rebuilding,
            "in_hand": self.core.in_hand(),
            "live": self.registry.peers.live() + self.local.live(),
            "localnode": self.local.status(), "counters": self.core.counters(),
            "packets": self.datapath.counters(), "servers": self.registry.table()}

    def pages(self) -> Pages:
        from tcpha.admin import metrics

        def show() -> bytes:
            return metrics.text(lambda: metrics.frontend(
                *self.ask_loop(self.status, self.rules, self.stats)))

        def state() -> bytes:
            status, rules, stats = self.ask_loop(self.status, self.rules, self.stats)
            return as_json({"status": status, "rules": rules, "stats": stats})
        return {"/": ("text/html; charset=utf-8", PAGE.read_bytes),
                "/status.json": ("application/json", state),
                "/metrics": (metrics.CONTENT_TYPE, show)}

    async def servers(self) -> list[dict[str, Any]]:
        return self.registry.table()

    async def rules(self) -> list[dict[str, Any]]:
        use = self.registry.rules.use()
        return [{"rule": n, "server": r.server, "conditions": " ".join(map(str, r.conditions)),
                 "pattern": r.pattern, "handed": use[r]}
                for n, r in enumerate(self.registry.rules.in_force)]

    async def stats(self) -> dict[str, Any]:
        """What 'top', the status page and the metrics show beside status() and rules()."""
        rules = self.registry.rules.in_force
        slowest = [{"seconds": round(s["seconds"], 6), "ago": round(s["ago"], 1),
                    "client": s["client"], "target": s["target"],
                    "rule": rules[s["rule"]].text if s["rule"] < len(rules) else "",
                    "server": self.registry.peers.address(s["backend"])}
                   for s in self.core.slowest(SLOW_FOR)]
        return {"uptime": round(time.monotonic() - self.began, 3), "stages": self.core.stages(),
                "slowest": slowest, "channels": self.registry.peers.channels(),
                "events": logs.recent()}

    async def test_request(self, *words: str) -> dict[str, Any]:
        """words: 'port=N' perhaps, method, request-target and header fields ('Name: value')."""
        port = str(self.config.port)
        if words and words[0].startswith("port="):
            port, words = words[0][5:], words[1:]
        if len(words) < 2:
            raise Refused("write a method and a request-target, as in GET /a.jpg")
        method, target, *fields = words
        if not any(f.lower().startswith("host:") for f in fields):
            fields = [f"Host: {self.config.vaddr}", *fields]
        try:
            head = "".join(f"{line}\r\n" for line in (f"{method} {target} HTTP/1.1", *fields, ""))
            return self.registry.rules.explain(head.encode("latin-1"), self.services.of_port(port))
        except UnicodeEncodeError:
            raise Refused("a request head has only ASCII characters; encode others in the target "
                          "as %XX") from None

    async def conns(self) -> Table:
        return Table(FLOWS, self._rows())

    async def drain(self, address: str) -> dict[str, Any]:
        return self.registry.drain(address, True)

    async def undrain(self, address: str) -> dict[str, Any]:
        return self.registry.drain(address, False)
