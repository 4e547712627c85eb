# SPDX-License-Identifier: GPL-2.0-or-later
"""Datapath 'nfqueue': rules, queues and their threads for each role.

Without the daemon, packets of handed-over flows are dropped, since nobody could rewrite or forward
them; a SYN to the front end passes, and is refused by its kernel, as nobody listens.
"""
from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
from pathlib import Path as FilePath
from typing import Any

from netfilterqueue import NetfilterQueue

from tcpha._fast.bpf import Object
from tcpha._fast.nfqueue import PROBE_MARK, PROBE_PRIORITY, Queue, open_queues
from tcpha._fast.nfqueue_be import BeNfqueue
from tcpha._fast.nfqueue_fe import FeNfqueue
from tcpha.application import Way, devices_of, local_ways, ways_to
from tcpha.config import Config
from tcpha.datapath import DEVICE_PRIORITY, LOCAL_CONNECTIONS, DatapathError, Path, program_file
from tcpha.datapath.fragments import Fragments, open_fragments
from tcpha.datapath.pinned import Pinned
from tcpha.net import rootfiles, rules
from tcpha.net.host import Host
from tcpha.net.journal import HostError
from tcpha.net.rules import Rule
from tcpha.owner import by_owner
from tcpha.tasks import persistent_thread
from tcpha.undoing import each

log = logging.getLogger("tcpha")
FIRST_QUEUE = 26000       # the first number that is tried
MAX_QUEUES = 4
V4_MAPPED = bytes(10) + b"\xff\xff"  # what an IPv4 address begins with (RFC 4291)
MARK = 0x7C9A0001         # of packets that a back end injects into its own stack
TIME_WAIT_FLOWS = 1 << 17  # room for connections that are over


def _count() -> int:
    """One for each core, down to a power of two."""
    return min(1 << len(os.sched_getaffinity(0)).bit_length() - 1, MAX_QUEUES)


def _kernel_counters(numbers: list[int]) -> dict[str, int]:
    """What the kernel says of queues (/proc/net/netfilter/nfnetlink_queue): packets that wait, and
    those lost because the queue was full or the daemon's socket had no room."""
    total = dict.fromkeys(("queued", "queue_dropped", "socket_dropped"), 0)
    try:
        lines = rootfiles.read(rootfiles.QUEUES).splitlines()
    except OSError:  # said when we began: they are missing, not zero
        return {}
    for line in lines:
        field = [int(x) for x in line.split()]
        if field[0] in numbers:
            total["queued"] += field[2]
            total["queue_dropped"] += field[5]
            total["socket_dropped"] += field[6]
    return total


def load() -> None:
    """Have the kernel know queues, if it can: before that, there is no file of their counters."""
    with contextlib.suppress(OSError):
        for queue in open_queues(1, FIRST_QUEUE):
            queue.close()


def _heads_suffice(host: Host, name: str) -> bool:
    """Whether the numbers of a verdict reach nft's rules, and those can store them: tried with a
    datagram to ourselves."""
    queue: Queue | None = None
    with (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
          socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender):
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(1)
        port = receiver.getsockname()[1]
        datagram: dict[str, Any] = {"protocol": socket.IPPROTO_UDP, "dport": port, "lo": True}
        try:
            queue, = open_queues(1, FIRST_QUEUE)
            queue.pass_numbers()
            queue.start()
            rules.install(host, name, [
                Rule("postrouting", **datagram, queue=(queue.num, 1)),
                Rule("numbers", sport=port, lo=True, store=True),
                Rule("numbers", mark=PROBE_MARK, priority=PROBE_PRIORITY),
                Rule("numbers", **datagram, drop=True)], rules.NFT)
            sender.sendto(b"?", receiver.getsockname())
            return receiver.recv(1) == b"?"
        except (OSError, HostError) as error:
            log.debug("whole packets are read: %s", error)
            return False
        finally:
            rules.remove(name)
            if queue:
                queue.close()


