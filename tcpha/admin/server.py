# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: one JSON document a line, both ways. Mode 0600.

Request: {"command": NAME, "args": [...]}. Answer: {"ok": true, "data": ...} or
{"ok": false, "error": TEXT}.
"""
from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Awaitable[Any]]


class Refused(Exception):
    """A command cannot be done; the message says why."""


async def serve(path: Path, commands: dict[str, Command]) -> asyncio.AbstractServer:
    """Listen on a Unix socket and answer commands."""
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                answer = await run(line)  # which may be a table of many thousand rows
                writer.write((await asyncio.to_thread(json.dumps, answer)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()

    async def run(line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            name, args = request["command"], [str(a) for a in request.get("args", [])]
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"ok": False, "error": "malformed request"}
        command = commands.get(name)
        if command is None:
            return {"ok": False, "error": f"unknown command '{name}'"}
        try:
            return {"ok": True, "data": await command(*args)}
        except Refused as error:
            return {"ok": False, "error": str(error)}
        except TypeError:
            return {"ok": False, "error": f"wrong number of arguments for '{name}'"}

    path.unlink(missing_ok=True)
    old = os.umask(0o177)
    try:
        return await asyncio.start_unix_server(converse, path)
    finally:
        os.umask(old)


def ask(path: Path, command: str, args: list[str]) -> Any:
    """Send one command to a daemon's socket. Raises Refused, or OSError if nobody answers."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path))
        s.sendall(json.dumps({"command": command, "args": args}).encode() + b"\n")
        with s.makefile("rb") as f:
            line = f.readline()
    if not line:
        raise ConnectionResetError("the daemon closed the connection")
    answer = json.loads(line)
    if not answer["ok"]:
        raise Refused(answer["error"])
    return answer["data"]
