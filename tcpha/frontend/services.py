# SPDX-License-Identifier: GPL-2.0-or-later
"""The services of the front end: for each address and port that clients connect to, a listener.

                  open()                    close()                 nobody is left
    not there  ------------->  open  ----------------->  closing  ------------------>  closed
                                ^                                                        |
                                +--------------------------------------------------------+
                                                       open()

Open: its SYNs are answered. Closing: they are not, and who has had an answer is accepted. Closed:
there is no listener. What was handed over goes on in all of these.
"""
from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from functools import partial

from tcpha._fast.fe_worker import FrontEnd
from tcpha.config import MAX_SERVICES, Service
from tcpha.daemon.control_socket import Refused
from tcpha.daemon.periodic import TICK
from tcpha.datapath import Frontend
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.sockets import handshakes

log = logging.getLogger("tcpha")
TCP_SAVE_SYN = 27
IP_FREEBIND = 15
# What our stack acknowledges before a handoff must fit into the socket that adopts it.
RECEIVE_BUFFER = 65536
GRACE = 1.0  # seconds for clients that have a cookie to send the end of the handshake
HANDSHAKE = 3.0  # seconds that an unacknowledged SYN-ACK may hold up closing
Key = tuple[str, int]  # address and port
Listeners = dict[Key, socket.socket]


def _key(service: Service) -> Key:
    return service.vaddr, service.port


def bind(host: Host, services: Iterable[Service]) -> Listeners:
    """A socket for each, which does not listen yet. Raises HostError."""
    listeners: Listeners = {}
    # The socket takes its initial receive buffer from the sysctl; setting SO_RCVBUF instead would
    # lower the window scale that clients get for the whole connection.
    mark = len(host.undo)
    low, initial, high = host.read_sysctl("net/ipv4/tcp_rmem").split()
    host.set_sysctl("net/ipv4/tcp_rmem", f"{low} {min(int(initial), RECEIVE_BUFFER)} {high}")
    try:
        for service in services:
            listeners[_key(service)] = socket.socket(socket.AF_INET,
                                                     socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        host.restore_to(mark)
        for (vaddr, port), listener in listeners.items():
            _bind(listener, vaddr, port)
    except BaseException:
        host.restore_to(mark)
        close(listeners)
        raise
    return listeners


def _bind(listener: socket.socket, vaddr: str, port: int) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
    listener.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)  # the address comes later
    try:
        listener.bind((vaddr, port))
    except OSError as error:
        raise HostError(f"cannot listen on {vaddr}:{port}: {error.strerror}; stop what holds the "
                        "port or change 'port' or 'listen'") from None


def close(listeners: Listeners) -> None:
    for listener in listeners.values():
        listener.close()


class Services:
    """Used in the loop's thread only."""

    def __init__(self, core: FrontEnd, datapath: Frontend,
                 spawn: Callable[..., asyncio.Task[None]]):
        self.core = core
        self.datapath = datapath
        self.spawn = spawn
        self.numbers: dict[Key, int] = {}  # of those that are open
        self.closing: dict[Key, asyncio.Task[None]] = {}

    async def prepare(self, host: Host, services: Iterable[Service],
                      first: Callable[[], None]) -> Listeners:
        """Listeners for those that have to be opened, whose packets the datapath looks at from here
        on. first: called before anything is changed, in another thread. Raises HostError."""
        fresh = [s for s in services if _key(s) not in self.numbers]
        ending = [self.closing[_key(s)] for s in fresh if _key(s) in self.closing]
        if ending:  # its old listener is in the way
            await asyncio.wait(ending)
        known = {(vaddr, port) for _, vaddr, port, *_ in self.core.services()}
        if len(known | {_key(s) for s in fresh}) > MAX_SERVICES:
            raise HostError(f"more than {MAX_SERVICES} services since the start; restart the front "
                            "end, and it forgets those that it does not have any more")

        def work() -> Listeners:
            first()
            listeners = bind(host, fresh)
            try:
                self.datapath.add_services(list(listeners))
            except OSError as error:
                close(listeners)
                raise HostError(f"the datapath takes no more services: {error}; restart the front "
                                "end") from None
            return listeners
        return await asyncio.to_thread(work)

    def open(self, listeners: Listeners) -> None:
        """Take listeners over. Clients are served from begin() on: what they are served by must be
        known before. Raises HostError, and none is taken."""
        for (vaddr, port), listener in listeners.items():
            try:
                listener.listen(65535)
            except OSError as error:  # since it was bound, somebody else was faster
                raise HostError(f"cannot listen on {vaddr}:{port}: {error.strerror}") from None
        for key in list(listeners):
            self.numbers[key] = self.core.open_service(listeners.pop(key), key[0])

    def begin(self) -> None:
        """Serve the clients of all that are open."""
        for key, number in self.numbers.items():
            self.datapath.set_service(*key, number)
        self.core.accept()

    def of_port(self, port: str) -> int:
        """The number of a service that is open. Raises Refused."""
        for (_, of_it), number in self.numbers.items():
            if port == str(of_it):
                return number
        ports = ", ".join(str(n) for n in sorted({n for _, n in self.numbers}))
        raise Refused(f"{port} is no port of ours; they are {ports or 'none'}")

    def close_others(self, services: Iterable[Service]) -> None:
        """Close those that are not among these."""
        wanted = {_key(s) for s in services}
        for key in [k for k in self.numbers if k not in wanted]:
            self.datapath.set_service(*key, None)
            number = self.numbers.pop(key)
            self.core.refuse_new(number)
            self.closing[key] = self.spawn("close service", partial(self._close, key, number))
            log.info("%s:%d takes no new connections", *key)

    async def _close(self, key: Key, number: int) -> None:
        await self._empty({key: number})
        self.core.close_service(number)
        del self.closing[key]

    async def empty(self) -> None:
        """Close all listeners once nobody is left who takes himself for connected."""
        for number in self.numbers.values():
            self.core.refuse_new(number)
        await self._empty(self.numbers)
        if self.closing:
            await asyncio.wait(self.closing.values())
        self.stop()

    async def _empty(self, numbers: dict[Key, int]) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while any(self.core.backlog(number) for number in numbers.values()) or (
                loop.time() < begin + HANDSHAKE and await asyncio.to_thread(
                    handshakes, set(numbers)) > 0) or (
                self.datapath.fastpath and loop.time() < begin + GRACE):
            if self.datapath.fastpath:
                await asyncio.to_thread(self.datapath.take_silent, 0.0)
            await asyncio.sleep(TICK)

    def stop(self) -> None:
        """Close all listeners; connections in hand go on."""
        for number, *_ in self.core.services():
            self.core.close_service(number)
        self.numbers = {}

    def table(self) -> list[dict[str, object]]:
        """For people."""
        return [{"vaddr": vaddr, "port": port,
                 "state": "open" if (vaddr, port) in self.numbers else
                 "closing" if listening else "closed", "accepted": accepted}
                for _, vaddr, port, listening, accepted in self.core.services()]
