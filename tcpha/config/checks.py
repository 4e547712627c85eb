# SPDX-License-Identifier: GPL-2.0-or-later
"""What needs more than one value to judge."""
from __future__ import annotations

import difflib

from tcpha._fast.match import Matcher
from tcpha.config.model import (
    ANY,
    MAX_BACKENDS,
    MAX_SERVICES,
    MAX_VADDRS,
    Config,
    Fault,
    Server,
    too_many,
)
from tcpha.control.hello import MOST_HELLO, new_instance, registration

At = dict[str, list[int]]  # by key, the lines on which its values stand


def check(config: Config, at: At) -> list[Fault]:
    """The faults of what has been read. What is merely odd goes to the configuration's warnings."""
    return (_BackEnd if config.role == "be" else _FrontEnd)(config, at).faults


class _Checks:
    """Of what both roles have."""

    def __init__(self, config: Config, at: At):
        self.config = config
        self.at = at
        self.vaddrs = config.vaddrs
        self.faults: list[Fault] = []
        self.sums()
        self.addresses()

    def fault(self, key: str, text: str, n: int | None = None) -> None:
        """n: which one, of a repeated key."""
        line = self.config.lines.get(key, 1) if n is None else self.at[key][n]
        self.faults.append(Fault(self.config.file, line, key, text))

    def warn(self, line: int, key: str, text: str) -> None:
        self.config.warnings.append(Fault(self.config.file, line, key, text, True))

    def sums(self) -> None:
        config, lines = self.config, self.config.lines
        if config.minspareservers > config.maxspareservers:
            self.fault("minspareservers" if "minspareservers" in lines else "maxspareservers",
                       f"minspareservers {config.minspareservers} is above maxspareservers "
                       f"{config.maxspareservers}; lower it or raise the other")
        if len(self.vaddrs) > MAX_VADDRS:
            self.fault("vaddr", f"{len(self.vaddrs)} virtual addresses are more than {MAX_VADDRS}; "
                                "remove some", MAX_VADDRS)

    def addresses(self) -> None:
        for n, vaddr in enumerate(self.vaddrs):
            if vaddr in self.vaddrs[:n]:
                self.fault("vaddr", f"{vaddr} is listed twice; remove one", n)
            for key in ("raddr", "uaddr"):
                if self.config.values.get(key) == vaddr:
                    self.fault("vaddr", f"the same as {key}; the virtual address is one of its "
                                        "own, shared by the cluster", n)

    def conditions(self, kind: str, known: tuple[str | int, ...], remedy: str) -> None:
        """Rules whose condition of that kind no request can meet."""
        for n, rule in enumerate(self.config.rule):
            for value in [c.value for c in rule.conditions if c.kind == kind]:
                if known and value not in known:
                    self.fault("rule", f"{kind}={value}: we have {', '.join(map(str, known))}; "
                                       f"write one of these, or add '{remedy} = {value}'", n)


class _BackEnd(_Checks):
    def __init__(self, config: Config, at: At):
        super().__init__(config, at)
        self.places()
        self.registration()

    def places(self) -> None:
        config = self.config
        vports = [place.vport for place in config.service]
        if len(vports) > MAX_SERVICES:
            self.fault("service", f"{len(vports)} of them are more than {MAX_SERVICES}; remove "
                                  "some", MAX_SERVICES)
        for n, vport in enumerate(vports):
            if vport in vports[:n]:
                first = self.at["service"][vports.index(vport)]
                self.fault("service", f"port {vport} has a place of its own already, on line "
                                      f"{first}; remove one", n)

    def registration(self) -> None:
        config, lines = self.config, self.config.lines
        if config.uaddr is not None and config.uaddr == config.raddr:
            self.fault("uaddr", "the same as raddr; name an address that the cluster does not use")
        for key in ("feaddr", "feport", "rule"):
            if key in lines and not config.dregister:
                self.warn(lines[key], key, "ignored, since dregister is 0")
            elif config.dregister and key != "feport" and key not in lines:
                self.faults.append(Fault(config.file, lines["dregister"], key,
                                         "must be specified, since dregister is 1"))
        if config.feaddr in self.vaddrs:
            self.fault("feaddr", "is the virtual address; write the FE's real one")
        for n, rule in enumerate(config.rule):
            if rule.server not in (ANY, config.raddr):
                self.fault("rule", f"{rule.server} is not this BE; write 'rule = PATTERN'", n)
        self.conditions("vaddr", self.vaddrs, "vaddr")
        if config.dregister and self.vaddrs:
            rules = [rule.text for rule in config.rule]
            size = len(registration(self.vaddrs, config.port, rules, new_instance()).body())
            if size > MOST_HELLO:
                self.fault("rule", f"the rules make {size} bytes, and a registration has room for "
                                   f"{MOST_HELLO}; join some with '|', or write them on the FE", -1)


