"""Web servers as lists of videos name them: what they do not tell is found out, what does not end is ended."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.errors import UserError
from clipmill.storage import retries, web
from clipmill.storage.urls import request_url, shown

CONTENT = bytes(range(256)) * 1024
ETAG = {"ETag": '"tag"'}
OTHER_ETAG = {"ETag": '"other"'}
DATED = {"Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}


class WebServer:
    """Answers requests as ``behave`` says, and remembers them.

    Attributes:
        requests: (method, path with query) of each.
        behave: takes the handler, which answers by its `give`.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.behave: Callable[[Any], None] = lambda handler: handler.give()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append((self.command, self.path))
                server.behave(self)

            do_HEAD = do_GET

            def give(
                self,
                status: int = 200,
                headers: dict[str, str] | None = None,
                *,
                length: bool = True,
                ranges: bool = False,
            ) -> None:
                body, headers = CONTENT if status == 200 else b"", dict(headers or {})
                if ranges and status == 200 and "Range" in self.headers:
                    first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(CONTENT)}"
                    body, status = CONTENT[first : last + 1], 206
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if length:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def num(self, method: str) -> int:
        return Counter(found for found, _ in self.requests)[method]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "1")
    retries._wasted_seconds.clear()
    server = WebServer()
    yield server
    server.stop()


def test_one_head_is_enough_for_a_server_that_tells_all(server: WebServer) -> None:
    server.behave = lambda handler: handler.give(headers=ETAG)
    assert storage.stat(f"{server.url}/a.mp4") == storage.Entry("a.mp4", len(CONTENT), "tag", None)
    assert [method for method, _ in server.requests] == ["HEAD"]


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
def test_head_may_be_refused_where_get_is_not(server: WebServer, status: int) -> None:
    server.behave = lambda handler: handler.give(200 if handler.command == "GET" else status, headers=ETAG, ranges=True)
    assert storage.stat(f"{server.url}/a.mp4").bytes == len(CONTENT)


@pytest.mark.parametrize(
    ("options", "tag"),
    [
        ({"headers": DATED}, "modified:Fri, 02 Jan 2026 03:04:05 GMT"),
        ({"headers": DATED, "length": False}, "modified:Fri, 02 Jan 2026 03:04:05 GMT"),
        ({"ranges": True}, "edges:"),
        ({"ranges": False}, "edges:"),
        ({"length": False}, "edges:"),
    ],
)
def test_what_a_server_does_not_tell_is_found_out(server: WebServer, options: dict[str, Any], tag: str) -> None:
    server.behave = lambda handler: handler.give(**options)
    entry = storage.stat(f"{server.url}/a.mp4")
    assert entry.bytes == len(CONTENT)
    assert (entry.etag or "").startswith(tag)
    if tag == "edges:":  # the same whichever way it was had
        assert entry.etag == web._tag(CONTENT[: web.EDGE_BYTES] + CONTENT[-web.EDGE_BYTES :])


def test_a_tag_of_any_bytes_is_kept_as_text(server: WebServer) -> None:
    server.behave = lambda handler: handler.give(headers={"ETag": '"caf\u00e9"'})  # sent as Latin-1, which no UTF-8 is
    assert storage.stat(f"{server.url}/a.mp4").etag == "caf\\xe9"


@pytest.mark.parametrize("status", [204, 300, 302, 304, 401, 403, 410, 418, 451])
def test_an_object_that_is_refused_is_unreadable_at_once(server: WebServer, tmp_path: Path, status: int) -> None:
    server.behave = lambda handler: handler.give(status)
    with pytest.raises(storage.Unreadable, match=str(status)):
        storage.stat(f"{server.url}/a.mp4?token=hidden")
    with pytest.raises(storage.Unreadable, match=rf"a\.mp4\?token=\*\*\*: the server answers {status}"):
        storage.fetch(f"{server.url}/a.mp4?token=hidden", tmp_path / "copy")
    assert len(server.requests) <= 3


def test_a_redirection_to_no_web_server_is_unreadable_at_once(server: WebServer) -> None:
    server.behave = lambda handler: handler.give(302, headers={"Location": "file:///etc/passwd"})
    with pytest.raises(storage.Unreadable, match="redirects to file:///etc/passwd"):
        storage.stat(f"{server.url}/a.mp4")
    assert len(server.requests) == 1


def test_a_missing_file_costs_one_head(server: WebServer) -> None:
    server.behave = lambda handler: handler.give(404)
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{server.url}/a.mp4")
    assert server.requests == [("HEAD", "/a.mp4")]


def test_retry_after_is_waited_for(server: WebServer) -> None:
    began = time.monotonic()
    server.behave = lambda handler: handler.give(
        *((200, ETAG) if len(server.requests) > 1 else (429, {"Retry-After": "0.7"}))
    )
    assert storage.stat(f"{server.url}/a.mp4").etag == "tag"
    assert time.monotonic() - began >= 0.7


def test_a_server_that_asks_for_too_long_a_pause_is_not_waited_for(server: WebServer) -> None:
    server.behave = lambda handler: handler.give(503, {"Retry-After": "3600"})
    with pytest.raises(storage.Unreadable, match="503"):
        storage.stat(f"{server.url}/a.mp4")
    assert len(server.requests) == 1


def test_the_budget_of_a_server_is_shared_by_its_files_and_whole_again_after_a_success(server: WebServer) -> None:
    server.behave = lambda handler: handler.give(503)
    began = time.monotonic()
    for number in range(40):
        with pytest.raises(storage.Unreadable):
            storage.stat(f"{server.url}/{number}")
    assert 40 < len(server.requests) < 60
    assert time.monotonic() - began < 20  # each for itself would have waited some 40 s
    retries._wasted_seconds[server.url.removeprefix("http://")] = 0.0
    server.behave = lambda handler: handler.give(503 if server.requests[-2][1] != "/d" else 200, ETAG)
    assert storage.stat(f"{server.url}/d").etag == "tag"
    assert retries._wasted_seconds == {}


