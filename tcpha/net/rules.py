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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, nlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFNL_SUBSYS_NFTABLES,
    NFT_MSG_DELTABLE,
    NFT_MSG_GETCHAIN,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    nft_chain_msg,
    nft_rule_msg,
    nft_table_msg,
)
from pyroute2.nftables.expressions import genex, verdict
from pyroute2.nftables.main import NFTables

from tcpha.net import rootfiles
from tcpha.net.host import NFT as BY_NFT
from tcpha.net.host import SLOW, Host, HostError, Kept
from tcpha.net.netlink import attributes

T = TypeVar("T")
log = logging.getLogger("tcpha")
NATIVE, COMPAT, IPTABLES = "nft queue", "nft with the NFQUEUE target", "iptables"
NFT, WAYS = (NATIVE, COMPAT), (NATIVE, COMPAT, IPTABLES)
IPIP = 4
NF_DROP, NF_ACCEPT = 0, 1
LOOPBACK = "127.0.0.0/8"
NF_INET_PRE_ROUTING, NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT, NF_INET_POST_ROUTING = 0, 1, 3, 4
NF_ARP_OUT = 1
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
META_PRIORITY, META_MARK, META_IIFNAME, META_OIFNAME = 2, 3, 6, 7
NETWORK, TRANSPORT = 1, 2
NFPROTO_ARP = 3
ARP_OPERATION, ARP_SENDER, ARP_TARGET = 6, 14, 24  # offsets, for Ethernet and IPv4
ARP_RULES = 3
NETLINK_NETFILTER = 12
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NFPROTO_INET = 1
NFT_NAT_DNAT = 1
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_USE = 1, 3, 6
ANSWER = 5.0  # seconds; the kernel answers within the call


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