class _FrontEnd(_Checks):
    def __init__(self, config: Config, at: At):
        super().__init__(config, at)
        self.listening()
        self.servers()
        self.rules()

    def listening(self) -> None:
        config, lines = self.config, self.config.lines
        listed = [one.port for one in config.listen]
        for n, port in enumerate(listed):
            if port in listed[:n]:
                self.fault("listen", f"{port} is listed twice; remove one", n)
        if len(config.services) > MAX_SERVICES and len(self.vaddrs) <= MAX_VADDRS:
            self.fault("listen", f"{len(self.vaddrs)} virtual addresses with {len(config.ports)} "
                                 f"ports each make {len(config.services)} services, more than "
                                 f"{MAX_SERVICES}; remove some", -1)
        port = config.redirectport
        if port in config.ports and config.redirectaddr in (ANY, *self.vaddrs):
            text = f"{port} is the port that the FE itself listens on; write the one of the " \
                   "Local Node's server"
            if "redirectport" in lines:
                self.fault("redirectport", text)
            else:
                line = self.at["listen"][listed.index(port)] if port in listed else lines["port"]
                self.warn(line, "redirectport", f"its default {text}, or there is no Local Node")

    def servers(self) -> None:
        config, lines = self.config, self.config.lines
        servers: list[Server] = config.server
        for n, server in enumerate(servers):
            if server.address in [s.address for s in servers[:n]]:
                self.fault("server", f"{server.address} is listed twice; remove one", n)
            if server.address in self.vaddrs:
                self.fault("server", "is the virtual address; write the BE's real one", n)
        if trouble := too_many(len(servers), config.connperbe):
            self.fault("connperbe" if len(servers) <= MAX_BACKENDS and "connperbe" in lines
                       else "server", trouble)
        if "server" not in lines and not config.secret and config.registration == "secret":
            self.warn(1, "server", "no back end is listed: every request goes to the Local Node; "
                                   "add 'server = ADDRESS PORT'")

    def rules(self) -> None:
        config = self.config
        known = {server.address for server in config.server}
        own = {*self.vaddrs, config.raddr} - {ANY}
        for n, rule in enumerate(config.rule):
            if rule.server not in known | own:
                near = difflib.get_close_matches(rule.server, sorted(known), 1, 0.7)
                self.fault("rule", f"{rule.server} is no server; " + (
                    f"did you mean {near[0]}?" if near else
                    f"add a line 'server = {rule.server} PORT'"), n)
        self.conditions("vaddr", self.vaddrs, "vaddr")
        # the first 'listen' takes the place of the port that is not written
        self.conditions("port", config.ports, "listen" if "port" in config.lines or config.listen
                        else f"listen = {config.port}' and 'listen")
        if config.matcher is not None and config.server:
            self.cover(config.matcher)

    def cover(self, matcher: Matcher) -> None:
        """The seed: 'The rules must contain all the cases'. Odd targets stand for all of them."""
        samples = [b"/", b"/~qz.7_/Zx-0?y=%41&k", b"*", b"http://q.invalid:1/w"]
        matching = [{matcher.patterns[n] for n in matcher.matches(sample)} for sample in samples]
        rules, services = self.config.rule, self.config.services
        bare = [service for service in services if not all(
            patterns & {rule.pattern for rule in rules if rule.holds_at(service)}
            for patterns in matching)]
        if bare:
            where = "" if len(bare) == len(services) else f" to {bare[0].vaddr}:{bare[0].port}"
            self.warn(self.at["rule"][-1] if rules else 1, "rule",
                      f"the rules do not cover every request{where}, and what none matches goes to "
                      "the Local Node, or is answered 503; add a last one 'rule = x.x.x.x .*'")
