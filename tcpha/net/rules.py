# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that send packets to netfilter queues, in tables of our own.

Three ways, tried in this order: nft's own 'queue' expression; nft with the NFQUEUE target of
xtables (nft_compat), over the same netlink socket; the iptables command, in chains of our own.

With nft, a queue need not carry the packets: a verdict brings the new sequence number as the
packet's mark and the new TSval as its priority, and rules of the hook 'numbers' store them.
"""
from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.expressions import genex, verdict

from tcpha.net import rootfiles
from tcpha.net.journal import NFT as BY_NFT
from tcpha.net.journal import SLOW, Changes, HostError, Kept
from tcpha.net.nft import (
    META_IIFNAME,
    META_MARK,
    META_OIFNAME,
    META_PRIORITY,
    NETWORK,
    NF_ACCEPT,
    NF_DROP,
    NFPROTO_INET,
    TRANSPORT,
    as_data,
    chain_use,
    compare,
    drop_table,
    in_thread,
    meta,
    new_chain,
    new_rule,
    payload,
    put,
    put_table,
)

log = logging.getLogger("tcpha")
NATIVE, COMPAT, IPTABLES = "nft queue", "nft with the NFQUEUE target", "iptables"
NFT, WAYS = (NATIVE, COMPAT), (NATIVE, COMPAT, IPTABLES)
IPIP = 4
LOOPBACK = "127.0.0.0/8"
NF_INET_PRE_ROUTING, NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT, NF_INET_POST_ROUTING = 0, 1, 3, 4
# netfilter's number of each hook, and the priority: raw, before conntrack; mangle, after it
HOOKS = {"prerouting": (NF_INET_PRE_ROUTING, -300), "postrouting": (NF_INET_POST_ROUTING, -150),
         "numbers": (NF_INET_POST_ROUTING, -149), "input": (NF_INET_LOCAL_IN, -150),
         "output": (NF_INET_LOCAL_OUT, -300), "pin_in": (NF_INET_PRE_ROUTING, -101),
         "pin_out": (NF_INET_LOCAL_OUT, -101)}  # before others' NAT
ARRIVING = (NF_INET_PRE_ROUTING, NF_INET_LOCAL_IN)
IPTABLES_CHAIN = {"prerouting": ("raw", "PREROUTING", "-i"), "input": ("filter", "INPUT", "-i"),
                  "postrouting": ("mangle", "POSTROUTING", "-o"), "output": ("raw", "OUTPUT", "-o"),
                  "pin_in": ("nat", "PREROUTING", "-i"), "pin_out": ("nat", "OUTPUT", "-o")}
SYN, SYN_ACK = 0x02, 0x12
NFT_NAT_DNAT = 1


@dataclass(frozen=True)
class Rule:
    """One rule. Packets of lo are left alone, or alone concerned. queue: number of the first and
    how many (a power of two) share the load by the client's port; None: accept, drop, or hide from
    conntrack (untracked), or have NAT leave the destination as it is (pin: by NAT to the very same
    address). bypass: accept if nobody serves the queue. destination: an address, or LOOPBACK for
    all that begin with 127."""

    hook: str
    queue: tuple[int, int] | None = None
    bypass: bool = False
    drop: bool = False
    untracked: bool = False
    pin: bool = False
    mark: int | None = None
    protocol: int | None = socket.IPPROTO_TCP
    source: str | None = None
    destination: str | None = None
    sport: int | None = None
    dport: int | None = None
    flags: int | None = None  # of SYN and ACK
    priority: int | None = None  # with 'mark'
    lo: bool = False
    store: bool = False       # mark and priority where they belong, if they are not zero


def install(host: Changes, name: str, rules: list[Rule],
            ways: tuple[str, ...] = WAYS) -> str:
    """Put rules in force, in an nft table (or in chains) of that name. Returns the way that worked.
    Raises HostError if none does."""
    host.will_undo(what="rules", name=name)
    tried = []
    for way in ways:
        try:
            if way == IPTABLES:
                _iptables(name, rules)
            else:
                in_thread(partial(_nft, name, rules, way == NATIVE))
            return way
        except (NetlinkError, OSError, subprocess.CalledProcessError) as error:
            tried.append(f"{way}: {getattr(error, 'stderr', None) or error}")
            remove(name)
    raise HostError("cannot put rules in force (" + "; ".join(tried) + "); the kernel needs "
                    "NF_TABLES, and for queues NFT_QUEUE, or NFT_COMPAT and "
                    "NETFILTER_XT_TARGET_NFQUEUE")


def add(host: Changes, name: str, rules: list[Rule], more: list[Rule], way: str) -> None:
    """Put more rules in force, of hooks that keep() has put some of. They come behind those: to
    replace these would drop what waits in their queues. way: that keep() returned. Raises
    OSError."""
    host.kept.pop(("rules", name), None)  # nobody is to mend what is being changed
    try:
        if way == IPTABLES:
            for rule in more:
                table, _, device = IPTABLES_CHAIN[rule.hook]
                _ipt("-t", table, "-A", _own_chain(name, rule.hook), *_arguments(rule, device))
        else:
            in_thread(partial(put, _nft_rules(name, more, way == NATIVE)))
    except (NetlinkError, subprocess.CalledProcessError) as error:
        raise OSError(getattr(error, "stderr", None) or str(error)) from None
    else:
        rules = [*rules, *more]
    finally:
        _have_stay(host, name, rules, way)


def keep(host: Changes, name: str, rules: list[Rule], ways: tuple[str, ...] = WAYS,
         then: Callable[[], None] = lambda: None) -> str:
    """Put rules in force as install() does, and keep them so. then: each time that they were put
    in force."""
    way = install(host, name, rules, ways)
    then()
    _have_stay(host, name, rules, way, then)
    return way


def _have_stay(host: Changes, name: str, rules: list[Rule], way: str,
               then: Callable[[], None] = lambda: None) -> None:
    def again() -> None:
        if way == IPTABLES:
            remove(name)
            _iptables(name, rules)
        else:
            in_thread(partial(_nft, name, rules, way == NATIVE))
        then()
    if way == IPTABLES:
        host.keep(("rules", name), Kept(f"chains {name} of iptables", SLOW,
                                        lambda: not _iptables_stand(name, rules), again))
    else:
        whole = Counter(r.hook for r in rules for _ in _expressions(r, way == NATIVE))
        host.keep(("rules", name), Kept(
            f"nft table {name}", BY_NFT,
            lambda: any(chain_use(socket.AF_INET, name, hook) != n for hook, n in whole.items()),
            again))


def remove(name: str) -> None:
    """Take everything of that name away, whichever way it was installed."""
    with contextlib.suppress(NetlinkError, OSError):  # a kernel without nf_tables
        in_thread(partial(drop_table, name))
    tables = _iptables_tables()
    for hook, (table, chain, _) in IPTABLES_CHAIN.items():
        own = _own_chain(name, hook)
        if table in tables and _ipt("-t", table, "-S", own, check=False).returncode == 0:
            _ipt("-t", table, "-D", chain, "-j", own, check=False)
            _ipt("-t", table, "-F", own)
            _ipt("-t", table, "-X", own)


def _iptables_tables() -> set[str]:
    """Those that may hold something. A look by legacy iptables at one that is not there would make
    it, and that of NAT would have the kernel track all connections."""
    if not shutil.which("iptables"):
        return set()
    if "nf_tables" in _ipt("-V", check=False).stdout:
        return {table for table, _, _ in IPTABLES_CHAIN.values()}
    return _legacy_tables()


def _legacy_tables() -> set[str]:
    try:
        return set(rootfiles.read(rootfiles.TABLES).split())
    except FileNotFoundError:  # the kernel has none at all
        return set()
    except OSError as error:
        # It came after us, as a module. A table that another namespace uses counts, too, and all of
        # them where they are no modules: a rule too many does no harm.
        _say_once(f"{rootfiles.TABLES}: {error.strerror}; iptables is taken for used as far as the "
                  "kernel has it, until we are restarted")
        modules = Path("/sys/module")
        return {table for table, _, _ in IPTABLES_CHAIN.values()
                if (modules / f"iptable_{table}").exists() or not (modules / "ip_tables").exists()}


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def others_translate() -> bool:
    """Whether there are rules of others for NAT of destinations."""
    if "nat" in _legacy_tables():
        return True
    with contextlib.suppress(NetlinkError, OSError):  # a kernel without nf_tables
        return any(in_thread(_translates, family) for family in (socket.AF_INET, NFPROTO_INET))
    return False


def _translates(nft: Any) -> bool:
    for chain in nft.get_chains():
        hook = chain.get_attr("NFTA_CHAIN_HOOK")
        if hook and chain.get_attr("NFTA_CHAIN_TYPE") == "nat" and \
                hook.get_attr("NFTA_HOOK_HOOKNUM") in (NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT) \
                and not str(chain.get_attr("NFTA_CHAIN_TABLE")).startswith("tcpha"):
            return True
    return False


# nft


def _expressions(rule: Rule, native: bool) -> list[list[list[dict[str, Any]]]]:
    """The rule as nft knows it; or several, if queues share the load."""
    device = META_IIFNAME if HOOKS[rule.hook][0] in ARRIVING else META_OIFNAME
    steps = [compare(meta(device), b"lo".ljust(16, b"\0"), equal=rule.lo)]
    if rule.protocol is not None:
        steps.append(compare(payload(NETWORK, 9, 1), bytes([rule.protocol])))
    if rule.mark is not None:
        steps = [compare(meta(META_MARK), struct.pack("=I", rule.mark))]
    if rule.priority is not None:
        steps.append(compare(meta(META_PRIORITY), struct.pack("=I", rule.priority)))
    for address, offset in ((rule.source, 12), (rule.destination, 16)):
        if address == LOOPBACK:
            steps.append(compare(payload(NETWORK, offset, 1), b"\x7f"))
        elif address is not None:
            steps.append(compare(payload(NETWORK, offset, 4), socket.inet_aton(address)))
    for port, offset in ((rule.sport, 0), (rule.dport, 2)):
        if port is not None:
            steps.append(compare(payload(TRANSPORT, offset, 2), struct.pack("!H", port)))
    if rule.flags is not None:
        steps.append(compare(payload(TRANSPORT, 13, 1), bytes([rule.flags]),
                             mask=bytes([SYN_ACK])))
    if rule.store:
        return [[*steps, *parts] for parts in _store()]
    if rule.untracked:
        return [[*steps, [{"attrs": [("NFTA_EXPR_NAME", "notrack")]}]]]
    if rule.pin:
        return [[*steps, _pin(str(rule.destination))]]
    if rule.queue is None:
        return [[*steps, verdict(NF_DROP if rule.drop else NF_ACCEPT)]]
    first, total = rule.queue
    return [[*steps, *_share(rule, n, total), [_queue(first + n, rule.bypass, native)]]
            for n in reversed(range(total))]


def _share(rule: Rule, n: int, total: int) -> list[list[dict[str, Any]]]:
    """Whether a client's port falls to the n-th queue; number 0, which comes last, takes the rest.
    The kernel's own ways to share go by addresses, and many users behind one proxy would meet in
    one queue; or by CPU, which reorders. The lowest bit is left out, since connect() takes ports of
    one parity first."""
    if n == 0:
        return []
    if rule.protocol == IPIP:
        port = payload(NETWORK, 40, 2)  # behind two IP headers
    else:
        port = payload(TRANSPORT, 0 if rule.hook == "prerouting" else 2, 2)
    return [compare(port, struct.pack("!H", n << 1), mask=struct.pack("!H", (total - 1) << 1))]


def _store() -> list[list[list[dict[str, Any]]]]:
    none = b"\0" * 4
    marked = compare(meta(META_MARK), none, equal=False)
    seq = genex("payload", {"sreg": 1, "base": TRANSPORT, "offset": 4, "len": 4,
                            "csum_type": 1, "csum_offset": 16})  # NFT_PAYLOAD_CSUM_INET
    tsval = genex("exthdr", {"sreg": 1, "op": 1, "type": 8, "offset": 2, "len": 4})  # TCPOPT
    clear = [genex("immediate", {"dreg": 1, "data": as_data(none)}),
             genex("meta", {"sreg": 1, "key": META_MARK}),
             genex("meta", {"sreg": 1, "key": META_PRIORITY})]
    return [[marked, [seq]],
            [marked, compare(meta(META_PRIORITY), none, equal=False), [tsval]],
            [marked, clear]]


def _pin(address: str) -> list[dict[str, Any]]:
    return [genex("immediate", {"dreg": 1, "data": as_data(socket.inet_aton(address))}),
            genex("nat", {"type": NFT_NAT_DNAT, "family": socket.AF_INET, "reg_addr_min": 1})]


def _queue(num: int, bypass: bool, native: bool) -> dict[str, Any]:
    if native:  # NFT_QUEUE_FLAG_BYPASS
        return dict(genex("queue", {"num": num, "total": 1, "flags": {"value": int(bypass)}}))
    return dict(genex("target", {"name": "NFQUEUE", "rev": 3,  # struct xt_NFQ_info_v3
                                 "info": struct.pack("=4H", num, 1, int(bypass), 0)}))


def _nft(name: str, rules: list[Rule], native: bool, nft: Any) -> None:
    chains = [new_chain(socket.AF_INET, name, hook, "nat" if hook.startswith("pin") else "filter",
                        *HOOKS[hook]) for hook in dict.fromkeys(r.hook for r in rules)]
    put_table(socket.AF_INET, name, [*chains, *_nft_rules(name, rules, native)], nft)


def _nft_rules(name: str, rules: list[Rule], native: bool) -> list[Any]:
    return [new_rule(socket.AF_INET, name, rule.hook, steps)
            for rule in rules for steps in _expressions(rule, native)]


# iptables

def _ipt(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["iptables", "-w", *args], check=check, capture_output=True, text=True)


def _own_chain(name: str, hook: str) -> str:
    """Several of the hooks are in one table."""
    return f"{name}_o" if hook in ("output", "pin_out") else name


def _iptables(name: str, rules: list[Rule]) -> None:
    for hook in dict.fromkeys(r.hook for r in rules):
        table, chain, device = IPTABLES_CHAIN[hook]
        own = _own_chain(name, hook)
        _ipt("-t", table, "-N", own)
        for rule in rules:
            if rule.hook == hook:
                _ipt("-t", table, "-A", own, *_arguments(rule, device))
        # where others want the same packets, the first one decides
        _ipt("-t", table, "-I" if table == "nat" else "-A", chain, "-j", own)


def _iptables_stand(name: str, rules: list[Rule]) -> bool:
    """Whether our chains are as they were made, and are gone through."""
    for hook, count in Counter(r.hook for r in rules).items():
        table, chain, _ = IPTABLES_CHAIN[hook]
        own = _own_chain(name, hook)
        listed = _ipt("-t", table, "-S", own, check=False).stdout.splitlines()
        if len(listed) != count + 1 or \
                _ipt("-t", table, "-C", chain, "-j", own, check=False).returncode:
            return False
    return True


def _arguments(rule: Rule, device: str) -> list[str]:
    args = ["!", device, "lo"]
    if rule.mark is not None:
        args = ["-m", "mark", "--mark", str(rule.mark)]
    elif rule.protocol is not None:
        args += ["-p", str(rule.protocol)]
    for option, value in (("-s", rule.source), ("-d", rule.destination), ("--sport", rule.sport),
                          ("--dport", rule.dport)):
        if value is not None:
            args += [option, str(value)]
    if rule.flags is not None:
        args += ["--tcp-flags", "SYN,ACK", "SYN,ACK" if rule.flags == SYN_ACK else "SYN"]
    if rule.untracked:
        return [*args, "-j", "CT", "--notrack"]
    if rule.pin:
        return [*args, "-j", "DNAT", "--to-destination", str(rule.destination)]
    if rule.queue is None:
        return [*args, "-j", "DROP" if rule.drop else "ACCEPT"]
    first, total = rule.queue  # shared by addresses: few kernels have a match for bits of a port
    args += ["-j", "NFQUEUE"]
    args += ["--queue-balance", f"{first}:{first + total - 1}"] if total > 1 else \
        ["--queue-num", str(first)]
    return [*args, "--queue-bypass"] if rule.bypass else args
