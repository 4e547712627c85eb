# SPDX-License-Identifier: GPL-2.0-or-later
"""The Local Node: the front end's own, unmodified server, which takes what no back end takes.

It is a back end within the front end's process: adoption, its fallbacks and the end of connections
are the same code, and a pair of sockets stands for the control connections.
"""
from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from tcpha._fast.be_worker import BackEnd
from tcpha._fast.fe_worker import ALL_SERVICES, FrontEnd
from tcpha._fast.message import clock
from tcpha.application import Watch, local_ways
from tcpha.config import Config
from tcpha.daemon.workers import Supervisor
from tcpha.datapath import LOCAL_CONNECTIONS, Backend, DatapathError, Frontend, allow_adoption
from tcpha.net.host import Host
from tcpha.undoing import Step, each

log = logging.getLogger("tcpha")
INDEX = 255  # in the table of back ends (TCPHA_LOCAL_NODE)
NAME = "localnode"
WORKERS = 1, 1, 2, 8  # at the start, spare at least and at most, altogether


class LocalNode:
    """core: the front end's."""

    def __init__(self, config: Config, core: FrontEnd, datapath: Frontend, host: Host):
        self.core = core
        self.watch = Watch(config, host, local_ways(config))
        self.application = self.watch.first
        self.address, self.port = self.application.address, self.application.port
        self.node = BackEnd(LOCAL_CONNECTIONS)
        self.workers = Supervisor(self.node, *WORKERS)
        core.backend_open(INDEX, NAME)
        core.backend_flags(INDEX, app_down=ALL_SERVICES)
        self.datapath: Backend | None = None
        if (self.address, self.port) in [(s.vaddr, s.port) for s in config.services]:
            return  # nobody but we can listen there
        try:
            allow_adoption(host)
            self.datapath = datapath.open_local()
        except DatapathError as error:
            log.warning("no Local Node: %s", error)

    def begin(self, forward_log: Callable[[Any], None]) -> None:
        """forward_log: called with the pipe of the workers' log lines."""
        if self.datapath is None:
            return
        forward_log(self.node.log_lines())
        self.node.start(self.datapath.table)
        ours, its = socket.socketpair()
        self.node.add_link(its, 0, clock())
        self.core.backend_add_link(INDEX, self.core.add_link(ours, INDEX, clock()))
        self.workers.begin()
        self.look()

    def tick(self) -> None:
        if self.datapath is None:
            return
        self.workers.tick()
        if not self.application.usable:  # requests for it are being turned away
            self.look()

    def look(self) -> None:
        """See whether its server is there. One that did not answer in time gets another chance."""
        if self.datapath is None:
            return
        application = self.application
        first = application.found is None
        changed = application in self.watch.look(self.datapath)
        self.core.backend_flags(INDEX, app_down=0 if application.usable else ALL_SERVICES,
                                dead=False)
        if changed and application.usable:
            log.info("Local Node: a server listens on %s:%d", self.address, self.port)
        elif changed and application.found and not (first and application.found.absent):
            log.info("Local Node: %s; %s", application.found.trouble, application.found.remedy)

    def level(self, dbglevel: int) -> None:
        self.node.dbglevel = dbglevel

    def live(self) -> int:
        return self.core.backend_stats(INDEX)["live"]

    def status(self) -> dict[str, Any]:
        stats = self.core.backend_stats(INDEX)
        return {"redirectaddr": self.address, "redirectport": self.port,
                "listening": self.application.usable,
                **{key: stats[key] for key in ("live", "handed", "refused", "returned",
                                                 "closed")}}

    def close(self, end_log: Callable[[Any], None]) -> None:
        """The front end's workers have ended."""
        steps: list[Step] = []
        if self.datapath is not None:
            steps = [("workers", self.workers.finish),
                     ("log of the workers", lambda: end_log(self.node.log_lines())),
                     ("datapath", self.datapath.close)]
        each(*steps, ("sock_diag", self.watch.close), ("descriptors", self.node.close))
