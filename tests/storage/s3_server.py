"""A small S3 server in a thread: what tests of listings and of blame need, and real requests that they can count."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from clipmill.storage import connection

Answer = tuple[int, str]
"""HTTP status and S3's error code."""


class S3Server:
    """Serves one bucket, whatever its name.

    Attributes:
        objects: content by key.
        classes: storage class by key, where it is not the standard one.
        requests: made so far: ``LIST``, and ``GET key`` and so on.
        fault: (request, how often it was made before) to what goes wrong, or None.
        knows_start_after: whether listings heed StartAfter.
        is_fenced: whether puts heed If-None-Match.
        delay_seconds: of each answer.
        most_at_once: requests that were answered at the same time.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.classes: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.fault: Callable[[str, int], Answer | None] = lambda request, number: None
        self.knows_start_after = self.is_fenced = True
        self.delay_seconds = 0.0
        self.num_at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes it the storage of this process."""
        environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        connection._connected.cache_clear()

    def num_lists(self) -> int:
        return self.requests["LIST"]

    def page(self, query: dict[str, str]) -> str:
        """An answer of ListObjectsV2."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after = query.get("continuation-token", query.get("start-after", "") if self.knows_start_after else "")
        names: list[tuple[str, str]] = []
        for key in sorted(self.objects):
            if not key.startswith(prefix):
                continue
            rest = key.removeprefix(prefix)
            folder = prefix + rest.partition("/")[0] + "/" if delimiter and "/" in rest else None
            item = ("CommonPrefixes", folder) if folder else ("Contents", key)
            if item[1] > after and item not in names[-1:] and not (folder and after.startswith(folder)):
                names.append(item)
        page = names[: int(query.get("max-keys", "1000"))]
        parts = [self._item(kind, name) for kind, name in page]
        is_cut = len(page) < len(names)
        token = f"<NextContinuationToken>{escape(page[-1][1])}</NextContinuationToken>" if is_cut else ""
        head = f"<EncodingType>url</EncodingType><IsTruncated>{str(is_cut).lower()}</IsTruncated>{token}"
        return f"<ListBucketResult>{head}{''.join(parts)}</ListBucketResult>"

    def _item(self, kind: str, name: str) -> str:
        if kind == "CommonPrefixes":
            return f"<CommonPrefixes><Prefix>{quote(name, safe='/')}</Prefix></CommonPrefixes>"
        content = self.objects[name]
        return (
            f"<Contents><Key>{quote(name, safe='/')}</Key><Size>{len(content)}</Size>"
            f"<ETag>&quot;{hashlib.md5(content).hexdigest()}&quot;</ETag>"
            f"<LastModified>2026-01-02T03:04:05.000Z</LastModified>"
            f"<StorageClass>{self.classes.get(name, 'STANDARD')}</StorageClass></Contents>"
        )

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                url = urlsplit(self.path)
                key = unquote(url.path).lstrip("/").partition("/")[2]
                query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = "LIST" if "list-type" in query else f"{self.command} {key}"
                with server.lock:
                    server.num_at_once += 1
                    server.most_at_once = max(server.most_at_once, server.num_at_once)
                time.sleep(server.delay_seconds)
                with server.lock:
                    server.num_at_once -= 1
                    number = server.requests[request]
                    server.requests[request] += 1
                    self._answer(request, key, query, body, server.fault(request, number))

            def _answer(self, request: str, key: str, query: dict[str, str], body: bytes, fault: Answer | None) -> None:
                if fault is not None:
                    self._error(*fault)
                elif request == "LIST":
                    self._send(200, server.page(query).encode())
                elif self.command == "PUT":
                    if key in server.objects and self.headers.get("If-None-Match") and server.is_fenced:
                        self._error(412, "PreconditionFailed")
                    else:
                        server.objects[key] = body
                        self._send(200, b"")
                elif self.command == "DELETE":
                    server.objects.pop(key, None)
                    self._send(204, b"")
                elif key not in server.objects:
                    self._error(404, "NoSuchKey")
                elif server.classes.get(key) == "GLACIER" and self.command == "GET":
                    self._error(403, "InvalidObjectState")
                else:
                    self._content(server.objects[key])

            def _content(self, content: bytes) -> None:
                first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last) + 1 if last else None] if first else content
                self._send(206 if first else 200, part)

            def _error(self, status: int, code: str) -> None:
                self._send(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", '"tag"')
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler
