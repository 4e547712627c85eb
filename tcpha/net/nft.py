# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables of nft, put together by hand: pyroute2 has the messages, and no transaction of many."""
from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, nlmsg
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
from pyroute2.nftables.expressions import genex
from pyroute2.nftables.main import NFTables

from tcpha.net.netlink import attributes

T = TypeVar("T")
NF_DROP, NF_ACCEPT = 0, 1
META_PRIORITY, META_MARK, META_IIFNAME, META_OIFNAME = 2, 3, 6, 7
NETWORK, TRANSPORT = 1, 2
NFPROTO_INET, NFPROTO_ARP = 1, 3
NETLINK_NETFILTER = 12
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_USE = 1, 3, 6
ANSWER = 5.0  # seconds; the kernel answers within the call


def in_thread(work: Callable[[Any], T], family: int = socket.AF_INET) -> T:
    """pyroute2 runs an event loop of its own, which must not meet the caller's."""
    def run() -> T:
        nft = NFTables(nfgen_family=family)
        try:
            return work(nft)
        finally:
            nft.close()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def put(content: list[nlmsg], nft: Any) -> None:
    """In one transaction."""
    def edge(kind: int) -> nlmsg:
        message = _message(0, nfgen_msg, kind, 0)
        message["res_id"] = NFNL_SUBSYS_NFTABLES
        return message
    nft.nlm_request_batch([edge(NFNL_MSG_BATCH_BEGIN), *content, edge(NFNL_MSG_BATCH_END)])


def put_table(family: int, name: str, content: list[nlmsg], nft: Any) -> None:
    """A table takes the place of the one of its name, if there is one: no packet meets a part of
    it, and none gets by while it is replaced."""
    def table(kind: int, flags: int = 0) -> nlmsg:
        return _message(family, nft_table_msg, _kind(kind), NLM_F_ACK | flags, name=name)
    put([table(NFT_MSG_NEWTABLE, NLM_F_CREATE), table(NFT_MSG_DELTABLE),
         table(NFT_MSG_NEWTABLE, NLM_F_CREATE), *content], nft)


def drop_table(name: str, nft: Any) -> None:
    if any(t.get_attr("NFTA_TABLE_NAME") == name for t in nft.get_tables()):
        nft.table("del", name=name)


def chain_use(family: int, table: str, chain: str) -> int:
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


def new_chain(family: int, table: str, name: str, kind: str, hook: int, priority: int) -> nlmsg:
    place = {"attrs": [["NFTA_HOOK_HOOKNUM", hook], ["NFTA_HOOK_PRIORITY", priority]]}
    return _message(family, nft_chain_msg, _kind(NFT_MSG_NEWCHAIN), NLM_F_ACK | NLM_F_CREATE,
                    table=table, name=name, hook=place, policy=NF_ACCEPT, type=kind)


def new_rule(family: int, table: str, chain: str, steps: list[list[dict[str, Any]]]) -> nlmsg:
    return _message(family, nft_rule_msg, _kind(NFT_MSG_NEWRULE),
                    NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND, table=table, chain=chain,
                    expressions=[e for step in steps for e in step])


def compare(load: dict[str, Any], value: bytes, equal: bool = True,
            mask: bytes | None = None) -> list[dict[str, Any]]:
    steps = [load]
    if mask:
        steps.append(genex("bitwise", {
            "sreg": 1, "dreg": 1, "len": len(mask), "mask": as_data(mask),
            "xor": as_data(b"\0" * len(mask))}))
    return [*steps, genex("cmp", {"sreg": 1, "op": 0 if equal else 1, "data": as_data(value)})]


def as_data(value: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def payload(base: int, offset: int, length: int) -> dict[str, Any]:
    return dict(genex("payload", {"dreg": 1, "base": base, "offset": offset, "len": length}))


def meta(key: int) -> dict[str, Any]:
    return dict(genex("meta", {"dreg": 1, "key": key}))
