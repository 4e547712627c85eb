# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket, which tcphactl asks."""
from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tcpha.daemon.control_socket import Refused, Server, Table, ask, ask_for
from tcpha.lab.bed import BIN


def test_a_command_under_way_is_answered_when_the_daemon_stops(tmp_path: Path) -> None:
    """'unload' of an idle daemon ends it at once; the sender is told nevertheless."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> int:
        asked.set()
        await go_on.wait()
        return 7

    async def daemon(pool: ThreadPoolExecutor) -> Future[Any]:
        server = Server({"slow": slow})
        await server.listen(tmp_path / "socket")
        answer = pool.submit(ask, tmp_path / "socket", "slow", [])
        await asked.wait()
        go_on.set()
        await server.close()
        return answer
    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(daemon(pool)).result() == 7


def serving(path: Path, pieces: Callable[[], Iterator[bytes]], name: str, begun: Event,
            until: Event) -> None:
    async def table() -> Table:
        return Table(("name", "n"), pieces())

    async def serve() -> None:
        server = Server({name: table})
        await server.listen(path)
        begun.set()
        await asyncio.to_thread(until.wait)
        await server.close()
    asyncio.run(serve())


@contextmanager
def answering(path: Path, pieces: Callable[[], Iterator[bytes]],
              name: str = "table") -> Iterator[None]:
    begun, until = Event(), Event()
    thread = Thread(target=serving, args=(path, pieces, name, begun, until))
    thread.start()
    try:
        begun.wait(60)
        yield
    finally:
        until.set()
        thread.join()


def test_a_table_on_the_control_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with answering(path, lambda: iter([b'["a", 1]\n["b", 2]\n', b'["c", 3]\n'])):
        assert ask(path, "table", []) == [{"name": n, "n": i} for i, n in enumerate("abc", 1)]
    with answering(path, lambda: iter([])):
        assert ask(path, "table", []) == []


@pytest.mark.parametrize("rest", (b"", b'["b", 2', b'["b", 2]', b"["))
def test_a_daemon_that_ends_within_its_answer(tmp_path: Path, rest: bytes) -> None:
    """What is not whole is no row, and one line says that something is missing."""
    def pieces() -> Iterator[bytes]:
        yield b'["a", 1]\n' + rest
        raise RuntimeError("the daemon ends here")
    path = tmp_path / "tcphafe.sock"
    with answering(path, pieces, "conns"):
        rows: Any = ask_for(path, "conns", [])
        assert next(rows) == {"name": "a", "n": 1}
        with pytest.raises(Refused, match="the daemon closed the connection"):
            next(rows)
        for more in ((), ("--json",)):
            shown = subprocess.run([BIN / "tcphactl", "--run-dir", tmp_path, "fe", "conns", *more],
                                   capture_output=True, text=True)
            assert shown.returncode == 1
            assert shown.stderr == "tcphactl: the rest of the table is missing: the daemon closed "\
                "the connection\n"


def test_a_table_that_breaks_off(tmp_path: Path) -> None:
    """Whoever reads it hears of that, behind the rows that came."""
    def pieces() -> Iterator[bytes]:
        yield b'["a", 1]\n'
        raise OSError(5, "cannot read the flow table")
    path = tmp_path / "socket"
    with answering(path, pieces):
        rows: Any = ask_for(path, "table", [])
        assert next(rows) == {"name": "a", "n": 1}
        with pytest.raises(Refused, match="cannot read the flow table"):
            next(rows)
