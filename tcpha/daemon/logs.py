# SPDX-License-Identifier: GPL-2.0-or-later
"""Where messages go: stderr in the foreground, else syslog; and a file if 'logfile' says so."""
from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import logging.handlers
import os
import sys
import time
from collections import Counter, deque
from typing import Any

from tcpha.daemon.troubles import QUIET

KEPT = 50  # messages
log = logging.getLogger("tcpha")
MINUTE = 60.0   # seconds
SAME = 5        # times that one line is written in a minute
LINES = 30      # that are written in a minute
MEMBERS = 1000  # of those about peers that belong here, of which each may come and go


class Sparing:
    """Lines that others can cause, as often as they like. In a minute each is written SAME times,
    and 'most' of all; how many were left out is said when it is over. what: names them in that
    line. Used in the loop's thread only."""

    def __init__(self, what: str, level: int = logging.WARNING, most: int = LINES):
        self.what = what
        self.level = level
        self.most = most
        self.written: Counter[str] = Counter()
        self.left_out = 0
        self.counting = False

    def say(self, text: str) -> None:
        if not self.counting:
            self.counting = True
            asyncio.get_running_loop().call_later(MINUTE, self._over)
        if self.written[text] >= SAME or self.written.total() >= self.most:
            self.left_out += 1
            return
        self.written[text] += 1
        log.log(self.level, "%s", text)

    def _over(self) -> None:
        if self.left_out:
            log.log(self.level, "%s: %d more lines in the last minute", self.what, self.left_out)
        self.written.clear()
        self.left_out = 0
        self.counting = False


warnings = Sparing("workers")


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


def printable(text: str) -> str:
    """Text of which others may have written a part, on one line, for people and their terminals."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _as_one_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


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
    log.addFilter(_as_one_line)
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


def place(path: str) -> str:
    """What must be writable for a log: its directory, where it is made anew after a rotation; or
    itself, if it is no regular file (/dev/stderr)."""
    return path if os.path.exists(path) and not os.path.isfile(path) else os.path.dirname(path)


def reopen() -> None:
    """Open the log file anew, after it was rotated."""
    for handler in log.handlers:
        if isinstance(handler, LogFile):
            with contextlib.suppress(OSError):  # the next line says so
                handler.reopenIfNeeded()


def forward(pipe: Any) -> None:
    """Log what the workers have written to their pipe: a digit for the level, then the text."""
    data = os.read(pipe.fileno(), 65536)
    for line in data.decode(errors="replace").split("\n"):
        if line[:1] == "0":
            warnings.say(line[1:])
        elif line:
            log.debug("%s", line[1:])


def forward_rest(pipe: Any) -> None:
    """Log what is left in the pipe, at the end."""
    os.set_blocking(pipe.fileno(), False)
    try:
        while True:
            forward(pipe)
    except BlockingIOError:
        pass
