"""A web server whose files fail in all the ways that those of strangers do."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["serve"]

STALL_SECONDS = 30
"""Longer than the tests let a transfer take."""


class _Handler(BaseHTTPRequestHandler):
    """``/STATUS/...`` answers so; ``/loop``, ``/endless``, ``/stalled`` do what they are called; others are files."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        first, _, rest = path.strip("/").partition("/")
        if first.isdigit():
            self._answer(int(first), b"")
        elif first == "loop":
            self._answer(302, b"", {"Location": self.path})
        elif first in ("endless", "stalled"):
            self._never_end(first)
        else:
            self._give(self._folder / first / rest)

    def _give(self, path: Path) -> None:
        if path.is_file():
            content = path.read_bytes()
            self._answer(200, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        else:
            self._answer(404, b"")

    def _never_end(self, kind: str) -> None:
        """``stalled`` promises a megabyte and goes silent; ``endless`` sends noise without ever stating a length."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("ETag", '"1"')
        if kind == "stalled":
            self.send_header("Content-Length", str(2**20))
        self.end_headers()
        if self.command == "HEAD":
            return
        deadline = time.monotonic() + STALL_SECONDS
        try:
            while time.monotonic() < deadline:
                if kind == "endless":
                    self.wfile.write(bytes(2**16))
                else:
                    time.sleep(0.1)
                    self.wfile.flush()
        except OSError:  # the client has had enough
            return

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Silent."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what some paths are for."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The URL of a server for the files of a folder."""
    with _Server(("127.0.0.1", 0), partial(_Handler, folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
