# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs commands in a virtual machine. A request is a line of JSON on the second serial port: a
command, what it reads, seconds; so is the answer: status, what it wrote."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import tty
from typing import Any

PORT = "/dev/ttyS1"
TIMED_OUT = 124  # as timeout(1) says it


def run(command: list[str], stdin: str, seconds: float) -> dict[str, Any]:
    """Output goes to files: what a command leaves running may hold it open."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, \
            tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err,
                                   start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = TIMED_OUT
        out.seek(0)
        err.seek(0)
        return {"status": status, "out": out.read(), "err": err.read()}


def main() -> None:
    with open(PORT, "r+b", buffering=0) as port:
        tty.setraw(port.fileno())
        requests = os.fdopen(os.dup(port.fileno()), "rb")
        answer: dict[str, Any] = {"ready": os.uname().release}
        while True:
            with open(PORT, "wb") as answers:
                answers.write(json.dumps(answer).encode() + b"\n")
            request = json.loads(requests.readline())
            try:
                answer = run(request["command"], request["stdin"], request["seconds"])
            except Exception as error:
                answer = {"status": 127, "out": "", "err": str(error)}


main()
