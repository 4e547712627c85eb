# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose the files of the run directory are: its owner's, whoever has started the daemon.

The package's units run as a user who owns /run/tcpha. A daemon that root starts by hand shares it
with them, before, after and beside, and cannot write there as root without CAP_DAC_OVERRIDE. It
does so in the owner's name instead, which setresuid(2) leaves to it. All else it does as root.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_libc = ctypes.CDLL(None)
_uid = 0  # the owner, if that is somebody else than root and root is who we are


def set_owner(uid: int) -> None:
    """By one who can still become any user: work for the owner of a run directory from now on."""
    global _uid
    if os.geteuid() == 0 and uid != 0:
        os.setresuid(0, 0, uid)  # a saved one, so that it takes no capability to be it for a while
        _uid = uid


@contextlib.contextmanager
def by_owner() -> Iterator[None]:
    """Use files in the owner's name: the calling thread alone, so nothing may be awaited here."""
    if not _uid:
        yield
        return
    before = _libc.setfsuid(_uid)
    try:
        yield
    finally:
        _libc.setfsuid(before)
