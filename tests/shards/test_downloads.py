"""Shards from a real server that fails: what passes is waited for, and a killed reader is in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipmill import storage
from clipmill.errors import StageFailed
from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.storage import bucket, retries
from tests.shards.folders import write_dataset


class Server:
    """Serves a folder; the next GETs of an archive end as told, one after the other.

    Attributes:
        faults: of ``503``, ``cut`` (after half of it) and ``stall`` (there, until `release`).
        gets: archives asked for.
        stalled: set once a transfer stands still.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: list[str] = []
        self.gets: list[str] = []
        self.stalled, self.release = threading.Event(), threading.Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                fault = server.next_fault(self.path)
                if fault == "503":
                    self.send_error(503)
                elif fault is None:
                    super().do_GET()
                else:
                    self.send_half(stall=fault == "stall")

            def send_half(self, stall: bool) -> None:
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                if stall:
                    self.wfile.flush()
                    server.stalled.set()
                    server.release.wait(60)
                self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next_fault(self, path: str) -> str | None:
        if not path.endswith(".tar"):
            return None
        self.gets.append(path)
        return self.faults.pop(0) if self.faults else None

    def stop(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path / "served", tmp_path, [5, 4])


@pytest.fixture
def server(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(storage.local_path(manifest.url))
    yield server
    server.stop()


@pytest.fixture
def served(manifest: Manifest, server: Server) -> Manifest:
    """The manifest, with its shards on the server."""
    return replace(manifest, url=server.url)


def test_a_transient_error_is_tried_again_after_growing_pauses(server, served, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bucket, "QUIET_RETRIES", 0)
    server.faults = ["503", "cut", "503"]
    assert ShardDataset(served, decode_codes, tmp_path / "cache").read(0, 2)["key"] == f"{0:016x}_{2:06d}"
    assert len(server.gets) == 4
    pauses = [record.args[2] for record in caplog.records if "trying again in" in record.message]
    assert len(pauses) == 3
    assert pauses[0] <= retries.FIRST_PAUSE_SECONDS
    assert pauses[2] >= 2 * retries.FIRST_PAUSE_SECONDS


def test_an_outage_that_lasts_ends_in_one_line(server, served, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMILL_STORAGE_RETRY_SECONDS", "0.5")
    server.faults = ["503"] * 99
    with pytest.raises(StageFailed, match=f"shard {served.shards[1].name} .*did not recover within 0.5 s") as caught:
        ShardDataset(served, decode_codes, tmp_path / "cache").read(1, 0)
    assert "\n" not in str(caught.value)


READER = """\
import sys
from dataclasses import replace
from pathlib import Path
from clipmill.shards.cache import ShardCache
from clipmill.shards.manifest import Manifest

folder, url, cache = sys.argv[1:]
ShardCache(replace(Manifest.load(folder, "tokens"), url=url), Path(cache), 2**30).open(0)
"""


def test_a_download_that_was_killed_leaves_neither_lock_nor_residue(server, manifest, served, tmp_path):
    server.faults = ["stall"]
    cache = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", READER, manifest.url, server.url, str(cache)], env=environment
    ) as reader:
        try:
            assert server.stalled.wait(60)
            assert reader.poll() is None
        finally:
            reader.kill()
    assert reader.returncode == -9
    assert ShardDataset(served, decode_codes, cache).read(0, 0)["key"] == f"{0:016x}_{0:06d}"
    sizes = {path.suffix: path.stat().st_size for path in (cache / "shards").iterdir()}
    assert sizes == {".tar": served.shards[0].bytes, ".idx": 6 * 8}
