# SPDX-License-Identifier: GPL-2.0-or-later
"""What both daemons do alike: start, signals, supervision, control socket and files, stop.

One asyncio loop in the main thread does all of it; the work is in the worker threads.
"""
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tcpha._fast.core import Core
from tcpha.beside import beside
from tcpha.config import Config, ConfigError, load
from tcpha.control.secret import read_secret
from tcpha.daemon import capabilities, landlock, logs
from tcpha.daemon.control_files import ControlFiles
from tcpha.daemon.control_socket import Command, Refused, Server
from tcpha.daemon.periodic import EACH_TICK, Every, keep_doing
from tcpha.daemon.rundir import RunDir
from tcpha.daemon.troubles import Troubles
from tcpha.daemon.web import Admin, Pages
from tcpha.daemon.workers import Supervisor
from tcpha.datapath import Backend, Frontend
from tcpha.net import rootfiles
from tcpha.net.announcer import Announcer, Place
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.keeper import SLOWLY, Keeper
from tcpha.tasks import Work, deaths, persist, watch
from tcpha.undoing import Undoing

T = TypeVar("T")

log = logging.getLogger("tcpha")
SECOND = 1.0
WAIT, WAIT_STEP = 5.0, 0.25  # seconds for addresses to come, without a service manager; a look
EXTEND_US = 30_000_000       # by which the manager is to wait longer, at each look
LOCK = "/run/xtables.lock"
# what is written beside run directory and logs
WRITABLE = ("/proc/sys/net", "/dev/net/tun", "/dev/null", "/var/log", LOCK)
ADMIN_PATIENCE = 5.0  # seconds for the loop to answer a page
CANCELLED = 1.0       # seconds for tasks to end when we stop