class _Nfqueue:
    name = "nfqueue"
    chosen = ""
    fastpath = False
    table: FeNfqueue | BeNfqueue
    fragments: Fragments | None = None

    def __init__(self, config: Config, host: Host, role: str, heads: bool = False):
        self.host = host
        self.rules = f"tcpha{role}_{host.handle:04x}_{os.getpid()}"
        self.heads = heads and _heads_suffice(host, self.rules)
        try:
            self.queues = open_queues(_count(), FIRST_QUEUE, config.queuelen, self.heads)
        except OSError as error:
            raise DatapathError(f"datapath nfqueue: {error.strerror}; the kernel needs "
                                "NETFILTER_NETLINK_QUEUE, and the daemon CAP_NET_ADMIN") from None

    def _begin(self, table: list[Rule]) -> None:
        self.way = rules.keep(self.host, self.rules, table,
                              rules.NFT if self.heads else rules.WAYS)
        log.info("packets reach their queues by %s%s", self.way,
                 "; of what leaves, heads only" if self.heads else "")
        try:
            rootfiles.read(rootfiles.QUEUES)
        except OSError as error:
            log.warning("%s: %s; what the kernel dropped for want of room is counted nowhere",
                        rootfiles.QUEUES, error.strerror)
        # Where the rules of a killed run are still in force, packets pass both: none may be
        # rewritten before those are gone, or it would be rewritten twice. Until then they wait.
        self.host.forget_rules()
        for queue in self.queues:
            queue.start()
        if self.fragments:
            self.fragments.start()

    def _errors(self, vaddr: str) -> Rule:
        """For ICMP errors about what was sent in the name of the VIP; they are few."""
        return Rule("prerouting", protocol=socket.IPPROTO_ICMP, destination=vaddr, bypass=True,
                    queue=(self.queues[0].num, 1))

    @property
    def _span(self) -> tuple[int, int]:
        """The queues that read whole packets."""
        return self.queues[0].num, _count()

    def counters(self) -> dict[str, Any]:
        total: dict[str, int] = {}
        for queue in self.queues:
            for key, value in queue.counters().items():
                total[key] = total.get(key, 0) + value
        return {**total, "by_queue": [q.counters()["packets"] for q in self.queues],
                **_kernel_counters([q.num for q in self.queues]), **self.table.counters(),
                **(self.fragments.counters() if self.fragments else {})}

    def close(self) -> None:
        each(("rules", lambda: rules.remove(self.rules)),
             *(("queue", queue.close) for queue in self.queues), ("flows", self.table.close),
             *([("fragments", self.fragments.close)] if self.fragments else []))


