# SPDX-License-Identifier: GPL-2.0-or-later
from typing import Any

HEADER_SIZE: int
VERSION: int
HELLO: int
HANDOFF: int
ADOPTED: int
REFUSED: int
CLOSED: int
PING: int
PONG: int
OWNED: int
PLACE: int
REFUSALS: tuple[bytes, ...]

def clock() -> int: ...
def encode_hello(body: bytes) -> bytes: ...
def encode(kind: int, id: int, fields: dict[str, Any] | None = None,
           data: bytes = b"") -> bytes: ...
def decode(data: bytes) -> dict[str, Any] | None: ...
