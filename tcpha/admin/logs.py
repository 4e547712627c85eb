# SPDX-License-Identifier: GPL-2.0-or-later
"""Where messages go: stderr in the foreground, else syslog; and a file if 'logfile' says so."""
from __future__ import annotations

import contextlib
import errno
import io
import logging
import logging.handlers
import os
import sys
import time
from collections import deque
from typing import Any

from tcpha.admin.troubles import QUIET

KEPT = 50  # messages
log = logging.getLogger("tcpha")


class WholeLines(io.FileIO):
    """A file of which a full disk keeps no part of a line."""

    def write(self, data: Any) -> int:
        written = super().write(data)
        if written < len(data):
            with contextlib.suppress(OSError):  # no regular file
                self.truncate(self.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


class LogFile(logging.handlers.WatchedFileHandler):
    """A file on a disk that may be full, or in a directory that somebody removes: the other
    handlers say so, once, and the daemon goes on."""

    def __init__(self, path: str):
        self.lost = 0
        self.lost_at = 0.0
        super().__init__(path)

    def _open(self) -> io.TextIOWrapper:
        # unbuffered: a line that could not be written is lost, and not a part of it written later
        return io.TextIOWrapper(WholeLines(self.baseFilename, "ab"), "utf-8", "backslashreplace",
                                write_through=True)

    def emit(self, record: logging.LogRecord) -> None:
        lost = self.lost
        try:
            super().emit(record)
        except OSError:  # it could not be opened anew
            self.handleError(record)
        # not at once: a short line may fit where a longer one did not
        if lost and self.lost == lost and time.monotonic() - self.lost_at >= QUIET:
            self.lost = 0
            log.warning("logfile %s: written again, %d lines were lost", self.baseFilename, lost)

    def handleError(self, record: logging.LogRecord) -> None:
        self.lost += 1
        self.lost_at = time.monotonic()
        if self.lost == 1:
            why = getattr(sys.exc_info()[1], "strerror", "cannot be written")
            log.error("logfile %s: %s; lines are lost, make room or mend the path",
                      self.baseFilename, why)


class Recent(logging.Handler):
    """The latest messages that are no debug lines, for who looks at a running daemon."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append({"time": round(record.created, 3), "level": record.levelname.lower(),
                            "text": record.getMessage()})


def recent() -> list[dict[str, Any]]:
    """The latest messages, oldest first: seconds since the epoch, level and text."""
    return [event for h in log.handlers if isinstance(h, Recent) for event in list(h.events)]


def set_up(name: str, foreground: bool, logfile: str | None) -> None:
    """Configure the logger. Raises OSError if the log file cannot be opened."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    logging.raiseExceptions = False  # no traceback when syslog is gone
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if foreground:
        stream = logging.StreamHandler(sys.stderr)
        # journald adds the time by itself
        stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
        stream.setFormatter(logging.Formatter(f"{stamp}{name}: %(message)s"))
        handlers.append(stream)
    elif os.path.exists("/dev/log"):
        syslog = logging.handlers.SysLogHandler("/dev/log",
                                                logging.handlers.SysLogHandler.LOG_DAEMON)
        syslog.setFormatter(logging.Formatter(f"{name}[%(process)d]: %(message)s"))
        handlers.append(syslog)
    if logfile:
        file = LogFile(logfile)
        file.setFormatter(logging.Formatter(f"%(asctime)s {name}[%(process)d]: %(message)s"))
        handlers.append(file)
    for handler in [*handlers, Recent()]:
        log.addHandler(handler)


def reopen() -> None:
    """Open the log file anew, after it was rotated."""
    for handler in log.handlers:
        if isinstance(handler, LogFile):
            with contextlib.suppress(OSError):  # the next line says so
                handler.reopenIfNeeded()


def forward(pipe: Any) -> None:
    """Log what the workers have written to their pipe: a digit for the level, then the text."""
    data = os.read(pipe.fileno(), 65536)
    for line in data.decode(errors="replace").splitlines():
        if line[:1] == "0":
            log.warning("%s", line[1:])
        else:
            log.debug("%s", line[1:])


def forward_rest(pipe: Any) -> None:
    """Log what is left in the pipe, at the end."""
    os.set_blocking(pipe.fileno(), False)
    try:
        while True:
            forward(pipe)
    except BlockingIOError:
        pass
