# SPDX-License-Identifier: GPL-2.0-or-later
"""llhttp (through httptools), which knows how a request head is to be read."""
from __future__ import annotations

import contextlib
from typing import Any

import httptools

from tcpha._fast.http import BadRequest, parse_head


class Llhttp:
    """What llhttp reads of a head: None while incomplete. Raises httptools.HttpParserError."""

    def __init__(self, data: bytes):
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser.feed_data(data)
        if self.complete:
            self.method = parser.get_method()
            self.version = parser.get_http_version()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


def taken(data: bytes) -> Any:
    """What parse_head() says, or None also if it refuses."""
    try:
        return parse_head(data)
    except BadRequest:
        return None


def agree(data: bytes) -> None:
    """Whatever we accept, llhttp accepts too and reads alike."""
    ours = taken(data)
    if ours is None:
        return
    method, target, minor, length = ours
    theirs = Llhttp(data[:length])
    assert theirs.complete
    assert (theirs.method, theirs.url, theirs.version) == (method, target, f"1.{minor}")
    assert data[:length].endswith(b"\r\n\r\n")
    names = [n.lower() for n, _ in theirs.headers]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert names.count(b"host") <= 1
