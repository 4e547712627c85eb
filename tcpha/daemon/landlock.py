# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a process may still write, whatever its user may: see landlock(7).

For daemons that somebody starts as root. Most files of a host are root's, capabilities or none.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, on all architectures
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
LEAST = 2  # version: before Linux 5.19, nothing may be renamed into another directory
WRITE_FILE, REMOVE_DIR, REMOVE_FILE = 1 << 1, 1 << 4, 1 << 5
MAKE = 0b1111111 << 6  # files, directories, sockets and so on
REFER, TRUNCATE = 1 << 13, 1 << 14
OF_FILES = WRITE_FILE | TRUNCATE
# An inode of /proc/sys is made anew when its dentry was dropped, and a rule is about an inode:
# these descriptors keep the dentries.
_kept: list[int] = []


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def _call(libc: ctypes.CDLL, *args: object) -> int:
    rc = int(libc.syscall(*args))
    if rc < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return rc


def write_only(paths: Iterable[Path | str]) -> bool:
    """From now on nothing can be changed but these files, and what is in these directories, by the
    calling thread, those that it starts later, and the programs that these start. Paths that do not
    exist are left out, and so are pipes, which need no rule. False: the kernel cannot do it. Takes
    no_new_privs."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        version = _call(libc, CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    except OSError:
        return False
    if version < LEAST:
        return False
    handled = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE | REFER
    if version > LEAST:
        handled |= TRUNCATE
    ruleset = _call(libc, CREATE_RULESET, ctypes.byref(ctypes.c_uint64(handled)), 8, 0)
    try:
        for path in paths:
            with contextlib.suppress(OSError):
                _kept.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
                allowed = handled if os.path.isdir(path) else handled & OF_FILES
                rule = _PathBeneath(allowed, _kept[-1])
                _call(libc, ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        _call(libc, RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True
