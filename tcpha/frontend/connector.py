# SPDX-License-Identifier: GPL-2.0-or-later
"""Control connections to back ends, and the ways to them that the datapath takes."""
from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import replace

from tcpha._fast.fe_worker import FrontEnd
from tcpha._fast.tls import Channel
from tcpha.config import ANY, Config
from tcpha.control.hello import PATIENCE, Hello, HelloError, call, check, give_up_after
from tcpha.datapath import Frontend, Path, headers
from tcpha.frontend.cookiekeys import CookieKeys
from tcpha.frontend.peers import HOST, PROCESS, Peer, Peers
from tcpha.frontend.recovery import Recovery
from tcpha.net import pathmtu
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.links import Route

log = logging.getLogger("tcpha")
BACKOFF_FIRST = 0.05  # seconds before the second attempt to connect; doubles up to BACKOFF_MOST
BACKOFF_MOST = 1.0
FIRST_LOOK = 1.0  # seconds that clients wait in the backlog at the start for silent hosts
UNHEARD = 20.0  # seconds without an acknowledgement by a back end's kernel, detection or not


class Connector:
    """Keeps as many as there are to be. instance: of this run of ours."""

    def __init__(self, core: FrontEnd, datapath: Frontend, host: Host, config: Config,
                 secret: bytes | None, spawn: Callable[..., asyncio.Task[None]], peers: Peers,
                 recovery: Recovery, instance: str):
        self.core = core
        self.datapath = datapath
        self.host = host
        self.config = config
        self.secret = secret
        self.spawn = spawn
        self.peers = peers
        self.recovery = recovery
        self.instance = instance
        self.keys = CookieKeys(core) if datapath.fastpath else None
        self.started = False

    async def begin(self) -> None:
        """Connect to the back ends. Returns when each has been tried, or FIRST_LOOK is over: before
        that, requests could be given to nobody. A host that took the connection lives, and its
        daemon is worth waiting for, PATIENCE at most."""
        self.started = True
        for peer in self.peers.listed.values():
            self.take(peer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK):
                for peer in list(self.peers.listed.values()):
                    await peer.tried.wait()
        for peer in list(self.peers.listed.values()):
            if peer.timeout == PROCESS and not self.core.backend_stats(peer.index)["links"]:
                await peer.tried.wait()

    def take(self, peer: Peer) -> None:
        """Connect to a back end, now or when we begin."""
        if self.started:
            peer.task = self.spawn("connect", lambda: self._keep_connected(peer))

    def look(self) -> None:
        """Links may have broken."""
        for peer in self.peers.listed.values():
            if self.core.backend_stats(peer.index)["links"] < self.config.connperbe:
                peer.wake.set()

    def change_keys(self) -> None:
        """Make and use new cookie keys when it is time; called every second."""
        if self.keys:
            fast = {p.index for p in self.peers.all() if p.fastpath}
            self.keys.tick([i for i, peer, up, _ in self.core.links() if up and peer in fast])

    # Control connections

    async def _keep_connected(self, peer: Peer) -> None:
        try:
            await self._connect_for_ever(peer)
        finally:
            peer.tried.set()  # nobody must wait for it

    async def _connect_for_ever(self, peer: Peer) -> None:
        delay = BACKOFF_FIRST
        while True:
            peer.wake.clear()
            have = self.core.backend_stats(peer.index)["links"]
            try:
                for _ in range(have, self.config.connperbe):
                    await self._connect(peer)
            except (TimeoutError, OSError, HelloError, HostError) as error:
                self.peers.failed(peer, error)
                peer.tried.set()
                try:
                    await asyncio.wait_for(peer.wake.wait(), delay)
                except TimeoutError:
                    delay = min(delay * 2, BACKOFF_MOST)
                continue
            delay = BACKOFF_FIRST
            peer.cause, peer.detail = PROCESS, "it closed its control connections"
            self.peers.judge(peer)
            peer.tried.set()
            await peer.wake.wait()

    async def _connect(self, peer: Peer) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            hello, channel = await self._greet(peer, sock)
            check(hello, "be", self.config.vaddrs)
            self._set_path(peer, sock.getsockname()[0], hello.mtu)
            if peer.instance != hello.instance:
                # before there is a link: requests of the packet path would go to who has no key
                self.core.backend_server(peer.index, hello.server)
                self.core.backend_places(peer.index, hello.places)
                self.peers.note_addresses(peer, hello.vaddrs or [hello.vaddr])
                self.core.backend_forgets_keys(peer.index)
            before = self.core.backend_stats(peer.index)
            index = self.core.add_link(sock, peer.index, hello.clock, channel)
            self.core.backend_add_link(peer.index, index)
            self.recovery.met(peer, hello.instance, before)
            peer.instance = hello.instance
            peer.fastpath = hello.fastpath
            if self.keys and peer.fastpath:
                self.keys.send(index)
            self.core.backend_flags(peer.index, dead=False)
        except BaseException:
            sock.close()
            raise

    async def _greet(self, peer: Peer, sock: socket.socket) -> tuple[Hello, Channel | None]:
        config = self.config
        sock.setblocking(False)
        if config.raddr != ANY:
            sock.bind((config.raddr, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        give_up_after(sock, UNHEARD)
        async with asyncio.timeout(PATIENCE):
            peer.timeout = HOST
            await asyncio.get_running_loop().sock_connect(
                sock, (peer.server.address, peer.server.port))
            peer.timeout = PROCESS
            mine = Hello("fe", config.vaddr, config.port, config.forward, instance=self.instance,
                         vaddrs=list(config.vaddrs), ports=list(config.ports))
            return await call(sock, mine, self.secret)

    # Paths

    def offer_mtu(self) -> None:
        """A client's packets must fit the way to each back end that may get them."""
        mtu = min([p.path.mtu for p in self.peers.listed.values() if p.path], default=0)
        self.core.offer_mtu(mtu, headers(self.config))
        if mtu:
            self.datapath.fit(mtu)

    def _set_path(self, peer: Peer, source: str, mtu: int) -> None:
        """Tell the datapath how to reach a back end. source: our end of the control connection,
        from which the back end expects tunnelled packets. mtu: the back end's, or 0."""
        peer.mtu = mtu
        self._take_route(peer, self.host.route(peer.server.address), source)
        self.offer_mtu()

    def _take_route(self, peer: Peer, route: Route, source: str) -> None:
        address = peer.server.address
        tunnel = self.config.forward == "tunnel"
        if not tunnel and not route.on_link(address):
            raise HostError(f"is behind a router ({route.nexthop}), and forward is direct; "
                            "write 'forward = tunnel'")
        ours = self.host.mtu(route.ifindex)
        peer.ends = min(ours, peer.mtu or ours)
        self._take_path(peer, Path(route.ifindex, tunnel, route.nexthop, address, source,
                                   peer.ends))

    def _take_path(self, peer: Peer, path: Path) -> None:
        if path.tunnel:
            known = pathmtu.known(path.address, path.source)
            if known is None:
                known = peer.path.mtu if peer.path else peer.ends
            path = replace(path, mtu=min(peer.ends, known))
        if peer.path and path.mtu != peer.path.mtu:
            log.info("back end %s: packets of %d bytes get there", path.address, path.mtu)
        if path != peer.path:
            peer.path = path
            self.datapath.set_backend(peer.index, path)

    def look_at_mtus(self, addresses: set[str] | None = None) -> None:
        """Take over what the kernel knows of the ways to back ends, to all if none are named:
        routers have said something new, or it is forgotten by now."""
        for peer in self.peers.all():
            if peer.path and peer.path.tunnel and (
                    addresses is None or peer.server.address in addresses):
                self._take_path(peer, peer.path)
        self.offer_mtu()

    def routes(self) -> dict[str, Route]:
        """The present ones to back ends. To be called in another thread; see reroute()."""
        found = {}
        for address in [p.server.address for p in self.peers.all() if p.path]:
            with contextlib.suppress(HostError):
                found[address] = self.host.route(address)
        return found

    def reroute(self, routes: dict[str, Route]) -> None:
        """Interfaces or routes have changed: what is handed over already has to follow, too."""
        for peer in self.peers.all():
            route = routes.get(peer.server.address)
            if route and peer.path:
                with contextlib.suppress(HostError):  # said when it is connected to anew
                    self._take_route(peer, route, peer.path.source)
        self.offer_mtu()
