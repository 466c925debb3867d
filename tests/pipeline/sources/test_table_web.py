"""Tables whose rows name files of a web server."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipmill.config import SourceConfig
from clipmill.pipeline.fetch import ExcludedVideo, fetch_video
from clipmill.pipeline.sources import list_videos
from clipmill.pipeline.sources.multivideo import KeptFiles
from tests.pipeline.corpus import make_plan
from tests.pipeline.sources.fixtures import shard_in_process, source_config, write_videos


class _Files(SimpleHTTPRequestHandler):
    """Serves files with content tags, as buckets and most web servers do; folders of it in other ways."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind.isdigit():
            self.send_error(int(kind))
        elif kind == "unending":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        self.do_GET()

    def end_headers(self) -> None:
        if "untagged" not in self.path:
            self.send_header("ETag", f'"{len(self.path)}"')
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a web server for the folder ``web``."""
    monkeypatch.setenv("CLIPMILL_STORAGE_RETRY_SECONDS", "1")
    write_videos(tmp_path / "web", 3)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(tmp_path / "web"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_absolute_urls_are_fetched(tmp_path: Path, web: str) -> None:
    signed = f"{web}/2.mp4?signature={'a' * 300}"  # longer than a file name may be
    (tmp_path / "list.csv").write_text("\n".join(["url", f"{web}/1.mp4", signed, f"{web}/gone.mp4"]))
    source = {"type": "table", "url": str(tmp_path / "list.csv")}
    found = shard_in_process(source_config(tmp_path, source))
    assert {described["source"] for described in found.described("train")} == {
        f"{web}/1.mp4",
        f"{web}/2.mp4?signature=***",
    }
    assert found.excluded() == {f"{web}/gone.mp4": f"{web}/gone.mp4 is missing"}


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("401/a.mp4", "the server answers 401 Unauthorized"),
        ("403/a.mp4", "the server answers 403 Forbidden"),
        ("410/a.mp4", "the server answers 410 Gone"),
        ("404/a.mp4", "is missing"),
        ("429/a.mp4", r"the server did not recover within 1 s \(HTTP 429\)"),
        ("500/a.mp4", r"the server did not recover within 1 s \(HTTP 500\)"),
        ("451/a.mp4", "the server answers 451 Unavailable For Legal Reasons"),
        ("unending/a.mp4", "the file is empty"),
    ],
)
def test_what_a_server_refuses_costs_one_row(tmp_path: Path, web: str, name: str, cause: str) -> None:
    (tmp_path / "list.csv").write_text(f"url\n{web}/1.mp4\n{web}/{name}\n")
    found = shard_in_process(source_config(tmp_path, {"type": "table", "url": str(tmp_path / "list.csv")}))
    assert {described["source"] for described in found.described("train")} == {f"{web}/1.mp4"}
    assert found.excluded().keys() == {f"{web}/{name}"}
    assert re.search(cause, found.excluded()[f"{web}/{name}"])


def test_a_server_need_not_tell_an_etag(tmp_path: Path, web: str) -> None:
    (tmp_path / "web" / "2.mp4").rename(tmp_path / "web" / "untagged.mp4")
    (tmp_path / "list.csv").write_text(f"url\n{web}/1.mp4\n{web}/untagged.mp4\n")
    found = shard_in_process(source_config(tmp_path, {"type": "table", "url": str(tmp_path / "list.csv")}))
    assert {described["source"] for described in found.described("train")} == {f"{web}/1.mp4", f"{web}/untagged.mp4"}


def test_a_server_that_is_away_is_waited_for_once(tmp_path: Path, web: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    rows = [f"http://127.0.0.1:{port}/{number}.mp4" for number in range(200)]
    (tmp_path / "list.csv").write_text("\n".join(["url", f"{web}/1.mp4", *rows]))
    began = time.monotonic()
    videos = list(list_videos(SourceConfig.model_validate({"type": "table", "url": str(tmp_path / "list.csv")})))
    assert [video.fault is None for video in videos] == [True, *[False] * 200]
    assert time.monotonic() - began < 60
    assert sum("was given up" in (video.fault or "") for video in videos) > 100


@pytest.mark.parametrize("status", [403, 503])
def test_a_server_that_refuses_a_worker_costs_one_video(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """As where a signed URL has expired since the listing."""
    (tmp_path / "list.csv").write_text(f"url\n{web}/1.mp4\n{web}/2.mp4\n")
    config = source_config(tmp_path, {"type": "table", "url": str(tmp_path / "list.csv")})
    videos = make_plan(config).unit("train", 0).videos
    monkeypatch.setattr(_Files, "do_GET", lambda handler: handler.send_error(status))
    with pytest.raises(ExcludedVideo, match=f"{status}"):
        fetch_video(config.data, videos[0], tmp_path, KeptFiles(tmp_path / "kept"))