class NfqueueFrontend(_Nfqueue):
    table: FeNfqueue

    def __init__(self, config: Config, host: Host):
        super().__init__(config, host, "fe")
        self.config = config
        self.table = FeNfqueue(config.maxclients, config.maxflows, config.forward == "tunnel",
                               self.queues)
        self.paths: dict[int, tuple[Path, tuple[Any, ...] | None]] = {}
        self.left: dict[str, tuple[int, int]] = {}
        self.fresh = True
        self.services: list[tuple[str, int]] = []
        self.fragments = open_fragments(config, host, "fe")
        self.in_force = self._more([(s.vaddr, s.port) for s in config.services])
        self._begin(self.in_force)

    def _more(self, services: list[tuple[str, int]]) -> list[Rule]:
        """Rules that bring us the packets of more services."""
        known = {vaddr for vaddr, _ in self.services}
        out = []
        for vaddr, port in services:
            vip: dict[str, Any] = {"hook": "prerouting", "destination": vaddr, "dport": port,
                                   "queue": self._span}
            out += [Rule(**vip, flags=rules.SYN, bypass=True), Rule(**vip)]
        for vaddr in dict.fromkeys(v for v, _ in services if v not in known):
            out += [self._errors(vaddr),
                    *([self.fragments.rule(vaddr)] if self.fragments else [])]
        self.services += services
        return out

    def add_services(self, services: list[tuple[str, int]]) -> None:
        """Those that are closed keep their rules, for the connections that they have."""
        more = self._more([service for service in services if service not in self.services])
        rules.add(self.host, self.rules, self.in_force, more, self.way)
        self.in_force += more

    def set_service(self, vaddr: str, port: int, number: int | None) -> None:
        """There is no packet path: our own stack has all new connections."""

    def fit(self, mtu: int) -> None:
        if self.fragments:
            self.fragments.fit(mtu)

    def open_local(self) -> NfqueueLocal:
        local = NfqueueLocal(self.config, self.host)
        self.table.set_local(local.table)
        return local

    def set_down(self, index: int, down: bool) -> None:
        """There is no packet path."""

    def wary(self) -> bool:
        return False

    def take_silent(self, seconds: float) -> None:
        """There is no packet path."""

    def set_backend(self, index: int, path: Path | None) -> None:
        if path is None:
            self.paths.pop(index, None)
            self.table.set_backend(index, None)
        else:
            self.paths[index] = path, None
            self._resolve([index])

    def _resolve(self, indexes: list[int]) -> None:
        neighbours = self.host.neighbours()
        links: dict[int, tuple[bytes, int]] = {}
        for index in indexes:
            path, known = self.paths[index]
            device = path.ifindex
            mac = neighbours.get((device, path.nexthop))
            if mac is None:
                continue
            if device not in links:
                links[device] = self.host.mac(device), self.host.mtu(device)
            ours, mtu = links[device]
            way = (device, path.tunnel, mac, ours, path.address, path.source, min(mtu, path.mtu))
            if way != known:
                self.paths[index] = path, way
                self.table.set_backend(index, way)

    def refresh(self) -> None:
        if self.paths:
            self._resolve(list(self.paths))


class _Handshakes:
    """SYN-ACKs of the local servers and SYNs for their own ports, few and small, through the
    netfilterqueue package."""

    def __init__(self, table: BeNfqueue, first: int):
        self.table = table
        self.queue = NetfilterQueue()
        for num in range(first, 65536):
            try:
                self.queue.bind(num, self._on_packet)
            except OSError:
                continue
            self.num = num
            break
        else:
            raise DatapathError("datapath nfqueue: no free netfilter queue")
        self.stop = os.eventfd(0, os.EFD_CLOEXEC)
        self.thread = persistent_thread("handshakes", self._run)

    def _on_packet(self, packet: Any) -> None:
        if self.table.handshake(packet.get_payload()):
            if packet.get_mark():
                packet.set_mark(0)  # or rules would take it for a number of ours
            packet.accept()
        else:
            packet.drop()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.queue.get_fd(), select.POLLIN)
        poll.register(self.stop, select.POLLIN)
        while not any(fd == self.stop for fd, _ in poll.poll()):
            self.queue.run(block=False)

    def close(self) -> None:
        os.eventfd_write(self.stop, 1)
        self.thread.join()
        each(("queue", self.queue.unbind), ("eventfd", lambda: os.close(self.stop)))