def drip(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


def pour(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**16))


@pytest.mark.parametrize(
    ("behave", "limits", "cause"),
    [
        (drip, storage.Limits(0.5, 2**30), "does not end within 0 s"),
        (pour, storage.Limits(60, 2**20), "more than 1048576 bytes"),
        (lambda handler: handler.give(), storage.Limits(60, 1000), "more than 1000 bytes"),
        (lambda handler: time.sleep(5), storage.Limits(0.5, 2**30), "does not end within"),
    ],
)
def test_what_does_not_end_is_ended(
    server: WebServer, tmp_path: Path, behave: Callable[[Any], None], limits: storage.Limits, cause: str
) -> None:
    server.behave = behave
    with pytest.raises(storage.Unreadable, match=cause):
        storage.fetch(f"{server.url}/a.mp4", tmp_path / "copy", limits)


def test_a_cut_transfer_is_repeated(server: WebServer, tmp_path: Path) -> None:
    def cut_once(handler: Any) -> None:
        if len(server.requests) > 1:
            handler.give()
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(CONTENT[:1000])

    server.behave = cut_once
    storage.fetch(f"{server.url}/a.mp4", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "path",
    [
        "a%2Fb%7Ec.mp4?X-Amz-Signature=0%2F1%2B2&x=a+b",
        "long.mp4?sig=" + "s" * 6000,
        "d/" + "n" * 5000 + ".mp4",
    ],
)
def test_urls_go_over_the_wire_as_they_stand(server: WebServer, tmp_path: Path, path: str) -> None:
    server.behave = lambda handler: handler.give(headers=ETAG)
    storage.fetch(f"{server.url}/{path}", tmp_path / "copy")
    storage.stat(f"{server.url}/{path}")
    assert {found for _, found in server.requests} == {f"/{path}"}


def test_what_no_url_may_hold_is_encoded() -> None:
    assert request_url("http://h/a b\u00e9\n.mp4#t=1") == "http://h/a%20b%C3%A9%0A.mp4"
    assert request_url("http://h/caf\\xe9.mp4") == "http://h/caf%E9.mp4"  # the byte of a name in Latin-1
    assert request_url("http://h/100%.mp4") == "http://h/100%25.mp4"
    assert request_url("http://m\u00fcller.example/x") == "http://xn--mller-kva.example/x"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:word@host/a.mp4", "https://host/a.mp4"),
        ("https://h/a?X-Amz-Signature=1&X-Amz-Date=2&id=3", "https://h/a?X-Amz-Signature=***&X-Amz-Date=***&id=3"),
        ("https://h/a?token=1", "https://h/a?token=***"),
        ("https://h/a?sv=1&se=2&sig=3&part=4", "https://h/a?sv=***&se=***&sig=***&part=4"),
        (
            "https://h/a?AWSAccessKeyId=1&Expires=2&Signature=3",
            "https://h/a?AWSAccessKeyId=***&Expires=***&Signature=***",
        ),
        ("https://h/a?" + "x" * 40, "https://h/a?***"),
        ("https://h/watch?v=abc&t=10", "https://h/watch?v=abc&t=10"),
        ("s3://b/a?token=1", "s3://b/a?token=1"),  # a key, not a query
        ("a\nb\x1b[2Jc", "a\\nb\\x1b[2Jc"),
        ("\u202egpj.4pm", "\\u202egpj.4pm"),
    ],
)
def test_credentials_are_not_shown_and_hidden_characters_are(url: str, text: str) -> None:
    assert shown(url) == text


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_is_read_at_any_place_whether_its_server_knows_ranges_or_not(server: WebServer, ranges: bool) -> None:
    server.behave = lambda handler: handler.give(headers=ETAG, ranges=ranges)
    with storage.open_to_read(f"{server.url}/a.mp4", 2**12) as file:
        assert file.read(10) == CONTENT[:10]
        file.seek(len(CONTENT) - 100)
        assert file.read() == CONTENT[-100:]


@pytest.mark.parametrize(
    ("later", "is_same"),
    [
        (ETAG | DATED, True),
        (ETAG, True),
        (OTHER_ETAG | DATED, True),
        ({}, True),
        (OTHER_ETAG, False),
    ],
)
def test_two_versions_of_a_file_are_not_mixed(server: WebServer, later: dict[str, str], is_same: bool) -> None:
    server.behave = lambda handler: handler.give(headers=later if server.num("GET") > 1 else ETAG | DATED, ranges=True)
    with storage.open_to_read(f"{server.url}/a.mp4", 2**12) as file:
        assert file.read(2**12) == CONTENT[: 2**12]
        if is_same:
            assert file.read(10) == CONTENT[:10]
        else:
            with pytest.raises(storage.Unreadable, match=r"a\.mp4 was replaced while it was read"):
                file.read(10)


@pytest.mark.parametrize("status", [403, 503])
def test_a_file_that_is_refused_while_it_is_read_is_unreadable(server: WebServer, status: int) -> None:
    server.behave = lambda handler: handler.give(200 if handler.command == "HEAD" else status, ETAG)
    with (
        storage.open_to_read(f"{server.url}/a.mp4?token=hidden") as file,
        pytest.raises(storage.Unreadable, match=rf"a\.mp4\?token=\*\*\*.*{status}"),
    ):
        file.read(10)


def test_a_web_server_is_not_listed(server: WebServer) -> None:
    with pytest.raises(UserError, match="name them in a table"):
        list(storage.walk(f"{server.url}/raw"))
