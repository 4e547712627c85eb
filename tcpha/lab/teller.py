# SPDX-License-Identifier: GPL-2.0-or-later
"""Stands for a back end with more connections than one machine has room for: asked what it has, it
tells of them. The front end enters each into its table, as after a restart.

python -m tcpha.lab.teller ADDRESS VADDR COUNT prints a line when it listens, and one when it was
asked about each connection.
"""
from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Iterator

from tcpha._fast.message import HEADER_SIZE, OWNED, PING, PONG, VERSION, encode
from tcpha.control.hello import MAGIC, Hello, HelloError, accept_each, answer, check, new_instance

FLOW, TOLD, ASK = 13, 14, 17  # besides: see _fast/message.pxd
BATCH = 1000  # messages
PORT, VPORT = 666, 80
FIRST = 0x0A000000  # 10.0.0.0


def flows(vaddr: str, count: int) -> Iterator[bytes]:
    """Messages. Each client has one connection."""
    mapped = b"\0" * 10 + b"\xff\xff"
    ours = mapped + socket.inet_aton(vaddr)
    length = HEADER_SIZE + 40
    for n in range(1, count + 1):
        yield struct.pack("!HBBIQ12sI16sHHI", MAGIC, VERSION, FLOW, length, n, mapped, FIRST + n,
                          ours, 1024 + n % 60000, VPORT, 1)


class Teller:
    def __init__(self, address: str, vaddr: str, count: int):
        self.address, self.vaddr, self.count = address, vaddr, count
        self.instance = new_instance()
        self.asked: set[int] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        with socket.create_server((self.address, PORT)) as listener:
            listener.setblocking(False)
            print("listening", flush=True)
            await accept_each(listener, self._meet)

    def _meet(self, sock: socket.socket, address: str) -> None:
        task = asyncio.create_task(self._serve(sock))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        mine = Hello("be", self.vaddr, PORT, datapath="ebpf", instance=self.instance)
        with sock:
            sock.setblocking(False)
            try:
                await answer(sock, mine, None, self._judge)
                heard = b""
                while data := await loop.sock_recv(sock, 65536):
                    heard = await self._listen(sock, heard + data)
            except (OSError, HelloError):
                pass  # the front end has ended

    async def _judge(self, hello: Hello) -> None:
        check(hello, "fe", [self.vaddr])

    async def _listen(self, sock: socket.socket, heard: bytes) -> bytes:
        """Returns what is left of it: a message that is not whole."""
        loop = asyncio.get_running_loop()
        at = 0
        while len(heard) >= at + HEADER_SIZE:
            _, _, kind, length, number = struct.unpack_from("!HBBIQ", heard, at)
            if len(heard) < at + length:
                break
            at += length
            if kind == PING:
                await loop.sock_sendall(sock, encode(PONG, number))
            elif kind == ASK:
                await self._tell(sock, number)
            elif kind == OWNED and number not in self.asked:
                self.asked.add(number)
                if len(self.asked) == self.count:
                    print(f"asked about {self.count}", flush=True)
        return heard[at:]

    async def _tell(self, sock: socket.socket, number: int) -> None:
        loop = asyncio.get_running_loop()
        batch: list[bytes] = []
        for message in flows(self.vaddr, self.count):
            batch.append(message)
            if len(batch) == BATCH:
                await loop.sock_sendall(sock, b"".join(batch))
                batch.clear()
        await loop.sock_sendall(sock, b"".join(batch) + encode(TOLD, number))


if __name__ == "__main__":
    asyncio.run(Teller(sys.argv[1], sys.argv[2], int(sys.argv[3])).run())
