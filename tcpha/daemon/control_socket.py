# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: one JSON document a line, both ways. Mode 0600.

Request: {"command": NAME, "args": [...]}. Answer: {"ok": true, "data": ...} or
{"ok": false, "error": TEXT}. A table that may be large is {"ok": true, "columns": [NAME, ...]},
then an array for each row, and behind the last one {"ok": true} or {"ok": false, "error": TEXT}.
"""
from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcpha.owner import by_owner
from tcpha.tasks import died

Command = Callable[..., Awaitable[Any]]
PATIENCE = 1.0  # seconds for answers under way when the daemon stops


class Refused(Exception):
    """A command cannot be done; the message says why."""


class NoAnswer(ConnectionError):
    """A daemon says nothing, or only a part of it."""


@dataclass
class Table:
    """An answer whose rows are made while the client reads. pieces: whole lines, each row an array
    of JSON; asked for in another thread."""

    columns: Sequence[str]
    pieces: Iterator[bytes]


class Server:
    """Listens on a Unix socket and answers commands."""

    def __init__(self, commands: dict[str, Command]):
        self.commands = commands
        self.busy: set[asyncio.Task[None]] = set()  # answers that somebody waits for
        self.talking: set[asyncio.StreamWriter] = set()
        self.closing = False

    async def listen(self, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        old = os.umask(0o177)
        try:
            with by_owner():
                path.unlink(missing_ok=True)
                listener.bind(str(path))
        finally:
            os.umask(old)
        self.server = await asyncio.start_unix_server(self._converse, sock=listener)

    async def close(self) -> None:
        """Take no more connections, nor commands on those there are. The command that ends a daemon
        is answered too, if its sender reads the answer."""
        with by_owner():  # Python 3.13 removes the socket's name
            self.server.close()
        self.closing = True
        if self.busy:
            await asyncio.wait(self.busy, timeout=PATIENCE)
        for answer in self.busy:
            answer.cancel()
        for writer in self.talking:
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.talking.add(writer)
        try:
            while line := await reader.readline():
                answer = asyncio.create_task(self._answer(line, writer))
                self.busy.add(answer)
                answer.add_done_callback(self.busy.discard)
                await answer
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass
        finally:
            self.talking.discard(writer)
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        answer = await self._run(line)
        table = answer.get("data")
        if isinstance(table, Table):
            await self._write(writer, {"ok": True, "columns": table.columns})
            answer = await self._send_rows(table, writer)
        await self._write(writer, answer)

    async def _write(self, writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()

    async def _send_rows(self, table: Table, writer: asyncio.StreamWriter) -> dict[str, Any]:
        """Returns what says how it ended."""
        while True:
            try:
                piece = await asyncio.to_thread(next, table.pieces, b"")
            except (OSError, MemoryError) as error:
                return {"ok": False, "error": str(error) or "out of memory"}
            if not piece:
                return {"ok": True}
            writer.write(piece)
            await writer.drain()

    async def _run(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            name, args = request["command"], [str(a) for a in request.get("args", [])]
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"ok": False, "error": "malformed request"}
        if self.closing:
            return {"ok": False, "error": "the daemon stops"}
        command = self.commands.get(name)
        if command is None:
            return {"ok": False, "error": f"unknown command '{name}'"}
        try:
            inspect.signature(command).bind(*args)
        except TypeError:
            return {"ok": False, "error": f"wrong number of arguments for '{name}'"}
        try:
            return {"ok": True, "data": await command(*args)}
        except Refused as error:
            return {"ok": False, "error": str(error)}
        except Exception as error:
            died("command", error)
            return {"ok": False, "error": f"internal error: {error!r}"}


def _documents(path: Path, command: str, args: list[str]) -> Iterator[Any]:
    """What the daemon says. Raises NoAnswer where that breaks off."""
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(path))
            s.sendall(json.dumps({"command": command, "args": args}).encode() + b"\n")
            with s.makefile("rb") as f:
                for line in f:
                    if not line.endswith(b"\n"):  # the daemon has ended within it
                        break
                    yield json.loads(line)
    except OSError as error:
        raise NoAnswer(error.errno, error.strerror or str(error)) from None
    except ValueError:
        raise NoAnswer("what answers there is no daemon of TCPHA") from None
    raise NoAnswer("the daemon closed the connection")


def _accepted(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        raise Refused(answer["error"])
    return answer


def _rows(columns: list[str], documents: Iterator[Any]) -> Iterator[dict[str, Any]]:
    try:
        for document in documents:
            if isinstance(document, dict):
                _accepted(document)
                return
            yield dict(zip(columns, document, strict=True))
    except NoAnswer as error:
        raise Refused(f"the rest of the table is missing: {error.strerror or error}") from None


def ask_for(path: Path, command: str, args: list[str]) -> Any:
    """Send one command to a daemon's socket. Raises Refused or NoAnswer. Of a table that may
    be large, an iterator over the rows, which raises Refused if some are missing."""
    documents = _documents(path, command, args)
    answer = _accepted(next(documents))
    return _rows(answer["columns"], documents) if "columns" in answer else answer["data"]


def ask(path: Path, command: str, args: list[str]) -> Any:
    """The same, but for the rows of a table, which are a list."""
    data = ask_for(path, command, args)
    return list(data) if isinstance(data, Iterator) else data
