# SPDX-License-Identifier: GPL-2.0-or-later
"""Prometheus metrics of both roles, made of what the commands 'status', 'rules' and 'stats' say.

docs/monitoring.md describes each family.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tcpha import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# stage: what it measures
STAGES = {
    "head": "accept until the request head is whole (socket path)",
    "offer": "last offer until the back end has adopted (socket path)",
    "total": "accept until the connection is the back end's (socket path)",
    "fast": "arrival of the request until it is sent on (packet path, through a worker)"}
NO_PACKETS = {"forwarded_bytes", "bytes", "queued", "flows"}  # bytes, and levels
ANSWERS = ("400", "408", "431", "503")


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"tcpha_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tcpha_{name}", text, value=value)


def _labelled(family: Any, rows: Iterable[tuple[list[str], float]]) -> Any:
    for labels, value in rows:
        family.add_metric(labels, value)
    return family


def _shared(role: str, status: Mapping[str, Any]) -> Iterable[Metric]:
    yield InfoMetricFamily("tcpha", "What runs here.", {
        "version": __version__, "role": role, "datapath": status["datapath"],
        "vaddr": ",".join(status["vaddrs"])})
    yield _labelled(GaugeMetricFamily("tcpha_workers", "Worker threads, by state.",
                                      labels=["state"]),
                    [([s], status["workers"][s]) for s in ("busy", "idle")])
    yield _gauge("live_connections", "Connections handed over that have not ended.",
                 status["live"])
    yield _gauge("maxclients", "The configuration's maxclients.", status["maxclients"])
    yield _labelled(CounterMetricFamily("tcpha_deaths", "Tasks and threads of the daemon that "
                                        "failed and began again: faults of TCPHA, see its log.",
                                        labels=["task"]),
                    [([k], v) for k, v in status["deaths"].items()])
    yield _gauge("unloading", "1 while it takes no new connections and ends with the last one.",
                 status["unloading"])
    yield _labelled(CounterMetricFamily("tcpha_packets", "Packets, by what the datapath did with "
                                        "them.", labels=["what"]),
                    [([k], v) for k, v in status["packets"].items()
                     if isinstance(v, int) and k not in NO_PACKETS])


def frontend(status: Mapping[str, Any], rules: list[dict[str, Any]],
             stats: Mapping[str, Any]) -> Iterable[Metric]:
    """Families of a front end."""
    counters = status["counters"]
    # what was returned counts here: no counter of Prometheus may go down
    returned = counters["returned"]
    servers = [*status["servers"], status["localnode"] | {
        "server": "localnode", "state": "up" if status["localnode"]["listening"] else "down"}]
    yield from _shared("fe", status)
    yield _labelled(
        CounterMetricFamily("tcpha_handoffs", "Handoffs, by back end and outcome: handed, refused "
                            "(offered elsewhere then), returned (those of both: refused after "
                            "they were handed over), closed (ended after it was handed over).",
                            labels=["server", "outcome"]),
        [([s["server"], how], s[how] + (s["returned"] if how == "handed" else 0))
         for s in servers for how in ("handed", "refused", "returned", "closed")])
    yield _labelled(
        CounterMetricFamily("tcpha_rule_handoffs", "Connections handed over, by rule.",
                            labels=["rule", "server", "pattern"]),
        [([str(r["rule"]), r["server"], r["pattern"]], r["handed"]) for r in rules])
    yield _labelled(GaugeMetricFamily("tcpha_server_up", "1: it gets new connections.",
                                      labels=["server"]),
                    [([s["server"]], s["state"] == "up") for s in servers])
    yield _labelled(GaugeMetricFamily("tcpha_server_draining", "1: drained by an operator.",
                                      labels=["server"]),
                    [([s["server"]], s["state"] == "draining") for s in status["servers"]])
    yield _labelled(GaugeMetricFamily("tcpha_server_live_connections", "Connections it has, offers "
                                      "included.", labels=["server"]),
                    [([s["server"]], s["live"]) for s in servers])
    yield _counter("accepted", "Connections taken, by socket or by packet path.",
                   counters["accepted"] + returned)
    yield _counter("restored", "Connections of an earlier run, or of another front end, that are "
                   "known again.", counters["restored"])
    yield _counter("late_bytes", "Bytes that came in the midst of a handoff, and were sent behind "
                   "it.", counters["late_bytes"])
    yield _labelled(CounterMetricFamily("tcpha_service_connections", "Connections taken, by the "
                                        "address and port that they came to.",
                                        labels=["vaddr", "port"]),
                    [([s["vaddr"], str(s["port"])], s["accepted"]) for s in status["services"]])
    yield _labelled(CounterMetricFamily("tcpha_paths", "Connections handed over, by path.",
                                        labels=["path"]),
                    [(["socket"], counters["handed"] - counters["fast"]),
                     (["packet"], counters["fast"] + returned)])
    yield _labelled(CounterMetricFamily("tcpha_answers", "Requests that the front end answered "
                                        "itself; 400 and 431: the parser refused the head.",
                                        labels=["code"]),
                    [([code], counters[f"answered_{code}"]) for code in ANSWERS])
    yield _labelled(CounterMetricFamily("tcpha_troubles", "What the front end ran out of, and "
                                        "connections that were lost in its hands, were silent, or "
                                        "expired.",
                                        labels=["what"]),
                    [([k], counters[k]) for k in ("lost", "silent", "expired", "no_descriptors",
                                                  "table_full", "access_lost")])
    yield _gauge("in_hand", "Connections accepted and not yet handed over: maxclients at most.",
                 status["in_hand"])
    yield _counter("forwarded_bytes", "Bytes of clients' packets sent on to back ends.",
                   status["packets"]["forwarded_bytes"])
    yield _gauge("packet_path", "1: SYNs are answered by cookie.", status["packet_path"])
    stages = HistogramMetricFamily(
        "tcpha_stage_seconds", "How long stages of a handoff took: " +
        "; ".join(f"{k}: {v}" for k, v in STAGES.items()), labels=["stage"])
    for stage in STAGES:
        h = stats["stages"][stage]
        stages.add_metric([stage], [("+Inf" if limit is None else repr(limit), count)
                                    for limit, count in h["buckets"]], h["sum"])
    yield stages
    yield _labelled(GaugeMetricFamily("tcpha_control_connections", "Control connections that are "
                                      "up.", labels=["server"]),
                    [([s["server"]], s["connperbe"]) for s in status["servers"]])
    silence: dict[str, float] = {}
    for c in stats["channels"]:
        if c["up"]:
            silence[c["server"]] = min(c["silent"], silence.get(c["server"], c["silent"]))
    yield _labelled(GaugeMetricFamily("tcpha_control_silence_seconds", "Since the last sign of "
                                      "life on any control connection; they PING every second.",
                                      labels=["server"]), [([s], v) for s, v in silence.items()])


def backend(status: Mapping[str, Any]) -> Iterable[Metric]:
    """Families of a back end."""
    counters = status["counters"]
    yield from _shared("be", status)
    yield _labelled(CounterMetricFamily("tcpha_adoptions", "Connections adopted, by path.",
                                        labels=["path"]),
                    [(["socket"], counters["adopted"] - counters["fast"]),
                     (["packet"], counters["fast"])])
    yield _counter("closed", "Adopted connections that have ended.", counters["closed"])
    yield _labelled(CounterMetricFamily("tcpha_refusals", "Handoffs refused, by reason.",
                                        labels=["reason"]),
                    [([k], v) for k, v in counters["refusals"].items()])
    yield _gauge("application_up", "1: somebody listens on redirectaddr:redirectport.",
                 status["application"] == "listening")
    yield _labelled(GaugeMetricFamily("tcpha_place_up", "1: somebody listens for a port of a "
                                      "virtual address ('any': each that has no place of its own).",
                                      labels=["vaddr", "port"]),
                    [([p["vaddr"], str(p["vport"] or "any")], p["listening"])
                     for p in status["places"]])
    yield _labelled(GaugeMetricFamily("tcpha_control_connections", "Control connections that are "
                                      "up.", labels=["frontend"]),
                    [([f["address"]], f["connections"]) for f in status["frontends"]])


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]):
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families()


def text(families: Callable[[], Iterable[Metric]]) -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry)
