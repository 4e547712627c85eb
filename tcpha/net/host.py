# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes to the host, each undone when the daemon stops.

Every change is written to a journal before it is made, so that a daemon that was killed is cleaned
up after by the next one with the same run directory.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

from pyroute2 import DiagSocket, IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from tcpha._fast.bpf import maps_of, open_program, program_id, tc_attach, tc_attached
from tcpha.net.tcx import Tcx
from tcpha.owner import by_owner
from tcpha.undoing import each

log = logging.getLogger("tcpha")

CLSACT_INGRESS, CLSACT_EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
PRIORITIES, LAST_PRIORITY = 3, 201  # of our filters at tc: how many, and the greatest
ETH_P_ALL = 0x0003
ETH_P_ARP = 0x0806
ARPHRD_ETHER = 1
IFF_UP, IFF_RUNNING = 1, 64
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
TCP_SYN_RECV = 3
PROBES, PROBE_WAIT = 2, 0.15  # seconds; neighbours answer within one
TAP_PREFIXES = ("tcphafe", "tcphabe", "tcphaln", "tcphafp", "tcphafr")
# what tells changes of each kind apart
IDENTITY = {"sysctl": ("name",), "address": ("address",), "rules": ("name",), "arp": ("name",),
            "filter": ("interface", "priority", "handle")}
# how a loss of what is kept shows; routes are not kept, only followed
LINK, NFT, POLLED, PROGRAM, SLOW, ROUTE = "link", "nft", "polled", "program", "slow", "route"


def _kind(link: Any) -> str:
    """What kind of virtual device a link is; '' for hardware."""
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND")) if info else ""


class HostError(Exception):
    """The host cannot be set up; the message says what to do."""


@dataclass(frozen=True)
class Route:
    """How a packet to an address leaves: interface, next hop (the address itself if on link), and
    the source address that goes with it."""

    ifindex: int
    nexthop: str
    source: str

    def on_link(self, address: str) -> bool:
        return self.nexthop == address


@dataclass(frozen=True)
class Kept:
    """Something that has to stay as it is while we run. what: its name, for people. kind: LINK or
    NFT, a notification tells of its loss; POLLED, a cheap look each second does; PROGRAM, LINK's
    notifications may, and a look each second, which may have to wait; SLOW, a dear one does.
    """

    what: str
    kind: str
    missing: Callable[[], bool]
    restore: Callable[[], None]
    late: bool = False  # it is needed only since others have come: nobody took it away


class _Netlink:
    """pyroute2's IPRoute in a thread of its own: it runs an event loop, and so do its callers."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "netlink")
        self._ipr = self._thread.submit(IPRoute).result()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._ipr, name)

        def call(*args: Any, **kw: Any) -> Any:
            answer = method(*args, **kw)
            return list(answer) if isinstance(answer, Iterator) else answer
        return lambda *args, **kw: self._thread.submit(call, *args, **kw).result()

    def close(self) -> None:
        self._thread.submit(self._ipr.close).result()
        self._thread.shutdown()


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """The journal is written by the keeper's thread, too."""
    @wraps(method)
    def call(self: Host, *args: Any, **kw: Any) -> Any:
        with self.lock:
            return method(self, *args, **kw)
    return call


def _changes(journal: Path) -> list[dict[str, Any]]:
    """What a daemon has changed, oldest first. Raises ValueError."""
    with by_owner():
        return list(json.loads(journal.read_text())) if journal.exists() else []


def _programs(changes: list[dict[str, Any]]) -> set[int]:
    """Ids of programs at tcx."""
    return {change["program"] for change in changes if change.get("program")}


def _identity(change: dict[str, Any]) -> tuple[Any, ...]:
    return change["what"], *(change[key] for key in IDENTITY[change["what"]])


