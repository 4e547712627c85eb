# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end's back ends: their control connections, their rules, and whether they live."""
from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tcpha._fast.fe_worker import AWAY, DEAD, DEAF, DRAINED, FULL, MAY
from tcpha._fast.match import Matcher, PatternError
from tcpha._fast.scan import Questions
from tcpha.config import ANY, MAX_BACKENDS, Config, Rule, Server, patterns_of, too_many
from tcpha.config.keys import BE_PORT
from tcpha.control.hello import (
    PATIENCE,
    Hello,
    HelloError,
    call,
    check,
    give_up_after,
    new_instance,
)
from tcpha.daemon.control_socket import Refused
from tcpha.datapath import Path, headers
from tcpha.frontend.compiling import Compiling
from tcpha.frontend.cookiekeys import CookieKeys
from tcpha.frontend.drained import Drained
from tcpha.frontend.localnode import INDEX as LOCAL_NODE
from tcpha.frontend.localnode import NAME
from tcpha.net import pathmtu
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.links import Route

log = logging.getLogger("tcpha")
BACKOFF_FIRST = 0.05  # seconds before the second attempt to connect; doubles up to BACKOFF_MOST
BACKOFF_MOST = 1.0
FIRST_LOOK = 1.0  # seconds that clients wait in the backlog at the start for silent hosts
REBUILD = 20.0  # seconds after which a back end that does not say what it has is not waited for
# seconds that back ends have to register anew, and another front end for what it has in its hands
REJOIN = 5.0
UNHEARD = 20.0  # seconds without an acknowledgement by a back end's kernel, detection or not
MISSED = 2  # detection intervals without a sign of life
BUSY_WAIT = 0.01  # seconds for what can wait, at a time, where a link is busy
NOBODY_LISTENS = "nothing listens on its redirectport that can take connections"
HOST, PROCESS, UNUSABLE = "host dead", "process dead", "unusable"
# errors that a host's network stack, not its daemon, is to blame for
SILENT = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN}


# by address: server, rules, and the connection that they came by
Registered = dict[str, tuple[Server, list[Rule], object]]


def _all_rules(config: Config, registered: Registered) -> list[Rule]:
    return [*config.rule, *(rule for _, rules, _ in registered.values() for rule in rules)]


def _in_order(few: list[str], many: list[str]) -> bool:
    """Whether all are among others, in their order."""
    left = iter(many)
    return all(one in left for one in few)


class BackEndEntry:
    """A back end that is or was configured, at its place in the workers' table."""

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


