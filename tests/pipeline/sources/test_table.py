from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.generation import make_plan
from clipmill.pipeline.sources import list_videos
from tests.pipeline.sources.fixtures import shard_in_process, source_config, write_videos

COLUMNS = {"url": "path", "label": "genre", "text": "caption", "actions": "moves", "split": "part"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Four videos: relative and absolute, one with actions, one missing."""
    names = write_videos(folder / "videos", 4)
    np.save(folder / "moves.npy", np.arange(18, dtype=np.float32).reshape(9, 2))
    table = []
    for number, name in enumerate(names):
        path = f"videos/{name}" if number else str(folder / "videos" / name)
        part = ("train", "val", "test", "")[number]
        moves = "moves.npy" if number == 1 else ""
        row = {"path": path, "genre": f"g{number % 2}", "caption": f'"{number}", a', "moves": moves, "part": part}
        table.append({**row, "license": "cc", "likes": number})
    return [*table, {**table[0], "path": "videos/gone.mp4", "likes": 9}]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if v != ""}) + "\n" for row in rows))
    else:
        pq.write_table(
            pa.Table.from_pylist([{k: v or None if v != 0 else v for k, v in row.items()} for row in rows]), path
        )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_brings_labels_captions_actions_splits_and_metadata(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    write_table(folder / f"videos{suffix}", rows_of(folder))
    source = {"type": "table", "url": str(folder / f"videos{suffix}"), "columns": COLUMNS}
    found = shard_in_process(source_config(tmp_path, source))
    assert found.excluded() == {"videos/gone.mp4": "videos/gone.mp4 is missing"}
    by_caption = {described["text"]: described for split in ("train", "val") for described in found.described(split)}
    assert {described["text"][1] for described in found.described("train")} == {"0", "3"}
    assert {described["text"][1] for described in found.described("val")} == {"1", "2"}
    first = by_caption['"0", a']
    assert (first["source"], first["label"]) == (str(folder / "videos" / "0.mp4"), "g0")
    likes = 0 if suffix in (".jsonl", ".parquet") else "0"
    assert first["metadata"] == {"license": "cc", "likes": likes}
    with_actions = [members for members in found.samples["val"].values() if "actions.npy" in members]
    assert {json.loads(members["json"])["text"] for members in with_actions} == {'"1", a'}
    assert len(with_actions) == 2


def test_named_actions_that_are_missing_exclude_the_video(tmp_path: Path) -> None:
    write_videos(tmp_path, 1)
    (tmp_path / "list.csv").write_text("url,moves\n0.mp4,gone.npy\n")
    source = {"type": "table", "url": str(tmp_path / "list.csv"), "columns": {"actions": "moves"}}
    assert shard_in_process(source_config(tmp_path, source)).excluded() == {"0.mp4": "gone.npy is missing"}


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "path,text\n0.mp4,x\n", {}, r"line 2: no column 'url' \(found: path, text\); correct .*columns\.url"),
        ("a.csv", "url,text\n0.mp4,x\n", {"label": "gerne"}, r"no column 'gerne' .*columns\.label"),
        ("a.jsonl", '{"url": "0.mp4"}\n', {"text": "caption"}, r"line 1: no column 'caption'"),
        ("a.csv", "url,part\n0.mp4,train\n0.mp4,exam\n", {"split": "part"}, "line 3: part is 'exam'"),
        ("a.csv", "url,text\n0.mp4,x\n0.mp4\n", {}, "line 3: not 2 cells"),
        ("a.csv", "url,text\n,x\n", {}, "line 2: url is empty"),
        ("a.jsonl", '{"url": "0.mp4"}\n{"url"\n', {}, "line 2: no JSON"),
        ("a.jsonl", "[1]\n", {}, "line 1: no JSON object"),
        ("a.parquet", "no parquet", {}, "cannot be read as .parquet"),
        ("a.txt", "0.mp4\n", {}, "must end in .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", "url\ngone.mp4\nlost.mp4\n", {}, "none of the 2 files that .* names exists"),
        ("a.csv", "url\n", {}, "holds no video"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_line(
    tmp_path: Path, name: str, text: str, columns: dict[str, str], message: str
) -> None:
    write_videos(tmp_path, 1)
    (tmp_path / name).write_text(text)
    source = SourceConfig.model_validate({"type": "table", "url": str(tmp_path / name), "columns": columns})
    with pytest.raises(UserError, match=message) as error:
        list(list_videos(source))
    assert "\n" not in str(error.value)


class _Files(SimpleHTTPRequestHandler):
    """Serves files with content tags, as buckets and most web servers do."""

    def end_headers(self) -> None:
        if "untagged" not in self.path:
            self.send_header("ETag", f'"{self.path}"')
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server for the folder ``web``."""
    write_videos(tmp_path / "web", 3)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(tmp_path / "web"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_absolute_urls_are_fetched(tmp_path: Path, web: str) -> None:
    (tmp_path / "list.csv").write_text("".join(f"{line}\n" for line in ["url", f"{web}/1.mp4", f"{web}/gone.mp4"]))
    source = {"type": "table", "url": str(tmp_path / "list.csv")}
    found = shard_in_process(source_config(tmp_path, source))
    assert {described["source"] for described in found.described("train")} == {f"{web}/1.mp4"}
    assert found.excluded() == {f"{web}/gone.mp4": f"{web}/gone.mp4 is missing"}


def test_a_server_without_content_tags_gives_no_identity(tmp_path: Path, web: str) -> None:
    (tmp_path / "web" / "untagged.mp4").write_bytes(b"x")
    (tmp_path / "list.csv").write_text(f"url\n{web}/untagged.mp4\n")
    with pytest.raises(UserError, match=r"untagged\.mp4 has no etag"):
        make_plan(source_config(tmp_path, {"type": "table", "url": str(tmp_path / "list.csv")}))
