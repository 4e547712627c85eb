# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin address: metrics for Prometheus and, on the front end, the status page. Read only."""
from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from tcpha.tasks import persistent_thread

# path: (content type, what makes the body)
Pages = dict[str, tuple[str, Callable[[], bytes]]]
PATIENCE = 10.0  # seconds for a client to send its request and read the answer
MOST = 32   # connections, of which each has a thread
MAKERS = 2  # threads that make a page at one time, which takes the daemon's loop some time
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " \
         "connect-src 'self'; img-src data:"


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


def names_us(host: str, names: Iterable[str]) -> bool:
    """Whether a Host field may be of a request for us. A page of somebody else's, in a browser that
    can reach us, has his name there, and nothing keeps him from giving that name our address."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        ip_address(name)
        return True
    return name in {"localhost", os.uname().nodename.lower(), *(n.lower() for n in names)}


class _Handler(BaseHTTPRequestHandler):
    server: Admin
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"
    server_version = "tcpha"
    sys_version = ""

    def do_GET(self) -> None:
        if not all(names_us(h, self.server.names) for h in self.headers.get_all("Host", [])):
            self._send(421, "text/plain", b"this is no name of ours; write 'adminname = NAME', or "
                       b"ask by address\n")
            return
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self._send(404, "text/plain", b"the pages here are " +
                       ", ".join(self.server.pages).encode() + b"\n")
            return
        kind, make = page
        try:
            with self.server.making:
                body = make()
            self._send(200, kind, body)
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
        self.send_header("Connection", "close")  # the next request has its own time, and place
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Admin(ThreadingHTTPServer):
    """Serves 'pages' at an address until close(). names: of ours, beside addresses and the host's.
    Raises OSError if it cannot listen there.

    A connection is cut after a while, whatever its client does, and where there are many, who has
    had his for the longest time makes room: a slow client holds nobody else up.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: str, port: int, pages: Pages, names: Iterable[str] = ()):
        self.pages = pages
        self.names = tuple(names)
        self.making = threading.BoundedSemaphore(MAKERS)
        self.lock = threading.Lock()
        self.open: dict[socket.socket, float] = {}  # since when; those that are not cut
        self.threads = 0
        super().__init__((address, port), _Handler)
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = persistent_thread("admin", self.serve_forever)

    def close(self) -> None:
        if self.thread:
            self.shutdown()
        self.server_close()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks the DNS for our name, which may take long

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            if len(self.open) >= MOST:
                self._cut(next(iter(self.open)))
            full = self.threads >= 2 * MOST  # what was cut takes a moment to end
            if not full:
                self.open[request] = time.monotonic()
                self.threads += 1
        if full:
            super().close_request(request)
        else:
            super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self.lock:
            self.open.pop(request, None)
            self.threads -= 1
        super().close_request(request)

    def service_actions(self) -> None:
        with self.lock:
            now = time.monotonic()
            for request in [r for r, since in self.open.items() if now - since > PATIENCE]:
                self._cut(request)

    def _cut(self, request: socket.socket) -> None:
        """Wake the thread that serves it, which closes it. The lock is held: so it is open yet."""
        del self.open[request]
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # somebody closed his connection
