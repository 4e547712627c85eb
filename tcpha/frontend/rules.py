# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules in force: their list, their use, and what they make of a request."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tcpha._fast.fe_worker import ALL_SERVICES, AWAY, DEAD, DEAF, DRAINED, FULL, MAY, FrontEnd
from tcpha._fast.match import Matcher, PatternError
from tcpha.config import HTTP, Condition, Group, Rule, Service, groups_of, patterns_of
from tcpha.daemon.control_socket import Refused
from tcpha.frontend.compiling import Compiling
from tcpha.frontend.localnode import INDEX as LOCAL_NODE
from tcpha.frontend.localnode import NAME
from tcpha.frontend.peers import NOBODY_LISTENS, Peers


def _in_order(few: list[str], many: list[str]) -> bool:
    """Whether all are among others, in their order."""
    left = iter(many)
    return all(one in left for one in few)


class Rules:
    """Used in the loop's thread only."""

    def __init__(self, core: FrontEnd, peers: Peers):
        self.core = core
        self.peers = peers
        self.in_force: list[Rule] = []
        self.matcher: Matcher | None = None  # of their patterns, and maybe of earlier ones
        self.compiling = Compiling()
        # connections handed over by rules that are not in force any more, or since a reload are
        # elsewhere in the list; and what the workers' counts were when it changed
        self.used: Counter[Rule] = Counter()
        self.counted: list[int] = []

    async def compile(self, rules: list[Rule], known: Iterable[Matcher | None]) -> Matcher:
        """Of their patterns. A known one, or the one in use, serves, too, if it has them in their
        order. Raises Refused."""
        patterns = patterns_of(rules)
        for matcher in (*known, self.matcher):
            if matcher is not None and _in_order(patterns, matcher.patterns):
                return matcher
        try:
            return await self.compiling.matcher(patterns)
        except PatternError as error:
            if error.pattern >= 0:
                raise Refused(f"the pattern '{patterns[error.pattern]}' does not compile: "
                              f"{error}") from None
            raise Refused(f"the patterns of the file and of the back ends that have registered do "
                          f"not compile together: {error}") from None

    def publish(self, rules: list[Rule], matcher: Matcher) -> None:
        """Put them in force. matcher: of at least their patterns, in their order."""
        groups: dict[Group, dict[int, int]] = {group: {} for group in groups_of(rules)}
        self.used = self.use()
        self.in_force = rules
        for n, rule in enumerate(rules):
            named = self.peers.listed.get(rule.server)  # or it is the front end itself
            index = named.index if named else LOCAL_NODE
            groups[rule.group].setdefault(index, n)  # the same line again changes nothing
        self.core.publish_rules(matcher, list(self._arranged(groups, matcher)))
        self.matcher = matcher
        self.counted = self.core.hits(len(rules))

    def _arranged(self, groups: dict[Group, dict[int, int]],
                  matcher: Matcher) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """For each of the matcher's patterns the group that it is there for, or an empty one."""
        left = list(groups)
        for pattern in matcher.patterns:
            if left and left[0][0] == pattern:
                group = left.pop(0)
                yield self._services(group[1]), list(groups[group].items())
            else:
                yield 0, []

    def _services(self, conditions: tuple[Condition, ...]) -> int:
        """Bits of the services, by number, for which they hold."""
        if not conditions:
            return ALL_SERVICES
        services = [(number, Service(vaddr, port, HTTP))
                    for number, vaddr, port, *_ in self.core.services()]
        return sum(1 << number for number, service in services
                   if all(condition.holds_at(service) for condition in conditions))

    def use(self) -> Counter[Rule]:
        """How many connections each rule has handed over, those of earlier lists too."""
        use = self.used.copy()
        hits = self.core.hits(len(self.in_force))
        for rule, now, before in zip(self.in_force, hits, self.counted, strict=False):
            use[rule] += now - before
        return use

    def explain(self, head: bytes, number: int) -> dict[str, Any]:
        """What would become of a service's request, and why. head: all of it, up to the empty
        line."""
        error, target, seen, matched, winner, asked, alone = self.core.consider(head, number)
        if error:
            status = 431 if "headlimit" in error else 400
            return {"outcome": str(status), "reason": f"request head: {error}", "rules": []}
        rows: list[dict[str, Any]] = []
        for n, refusal in matched:
            rule = self.in_force[n]
            rows.append({"rule": n, "conditions": " ".join(map(str, rule.conditions)),
                         "pattern": rule.pattern, "server": rule.server,
                         "usable": refusal == MAY, "reason": self._why(rule.server, refusal)})
        if winner >= 0:
            rule = self.in_force[winner]
            alike = sum(r["usable"] and self._is_like(r["rule"], winner) for r in rows)
            how = "first rule that matches and can be served" if alike == 1 else \
                f"of {alike} with this pattern, it has the fewest connections, or its turn"
            out = {"outcome": "handed over", "server": rule.server, "rule": winner,
                   "reason": f"{how}: '{rule.text}'"}
        else:
            why = "no back end of a rule that matches can take it" if rows else "no rule matches"
            if asked >= 0:
                why += (f"; {self.in_force[asked].server} is asked all the same, and refuses "
                        "unless its server is back")
            if alone == MAY:
                out = {"outcome": "handed over", "server": NAME,
                       "reason": f"{why}; the Local Node listens"}
            else:
                out = {"outcome": "503", "reason": f"{why}, and no Local Node listens"}
        return out | {"target": target, "rules_see": seen, "rules": rows}

    def _is_like(self, one: int, other: int) -> bool:
        """Whether two rules share the load."""
        return self.in_force[one].group == self.in_force[other].group

    def _why(self, server: str, refusal: int) -> str:
        """Why a back end gets no new connections; '' if it may."""
        peer = self.peers.listed.get(server)
        if refusal in (AWAY, DEAD):
            return (peer.why if peer and peer.why != "up" else "") or "no control connection"
        return {DRAINED: "draining", DEAF: NOBODY_LISTENS,
                FULL: "full: it has maxclients connections"}.get(refusal, "")
