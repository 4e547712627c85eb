# SPDX-License-Identifier: GPL-2.0-or-later
"""The run directory of an instance: lock, pid file, and becoming a daemon."""
from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tcpha.owner import by_owner, set_owner
from tcpha.undoing import each

DEFAULT = Path("/run/tcpha")
USER = "tcpha"  # of the units


class RunDirError(Exception):
    """The run directory cannot be used; the message says why."""


def make_directory(path: Path) -> None:
    """With the parents that are missing. Who starts us may have a umask that would lock us out
    (keepalived's is 0177), also of what an earlier run made."""
    for directory in (*reversed(path.parents), path):
        try:
            directory.mkdir()
        except FileExistsError:
            if directory != path or path.stat().st_mode & stat.S_IXUSR:
                continue
        directory.chmod(0o755)


def check_owners(path: Path) -> None:
    """Raise RunDirError unless nobody but root and us can have put a run directory, or what is in
    it, there: a journal is obeyed. The package's user is us, too, for a daemon that root starts."""
    ours = {0, os.geteuid()}
    with contextlib.suppress(KeyError):
        ours.add(pwd.getpwnam(USER).pw_uid)
    for entry in (path, path.resolve(), *path.rglob("*")):
        try:
            status = entry.lstat()
        except FileNotFoundError:  # another daemon's, which runs
            continue
        if status.st_uid not in ours:
            raise RunDirError(f"{entry}: belongs to user {status.st_uid}, who may have written "
                              "anything there; remove it or choose another --run-dir")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode):
            raise RunDirError(f"{entry}: others can write there; 'chmod go-w {entry}' if you trust "
                              "what is there, or choose another --run-dir")


def hand_over(path: Path) -> None:
    """The units' directory is their user's, as systemd would have it; but if root came first, it
    would take it away from under us when it starts a unit."""
    if path != DEFAULT or os.geteuid() != 0 or path.stat().st_uid != 0:
        return
    try:
        user = pwd.getpwnam(USER)
    except KeyError:  # not of the package
        return
    # root's until now, so that nobody else can have put anything there; the top comes last
    for _, names, files, fd in os.fwalk(path, topdown=False):
        for name in (*names, *files):
            os.chown(name, user.pw_uid, user.pw_gid, dir_fd=fd, follow_symlinks=False)
    os.chown(path, user.pw_uid, user.pw_gid)


class RunDir:
    """DIR/NAME.pid, locked for the life of the daemon. name: tcphafe or tcphabe."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = name
        self.pid_file = path / f"{name}.pid"
        self.socket = path / f"{name}.sock"
        self.journal = path / f"{name}.journal"
        try:
            make_directory(path)
            check_owners(path)
            hand_over(path)
            set_owner(path.stat().st_uid)
            with by_owner():
                self.fd = os.open(self.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunDirError(f"{path}: {error.strerror}; choose another --run-dir") from None
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = self.pid_file.read_text().strip()
            raise RunDirError(f"{name} is running already in {path} (process {pid}); stop it or "
                              "choose another --run-dir") from None

    def write_pid(self) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        with by_owner():
            each(*((str(file), partial(file.unlink, missing_ok=True))
                   for file in (self.pid_file, self.socket)))
        os.close(self.fd)


def daemonise() -> Callable[[str], None]:
    """Go to the background. The first process waits for the returned function to be called: with ''
    once the daemon serves (it exits 0), or with the reason why it does not (exits 1)."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with os.fdopen(reader) as f:
            said = f.read()
        if said != "ok":
            print(said or "the daemon died while starting; see its log", file=sys.stderr)
        os._exit(0 if said == "ok" else 1)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)

    def report(reason: str) -> None:
        os.write(writer, (reason or "ok").encode())
        os.close(writer)
    return report
