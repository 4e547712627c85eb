# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemons may still do once they have looked after an earlier run: see capabilities(7)."""
from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

KEPT = {  # name: number
    "NET_BIND_SERVICE": 10,  # the VIP's port, after a reload too
    "NET_ADMIN": 12,         # addresses, tc, nft, TCP_REPAIR, ending sockets
    "NET_RAW": 13,           # ARP, and forged segments
    "PERFMON": 38,           # BPF programs that read the kernel's structs
    "BPF": 39}
OF_PROGRAMS = (KEPT["NET_ADMIN"], KEPT["NET_RAW"])  # iptables, by a user who is not root
READ_ALL = 2  # DAC_READ_SEARCH
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 23, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
VERSION_3 = 0x20080522     # _LINUX_CAPABILITY_VERSION_3
_libc = ctypes.CDLL(None, use_errno=True)


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


def hold_back() -> None:
    """What a service manager gave us so that we can read what is root's is no help with files that
    an operator names: a reload could not read those. See reading()."""
    if os.geteuid() != 0:
        _set(effective={READ_ALL: False})


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Read what is root's, if we may. For the calling thread."""
    with contextlib.suppress(OSError):  # we may not, and who reads says so
        _set(effective={READ_ALL: True})
    try:
        yield
    finally:
        hold_back()


def restrict() -> None:
    """Give up, for good and for all programs that are started, everything but KEPT, as far as we
    have that. For the calling thread and those that it starts later. Raises OSError."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    gone = set(range(last + 1)) - set(KEPT.values())
    for number in gone:
        if _libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) > 0:  # not gone already, as by a unit
            _check(_libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
    _check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    ours = os.geteuid() != 0  # root's programs have what is left without more ado
    nothing = dict.fromkeys(range(last + 1), False)
    _set(effective=dict.fromkeys(gone, False), permitted=dict.fromkeys(gone, False),
         inheritable=nothing | dict.fromkeys(OF_PROGRAMS if ours else (), True))
    for number in OF_PROGRAMS if ours else ():
        _check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0))


def _check(rc: int) -> None:
    if rc < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot give up capabilities: {os.strerror(number)}")


def _set(**changes: dict[int, bool]) -> None:
    """Of each set that is named: which are to be in it, or not."""
    header, sets = _Header(VERSION_3, 0), (_Sets * 2)()
    _check(_libc.capget(ctypes.byref(header), sets))
    for name, change in changes.items():
        for number, there in change.items():
            half, bit = sets[number // 32], 1 << number % 32
            now = getattr(half, name)
            setattr(half, name, now | bit if there else now & ~bit)
    _check(_libc.capset(ctypes.byref(header), sets))