def sd_notify(state: str) -> None:
    """Tell systemd, if it asked (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.connect("\0" + path[1:] if path[0] == "@" else path)
            s.send(state.encode())


def number(text: str, low: int, high: int, what: str) -> int:
    if not text.isdigit() or not low <= int(text) <= high:
        raise Refused(f"{what} '{text}' is no number from {low} to {high}")
    return int(text)


class Service:
    """Base of both roles. Derived classes set core and extend open(), close() and commands()."""

    role = ""
    core: Core
    datapath: Frontend | Backend
    TROUBLES: ClassVar[dict[str, tuple[str, str]]] = {
        "log_lost": ("debug lines are lost, more come than can be written",
                     "lower dbglevel")}

    def __init__(self, config: Config, run: RunDir, foreground: bool):
        self.config = config
        self.run_dir = run
        self.foreground = foreground
        self.host = Host(run.journal)
        self.secret = read_secret(config.secret) if config.secret else None
        self.stopping = asyncio.Event()
        self.unloading = False
        self.ending = False  # tasks are cancelled, and new ones do not begin
        self.troubles = Troubles(self.TROUBLES)
        self.tasks: list[asyncio.Task[Any]] = []
        self.admin: Admin | None = None
        self.keeper = Keeper(self.host, self.look_at_links)
        self.announcers: list[Announcer] = []
        self.reload_turn = asyncio.Lock()
        self.next_reload: asyncio.Task[dict[str, Any]] | None = None  # that has not begun

    # For the roles

    def open(self) -> None:
        """Set the host up and open the datapath. Errors leave nothing behind: see run()."""

    def lacking(self) -> str:
        """What this host has not yet that open() needs, and may have soon; '': nothing."""
        return ""

    async def begin(self) -> None:
        """Start to serve: workers run, the loop too."""

    async def shut(self) -> None:
        """Stop to serve, before the workers end. begin() may have failed, or was not called."""

    def close(self) -> None:
        """The workers have ended; the datapath is still open."""

    def on_notice(self) -> None:
        """The workers have something for us."""

    def look_at_links(self) -> None:
        """Interfaces or addresses may have changed. In a thread that may wait for netlink."""
        self.loop.call_soon_threadsafe(self.announce, self.look_at_places())

    def look_at_places(self) -> list[tuple[Announcer, Place | None]]:
        return [(announcer, announcer.look()) for announcer in list(self.announcers)]

    def announce(self, places: list[tuple[Announcer, Place | None]]) -> None:
        """Let neighbours know where our addresses are, if that is new."""
        for announcer, place in places:
            announcer.take(place, time.monotonic())

    def live(self) -> int:
        """Connections that unload waits for."""
        return 0

    def begin_unload(self) -> None:
        """Take no new connections."""

    async def apply(self, config: Config) -> None:
        """Take a new configuration over, as far as it can change at run time. Raises HostError or
        Refused before anything is changed."""

    def set_level(self, dbglevel: int) -> None:
        self.core.dbglevel = dbglevel

    def reopen(self) -> None:
        """Open log files anew."""
        logs.reopen()
        log.info("log files opened anew")

    def pages(self) -> Pages:
        """What the admin address serves; called in threads of its own."""
        return {}

    def ask_loop(self, *work: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run commands in the loop's thread for another one. Returns what they say."""
        async def each() -> list[Any]:
            return [await w() for w in work]
        return asyncio.run_coroutine_threadsafe(each(), self.loop).result(ADMIN_PATIENCE)

    def _listen_admin(self) -> None:
        if not self.config.admin:
            return
        address, _, port = self.config.admin.rpartition(":")
        try:
            self.admin = Admin(address, int(port), self.pages(), self.config.adminname)
        except OSError as error:
            raise HostError(f"admin: cannot listen on {self.config.admin}: {error.strerror}; mend "
                            "the address or stop what holds the port") from None

    def commands(self) -> dict[str, Command]:
        return {"set": self.set, "unload": self.unload}

    def control_files(self) -> dict[str, tuple[Callable[[], Any], Any]]:
        async def level(text: str) -> None:
            await self.set("dbglevel", text)

        async def unload(text: str) -> None:
            if text != "0":
                await self.unload()
        return {"dbglevel": (lambda: self.core.dbglevel, level),
                "unload": (lambda: int(self.unloading), unload)}

    # Commands

    async def status(self) -> dict[str, Any]:
        """What both roles show alike."""
        config = self.config
        return {"startservers": config.startservers, "minspareservers": config.minspareservers,
                "maxspareservers": config.maxspareservers, "maxclients": config.maxclients,
                "dbglevel": self.core.dbglevel, "unloading": self.unloading,
                "host": self.keeper.report(), "workers": self.workers.stats(),
                "deaths": deaths()}

    async def set(self, name: str, value: str) -> dict[str, Any]:
        if name != "dbglevel":
            raise Refused(f"'{name}' cannot be set; 'dbglevel' can")
        self.set_level(number(value, 0, 6, "level"))
        log.info("dbglevel %d", self.core.dbglevel)
        self.files.refresh()
        return {"dbglevel": self.core.dbglevel}

    async def unload(self) -> dict[str, Any]:
        """Drain and stop; a second time stop at once."""
        if self.unloading:
            self.stopping.set()
        else:
            self.unloading = True
            log.info("unloading: no new connections, %d live ones finish", self.live())
            self.begin_unload()
            self.files.refresh()
        return {"live": self.live()}

    async def reload(self) -> dict[str, Any]:
        """Read the configuration file again; a bad one changes nothing. Who comes while that is
        under way shares the next one with all who do: what they mean is in the file by then."""
        if self.next_reload is None:
            self.next_reload = self._begin(self._reload_in_turn())
        reloading = self.next_reload
        try:
            return await asyncio.shield(reloading)
        except asyncio.CancelledError:
            if reloading.cancelled():
                raise Refused("the daemon stops; nothing was changed") from None
            raise

    async def _reload_in_turn(self) -> dict[str, Any]:
        async with self.reload_turn:
            self.next_reload = None
            return await self._reload()

    async def _reload(self) -> dict[str, Any]:
        now = self.config
        try:
            fresh = await beside(lambda: load(self.role, now.file, now.directory, now.matcher))
        except ConfigError as error:
            for fault in error.faults:
                log.error("reload refused, nothing was changed: %s", fault)
            raise Refused(str(error)) from None
        fixed = [k for k in fresh.values
                 if k not in self.reloadable and fresh.values[k] != now.values[k]]
        fresh.values |= {k: now.values[k] for k in fixed}
        for warning in fresh.warnings:
            log.warning("%s", warning)
        try:
            await self.apply(fresh)
        except (HostError, Refused) as error:
            log.error("reload refused, nothing was changed: %s", error)
            raise Refused(str(error)) from None
        if fixed:
            log.warning("changed but not taken over before a restart: %s", ", ".join(fixed))
        log.info("configuration reloaded")
        return {"restart_needed_for": fixed}

    reloadable: frozenset[str] = frozenset({"dbglevel", "minspareservers", "maxspareservers"})

    # Life

    async def run(self, report: Callable[[str], None]) -> None:
        """Serve until told to stop. report('') once ready."""
        loop = self.loop = asyncio.get_running_loop()
        watch(loop)
        for number_ in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number_, self.stopping.set)
        # until we serve, when there is more to do
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        loop.add_signal_handler(signal.SIGUSR1, logs.reopen)
        undoing = Undoing()
        try:
            await self._serve(undoing, report)
        finally:
            await undoing.undo()

    async def _serve(self, undoing: Undoing, report: Callable[[str], None]) -> None:
        loop = self.loop
        undoing.push("netlink", self.host.close)
        undoing.push("this host", self.host.restore)
        self.host.recover()
        capabilities.lock_memory()
        self._restrict()
        if not await self._wait_until_possible():
            return
        self._listen_admin()
        undoing.push("admin address", self._close_admin)
        self.open()
        undoing.push("memory and descriptors", self.core.close)
        undoing.push("datapath", self.datapath.close)
        undoing.push(self.role, self.close)
        undoing.push("threads", loop.shutdown_default_executor)  # they may look at flows
        self.host.settle()
        self.set_level(self.config.dbglevel)
        if self.secret is None:
            log.warning("no 'secret': control connections are neither authenticated nor encrypted; "
                        "make one with 'openssl rand -hex 32', or keep them on a network of your "
                        "own")
        self.workers = Supervisor(self.core, self.config.startservers,
                                  self.config.minspareservers, self.config.maxspareservers,
                                  min(self.config.maxclients, 512))
        loop.add_reader(self.core.notice_fd, self._notice)
        undoing.push("notices", lambda: loop.remove_reader(self.core.notice_fd))
        self.files = ControlFiles(self.run_dir.path / f"k{self.run_dir.name}",
                                  self.control_files())
        undoing.push("control files", self.files.close)
        self.forward_log(self.core.log_lines())
        undoing.push("log of the workers", lambda: self.end_log(self.core.log_lines()))
        undoing.push("what workers used", self.core.reclaim)
        undoing.push("workers", self.workers.finish)
        self.workers.begin()
        undoing.push("what serves", self.shut)
        server = Server(self.commands())
        await server.listen(self.run_dir.socket)
        undoing.push("control socket", server.close)
        loop.add_signal_handler(signal.SIGHUP, self._hup)
        loop.add_signal_handler(signal.SIGUSR1, self.reopen)
        undoing.push("admin address", self._close_admin)  # it asks what is closed after this
        undoing.push("keeper", self.keeper.end)
        self.keeper.begin()
        undoing.push("tasks", self._cancel_tasks)
        await self.begin()
        keep_doing(self.periodic(), self.spawn)
        if self.admin:
            self.admin.start()
        self.run_dir.write_pid()
        report("")
        sd_notify("READY=1")
        log.info("serving")
        await self.stopping.wait()

    async def _cancel_tasks(self) -> None:
        log.info("stopping")
        sd_notify("STOPPING=1")
        self.ending = True
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=CANCELLED)

    async def _close_admin(self) -> None:
        if self.admin:
            admin, self.admin = self.admin, None
            await beside(admin.close)

    def _restrict(self) -> None:
        """Before there is a second thread. Root can write most files without any capability, those
        of the kernel's settings among them; another user lacks some that are to be read."""
        if os.geteuid() != 0:
            if self.config.datapath != "ebpf":
                from tcpha.datapath import nfqueue
                nfqueue.load()
            with capabilities.reading():
                rootfiles.hold()
            capabilities.restrict()
            return
        capabilities.restrict()
        if shutil.which("iptables-legacy"):
            with contextlib.suppress(OSError):
                Path(LOCK).touch(0o600)  # as it would do itself
        written = [logs.place(p) for p in (self.config.logfile, self.config.accesslog) if p]
        if not landlock.write_only([self.run_dir.path, *WRITABLE, *written,
                                    *os.environ.get("TCPHA_LAB_WRITABLE", "").split()]):
            log.info("this kernel has no Landlock (Linux 5.19): files of root's can be written")

    async def _wait_until_possible(self) -> bool:
        """At boot, addresses may come later than we do. A service manager knows whether we wait;
        whoever else started us hears of it soon that an address may be the wrong one. Returns False
        if we are to stop."""
        managed = self.foreground and "NOTIFY_SOCKET" in os.environ
        end = time.monotonic() + WAIT
        said = ""
        while (lacking := await asyncio.to_thread(self.lacking)) and (
                managed or time.monotonic() < end) and not self.stopping.is_set():
            if lacking != said:
                log.warning("waiting: %s", lacking)
                said = lacking
            sd_notify(f"STATUS=Waiting: {lacking}\nEXTEND_TIMEOUT_USEC={EXTEND_US}")
            await asyncio.sleep(WAIT_STEP)
        sd_notify("STATUS=")
        return not self.stopping.is_set()

    def forward_log(self, pipe: Any) -> None:
        """Log what workers write to a pipe."""
        asyncio.get_running_loop().add_reader(pipe.fileno(), logs.forward, pipe)

    def end_log(self, pipe: Any) -> None:
        """Log what is left in it; nobody writes to it any more."""
        logs.forward_rest(pipe)
        asyncio.get_running_loop().remove_reader(pipe.fileno())

    def spawn(self, name: str, work: Work, again: bool = True) -> asyncio.Task[None]:
        """Have something done beside us, see persist(); it is cancelled when we stop."""
        return self._begin(persist(name, work, again))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self.loop.create_task(work)
        self.tasks.append(task)
        task.add_done_callback(self.tasks.remove)
        if self.ending:  # a SIGHUP, for instance, comes too late
            task.cancel()
        return task

    def _notice(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.core.notice_fd)
        self.on_notice()

    def _hup(self) -> None:
        async def quietly() -> None:
            with contextlib.suppress(Refused):
                await self.reload()
        self.spawn("reload", quietly)

    def periodic(self) -> list[Every]:
        """What is done again and again while we serve."""
        return [Every(EACH_TICK, self.workers.tick), Every(EACH_TICK, self.core.reclaim),
                Every(EACH_TICK, self._look_unloaded), Every(SECOND, self._ping),
                Every(SECOND, self._look_at_troubles), Every(SECOND, self.keeper.tick),
                Every(SLOWLY, self.keeper.look_at_all), Every(SECOND, self._announce_again)]

    def _look_unloaded(self) -> None:
        if self.unloading and self.live() == 0:
            self.stopping.set()

    def _ping(self) -> None:
        for index, _, up, _ in self.core.links():
            if up:
                self.core.ping(index)

    def _look_at_troubles(self) -> None:
        self.troubles.look(self.trouble_counts(), asyncio.get_running_loop().time())

    def _announce_again(self) -> None:
        for announcer in self.announcers:
            announcer.tick(time.monotonic())

    def trouble_counts(self) -> dict[str, int]:
        """Of what TROUBLES names."""
        return {"log_lost": self.core.log_lost}
