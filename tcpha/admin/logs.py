# SPDX-License-Identifier: GPL-2.0-or-later
"""Where messages go: stderr in the foreground, else syslog; and a file if 'logfile' says so."""
from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from typing import Any

log = logging.getLogger("tcpha")


def set_up(name: str, foreground: bool, logfile: str | None) -> None:
    """Configure the logger. Raises OSError if the log file cannot be opened."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
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
        file = logging.handlers.WatchedFileHandler(logfile)
        file.setFormatter(logging.Formatter(f"%(asctime)s {name}[%(process)d]: %(message)s"))
        handlers.append(file)
    for handler in handlers or [logging.NullHandler()]:
        log.addHandler(handler)


def reopen() -> None:
    """Open the log file anew, after it was rotated."""
    for handler in log.handlers:
        if isinstance(handler, logging.handlers.WatchedFileHandler):
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
