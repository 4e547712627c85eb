# SPDX-License-Identifier: GPL-2.0-or-later
"""How command line tools end where they cannot go on with what they print."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def _end_by(number: signal.Signals) -> None:
    """As a program that does not handle the signal. Nothing is flushed."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def plain_ending(name: str) -> Iterator[None]:
    """For all that a command line tool does: without a traceback it ends by SIGPIPE if nobody reads
    what it prints, by SIGINT after Ctrl-C, and with one line if what it prints cannot be kept. The
    signal is not left to the kernel: a daemon that closes its socket would end the tool, too."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # or it was closed by who started us
                sys.stdout.flush()
    except BrokenPipeError:
        _end_by(signal.SIGPIPE)
    except KeyboardInterrupt:
        _end_by(signal.SIGINT)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)  # the rest is tried at exit
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
