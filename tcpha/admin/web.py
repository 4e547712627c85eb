# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin address: metrics for Prometheus and, on the front end, the status page. Read only."""
from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tcpha.tasks import persistent_thread

log = logging.getLogger("tcpha")
# path: (content type, what makes the body)
Pages = dict[str, tuple[str, Callable[[], bytes]]]
PATIENCE = 10.0  # seconds for a client to send its request
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " \
         "connect-src 'self'; img-src data:"


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Admin
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"
    server_version = "tcpha"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self._send(404, "text/plain", b"the pages here are " +
                       ", ".join(self.server.pages).encode() + b"\n")
            return
        kind, make = page
        try:
            self._send(200, kind, make())
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # the daemon stops, for instance
            self._send(503, "text/plain", f"not available: {error!r}\n".encode())

    do_HEAD = do_GET

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("admin: %s %s", self.client_address[0], format % args)


class Admin(ThreadingHTTPServer):
    """Serves 'pages' at an address until close(). Raises OSError if it cannot listen there."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str, port: int, pages: Pages):
        self.pages = pages
        super().__init__((address, port), _Handler)
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = persistent_thread("admin", self.serve_forever)

    def close(self) -> None:
        if self.thread:
            self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # somebody closed his connection
