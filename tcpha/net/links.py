# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces, routes and neighbours of this network namespace."""
from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from tcpha.net.journal import HostError

ARPHRD_ETHER = 1
IFF_UP, IFF_RUNNING = 1, 64
TAP_PREFIXES = ("tcphafe", "tcphabe", "tcphaln", "tcphafp", "tcphafr")


def _kind(link: Any) -> str:
    """What kind of virtual device a link is; '' for hardware."""
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND")) if info else ""


@dataclass(frozen=True)
class Route:
    """How a packet to an address leaves: interface, next hop (the address itself if on link), and
    the source address that goes with it."""

    ifindex: int
    nexthop: str
    source: str

    def on_link(self, address: str) -> bool:
        return self.nexthop == address


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


class Links:
    """Several threads may use it."""

    @cached_property
    def ipr(self) -> _Netlink:
        return _Netlink()

    def interface(self, index: int) -> str:
        return str(socket.if_indextoname(index))

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

    def link(self, index: int) -> Any:
        try:
            return self.ipr.get_links(index)[0]
        except (NetlinkError, IndexError) as error:
            raise HostError(f"interface number {index} is gone ({error})") from None

    def mtu(self, index: int) -> int:
        """Raises HostError if there is no such interface any more."""
        return int(self.link(index).get_attr("IFLA_MTU"))

    def running_mac(self, index: int) -> bytes | None:
        """The MAC address of an Ethernet interface whose link is up."""
        link = self.link(index)
        if link["ifi_type"] != ARPHRD_ETHER or not link["flags"] & IFF_RUNNING:
            return None
        return bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", ""))

    def neighbours(self) -> dict[tuple[int, str], bytes]:
        """{(interface, address): MAC address} of all neighbours that the kernel knows."""
        return {(int(e["ifindex"]), str(e.get_attr("NDA_DST"))):
                bytes.fromhex(e.get_attr("NDA_LLADDR").replace(":", ""))
                for e in self.ipr.get_neighbours(family=socket.AF_INET)
                if e.get_attr("NDA_LLADDR")}

    def is_ethernet(self, index: int) -> bool:
        return bool(self.link(index)["ifi_type"] == ARPHRD_ETHER)

    def mac(self, index: int) -> bytes:
        return bytes.fromhex(
            self.link(index).get_attr("IFLA_ADDRESS").replace(":", ""))

    def close(self) -> None:
        if "ipr" in self.__dict__:
            self.ipr.close()
