# SPDX-License-Identifier: GPL-2.0-or-later
"""Which back ends and rules there are: those of the file, and of back ends that have registered."""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tcpha._fast.fe_worker import FrontEnd
from tcpha._fast.match import Matcher
from tcpha.config import Config, Rule, Server, too_many
from tcpha.control.hello import new_instance
from tcpha.daemon.control_socket import Refused
from tcpha.datapath import Frontend
from tcpha.frontend.connector import Connector
from tcpha.frontend.drained import Drained
from tcpha.frontend.peers import Peers
from tcpha.frontend.recovery import Recovery
from tcpha.frontend.rules import Rules
from tcpha.net.host import Host

# by address: server, rules, and the connection that they came by
Registered = dict[str, tuple[Server, list[Rule], object]]


def _all_rules(config: Config, registered: Registered) -> list[Rule]:
    return [*config.rule, *(rule for _, rules, _ in registered.values() for rule in rules)]


class Registry:
    """Holds together what has to do with back ends. Used in the loop's thread only."""

    def __init__(self, core: FrontEnd, datapath: Frontend, host: Host, config: Config,
                 secret: bytes | None, spawn: Callable[..., asyncio.Task[None]],
                 drained: Drained):
        self.config = config
        self.drained = drained
        self.instance = new_instance()
        self.registered: Registered = {}
        self.turn = asyncio.Lock()  # of who changes them
        self.peers = Peers(core, datapath, drained, config.dtcinterval)
        self.rules = Rules(core, self.peers)
        self.recovery = Recovery(core, datapath, self.peers, spawn, config.announce == "off")
        self.connector = Connector(core, datapath, host, config, secret, spawn, self.peers,
                                   self.recovery, self.instance)

    async def begin(self) -> None:
        """See Connector.begin()."""
        self.recovery.begin()
        await self.connector.begin()

    def on_notice(self) -> None:
        """Links broke, or a back end did not answer an offer in time."""
        broken = self.peers.look_at_links()
        self.connector.look()
        self.recovery.lost(broken)
        self.recovery.look()

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
        return await self.rules.compile(_all_rules(config, registered), [config.matcher])

    def configure(self, config: Config, matcher: Matcher) -> None:
        """Take over servers and rules. Connections to back ends that stay are kept. matcher: of at
        least the rules' patterns, in their order."""
        self.config = self.connector.config = config
        wanted = {address: server for address, (server, _, _) in self.registered.items()}
        self.drained.configured({s.address for s in config.server}, set(wanted))
        wanted |= {s.address: s for s in config.server}
        for address, peer in list(self.peers.listed.items()):
            if wanted.get(address) != peer.server:
                self.peers.remove(peer)
                self.connector.offer_mtu()
        for address, server in wanted.items():
            if address not in self.peers.listed:
                self.connector.take(self.peers.add(server))
        self.rules.publish(_all_rules(config, self.registered), matcher)

    # Registration

    def _see_room(self, wanted: set[str]) -> None:
        """Raise Refused unless they fit beside those that are there, or were and still have
        connections."""
        known = {p.server.address for p in self.peers.all()}
        trouble = too_many(len(known | wanted), self.config.connperbe)
        if wanted - known and trouble:
            raise Refused(f"{trouble} (those of before count until their last connection has "
                          "ended)")

    async def register(self, server: Server, rules: list[Rule], token: object) -> None:
        """Let a back end join; its rules come behind those of the file and of earlier ones. An
        earlier registration of it ends. If the file lists it, the file's port holds. Raises
        Refused."""
        async with self.turn:
            self._see_room({server.address})
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

    # Commands

    def table(self) -> list[dict[str, Any]]:
        return [self.peers.row(peer, peer.server.address in self.registered)
                for peer in self.peers.listed.values()]

    def drain(self, address: str, draining: bool) -> dict[str, Any]:
        return self.peers.drain(address, draining,
                                any(s.address == address for s in self.config.server))
