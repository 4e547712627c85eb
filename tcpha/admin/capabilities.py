# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemons may still do once they have looked after an earlier run: see capabilities(7)."""
from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

KEPT = {  # name: number
    "NET_BIND_SERVICE": 10,  # the VIP's port, after a reload too
    "NET_ADMIN": 12,         # addresses, tc, nft, TCP_REPAIR, ending sockets
    "NET_RAW": 13,           # ARP, and forged segments
    "PERFMON": 38,           # BPF programs that read the kernel's structs
    "BPF": 39}
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 23, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
VERSION_3 = 0x20080522     # _LINUX_CAPABILITY_VERSION_3


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32),
                ("inheritable", ctypes.c_uint32)]


def lock_memory() -> None:
    """Kernels before 5.11 count what BPF maps take as locked memory, and the limit is low. Raising
    it takes CAP_SYS_RESOURCE, which is not kept."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


def has_all() -> bool:
    """Whether we have what is kept, as root or by a service manager."""
    said = Path("/proc/self/status").read_text()
    effective = int(said.partition("\nCapEff:")[2].split()[0], 16)
    return all(effective >> n & 1 for n in KEPT.values())


def restrict() -> None:
    """Give up, for good and for all programs that are started, everything but KEPT, as far as we
    have that. For the calling thread and those that it starts later. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(rc: int) -> None:
        if rc < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot give up capabilities: {os.strerror(number)}")
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in set(range(last + 1)) - set(KEPT.values()):
        if libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) > 0:  # not gone already, as by a unit
            check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header, sets = _Header(VERSION_3, 0), (_Sets * 2)()
    check(libc.capget(ctypes.byref(header), sets))
    for i in range(2):
        kept = sum(1 << n % 32 for n in KEPT.values() if n // 32 == i)
        sets[i].permitted &= kept
        sets[i].effective = sets[i].permitted
        sets[i].inheritable = 0
    check(libc.capset(ctypes.byref(header), sets))
