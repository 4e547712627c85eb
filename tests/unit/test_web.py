# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin address, asked by who takes his time."""
from __future__ import annotations

import socket
import time

import pytest

from tcpha.daemon import web
from tcpha.lab.bed import wait_for


def test_a_client_that_trickles_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PATIENCE", 0.5)
    admin = web.Admin("127.0.0.1", 0, {"/": ("text/plain", lambda: b"page\n")})
    admin.start()
    try:
        with socket.create_connection(admin.server_address[:2]) as s:
            s.sendall(b"GET / HTTP/1.1\r\nX: ")
            with pytest.raises(ConnectionError):
                for _ in range(600):
                    s.sendall(b"y")
                    time.sleep(0.05)  # it is never silent for long
        with socket.create_connection(admin.server_address[:2]) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert s.makefile("rb").read().endswith(b"page\n")
        wait_for(lambda: not admin.open, "its end")
    finally:
        admin.close()
