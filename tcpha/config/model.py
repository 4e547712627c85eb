# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: every key with its type and default, and what a checked file becomes."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tcpha._fast.core import MOST_LINKS
from tcpha._fast.match import Matcher

ANY = "0.0.0.0"  # INADDR_ANY
HTTP = "http"
PROTOCOLS = (HTTP,)  # that a service may speak; the first one is the default
MAX_BACKENDS = 255           # and the Local Node
MAX_LINKS = MOST_LINKS - 1   # control connections to them; one is the Local Node's
MAX_VADDRS = 8
MAX_SERVICES = 64


@dataclass(frozen=True)
class Server:
    """A back end: address and port of its control listener."""

    address: str
    port: int


def too_many(backends: int, connperbe: int) -> str:
    """Why a front end cannot have so many; '' if it can."""
    if backends > MAX_BACKENDS:
        return f"{backends} back ends are more than {MAX_BACKENDS}; remove some"
    if backends * connperbe > MAX_LINKS:
        return (f"{backends} back ends with {connperbe} control connections each make "
                f"{backends * connperbe}, more than {MAX_LINKS}; lower connperbe to "
                f"{MAX_LINKS // backends}")
    return ""


@dataclass(frozen=True)
class Listen:
    """A port that clients connect to, and what they speak there."""

    port: int
    protocol: str


@dataclass(frozen=True)
class Service:
    """What clients connect to: a port of one of the virtual addresses."""

    vaddr: str
    port: int
    protocol: str


@dataclass(frozen=True)
class Place:
    """Where the application listens that serves port 'vport' of the virtual addresses. vport 0: any
    port that has no place of its own. address ANY: the virtual address itself."""

    vport: int
    address: str
    port: int


@dataclass(frozen=True)
class Condition:
    """What a rule asks for besides its pattern. kind: one of CONDITIONS, see keys.py."""

    kind: str
    value: str | int

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"

    def holds_at(self, service: Service) -> bool:
        return bool(getattr(service, self.kind) == self.value)


Group = tuple[str, tuple[Condition, ...]]  # pattern and conditions


@dataclass(frozen=True)
class Rule:
    """Requests whose target matches 'pattern' go to 'server', where all conditions hold."""

    server: str
    pattern: str
    conditions: tuple[Condition, ...] = ()

    @property
    def group(self) -> Group:
        """Rules of which it is the same share the load."""
        return self.pattern, tuple(sorted(self.conditions, key=str))

    @property
    def text(self) -> str:
        """It without the server, as it stands in a BE's file."""
        return " ".join([*map(str, self.conditions), self.pattern])

    def __str__(self) -> str:
        return self.text if self.server == ANY else f"{self.server} {self.text}"

    def holds_at(self, service: Service) -> bool:
        """Whether requests that come there may be meant."""
        return all(condition.holds_at(service) for condition in self.conditions)


def groups_of(rules: Iterable[Rule]) -> list[Group]:
    """Without repetition, in the order of their first rule."""
    return list(dict.fromkeys(rule.group for rule in rules))


def patterns_of(rules: Iterable[Rule]) -> list[str]:
    """Of their groups: the same one again where conditions differ."""
    return [pattern for pattern, _ in groups_of(rules)]


@dataclass(frozen=True)
class Fault:
    """Something wrong at a place in a file; str() is the line for the user."""

    file: str
    line: int
    key: str
    text: str
    warning: bool = False

    def __str__(self) -> str:
        mark = "warning: " if self.warning else ""
        return f"{self.file}:{self.line}: {self.key}: {mark}{self.text}"


class ConfigError(Exception):
    """A configuration that cannot be used; faults says all that is wrong."""

    def __init__(self, faults: list[Fault]):
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


@dataclass(frozen=True)
class Key:
    """What a key means. read: turns one value into its typed form, or raises ValueError with a
    remedy."""

    read: Callable[[Any], Any]
    default: Any = None
    required: bool = False
    repeated: bool = False


@dataclass
class Config:
    """A checked configuration of either role. Values are attributes by key name; of vaddr, that is
    the first one."""

    role: str
    file: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    warnings: list[Fault] = field(default_factory=list)
    directory: str = ""  # to which paths are relative
    matcher: Matcher | None = None  # of the rules' patterns

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def vaddr(self) -> str:
        return self.vaddrs[0]

    @property
    def vaddrs(self) -> tuple[str, ...]:
        return tuple(self.values["vaddr"])

    @property
    def ports(self) -> tuple[int, ...]:
        """Of the FE: those that clients connect to, 'port' first."""
        return tuple(self._protocols())

    @property
    def services(self) -> tuple[Service, ...]:
        """Of the FE: every port of the first virtual address, then of the next one."""
        return tuple(Service(vaddr, port, protocol) for vaddr in self.vaddrs
                     for port, protocol in self._protocols().items())

    def _protocols(self) -> dict[int, str]:
        return {self.values["port"]: HTTP} | {one.port: one.protocol
                                              for one in self.values["listen"]}

    @property
    def places(self) -> tuple[Place, ...]:
        """Of the BE: where its applications listen. The first one serves what no other does."""
        return (Place(0, self.values["redirectaddr"], self.values["redirectport"]),
                *self.values["service"])
