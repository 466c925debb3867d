"""A bucket as slow as a distant one: an S3 server in a separate process that delays requests and throttles streams.

    python benchmarks/slow_s3.py PORT DELAY_SECONDS BYTES_PER_SECOND

It supports the requests that clipmill sends (objects whole or in part, conditional puts, ListObjectsV2, deletions) and
keeps objects in memory. `serve` starts it for a benchmark.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

CHUNK_BYTES = 2**16


@contextlib.contextmanager
def serve(delay_seconds: float, bytes_per_second: float) -> Iterator[None]:
    """Runs the server and points this process and its children to it, for the time of the ``with`` block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, str(port), str(delay_seconds), str(bytes_per_second)])
    try:
        _wait_for(port)
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_DEFAULT_REGION="us-east-1",
            NO_PROXY="127.0.0.1",
        )
        yield
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise TimeoutError("the server does not start")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes] = {}  # noqa: RUF012  of all handlers
    delay_seconds = 0.0
    bytes_per_second = 0.0

    def _answer(self) -> None:
        time.sleep(self.delay_seconds)
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self._receive(int(self.headers.get("Content-Length", 0)))
        key = unquote(url.path).lstrip("/")
        if "list-type" in query:
            self._send(200, self._page(key.rstrip("/"), query))
        elif self.command == "PUT":
            is_taken = "If-None-Match" in self.headers and key in self.objects
            self.objects.setdefault(key, body) if is_taken else self.objects.update({key: body})
            self._send(412 if is_taken else 200, _error("PreconditionFailed") if is_taken else b"")
        elif self.command == "DELETE":
            self.objects.pop(key, None)
            self._send(204, b"")
        elif key not in self.objects:
            self._send(404, _error("NoSuchKey"))
        else:
            self._send_part(self.objects[key])

    do_GET = do_HEAD = do_PUT = do_DELETE = _answer

    def _receive(self, num_bytes: int) -> bytes:
        chunks = []
        while num_bytes:
            chunks.append(self.rfile.read(min(num_bytes, CHUNK_BYTES)))
            num_bytes -= len(chunks[-1])
            time.sleep(len(chunks[-1]) / self.bytes_per_second)
        return b"".join(chunks)

    def _send_part(self, content: bytes) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first:
            self._send(200, content)
            return
        end = min(int(last) + 1, len(content)) if last else len(content)
        self._send(206, content[int(first) : end], f"bytes {first}-{end - 1}/{len(content)}")

    def _send(self, status: int, content: bytes, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(content), CHUNK_BYTES):
            self.wfile.write(content[start : start + CHUNK_BYTES])
            time.sleep(min(CHUNK_BYTES, len(content) - start) / self.bytes_per_second)

    def _page(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = f"{bucket}/{query.get('prefix', '')}", query.get("delimiter")
        items: dict[str, str] = {}
        for key in sorted(self.objects):
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                name = (prefix + rest.partition(delimiter)[0] + delimiter)[len(bucket) + 1 :]
                items[name] = f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
            else:
                name, content = key[len(bucket) + 1 :], self.objects[key]
                etag = hashlib.md5(content, usedforsecurity=False).hexdigest()
                items[name] = (
                    f"<Contents><Key>{quote(name)}</Key><Size>{len(content)}</Size><ETag>&quot;{etag}&quot;</ETag>"
                    "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
                )
        after = query.get("start-after", "")
        listed = "".join(item for name, item in items.items() if name > after)
        head = "<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{head}{listed}</ListBucketResult>".encode()

    def log_message(self, *_: object) -> None:
        pass


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()


if __name__ == "__main__":
    _Handler.delay_seconds, _Handler.bytes_per_second = float(sys.argv[2]), float(sys.argv[3])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
