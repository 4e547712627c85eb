# SPDX-License-Identifier: GPL-2.0-or-later
"""What others have netfilter do with packets that come to this host."""
from __future__ import annotations

import errno
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tcpha.net.netlink import attributes, dump

NETLINK_NETFILTER = 12
NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN = 0x0A03, 0x0A04
TABLE, NAME, HOOK, POLICY, USE = 1, 3, 4, 5, 6  # NFTA_CHAIN_*
HOOKNUM = 1
NF_DROP = 0
INET, IPV4, NETDEV = 1, 2, 5
FAMILIES = {INET: "inet", IPV4: "ip", NETDEV: "netdev"}
# prerouting, input and ingress; those of a device have numbers of their own
HOOKS = {INET: (0, 1, 5), IPV4: (0, 1), NETDEV: (0,)}
OURS = "tcpha"  # begins the names of all tables and chains of ours
LEGACY = Path("/proc/net/ip_tables_names")


def chains() -> list[str]:
    """Chains that judge what comes in: those with rules, and those that drop by themselves. Raises
    OSError."""
    return [*_nft(), *_legacy()]


def _nft() -> Iterator[str]:
    try:
        for kind, data, at, end in dump(NETLINK_NETFILTER, NFT_MSG_GETCHAIN, bytes(4)):
            family = data[at]
            if kind == NFT_MSG_NEWCHAIN and family in FAMILIES:
                found = {what: data[begin:stop] for what, begin, stop
                         in attributes(data, at + 4, end)}
                table, name = (found[x].rstrip(b"\0").decode() for x in (TABLE, NAME))
                if not table.startswith(OURS) and _judges(family, found):
                    yield f"nft {FAMILIES[family]} {table} {name}"
    except OSError as error:
        if error.errno not in (errno.EPROTONOSUPPORT, errno.EINVAL):  # no nf_tables
            raise


def _judges(family: int, chain: dict[int, bytes]) -> bool:
    hook = chain.get(HOOK, b"")
    number = next((struct.unpack_from("!I", hook, begin)[0]
                   for kind, begin, _ in attributes(hook, 0, len(hook)) if kind == HOOKNUM), None)
    return number in HOOKS[family] and (
        chain[USE] != bytes(4) or chain.get(POLICY) == struct.pack("!I", NF_DROP))


def _legacy() -> Iterator[str]:
    """Of iptables as it was before nft."""
    command = shutil.which("iptables-legacy") or shutil.which("iptables")
    try:
        tables = LEGACY.read_text().split()
    except FileNotFoundError:
        return
    for table in tables if command else ():
        for chain in ("PREROUTING", "INPUT"):
            listed = subprocess.run([str(command), "-w", "-t", table, "-S", chain], check=False,
                                    capture_output=True, text=True).stdout.splitlines()
            if any(f" -j {OURS}" not in line and line != f"-P {chain} ACCEPT" for line in listed):
                yield f"iptables {table} {chain}"
