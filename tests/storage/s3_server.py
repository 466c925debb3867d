"""A small S3 server in a thread: enough to list, look at, read and write objects, and requests that a test can count.

``python -m tests.storage.s3_server NUMBER...`` serves buckets of so many fabricated objects, ``b<NUMBER>``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from clipmill.storage import connection

Answer = tuple[int, str]
"""HTTP status and S3's error code."""

MODIFIED = "2026-01-02T03:04:05.000Z"


class Object(NamedTuple):
    """An object; without content where only its size counts."""

    etag: str
    num_bytes: int
    content: bytes = b""


def whole(content: bytes) -> Object:
    """An object that was put in one request."""
    return Object(hashlib.md5(content).hexdigest(), len(content), content)


def in_parts(content: bytes, part_bytes: int) -> Object:
    """An object that was uploaded in parts."""
    parts = [content[first : first + part_bytes] for first in range(0, len(content), part_bytes)]
    digests = b"".join(hashlib.md5(part).digest() for part in parts)
    return Object(f"{hashlib.md5(digests).hexdigest()}-{len(parts)}", len(content), content)


class Fabricated(Sequence[str]):
    """Keys ``raw/000000000.mp4`` and so on, in order: ten million of them cost nothing to store."""

    def __init__(self, num_keys: int) -> None:
        self._num_keys = num_keys

    def __len__(self) -> int:
        return self._num_keys

    def __getitem__(self, index):
        if not 0 <= index < self._num_keys:
            raise IndexError(index)
        return f"raw/{index:09d}.mp4"

    def find(self, key: str) -> Object | None:
        """An object of some megabytes that was put whole."""
        found = re.fullmatch(r"raw/(\d{9})\.mp4", key)
        if found is None or int(found[1]) >= self._num_keys:
            return None
        number = int(found[1])
        return Object(f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}", 2**21 + number % 4096)


class S3Server:
    """Serves buckets.

    Attributes:
        objects: content by key, of every bucket that is in neither of the next two.
        buckets: objects by key, by bucket.
        fabricated: keys of fabricated objects, by bucket.
        classes: storage class by key, where it is not the standard one.
        requests: made so far: ``LIST``, and ``GET key`` and so on.
        fault: (request, how often it was made before) to what goes wrong, or None.
        knows_start_after: whether listings heed StartAfter.
        is_fenced: whether puts heed If-None-Match.
        access_key: that requests must be signed with; None: any. The signature itself is not checked.
        delay_seconds: of each answer.
        most_at_once: requests that were answered at the same time.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.buckets: dict[str, dict[str, Object]] = {}
        self.fabricated: dict[str, Fabricated] = {}
        self.classes: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.fault: Callable[[str, int], Answer | None] = lambda request, number: None
        self.knows_start_after = self.is_fenced = True
        self.access_key: str | None = None
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
        connection._connected.cache_clear()

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

    def put(self, bucket: str, key: str, content: bytes, part_bytes: int | None = None) -> None:
        """Puts an object into one of ``buckets``, as a whole or in parts."""
        one = whole(content) if part_bytes is None else in_parts(content, part_bytes)
        self.buckets.setdefault(bucket, {})[key] = one

    def find(self, bucket: str, key: str) -> Object | None:
        if bucket in self.fabricated:
            return self.fabricated[bucket].find(key)
        if bucket in self.buckets:
            return self.buckets[bucket].get(key)
        return whole(self.objects[key]) if key in self.objects else None

    def refusal(self, authorization: str) -> Answer | None:
        """What a request gets that another key signed."""
        is_known = self.access_key is None or f"Credential={self.access_key}/" in authorization
        return None if is_known else (403, "InvalidAccessKeyId")

    def page(self, bucket: str, query: dict[str, str]) -> str:
        """An answer of ListObjectsV2."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after = query.get("continuation-token", query.get("start-after", "") if self.knows_start_after else "")
        most = int(query.get("max-keys", "1000"))
        keys = self.fabricated.get(bucket) or sorted(self.buckets.get(bucket, self.objects))
        names: list[tuple[str, str]] = []
        for place in range(max(bisect_left(keys, prefix), bisect_right(keys, after)), len(keys)):
            key = keys[place]
            if not key.startswith(prefix) or len(names) > most:
                break
            rest = key.removeprefix(prefix)
            folder = prefix + rest.partition("/")[0] + "/" if delimiter and "/" in rest else None
            item = ("CommonPrefixes", folder) if folder else ("Contents", key)
            if item not in names[-1:] and not (folder and after.startswith(folder)):
                names.append(item)
        parts = [self._item(bucket, kind, name) for kind, name in names[:most]]
        is_cut = len(names) > most
        token = f"<NextContinuationToken>{escape(names[most - 1][1])}</NextContinuationToken>" if is_cut else ""
        head = f"<EncodingType>url</EncodingType><IsTruncated>{str(is_cut).lower()}</IsTruncated>{token}"
        return f"<ListBucketResult>{head}{''.join(parts)}</ListBucketResult>"

    def _item(self, bucket: str, kind: str, name: str) -> str:
        if kind == "CommonPrefixes":
            return f"<CommonPrefixes><Prefix>{quote(name, safe='/')}</Prefix></CommonPrefixes>"
        one = self.find(bucket, name)
        return (
            f"<Contents><Key>{quote(name, safe='/')}</Key><Size>{one.num_bytes}</Size>"
            f"<ETag>&quot;{one.etag}&quot;</ETag><LastModified>{MODIFIED}</LastModified>"
            f"<StorageClass>{self.classes.get(name, 'STANDARD')}</StorageClass></Contents>"
        )

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                url = urlsplit(self.path)
                bucket, _, key = unquote(url.path).lstrip("/").partition("/")
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
                    fault = server.fault(request, number) or server.refusal(self.headers.get("Authorization", ""))
                    if fault is not None:
                        self._error(*fault)
                    elif request == "LIST":
                        self._send(200, server.page(bucket, query).encode())
                    elif self.command == "PUT":
                        self._put(key, body)
                    elif self.command == "DELETE":
                        server.objects.pop(key, None)
                        self._send(204, b"")
                    else:
                        self._give(key, server.find(bucket, key))

            def _put(self, key: str, body: bytes) -> None:
                if key in server.objects and self.headers.get("If-None-Match") and server.is_fenced:
                    self._error(412, "PreconditionFailed")
                    return
                server.objects[key] = body
                self._send(200, b"", {"ETag": f'"{whole(body).etag}"'})

            def _give(self, key: str, one: Object | None) -> None:
                if one is None:
                    self._error(404, "NoSuchKey")
                elif server.classes.get(key) == "GLACIER" and self.command == "GET":
                    self._error(403, "InvalidObjectState")
                elif self.headers.get("If-Match", f'"{one.etag}"') != f'"{one.etag}"':
                    self._error(412, "PreconditionFailed")
                else:
                    headers = {"ETag": f'"{one.etag}"', "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
                    first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
                    part = one.content[int(first) : int(last) + 1 if last else None] if first else one.content
                    if self.command == "HEAD":
                        headers["Content-Length"] = str(one.num_bytes)
                    self._send(206 if first else 200, part, headers)

            def _error(self, status: int, code: str) -> None:
                self._send(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

            def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def main() -> None:
    """Serves until standard input ends; prints the endpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", type=int, nargs="+")
    server = S3Server()
    for num_objects in parser.parse_args().objects:
        server.fabricated[f"b{num_objects}"] = Fabricated(num_objects)
    print(server.endpoint, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