class Host:
    """This network namespace, seen through netlink and /proc. Several threads may use it."""

    def __init__(self, journal: Path):
        self.journal = journal
        self.lock = threading.RLock()
        self.undo: list[dict[str, Any]] = []
        self.inherited: list[dict[str, Any]] = []
        self.maps: dict[int, dict[str, tuple[int, int, int]]] = {}
        # by kind of the change and what tells it apart
        self.kept: dict[tuple[Any, ...], Kept] = {}
        self.followers: dict[str, list[tuple[str, Callable[[], None]]]] = {}
        # names (none: all), program and priority of what is attached to the network's interfaces
        self.everywhere: tuple[list[str], int, int] | None = None
        # distinguishes the programs of instances with other run directories
        self.handle = zlib.crc32(str(journal.resolve()).encode()) % 0xFFFE + 1
        self.tcx = Tcx(self.handle)

    @cached_property
    def ipr(self) -> _Netlink:
        return _Netlink()

    # Journal

    def recover(self) -> None:
        """Learn what a killed predecessor left. It stays in force until there is something in its
        place, so that its connections go on: see settle()."""
        try:
            left = _changes(self.journal)
        except ValueError:
            log.warning("%s is damaged; what a killed daemon left behind stays", self.journal)
            left = []
        self.tcx.recover(_programs(left))
        if left:
            log.info("taking over from an earlier run that was killed")
        self.undo = list(left)
        self.inherited = list(left)
        self._claim_maps()

    def _know_others(self) -> None:
        """Other daemons of TCPHA may have come after us; nobody without CAP_SYS_ADMIN could tell
        by their programs."""
        for path in self.journal.parent.glob(f"*{self.journal.suffix}"):
            if path != self.journal:
                with contextlib.suppress(OSError, ValueError):
                    self.tcx.others |= _programs(_changes(path))

    def _claim_maps(self) -> None:
        """Of the programs that are still attached, by priority: {name: (descriptor, size of a key,
        of a value)}. Nobody without CAP_SYS_ADMIN can get at them later."""
        for change in self.inherited:
            if change["what"] == "filter" and not self.maps.get(change["priority"]):
                with contextlib.suppress(OSError):
                    self.maps[change["priority"]] = self._maps_of(change)

    def _maps_of(self, change: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
        if number := change.get("program"):
            return self.tcx.maps(number)
        index = socket.if_nametoindex(change["interface"])
        number = tc_attached(index, change.get("at", change["priority"]), self.handle)
        if not number:
            return {}
        fd = open_program(number)
        try:
            return dict(maps_of(fd))
        finally:
            os.close(fd)

    def settle(self) -> None:
        """All of ours is in force: undo what else a killed predecessor changed."""
        self._forget(self.inherited)
        self.tcx.settle()
        for fd, _, _ in (m for maps in self.maps.values() for m in maps.values()):
            os.close(fd)
        self.maps.clear()

    def forget_rules(self) -> None:
        """New rules are in force: take those of a killed predecessor away."""
        self._forget([change for change in self.inherited if change["what"] == "rules"])

    @_one_at_a_time
    def _forget(self, changes: list[dict[str, Any]]) -> None:
        for change in reversed(list(changes)):
            self.inherited.remove(change)
            self.undo.remove(change)
            self._undo(change)
        self._write()

    @_one_at_a_time
    def inherit(self, **change: Any) -> dict[str, Any] | None:
        """A predecessor's change, which is ours from now on; None: there is none like it."""
        for old in self.inherited:
            if all(old.get(key) == value for key, value in change.items()):
                self.inherited.remove(old)
                self.undo.remove(old)
                self.undo.append(old)
                self._write()
                return old
        return None

    @_one_at_a_time
    def will_undo(self, **change: Any) -> None:
        """Note a change that is about to be made, in the place of one that has to be made again."""
        for n, old in enumerate(self.undo):
            if _identity(old) == _identity(change) and old not in self.inherited:
                self.undo[n] = change
                break
        else:
            self.undo.append(change)
        self._write()

    def keep(self, key: tuple[Any, ...], kept: Kept) -> None:
        """See to it that something stays until it is undone (see net/keeper.py). key: the identity
        of its change, whether or not one had to be made."""
        self.kept[key] = kept

    def follow(self, kind: str, what: str, work: Callable[[], None]) -> None:
        """Have something done whenever there may be news of a kind. It may wait for netlink."""
        self.followers.setdefault(kind, []).append((what, work))

    @_one_at_a_time
    def forget(self, *key: Any) -> None:
        """What was kept is gone for good, and there is nothing to be undone."""
        self.kept.pop(key, None)
        self.undo[:] = [change for change in self.undo if _identity(change) != key]
        self._write()

    def _undo(self, change: dict[str, Any]) -> None:
        try:
            self.kept.pop(_identity(change), None)
            getattr(self, "_undo_" + change["what"])(change)
        except Exception as error:  # whatever it is, there are others to undo
            log.warning("cannot undo %s: %s", change, error)

    def _write(self) -> None:
        scratch = self.journal.with_suffix(".new")
        with by_owner():
            with open(scratch, "w") as f:
                json.dump(self.undo, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(scratch, self.journal)

    def _write_undone(self) -> None:
        """What is in the journal and undone already does no harm to who undoes it again."""
        try:
            self._write()
        except OSError as error:
            log.debug("%s: %s", self.journal, error.strerror)

    @_one_at_a_time
    def withdraw(self) -> None:
        """Take addresses away, before that which would miss their packets."""
        for change in [c for c in self.undo if c["what"] == "address"]:
            self.undo.remove(change)
            self._undo(change)
            self._write_undone()

    def restore(self) -> None:
        """Put everything back, latest change first."""
        each(("addresses", self.withdraw), ("changes", lambda: self.restore_to(0)),
             ("tcx", self.tcx.end), ("journal", self._remove_journal))

    def _remove_journal(self) -> None:
        with by_owner():
            for file in (self.journal, self.journal.with_suffix(".new")):
                file.unlink(missing_ok=True)

    @_one_at_a_time
    def restore_to(self, mark: int) -> None:
        """Undo all changes but the first 'mark' ones."""
        while len(self.undo) > mark:
            self._undo(self.undo.pop())
            self._write_undone()

    @_one_at_a_time
    def restore_since(self, before: list[dict[str, Any]]) -> None:
        """Undo what is not in an earlier copy of our changes, whatever became of those in it."""
        for change in [c for c in reversed(self.undo) if not any(c is b for b in before)]:
            self.undo.remove(change)
            self._undo(change)
            self._write_undone()

    def close(self) -> None:
        if "ipr" in self.__dict__:
            self.ipr.close()

    # sysctl

    def sysctl(self, name: str, value: str) -> None:
        """Set a sysctl (slashes in its name), if it is not so already, and keep it so."""
        if self.set_sysctl(name, value):
            self._keep_sysctl(name, value, lambda now: now.split() != value.split())

    def sysctl_on(self, name: str) -> None:
        """Set a sysctl to 1, if it is 0: other values mean more than that. Keep it from 0."""
        value = self.read_sysctl(name)
        if value and self.set_sysctl(name, "1" if value == "0" else value):
            self._keep_sysctl(name, "1", lambda now: now == "0")

    def _keep_sysctl(self, name: str, value: str, wrong: Callable[[str], bool]) -> None:
        self.keep(("sysctl", name), Kept(
            f"sysctl {name.replace('/', '.')} = {value}", POLLED,
            lambda: wrong(self.read_sysctl(name)), lambda: self._set_again(name, value)))

    def _set_again(self, name: str, value: str) -> None:
        """Somebody has changed it, and that is what it shall be when we are gone."""
        self.will_undo(what="sysctl", name=name, old=self.read_sysctl(name))
        (Path("/proc/sys") / name).write_text(value)

    def set_sysctl(self, name: str, value: str) -> bool:
        """Set a sysctl, if it is not so already. Returns whether there is such a one."""
        path = Path("/proc/sys") / name
        try:
            old = path.read_text().strip()
        except FileNotFoundError:
            return False
        inherited = self.inherit(what="sysctl", name=name)
        if old.split() == value.split():
            return True
        if inherited:
            path.write_text(value)
            return True
        log.info("sysctl %s: %s, was %s", name.replace("/", "."), value, old)
        self.will_undo(what="sysctl", name=name, old=old)
        path.write_text(value)
        return True

    def read_sysctl(self, name: str) -> str:
        try:
            return (Path("/proc/sys") / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def _undo_sysctl(self, change: dict[str, Any]) -> None:
        parts = change["name"].split("/")
        if parts[0] != "net" or ".." in parts:
            raise KeyError(change["name"])  # none that we change
        path = Path("/proc/sys", *parts)
        if path.exists():
            path.write_text(change["old"])

    # Addresses

    def interface(self, index: int) -> str:
        return str(socket.if_indextoname(index))

    def holder(self, address: str) -> int | None:
        """Index of the interface that holds an address."""
        for entry in self.ipr.get_addr(family=socket.AF_INET):
            if entry.get_attr("IFA_LOCAL") == address:
                return int(entry["index"])
        return None

    def takes(self, address: str) -> bool:
        """Whether our stack takes packets for an address, which somebody else may have added, or a
        local route for it (AnyIP)."""
        if self.holder(address) is not None:
            return True
        try:
            return bool(self.ipr.route("get", dst=address)[0]["type"] == RTN_LOCAL)
        except (NetlinkError, IndexError):
            return False

    def address_beside(self, index: int, address: str) -> str | None:
        """Another address of an interface."""
        for entry in self.ipr.get_addr(family=socket.AF_INET, index=index):
            if entry.get_attr("IFA_LOCAL") != address:
                return str(entry.get_attr("IFA_LOCAL"))
        return None

    def add_address(self, address: str, where: Callable[[], int | None]) -> None:
        """Add address/32, unless another interface holds it (the administrator's then, and kept),
        and keep it there. where: finds the interface, which may be another one later, or none."""
        index = where()
        if index is not None:
            self.inherit(what="address", address=address)
            self._place_address(address, index)
        self.keep(("address", address), Kept(
            f"address {address}", LINK,
            lambda: (index := where()) is not None and self._misplaced(address, index),
            lambda: self._place_address(address, where())))

    def _ours(self, address: str) -> str | None:
        """The interface that we added an address to."""
        return next((str(c["interface"]) for c in self.undo
                     if _identity(c) == ("address", address)), None)

    def _misplaced(self, address: str, index: int) -> bool:
        """Whether nobody holds an address, or an interface where we added it and which is not the
        right one any more."""
        held = self.holder(address)
        return held is None or (held != index and self.interface(held) == self._ours(address))

    def _place_address(self, address: str, index: int | None) -> None:
        if index is None or not self._misplaced(address, index):
            return
        if self.holder(address) is not None:
            self._undo_address({"address": address, "interface": self._ours(address)})
        self.will_undo(what="address", address=address, interface=self.interface(index))
        self.ipr.addr("add", index=index, address=address, prefixlen=32)

    def ensure_loopback(self, index: int) -> None:
        """Give a device of ours an address. It takes that along when it goes."""
        if not any(self.ipr.get_addr(family=socket.AF_INET, index=index)):
            self.ipr.addr("add", index=index, address="127.0.0.1", prefixlen=32,
                          scope=RT_SCOPE_HOST)

    def _undo_address(self, change: dict[str, Any]) -> None:
        try:
            index = socket.if_nametoindex(change["interface"])
            self.ipr.addr("del", index=index, address=change["address"], prefixlen=32)
        except (OSError, NetlinkError):
            return  # gone already, with its interface or by the administrator

    def route(self, address: str) -> Route:
        """The route to an address. Raises HostError if there is none."""
        try:
            answer = self.ipr.route("get", dst=address)[0]
        except (NetlinkError, IndexError) as error:
            raise HostError(f"no route to {address} ({error}); add one") from None
        return Route(int(answer.get_attr("RTA_OIF")),
                     str(answer.get_attr("RTA_GATEWAY") or address),
                     str(answer.get_attr("RTA_PREFSRC") or "0.0.0.0"))

    def ethernet(self, names: list[str]) -> list[int]:
        """Indexes of the interfaces at which our stack takes packets: the named ones, or all
        Ethernet ones that are up and whose packets no bridge or bond takes first."""
        links = {int(link["index"]): link for link in self.ipr.get_links()}
        found = []
        for index, link in links.items():
            name = link.get_attr("IFLA_IFNAME")
            if name.startswith(TAP_PREFIXES):
                continue
            usable = link["ifi_type"] == ARPHRD_ETHER and link["flags"] & IFF_UP \
                and not self._is_taken(link, links)
            if name in names or (not names and usable):
                found.append(index)
        missing = set(names) - {links[i].get_attr("IFLA_IFNAME") for i in found}
        if missing:
            raise HostError(f"no interface {', '.join(sorted(missing))}; mend the key 'interface'")
        if not found:
            raise HostError("no Ethernet interface is up; bring one up first")
        return found + self._lower(found, links)

    @staticmethod
    def _is_taken(link: Any, links: dict[int, Any]) -> bool:
        """Whether what an interface receives goes to its master (but a VRF only looks on)."""
        master = links.get(int(link.get_attr("IFLA_MASTER") or 0))
        return master is not None and _kind(master) != "vrf"

    @staticmethod
    def _lower(found: list[int], links: dict[int, Any]) -> list[int]:
        """An ipvlan device gets what is for its own addresses; the virtual address is on lo, so its
        parent has those packets."""
        return [parent for index in found if _kind(links[index]) == "ipvlan"
                and links[index].get_attr("IFLA_LINK_NETNSID") is None
                and (parent := int(links[index].get_attr("IFLA_LINK") or 0)) in links
                and parent not in found]

    def _link(self, index: int) -> Any:
        try:
            return self.ipr.get_links(index)[0]
        except (NetlinkError, IndexError) as error:
            raise HostError(f"interface number {index} is gone ({error})") from None

    def mtu(self, index: int) -> int:
        """Raises HostError if there is no such interface any more."""
        return int(self._link(index).get_attr("IFLA_MTU"))

    def running_mac(self, index: int) -> bytes | None:
        """The MAC address of an Ethernet interface whose link is up."""
        link = self._link(index)
        if link["ifi_type"] != ARPHRD_ETHER or not link["flags"] & IFF_RUNNING:
            return None
        return bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", ""))

    def announce(self, address: str, index: int, mac: bytes) -> None:
        """Gratuitous ARP (RFC 5227 section 3): neighbours learn who holds an address now."""
        ip = socket.inet_aton(address)
        frame = b"\xff" * 6 + mac + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1) \
            + mac + ip + b"\0" * 6 + ip
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind((self.interface(index), ETH_P_ARP))
            s.send(frame)

    def holder_on_link(self, index: int, address: str) -> str | None:
        """Who answers for an address on an interface's segment, as a MAC address; None: nobody.
        Asked as RFC 5227 section 2.1.1 does, without claiming an address."""
        mac, ip = self.mac(index), socket.inet_aton(address)
        probe = b"\xff" * 6 + mac + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1) \
            + mac + b"\0" * 10 + ip
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as s:
            s.bind((self.interface(index), ETH_P_ARP))
            for _ in range(PROBES):
                s.send(probe)
                end = time.monotonic() + PROBE_WAIT
                while (left := end - time.monotonic()) > 0:
                    s.settimeout(left)
                    try:
                        frame = s.recv(64)
                    except TimeoutError:
                        break
                    if frame[20:22] == b"\0\2" and frame[28:32] == ip and frame[22:28] != mac:
                        return frame[22:28].hex(":")
        return None

    def neighbours(self) -> dict[tuple[int, str], bytes]:
        """{(interface, address): MAC address} of all neighbours that the kernel knows."""
        return {(int(e["ifindex"]), str(e.get_attr("NDA_DST"))):
                bytes.fromhex(e.get_attr("NDA_LLADDR").replace(":", ""))
                for e in self.ipr.get_neighbours(family=socket.AF_INET)
                if e.get_attr("NDA_LLADDR")}

    def is_ethernet(self, index: int) -> bool:
        return bool(self._link(index)["ifi_type"] == ARPHRD_ETHER)

    def mac(self, index: int) -> bytes:
        return bytes.fromhex(
            self._link(index).get_attr("IFLA_ADDRESS").replace(":", ""))

    def handshakes(self, address: str, port: int) -> int:
        """How many SYNs to an address and port of ours are answered, and the answer not yet
        acknowledged; 0 if the kernel does not say. May be called from another thread."""
        try:
            with DiagSocket() as diag:
                diag.bind()
                return sum(s["idiag_src"] == address and s["idiag_sport"] == port for s in
                           diag.get_sock_stats(family=socket.AF_INET, states=1 << TCP_SYN_RECV))
        except (OSError, NetlinkError) as error:
            log.debug("half-open connections: %s", error)
            return 0

    # Rules

    def _undo_rules(self, change: dict[str, Any]) -> None:
        from tcpha.net.rules import remove
        remove(change["name"])

    def _undo_arp(self, change: dict[str, Any]) -> None:
        from tcpha.net.rules import show_in_arp
        show_in_arp(change["name"])

    # Programs

    def attach(self, index: int, program_fd: int, priority: int) -> None:
        """Put a BPF program where it sees what an interface receives before others do, who see what
        it lets pass, and keep it there as long as there is this interface. In the order of their
        priorities, if there are several of ours."""
        name = self.interface(index)
        key = "filter", name, priority, self.handle
        self._attach(index, program_fd, priority)
        self.keep(key, Kept(
            f"BPF program on {name}", PROGRAM,
            lambda: self._detached(index, program_fd, key),
            lambda: self._attach(index, program_fd, priority)))

    def attach_everywhere(self, names: list[str], program_fd: int, priority: int) -> None:
        """The same for the named interfaces, or all Ethernet ones; and see late()."""
        for index in self.ethernet(names):
            self.attach(index, program_fd, priority)
        self.everywhere = names, program_fd, priority

    def late(self) -> list[int]:
        """Interfaces that have come since, and are to have the same."""
        if self.everywhere is None:
            return []
        names, _, priority = self.everywhere
        return [index for index in self._present(names)
                if ("filter", self.interface(index), priority, self.handle) not in self.kept]

    def join(self, index: int) -> None:
        """Attach to one of these what the others have."""
        assert self.everywhere is not None
        _, program_fd, priority = self.everywhere
        self.attach(index, program_fd, priority)
        log.info("interface %s: in use from now on", self.interface(index))

    def _present(self, names: list[str]) -> list[int]:
        """As ethernet(), of what there is."""
        there = [name for name in names if (Path("/sys/class/net") / name).exists()]
        try:
            return self.ethernet(there) if there or not names else []
        except HostError:
            return []

    def _attachment(self, key: tuple[Any, ...]) -> dict[str, Any]:
        """How the journal has a program that was attached: with its id, if it is at tcx."""
        return next((c for c in self.undo if _identity(c) == key and c not in self.inherited), {})

    def _detached(self, index: int, program_fd: int, key: tuple[Any, ...]) -> bool:
        """Whether a program is not where it was attached. Nothing is missing, and nothing to be
        undone, if the interface is gone, or has another name, under which it comes again."""
        try:
            gone = self.interface(index) != key[1]
        except OSError:
            gone = True
            with self.lock:
                self.tcx.gone(index)
        if gone:
            self.forget(*key)
            return False
        change = self._attachment(key)
        if number := change.get("program"):
            return not self.tcx.attached(index, number)
        at = change.get("at", key[2])
        return bool(tc_attached(index, at, self.handle) != program_id(program_fd))

    @_one_at_a_time
    def _attach(self, index: int, program_fd: int, priority: int) -> None:
        """At tcx, or by a filter of tc where the kernel has none."""
        place = {"interface": self.interface(index), "priority": priority, "handle": self.handle}
        self._know_others()
        if number := self.tcx.attach(index, program_fd, priority):
            self.will_undo(what="filter", **place, qdisc=False, program=number)
        else:
            self._attach_filter(index, program_fd, place)
        self._forget([c for c in self.inherited
                      if _identity(c) == ("filter", *place.values())])

    def _attach_filter(self, index: int, program_fd: int, place: dict[str, Any]) -> None:
        # the new program takes the old one's place
        if old := self.inherit(what="filter", **place, program=None):
            tc_attach(index, program_fd, old.get("at", place["priority"]), self.handle)
            return
        # the qdisc goes with the last of our instances, if one of them made it
        ours = not self._has_clsact(index) or (bool(self._filters(index)) and all(
            f["handle"] >> 16 == 0 and self._is_ours(f) for f in self._filters(index)))
        # or if we did, and somebody has taken only the filter away since
        ours = ours or any(c["what"] == "filter" and c["interface"] == place["interface"] and
                           c["qdisc"] for c in self.undo)
        at = self._best_priority(index, place["priority"])
        self.will_undo(what="filter", **place, qdisc=ours, at=at)
        tc_attach(index, program_fd, at, self.handle)

    def _best_priority(self, index: int, wanted: int) -> int:
        """Before the filters of others, if there is room before the first one; else as wanted. No
        lower than it takes, since whoever wants a priority that is in use is refused."""
        first = min((f["info"] >> 16 for f in self._ingress_filters(index)
                     if f["info"] >> 16 and not self._is_bpf_of_ours(f)), default=LAST_PRIORITY + 1)
        lower = min(wanted, wanted - (LAST_PRIORITY + 1 - first))
        return lower if first > PRIORITIES else wanted

    def in_front(self) -> dict[str, list[str]]:
        """By interface, what sees packets before our programs do, and may keep them to itself."""
        found = {}
        self._know_others()
        for key in list(self.kept):
            if key[0] != "filter" or key[1].startswith(TAP_PREFIXES):
                continue
            try:
                index = socket.if_nametoindex(key[1])
                found[key[1]] = self._before(index, self._attachment(key))
            except (OSError, HostError):  # gone since; see _detached()
                continue
        return found

    def _before(self, index: int, change: dict[str, Any]) -> list[str]:
        found = []
        xdp = self._link(index).get_attr("IFLA_XDP")
        if xdp and xdp.get_attr("IFLA_XDP_ATTACHED"):
            found.append("an XDP program")
        number = change.get("program", 0)
        if count := self.tcx.in_front(index, number):
            found.append(f"{count} tcx program{'s' * (count > 1)}")
        if not number:
            found += [f"a {f.get_attr('TCA_KIND')} filter of priority {f['info'] >> 16}"
                      for f in self._ingress_filters(index)
                      if 0 < f["info"] >> 16 < change.get("at", 0) and not self._is_bpf_of_ours(f)]
        return list(dict.fromkeys(found))

    def _is_bpf_of_ours(self, filter_: Any) -> bool:
        return filter_.get_attr("TCA_KIND") == "bpf" and self._is_ours(filter_)

    @staticmethod
    def _is_ours(filter_: Any) -> bool:
        options = filter_.get_attr("TCA_OPTIONS")
        name = options.get_attr("TCA_BPF_NAME") if options else None
        return options is None or str(name).startswith(("fe_", "be_"))

    def _has_clsact(self, index: int) -> bool:
        return any(q.get_attr("TCA_KIND") == "clsact" for q in self.ipr.get_qdiscs(index=index))

    def _undo_filter(self, change: dict[str, Any]) -> None:
        try:
            index = socket.if_nametoindex(change["interface"])
        except OSError:
            return
        if number := change.get("program"):
            self.tcx.detach(index, number)
            return
        try:
            self.ipr.tc("del-filter", "bpf", index, change["handle"], parent=CLSACT_INGRESS,
                        prio=change.get("at", change["priority"]), protocol=ETH_P_ALL)
        except NetlinkError as error:
            log.debug("filter on %s: %s", change["interface"], error)
        if change["qdisc"] and self._has_clsact(index) and not self._filters(index):
            self.ipr.tc("del", "clsact", index)

    def _ingress_filters(self, index: int) -> list[Any]:
        return list(self.ipr.get_filters(index=index, parent=CLSACT_INGRESS))

    def _filters(self, index: int) -> list[Any]:
        return [*self._ingress_filters(index),
                *self.ipr.get_filters(index=index, parent=CLSACT_EGRESS)]
