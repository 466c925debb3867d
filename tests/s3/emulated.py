"""A small S3 server in memory: enough to list, look at and read objects, and whatever else a test wants of a bucket.

Its objects may be fabricated from their number, so that a listing of ten million costs nothing to store.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE_KEYS = 1000
MODIFIED = "2026-01-01T00:00:00.000Z"


class Object(NamedTuple):
    etag: str
    num_bytes: int
    content: bytes = b""


class Fabricated(Sequence[str]):
    """Keys ``raw/000000000.mp4`` and so on, in order."""

    def __init__(self, num_keys: int) -> None:
        self._num_keys = num_keys

    def __len__(self) -> int:
        return self._num_keys

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(self._num_keys))]
        if index >= self._num_keys:
            raise IndexError(index)
        return f"raw/{index:09d}.mp4"

    def __contains__(self, key: object) -> bool:
        found = re.fullmatch(r"raw/(\d{9})\.mp4", str(key))
        return found is not None and int(found[1]) < self._num_keys


def fabricate(key: str) -> Object:
    """An object of some megabytes that was put whole."""
    number = int(key[4:13])
    return Object(f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}", 2**21 + number % 4096)


class EmulatedS3:
    """Serves the buckets that it is given.

    Attributes:
        buckets: objects by key, by bucket.
        fabricated: by bucket, the keys of buckets whose objects are `fabricate`d.
        num_requests: by ``list``, ``get`` and ``head``.
        num_failures: of the next listings, how many answer 503.
        seconds_per_page: time that a listing takes.
        environment: variables by which a process reaches it.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Object]] = {}
        self.fabricated: dict[str, Sequence[str]] = {}
        self.num_requests: Counter[str] = Counter()
        self.num_failures = 0
        self.seconds_per_page = 0.0
        emulated = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                emulated._answer(self, with_content=True)

            def do_HEAD(self) -> None:
                emulated._answer(self, with_content=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, bucket: str, key: str, content: bytes, part_bytes: int | None = None) -> None:
        """As a whole, or in parts."""
        etag = hashlib.md5(content).hexdigest()
        if part_bytes is not None:
            parts = [content[first : first + part_bytes] for first in range(0, len(content), part_bytes)]
            digests = b"".join(hashlib.md5(part).digest() for part in parts)
            etag = f"{hashlib.md5(digests).hexdigest()}-{len(parts)}"
        self.buckets.setdefault(bucket, {})[key] = Object(etag, len(content), content)

    def _answer(self, handler: BaseHTTPRequestHandler, *, with_content: bool) -> None:
        url = urlsplit(handler.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if "list-type" in query:
            self.num_requests["list"] += 1
            time.sleep(self.seconds_per_page)
            if self.num_failures:
                self.num_failures -= 1
                _send(handler, 503, b"<Error><Code>SlowDown</Code></Error>")
            else:
                _send(handler, 200, self._page(bucket, query))
            return
        self.num_requests["get" if with_content else "head"] += 1
        found = self.buckets.get(bucket, {}).get(key)
        if found is None and key in self.fabricated.get(bucket, ()):
            found = fabricate(key)
        if found is None:
            _send(handler, 404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        content, status = found.content, 200
        headers = {"ETag": f'"{found.etag}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if wanted := handler.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        if not with_content:
            headers["Content-Length"] = str(found.num_bytes)
        _send(handler, status, content, headers)

    def _page(self, bucket: str, query: dict[str, str]) -> bytes:
        objects = self.buckets.get(bucket, {})
        keys = self.fabricated.get(bucket) or sorted(objects)
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        first = max(bisect_left(keys, prefix), bisect_right(keys, after))
        some = keys[first : first + int(query.get("max-keys", PAGE_KEYS))]
        page = [key for key in some if key.startswith(prefix)]
        is_more = len(page) == len(some) and first + len(some) < len(keys)
        contents = []
        for key in page:
            one = objects[key] if key in objects else fabricate(key)
            contents.append(
                f"<Contents><Key>{quote(key)}</Key><LastModified>{MODIFIED}</LastModified><ETag>&quot;{one.etag}&quot;"
                f"</ETag><Size>{one.num_bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if is_more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<EncodingType>url</EncodingType><MaxKeys>{PAGE_KEYS}</MaxKeys>"
            f"<IsTruncated>{str(is_more).lower()}</IsTruncated>{token}{''.join(contents)}</ListBucketResult>"
        ).encode()


def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


def main() -> None:
    """Serves fabricated buckets, ``b<number of objects>``, until standard input ends; prints the endpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", type=int, nargs="+")
    emulated = EmulatedS3()
    for num_objects in parser.parse_args().objects:
        emulated.fabricated[f"b{num_objects}"] = Fabricated(num_objects)
    print(emulated.endpoint, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
