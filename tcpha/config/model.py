# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: every key with its type and default, and what a checked file becomes."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tcpha._fast.core import MOST_LINKS
from tcpha._fast.match import Matcher

ANY = "0.0.0.0"  # INADDR_ANY
MAX_BACKENDS = 255           # and the Local Node
MAX_LINKS = MOST_LINKS - 1   # control connections to them; one is the Local Node's


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
class Rule:
    """Requests whose target matches 'pattern' go to 'server'."""

    server: str
    pattern: str


def patterns_of(rules: Iterable[Rule]) -> list[str]:
    """Without repetition, in the order of their first rule."""
    return list(dict.fromkeys(rule.pattern for rule in rules))


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
    """A checked configuration of either role. Values are attributes by key name."""

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