class Registry:
    """All back ends. Used in the loop's thread only."""

    def __init__(self, core: Any, datapath: Any, host: Host, config: Config,
                 secret: bytes | None, spawn: Callable[..., asyncio.Task[None]],
                 drained: Drained):
        self.core = core
        self.datapath = datapath
        self.host = host
        self.config = config
        self.secret = secret
        self.spawn = spawn
        self.drained = drained
        self.instance = new_instance()
        self.entries: dict[str, BackEndEntry] = {}
        self.gone: list[BackEndEntry] = []
        self.registered: Registered = {}
        self.rules: list[Rule] = []
        self.matcher: Matcher | None = None  # of their patterns, and maybe of earlier ones
        self.compiling = Compiling()
        self.turn = asyncio.Lock()  # of who changes them
        # connections handed over by rules that are not in force any more, or since a reload are
        # elsewhere in the list; and what the workers' counts were when it changed
        self.used: Counter[Rule] = Counter()
        self.counted: list[int] = []
        self.keys = CookieKeys(core) if datapath.fastpath else None
        self.left: dict[str, tuple[int, int]] = dict(datapath.left)
        self.started = False
        # Another front end may have the virtual address, and hand over what we know nothing of.
        self.shared = config.announce == "off"
        self.holding = not self.shared
        self.rebuilding = bool(datapath.fresh) or self.shared
        self.rebuild_since = 0.0
        self.restored = 0  # connections, when it began
        self.whose = "an earlier run"
        if self.rebuilding:
            core.drop_strangers(True)
        self.registers = False  # back ends may register
        self.interval = config.dtcinterval

    # Configuration

    async def reconfigure(self, config: Config, first: Callable[[], None]) -> None:
        """Take over a new configuration. first: called when nothing stands in its way any more but
        what that raises. Raises HostError or Refused before anything is changed."""
        async with self.turn:
            self._see_room({s.address for s in config.server} | set(self.registered))
            matcher = await self._matcher(config, self.registered)
            first()
            self.configure(config, matcher)

    async def _matcher(self, config: Config, registered: Registered) -> Matcher:
        """Of the patterns of all rules. One in use serves, too, if it has them in their order."""
        patterns = patterns_of(_all_rules(config, registered))
        for known in (config.matcher, self.matcher):
            if known is not None and _in_order(patterns, known.patterns):
                return known
        try:
            return await self.compiling.matcher(patterns)
        except PatternError as error:
            if error.pattern >= 0:
                raise Refused(f"the pattern '{patterns[error.pattern]}' does not compile: "
                              f"{error}") from None
            raise Refused(f"the patterns of the file and of the back ends that have registered do "
                          f"not compile together: {error}") from None

    def configure(self, config: Config, matcher: Matcher) -> None:
        """Take over servers and rules. Connections to back ends that stay are kept. matcher: of at
        least the rules' patterns, in their order."""
        self.config = config
        wanted = {address: server for address, (server, _, _) in self.registered.items()}
        self.drained.configured({s.address for s in config.server}, set(wanted))
        wanted |= {s.address: s for s in config.server}
        for address, entry in list(self.entries.items()):
            if wanted.get(address) != entry.server:
                del self.entries[address]
                self._remove(entry)
                self.offer_mtu()
        for address, server in wanted.items():
            if address not in self.entries:
                self.entries[address] = self._add(server)
        groups: dict[str, dict[int, int]] = {p: {} for p in matcher.patterns}
        self.used = self.rule_use()
        self.rules = _all_rules(config, self.registered)
        for n, rule in enumerate(self.rules):
            named = self.entries.get(rule.server)  # or it is the front end itself
            index = named.index if named else LOCAL_NODE
            groups[rule.pattern].setdefault(index, n)  # the same line again changes nothing
        self.core.publish_rules(matcher, [list(group.items()) for group in groups.values()])
        self.matcher = matcher
        self.counted = self.core.hits(len(self.rules))

    # Registration

    def room_for(self, address: str) -> None:
        """Raise Refused if no further back end fits."""
        self._see_room({address})

    def _see_room(self, wanted: set[str]) -> None:
        """Raise Refused unless they fit beside those that are there, or were and still have
        connections."""
        known = {e.server.address for e in self._all()}
        trouble = too_many(len(known | wanted), self.config.connperbe)
        if wanted - known and trouble:
            raise Refused(f"{trouble} (those of before count until their last connection has "
                          "ended)")

    async def register(self, server: Server, rules: list[Rule], token: object) -> None:
        """Let a back end join; its rules come behind those of the file and of earlier ones. An
        earlier registration of it ends. If the file lists it, the file's port holds. Raises
        Refused."""
        async with self.turn:
            self.room_for(server.address)
            others = self._registered_but(server.address)
            await self._change(others | {server.address: (server, rules, token)})

    async def unregister(self, address: str, token: object) -> bool:
        """Take a registration back, unless there is a newer one. Returns whether it was."""
        if not self._is_of(address, token):  # nor need anybody wait to hear that
            return False
        async with self.turn:
            if not self._is_of(address, token):
                return False
            await self._change(self._registered_but(address))
            return True

    def _is_of(self, address: str, token: object) -> bool:
        return address in self.registered and self.registered[address][2] is token

    def _registered_but(self, address: str) -> Registered:
        return {a: what for a, what in self.registered.items() if a != address}

    async def _change(self, registered: Registered) -> None:
        matcher = await self._matcher(self.config, registered)
        self.registered = registered
        self.configure(self.config, matcher)

    def _add(self, server: Server) -> BackEndEntry:
        for entry in self.gone:  # back again: its flows are still known by this place
            if entry.server.address == server.address:
                self.gone.remove(entry)
                index = entry.index
                break
        else:
            index = self._place(server.address)
        entry = BackEndEntry(index, server)
        # what it said to an earlier run of connections that ended may be lost
        entry.missed = self.core.backend_stats(index)["live"] > 0
        self.core.backend_open(index, server.address)
        if server.address in self.drained:
            self.core.backend_flags(index, draining=True)
            log.info("back end %s: still draining", server.address)
        if self.started:
            self._begin(entry)
        return entry

    def _begin(self, entry: BackEndEntry) -> None:
        entry.task = self.spawn("connect", lambda: self._keep_connected(entry))

    def _place(self, address: str) -> int:
        """An index for a new back end. Connections of an earlier run know it by the one it had."""
        if address in self.left:
            index, live = self.left.pop(address)
            self.core.backend_has(index, live)
            return index
        used = {e.index for e in self._all()} | {index for index, _ in self.left.values()}
        free = [i for i in range(MAX_BACKENDS) if i not in used]
        if not free:
            raise Refused(f"more than {MAX_BACKENDS} back ends")
        return free[0]

    def keep_left(self) -> None:
        """Back ends of an earlier run that no server line lists: what they have goes on."""
        for address, (_, live) in list(self.left.items()):
            if live:
                self._remove(self._add(Server(address, BE_PORT)))
            else:
                self.datapath.set_backend(self.left.pop(address)[0], None)

    def _remove(self, entry: BackEndEntry) -> None:
        """No new connections; the flows that it has go on."""
        if entry.task:
            entry.task.cancel()
        self.core.backend_flags(entry.index, draining=True)
        self.gone.append(entry)

    async def begin(self) -> None:
        """Connect to the back ends. Returns when each has been tried, or FIRST_LOOK is over: before
        that, requests could be given to nobody. A host that took the connection lives, and its
        daemon is worth waiting for, PATIENCE at most."""
        self.started = True
        self.rebuild_since = asyncio.get_running_loop().time()
        for entry in self.entries.values():
            self._begin(entry)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK):
                for entry in list(self.entries.values()):
                    await entry.tried.wait()
        for entry in list(self.entries.values()):
            if entry.timeout == PROCESS and not self.core.backend_stats(entry.index)["links"]:
                await entry.tried.wait()

    # Control connections

    async def _keep_connected(self, entry: BackEndEntry) -> None:
        try:
            await self._connect_for_ever(entry)
        finally:
            entry.tried.set()  # nobody must wait for it

    async def _connect_for_ever(self, entry: BackEndEntry) -> None:
        delay = BACKOFF_FIRST
        while True:
            entry.wake.clear()
            have = self.core.backend_stats(entry.index)["links"]
            try:
                for _ in range(have, self.config.connperbe):
                    await self._connect(entry)
            except (TimeoutError, OSError, HelloError, HostError) as error:
                self._failed(entry, error)
                entry.tried.set()
                try:
                    await asyncio.wait_for(entry.wake.wait(), delay)
                except TimeoutError:
                    delay = min(delay * 2, BACKOFF_MOST)
                continue
            delay = BACKOFF_FIRST
            entry.cause, entry.detail = PROCESS, "it closed its control connections"
            self._judge(entry)
            entry.tried.set()
            await entry.wake.wait()

    async def _connect(self, entry: BackEndEntry) -> None:
        address = (entry.server.address, entry.server.port)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            if self.config.raddr != ANY:
                sock.bind((self.config.raddr, 0))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            give_up_after(sock, UNHEARD)
            async with asyncio.timeout(PATIENCE):
                entry.timeout = HOST
                await asyncio.get_running_loop().sock_connect(sock, address)
                entry.timeout = PROCESS
                mine = Hello(
                    "fe", self.config.vaddr, self.config.port, self.config.forward,
                    instance=self.instance)
                hello, channel = await call(sock, mine, self.secret)
            check(hello, "be", self.config.vaddr)
            self._set_path(entry, sock.getsockname()[0], hello.mtu)
            if entry.instance != hello.instance:
                # before there is a link: requests of the packet path would go to who has no key
                self.core.backend_server(entry.index, hello.server)
                self.core.backend_forgets_keys(entry.index)
            before = self.core.backend_stats(entry.index)
            index = self.core.add_link(sock, entry.index, hello.clock, channel)
            self.core.backend_add_link(entry.index, index)
            forgetful = entry.missed or entry.instance not in ("", hello.instance)
            asked = not before["links"] and self.holding and (
                self.shared or (self.datapath.fresh and not before["told"]))
            if forgetful:
                entry.missed = False
                self.spawn("remind", partial(self._remind, entry, asked))
            elif asked:
                self._ask(entry)
            entry.instance = hello.instance
            entry.fastpath = hello.fastpath
            if self.keys and entry.fastpath:
                self.keys.send(index)
            self.core.backend_flags(entry.index, dead=False)
        except BaseException:
            sock.close()
            raise

    def offer_mtu(self) -> None:
        """A client's packets must fit the way to each back end that may get them."""
        mtu = min([e.path.mtu for e in self.entries.values() if e.path], default=0)
        self.core.offer_mtu(mtu, headers(self.config))
        if mtu:
            self.datapath.fit(mtu)

    def _set_path(self, entry: BackEndEntry, source: str, mtu: int) -> None:
        """Tell the datapath how to reach a back end. source: our end of the control connection,
        from which the back end expects tunnelled packets. mtu: the back end's, or 0."""
        entry.mtu = mtu
        self._take_route(entry, self.host.route(entry.server.address), source)
        self.offer_mtu()

    def _take_route(self, entry: BackEndEntry, route: Route, source: str) -> None:
        address = entry.server.address
        tunnel = self.config.forward == "tunnel"
        if not tunnel and not route.on_link(address):
            raise HostError(f"is behind a router ({route.nexthop}), and forward is direct; "
                            "write 'forward = tunnel'")
        ours = self.host.mtu(route.ifindex)
        entry.ends = min(ours, entry.mtu or ours)
        self._take_path(entry, Path(route.ifindex, tunnel, route.nexthop, address, source,
                                    entry.ends))

    def _take_path(self, entry: BackEndEntry, path: Path) -> None:
        if path.tunnel:
            known = pathmtu.known(path.address, path.source)
            if known is None:
                known = entry.path.mtu if entry.path else entry.ends
            path = replace(path, mtu=min(entry.ends, known))
        if entry.path and path.mtu != entry.path.mtu:
            log.info("back end %s: packets of %d bytes get there", path.address, path.mtu)
        if path != entry.path:
            entry.path = path
            self.datapath.set_backend(entry.index, path)

    def look_at_mtus(self, addresses: set[str] | None = None) -> None:
        """Take over what the kernel knows of the ways to back ends, to all if none are named:
        routers have said something new, or it is forgotten by now."""
        for entry in self._all():
            if entry.path and entry.path.tunnel and (
                    addresses is None or entry.server.address in addresses):
                self._take_path(entry, entry.path)
        self.offer_mtu()

    def routes(self) -> dict[str, Route]:
        """The present ones to back ends. To be called in another thread; see reroute()."""
        found = {}
        for address in [e.server.address for e in self._all() if e.path]:
            with contextlib.suppress(HostError):
                found[address] = self.host.route(address)
        return found

    def reroute(self, routes: dict[str, Route]) -> None:
        """Interfaces or routes have changed: what is handed over already has to follow, too."""
        for entry in self._all():
            route = routes.get(entry.server.address)
            if route and entry.path:
                with contextlib.suppress(HostError):  # said when it is connected to anew
                    self._take_route(entry, route, entry.path.source)
        self.offer_mtu()

    def hold(self, here: bool) -> None:
        """Whether the virtual address, which somebody else moves, is on this host."""
        if self.holding != here:
            self.holding = here
            self._rebuild()

    def _rebuild(self) -> None:
        """What another front end hands over, or has, back ends know. Until they have said it,
        packets of connections that we do not know wait, by being dropped. They do so before the
        virtual address comes: there would be no time for it then."""
        self.rebuilding = True
        self.rebuild_since = asyncio.get_running_loop().time()
        self.restored = self.core.counters()["restored"]
        self.whose = "another front end"
        self.core.drop_strangers(True)
        if self.holding:
            for entry in self._all():
                self._ask(entry)

    def _ask(self, entry: BackEndEntry) -> None:
        """Have a back end tell what it has. What began here since the address came is newer than
        what it may have had of the same client's port before."""
        self.core.ask_all(entry.index, asyncio.get_running_loop().time() - self.rebuild_since)

    def _cut_off(self) -> bool:
        """Whether we reach no back end. Another front end may, and take the virtual address,
        without us losing ours."""
        return self.shared and not any(self.core.backend_stats(e.index)["links"]
                                       for e in self.entries.values())

    def look_rebuilt(self) -> None:
        """Once all back ends have said what they have of an earlier run of ours, which had no time
        to leave us its table, or of another front end, what they do not have is nobody's."""
        now = asyncio.get_running_loop().time()
        if not self.rebuilding or not self.started:
            return
        if not self.holding or self._cut_off():
            self.rebuild_since = now
            return
        age = now - self.rebuild_since
        told = all(self.core.backend_stats(e.index)["told"] for e in self.entries.values())
        at_least = REJOIN if self.registers or self.shared else 0.0
        if age <= REBUILD and not (told and age > at_least):
            return
        self.rebuilding = False
        self.core.drop_strangers(False)
        found = self.core.counters()["restored"] - self.restored
        if found:
            log.info("%d connections of %s go on", found, self.whose)

    def on_notice(self) -> None:
        """Links broke, or a back end did not answer an offer in time."""
        for entry in self.entries.values():
            if self.core.backend_stats(entry.index)["dead"]:
                self._give_up(entry, "did not answer a handoff in time")
        errors = {peer: self.core.link_error(i) for i, peer, up, _ in self.core.links() if not up}
        broken = {peer for _, peer in self.core.reap_links()}
        for entry in self.entries.values():
            entry.missed |= entry.index in broken
            if errors.get(entry.index) in SILENT:
                entry.cause, entry.detail = HOST, os.strerror(errors[entry.index])
            self._judge(entry)
            if entry.index in broken and self.rebuilding and self.holding:
                self._ask(entry)  # the question, or the answer, may be lost
            if self.core.backend_stats(entry.index)["links"] < self.config.connperbe:
                entry.wake.set()
        if not self.rebuilding and self._cut_off():  # by now: a worker may be at it still
            self._rebuild()
        for entry in self._all():
            if self.core.backend_missed(entry.index):
                self._list_owned(entry)

    def _list_owned(self, entry: BackEndEntry) -> None:
        """A back end took links for alive that we had given up."""
        self.spawn("remind", partial(self._remind, entry, False))

    async def _remind(self, entry: BackEndEntry, asked: bool) -> None:
        """Tell a back end which connections it has: it was started anew, or does not know that we
        have not heard of their ends. They may be more than a link's queue has room for. asked: then
        have it tell what else it has, since it knows the ids of what is ours."""
        owned = Questions(self.datapath.table, backend=entry.index)
        while await asyncio.to_thread(owned.find):
            self.core.ask(owned)
            while self._is_busy(entry):
                await asyncio.sleep(BUSY_WAIT)
        if asked:
            self._ask(entry)

    def _is_busy(self, entry: BackEndEntry) -> bool:
        return any(up and peer == entry.index and self.core.is_busy(i)
                   for i, peer, up, _ in self.core.links())

    # Detection

    def _failed(self, entry: BackEndEntry, error: OSError | HelloError | HostError) -> None:
        """No control connection came about."""
        entry.detail = str(error) or "no answer"
        if isinstance(error, HelloError | HostError):
            entry.cause = UNUSABLE
        elif isinstance(error, TimeoutError) and error.errno is None:
            entry.cause = entry.timeout
        else:
            entry.cause = HOST if error.errno in SILENT else PROCESS
            entry.detail = os.strerror(error.errno or 0)
        self._judge(entry)

    def _judge(self, entry: BackEndEntry) -> None:
        """Log a change of health, and let the workers know whether the application is there."""
        stats = self.core.backend_stats(entry.index)
        app_down = self.interval > 0 and not stats["listens"]
        self.core.backend_flags(entry.index, app_down=app_down)
        if self.keys:
            self.datapath.set_down(entry.index, not stats["links"])
        if not stats["links"] and not entry.detail:
            return  # nothing is known yet
        if not stats["links"]:
            health, why = entry.cause, entry.detail
        elif app_down:
            health, why = "application dead", NOBODY_LISTENS
        else:
            health = why = "up"
        changed = health != entry.health
        entry.health, entry.why = health, why
        if changed:
            say = log.info if health == "up" else log.warning
            say("back end %s: %s%s", entry.server.address, health,
                "" if health == "up" else f" ({why})")

    def _give_up(self, entry: BackEndEntry, why: str) -> None:
        """Break all links to a back end: what it may still find in them is void."""
        links = [i for i, peer, up, _ in self.core.links() if up and peer == entry.index]
        if links:
            entry.detail = why
            # its kernel acknowledges what we send, or does not even do that
            entry.cause = PROCESS if any(self.core.link_unacked(i) == 0 for i in links) else HOST
        self.core.backend_flags(entry.index, dead=True)
        for index in links:
            self.core.break_link(index)

    def detect(self, interval: int) -> None:
        """Give up back ends that gave no sign of life for MISSED intervals. 0: never, and whether
        the application listens is not looked at."""
        if bool(interval) != bool(self.interval):
            self.interval = interval
            for entry in self.entries.values():
                self._judge(entry)
        self.interval = interval
        self._forget_gone()
        if not interval:
            return
        for entry in self.entries.values():
            ages = [age for _, peer, up, age in self.core.links() if up and peer == entry.index]
            if ages and min(ages) > MISSED * interval:
                self._give_up(entry, f"silent for {min(ages):.0f} seconds")

    def change_keys(self) -> None:
        """Make and use new cookie keys when it is time; called every second."""
        if self.keys:
            fast = {e.index for e in self._all() if e.fastpath}
            self.keys.tick([i for i, peer, up, _ in self.core.links() if up and peer in fast])

    def _forget_gone(self) -> None:
        """Free the places of removed back ends whose last connection has ended."""
        for entry in list(self.gone):
            links = [(i, up) for i, peer, up, _ in self.core.links() if peer == entry.index]
            if self.core.backend_stats(entry.index)["live"]:
                continue
            if not links:
                self.gone.remove(entry)
                self.core.backend_close(entry.index)
            for index, up in links:
                if up:
                    self.core.break_link(index)

    # What it knows

    def rule_use(self) -> Counter[Rule]:
        """How many connections each rule has handed over, those of earlier lists too."""
        use = self.used.copy()
        for rule, now, before in zip(self.rules, self.core.hits(len(self.rules)), self.counted,
                                     strict=False):
            use[rule] += now - before
        return use

    def explain(self, head: bytes) -> dict[str, Any]:
        """What would become of a request, and why. head: all of it, up to the empty line."""
        error, target, seen, matched, winner, alone = self.core.consider(head)
        if error:
            status = 431 if "headlimit" in error else 400
            return {"outcome": str(status), "reason": f"request head: {error}", "rules": []}
        rows: list[dict[str, Any]] = []
        for n, refusal in matched:
            rule = self.rules[n]
            rows.append({"rule": n, "pattern": rule.pattern, "server": rule.server,
                         "usable": refusal == MAY, "reason": self._why(rule.server, refusal)})
        if winner >= 0:
            rule = self.rules[winner]
            out = {"outcome": "handed over", "server": rule.server, "rule": winner,
                   "reason": f"first rule that matches and can be served: '{rule.pattern}'"}
        else:
            why = "no back end of a rule that matches can take it" if rows else "no rule matches"
            last = next((r["server"] for r in rows if r["reason"] == NOBODY_LISTENS), "")
            if last:
                why += f"; {last} is asked all the same, and refuses unless its server is back"
            if alone == MAY:
                out = {"outcome": "handed over", "server": NAME,
                       "reason": f"{why}; the Local Node listens"}
            else:
                out = {"outcome": "503", "reason": f"{why}, and no Local Node listens"}
        return out | {"target": target, "rules_see": seen, "rules": rows}

    def _why(self, server: str, refusal: int) -> str:
        """Why a back end gets no new connections; '' if it may."""
        entry = self.entries.get(server)
        if refusal in (AWAY, DEAD):
            return (entry.why if entry and entry.why != "up" else "") or "no control connection"
        return {DRAINED: "draining", DEAF: NOBODY_LISTENS,
                FULL: "full: it has maxclients connections"}.get(refusal, "")

    def channels(self) -> list[dict[str, Any]]:
        """Control connections: whose, whether up, and seconds since a sign of life."""
        return [{"server": self.address(peer), "up": up, "silent": age}
                for _, peer, up, age in self.core.links() if peer != LOCAL_NODE]

    def _all(self) -> list[BackEndEntry]:
        return [*self.entries.values(), *self.gone]

    def live(self) -> int:
        return sum(self.core.backend_stats(e.index)["live"] for e in self._all())

    def dead(self) -> set[int]:
        return {e.index for e in self._all()
                if self.core.backend_stats(e.index)["links"] == 0}

    def address(self, index: int) -> str:
        if index == LOCAL_NODE:
            return NAME
        return next((e.server.address for e in self._all() if e.index == index), "?")

    def addresses(self) -> list[str]:
        """By index."""
        out = ["?"] * (LOCAL_NODE + 1)
        for entry in self._all():
            out[entry.index] = entry.server.address
        out[LOCAL_NODE] = NAME
        return out

    def table(self) -> list[dict[str, Any]]:
        rows = []
        for entry in self.entries.values():
            stats = self.core.backend_stats(entry.index)
            down = entry.health != "up"
            state = "draining" if stats["draining"] else "down" if down else "up"
            reason = f"{entry.health}: {entry.why}" if entry.health else entry.why
            rows.append({"server": entry.server.address, "port": entry.server.port, "state": state,
                         "reason": reason if down else "", "connperbe": stats["links"],
                         "packet_path": stats["fast"],
                         "mtu": entry.path.mtu if entry.path else 0,
                         "registered": entry.server.address in self.registered,
                         "live": stats["live"], "handed": stats["handed"],
                         "refused": stats["refused"], "returned": stats["returned"],
                         "closed": stats["closed"]})
        return rows

    def drain(self, address: str, draining: bool) -> dict[str, Any]:
        entry = self.entries.get(address)
        if entry is None and address in self.drained and not draining:
            self.drained.forget(address)  # it may register again
            return {"server": address, "draining": False, "live": 0}
        if entry is None:
            raise Refused(f"{address} is no server; the servers are "
                          f"{', '.join(self.entries) or 'none'}")
        self.core.backend_flags(entry.index, draining=draining)
        if draining:
            self.drained.add(address, any(s.address == address for s in self.config.server))
        else:
            self.drained.forget(address)
        log.info("back end %s: %s", address, "draining" if draining else "taking connections again")
        return {"server": address, "draining": draining,
                "live": self.core.backend_stats(entry.index)["live"]}