class _Adopter(_Nfqueue):
    """The local servers' side, of a back end and of the Local Node. file: what an earlier run knew
    of its connections, if it was killed."""

    table: BeNfqueue

    def __init__(self, config: Config, host: Host, role: str, ways: list[Way], connections: int,
                 file: FilePath | None):
        super().__init__(config, host, role, heads=True)
        self.file = file
        self.pinned: Pinned | None = None
        self.detour: Object | None = None
        self.listeners = list(dict.fromkeys((way.address, way.port) for way in ways))
        # to which nobody but we sends anything
        self.own = [] if file is None else [x for x in self.listeners if x[0] in config.vaddrs]
        devices = devices_of(config, host)
        with by_owner():
            self.table = BeNfqueue(ways, connections * 2 + TIME_WAIT_FLOWS, MARK, self.queues,
                                   str(file) if file else None, devices, file is None)
        self.handshakes = _Handshakes(self.table, self._span[0] + len(self.queues))

    def _direct(self) -> list[Rule]:
        """For who talks to a local server directly."""
        return [Rule("prerouting", destination=address, dport=port, flags=rules.SYN,
                     queue=(self.handshakes.num, 1), bypass=True)
                for address, port in self.listeners if (address, port) not in self.own]

    def _outward(self, address: str, port: int) -> list[Rule]:
        """For what a local server sends."""
        first, total = self._span
        local: dict[str, Any] = {"hook": "postrouting", "source": address, "sport": port}
        found = [Rule(**local, flags=rules.SYN_ACK, queue=(self.handshakes.num, 1)),
                 Rule(**local, queue=(first + total, total) if self.heads else self._span)]
        if self.heads:
            found.append(Rule("numbers", source=address, sport=port, store=True))
        return found

    def _serve(self, inward: list[Rule]) -> None:
        guard = []
        if any(address.startswith("127.") for address, _ in self.listeners):
            # packets for it come from the network and leave for it; only those that we rewrite may
            guard = [Rule("prerouting", drop=True, protocol=None, destination=rules.LOOPBACK)]
        self.pinned = Pinned(self.host, f"{self.rules}_n", self.listeners, self.own, MARK)
        outward = [rule for listener in self.listeners for rule in self._outward(*listener)]
        self._begin([*guard, Rule("prerouting", mark=MARK), *inward, *self._direct(), *outward])
        if guard:
            self.host.sysctl("net/ipv4/conf/all/route_localnet", "1")

    def allow(self, address: str, allowed: bool) -> None:
        self.table.allow(address, allowed)

    def allowed(self) -> list[str]:
        return self.table.allowed()

    def follow(self, address: str, port: int, device: int) -> None:
        host = self.host
        if self.detour is None:
            self.detour = Object(program_file("detour"), struct.pack("=I", MARK),
                                 {"devices": len(self.listeners)}, instance=host.handle)
        host.attach(device, self.detour.program_fd("be_arrival"), DEVICE_PRIORITY)
        host.attach(socket.if_nametoindex("lo"), self.detour.program_fd("be_detour"),
                    DEVICE_PRIORITY)
        self.detour.put("devices", V4_MAPPED + socket.inet_aton(address) +
                        struct.pack("!HH", port, 0),
                        struct.pack("=I", device))
        self.table.follow(address, port, device, host.mtu(device))

    def close(self) -> None:
        # without us their packets would leave as they are, and mean nothing to the clients
        each(("connections", self.table.end_all), ("handshakes", self.handshakes.close),
             *([("NAT rules", self.pinned.close)] if self.pinned else []),
             ("datapath", super().close), ("file of flows", self._remove_file))

    def _remove_file(self) -> None:
        if self.file:
            with by_owner():
                self.file.unlink(missing_ok=True)


class NfqueueBackend(_Adopter):
    def __init__(self, config: Config, host: Host):
        super().__init__(config, host, "be", ways_to(config, config.places), config.maxclients,
                         host.journal.with_suffix(".flows"))
        self.fragments = open_fragments(config, host, "be")
        self._serve([
            Rule("prerouting", queue=self._span, protocol=rules.IPIP, destination=config.raddr),
            *(Rule("prerouting", queue=self._span, destination=vaddr) for vaddr in config.vaddrs),
            *(self._errors(vaddr) for vaddr in config.vaddrs),
            *([self.fragments.rule(config.raddr)] if self.fragments else [])])


class NfqueueLocal(_Adopter):
    """What comes from the network has passed the front end's queues."""

    def __init__(self, config: Config, host: Host):
        super().__init__(config, host, "ln", local_ways(config), LOCAL_CONNECTIONS, None)
        self._serve([])