def install(host: Host, name: str, rules: list[Rule],
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
                _in_thread(partial(_nft, name, rules, way == NATIVE))
            return way
        except (NetlinkError, OSError, subprocess.CalledProcessError) as error:
            tried.append(f"{way}: {getattr(error, 'stderr', None) or error}")
            remove(name)
    raise HostError("cannot put rules in force (" + "; ".join(tried) + "); the kernel needs "
                    "NF_TABLES, and for queues NFT_QUEUE, or NFT_COMPAT and "
                    "NETFILTER_XT_TARGET_NFQUEUE")


def keep(host: Host, name: str, rules: list[Rule], ways: tuple[str, ...] = WAYS,
         then: Callable[[], None] = lambda: None) -> str:
    """Put rules in force as install() does, and keep them so. then: each time that they were put
    in force."""
    way = install(host, name, rules, ways)
    then()

    def again() -> None:
        if way == IPTABLES:
            remove(name)
            _iptables(name, rules)
        else:
            _in_thread(partial(_nft, name, rules, way == NATIVE))
        then()
    if way == IPTABLES:
        host.keep(("rules", name), Kept(f"chains {name} of iptables", SLOW,
                                        lambda: not _iptables_stand(name, rules), again))
    else:
        whole = Counter(r.hook for r in rules for _ in _expressions(r, way == NATIVE))
        host.keep(("rules", name), Kept(
            f"nft table {name}", BY_NFT,
            lambda: any(_chain_use(socket.AF_INET, name, hook) != n for hook, n in whole.items()),
            again))
    return way


def remove(name: str) -> None:
    """Take everything of that name away, whichever way it was installed."""
    with contextlib.suppress(NetlinkError, OSError):  # a kernel without nf_tables
        _in_thread(partial(_drop_table, name))
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


def hide_in_arp(host: Host, name: str, address: str, instead: str) -> None:
    """In ARP that this host sends: replies for an address, and announcements of it, are dropped;
    requests by it (RFC 826: ar$spa) show another. Raises HostError if the kernel has no nft for
    ARP."""
    hidden, shown = socket.inet_aton(address), socket.inet_aton(instead)
    sender = _compare(_payload(NETWORK, ARP_SENDER, 4), hidden)

    rules = [
        [sender, _compare(_payload(NETWORK, ARP_OPERATION, 2), b"\0\2"), verdict(NF_DROP)],
        [sender, _compare(_payload(NETWORK, ARP_TARGET, 4), hidden), verdict(NF_DROP)],
        [sender, [genex("immediate", {"dreg": 1, "data": _data(shown)}),
                  genex("payload", {"sreg": 1, "base": NETWORK, "offset": ARP_SENDER,
                                    "len": 4, "csum_type": 0, "csum_offset": 0})]]]

    def work() -> None:
        chain = _chain(NFPROTO_ARP, name, "output", "filter", NF_ARP_OUT, 0)
        _in_thread(partial(_put_table, NFPROTO_ARP, name, [
            chain, *(_rule(NFPROTO_ARP, name, "output", r) for r in rules)]))
    if host.inherit(what="arp", name=name):
        host.restore_to(len(host.undo) - 1)
    host.will_undo(what="arp", name=name)
    try:
        work()
    except NetlinkError as error:
        raise HostError(f"the kernel cannot filter ARP by nft: {error}") from None
    host.keep(("arp", name), Kept(f"nft table {name} (ARP)", BY_NFT,
                                  lambda: _chain_use(NFPROTO_ARP, name, "output") != ARP_RULES,
                                  work))


def _drop_table(name: str, nft: Any) -> None:
    if any(t.get_attr("NFTA_TABLE_NAME") == name for t in nft.get_tables()):
        nft.table("del", name=name)


def show_in_arp(name: str) -> None:
    """Undo hide_in_arp()."""
    with contextlib.suppress(NetlinkError):
        _in_thread(partial(_drop_table, name), NFPROTO_ARP)


def _in_thread(work: Callable[[Any], T], family: int = socket.AF_INET) -> T:
    """pyroute2 runs an event loop of its own, which must not meet the caller's."""
    def run() -> T:
        nft = NFTables(nfgen_family=family)
        try:
            return work(nft)
        finally:
            nft.close()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def others_translate() -> bool:
    """Whether there are rules of others for NAT of destinations."""
    if "nat" in _legacy_tables():
        return True
    with contextlib.suppress(NetlinkError, OSError):  # a kernel without nf_tables
        return any(_in_thread(_translates, family) for family in (socket.AF_INET, NFPROTO_INET))
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

def _chain_use(family: int, table: str, chain: str) -> int:
    """How many rules a chain has; -1: there is none. Asked by hand: the kernel then sends this one
    alone, and not those of all that have rules here."""
    names = b"".join(struct.pack("=HH", 4 + len(raw), kind) + raw + b"\0" * (-len(raw) % 4)
                     for kind, raw in ((NFTA_CHAIN_TABLE, table.encode() + b"\0"),
                                       (NFTA_CHAIN_NAME, chain.encode() + b"\0")))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as s:
        s.settimeout(ANSWER)
        s.send(struct.pack("=IHHII BBH", 20 + len(names), _kind(NFT_MSG_GETCHAIN), NLM_F_REQUEST,
                           0, 0, family, 0, 0) + names)
        answer = s.recv(65536)
    length, kind = struct.unpack_from("=IH", answer)
    for attribute, begin, _ in attributes(answer, 20, length) if kind == _kind(NFT_MSG_NEWCHAIN) \
            else ():
        if attribute == NFTA_CHAIN_USE:
            return int(struct.unpack_from("!I", answer, begin)[0])
    return -1


def _kind(message: int) -> int:
    return int(NFNL_SUBSYS_NFTABLES) << 8 | message


def _message(family: int, of: type[nlmsg], kind: int, flags: int, **attributes: Any) -> nlmsg:
    message = of()
    message["attrs"] = [[of.name2nla(name), value] for name, value in attributes.items()]
    message["header"]["type"], message["header"]["flags"] = kind, NLM_F_REQUEST | flags
    message["nfgen_family"] = family
    return message


def _chain(family: int, table: str, name: str, kind: str, hook: int, priority: int) -> nlmsg:
    place = {"attrs": [["NFTA_HOOK_HOOKNUM", hook], ["NFTA_HOOK_PRIORITY", priority]]}
    return _message(family, nft_chain_msg, _kind(NFT_MSG_NEWCHAIN), NLM_F_ACK | NLM_F_CREATE,
                    table=table, name=name, hook=place, policy=NF_ACCEPT, type=kind)


def _rule(family: int, table: str, chain: str, steps: list[list[dict[str, Any]]]) -> nlmsg:
    return _message(family, nft_rule_msg, _kind(NFT_MSG_NEWRULE),
                    NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND, table=table, chain=chain,
                    expressions=[e for step in steps for e in step])


def _put_table(family: int, name: str, content: list[nlmsg], nft: Any) -> None:
    """A table takes the place of the one of its name, if there is one, in one transaction: no
    packet meets a part of it, and none gets by while it is replaced."""
    def edge(kind: int) -> nlmsg:
        message = _message(0, nfgen_msg, kind, 0)
        message["res_id"] = NFNL_SUBSYS_NFTABLES
        return message

    def table(kind: int, flags: int = 0) -> nlmsg:
        return _message(family, nft_table_msg, _kind(kind), NLM_F_ACK | flags, name=name)
    nft.nlm_request_batch([
        edge(NFNL_MSG_BATCH_BEGIN), table(NFT_MSG_NEWTABLE, NLM_F_CREATE), table(NFT_MSG_DELTABLE),
        table(NFT_MSG_NEWTABLE, NLM_F_CREATE), *content, edge(NFNL_MSG_BATCH_END)])


def _compare(load: dict[str, Any], value: bytes, equal: bool = True,
             mask: bytes | None = None) -> list[dict[str, Any]]:
    steps = [load]
    if mask:
        steps.append(genex("bitwise", {
            "sreg": 1, "dreg": 1, "len": len(mask), "mask": _data(mask),
            "xor": _data(b"\0" * len(mask))}))
    return [*steps, genex("cmp", {"sreg": 1, "op": 0 if equal else 1, "data": _data(value)})]


def _data(value: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def _payload(base: int, offset: int, length: int) -> dict[str, Any]:
    return dict(genex("payload", {"dreg": 1, "base": base, "offset": offset, "len": length}))


def _meta(key: int) -> dict[str, Any]:
    return dict(genex("meta", {"dreg": 1, "key": key}))


def _expressions(rule: Rule, native: bool) -> list[list[list[dict[str, Any]]]]:
    """The rule as nft knows it; or several, if queues share the load."""
    device = META_IIFNAME if HOOKS[rule.hook][0] in ARRIVING else META_OIFNAME
    steps = [_compare(_meta(device), b"lo".ljust(16, b"\0"), equal=rule.lo)]
    if rule.protocol is not None:
        steps.append(_compare(_payload(NETWORK, 9, 1), bytes([rule.protocol])))
    if rule.mark is not None:
        steps = [_compare(_meta(META_MARK), struct.pack("=I", rule.mark))]
    if rule.priority is not None:
        steps.append(_compare(_meta(META_PRIORITY), struct.pack("=I", rule.priority)))
    for address, offset in ((rule.source, 12), (rule.destination, 16)):
        if address == LOOPBACK:
            steps.append(_compare(_payload(NETWORK, offset, 1), b"\x7f"))
        elif address is not None:
            steps.append(_compare(_payload(NETWORK, offset, 4), socket.inet_aton(address)))
    for port, offset in ((rule.sport, 0), (rule.dport, 2)):
        if port is not None:
            steps.append(_compare(_payload(TRANSPORT, offset, 2), struct.pack("!H", port)))
    if rule.flags is not None:
        steps.append(_compare(_payload(TRANSPORT, 13, 1), bytes([rule.flags]),
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
        port = _payload(NETWORK, 40, 2)  # behind two IP headers
    else:
        port = _payload(TRANSPORT, 0 if rule.hook == "prerouting" else 2, 2)
    return [_compare(port, struct.pack("!H", n << 1), mask=struct.pack("!H", (total - 1) << 1))]


def _store() -> list[list[list[dict[str, Any]]]]:
    none = b"\0" * 4
    marked = _compare(_meta(META_MARK), none, equal=False)
    seq = genex("payload", {"sreg": 1, "base": TRANSPORT, "offset": 4, "len": 4,
                            "csum_type": 1, "csum_offset": 16})  # NFT_PAYLOAD_CSUM_INET
    tsval = genex("exthdr", {"sreg": 1, "op": 1, "type": 8, "offset": 2, "len": 4})  # TCPOPT
    clear = [genex("immediate", {"dreg": 1, "data": _data(none)}),
             genex("meta", {"sreg": 1, "key": META_MARK}),
             genex("meta", {"sreg": 1, "key": META_PRIORITY})]
    return [[marked, [seq]],
            [marked, _compare(_meta(META_PRIORITY), none, equal=False), [tsval]],
            [marked, clear]]


def _pin(address: str) -> list[dict[str, Any]]:
    return [genex("immediate", {"dreg": 1, "data": _data(socket.inet_aton(address))}),
            genex("nat", {"type": NFT_NAT_DNAT, "family": socket.AF_INET, "reg_addr_min": 1})]


def _queue(num: int, bypass: bool, native: bool) -> dict[str, Any]:
    if native:  # NFT_QUEUE_FLAG_BYPASS
        return dict(genex("queue", {"num": num, "total": 1, "flags": {"value": int(bypass)}}))
    return dict(genex("target", {"name": "NFQUEUE", "rev": 3,  # struct xt_NFQ_info_v3
                                 "info": struct.pack("=4H", num, 1, int(bypass), 0)}))


def _nft(name: str, rules: list[Rule], native: bool, nft: Any) -> None:
    chains = [_chain(socket.AF_INET, name, hook, "nat" if hook.startswith("pin") else "filter",
                     *HOOKS[hook]) for hook in dict.fromkeys(r.hook for r in rules)]
    _put_table(socket.AF_INET, name, [*chains, *(
        _rule(socket.AF_INET, name, rule.hook, steps)
        for rule in rules for steps in _expressions(rule, native))], nft)


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
