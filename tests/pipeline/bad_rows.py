"""A table of videos of which a tenth is bad, each in one of many ways, and what must become of every row."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.pipeline.corpus import video_bytes
from tests.storage.s3_server import S3Server

__all__ = ["COLUMNS", "NUM_FRAMES", "Table", "write_table"]

NUM_FRAMES = 9
COLUMNS = ("label", "text", "actions", "split", "start", "end")
"""Beside ``url``; what is in others is metadata."""
_NUM_FILMS = 16
"""Different films; every video is one of them with a number behind it, so that all have identities of their own."""


@dataclass
class Table:
    """A table, and what becomes of its rows.

    Attributes:
        path: of the table.
        good: the lines of its good rows.
        causes: of the bad rows, by the name under which each is excluded: a regular expression.
        kinds: the different ways in which they are bad.
    """

    path: Path
    good: list[str] = field(default_factory=list)
    causes: dict[str, str] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)


def write_table(folder: Path, web: str, bucket: S3Server, num_rows: int) -> Table:
    """Writes the table and all that its rows name.

    Args:
        folder: of the table and the files; the files of its folder ``web`` are served.
        web: URL of their server.
        bucket: gets the objects that rows name.
        num_rows: of which every tenth is bad, in turn by each of `_BAD`.
    """
    table = Table(folder / "list.jsonl")
    (folder / "good").mkdir(parents=True)
    (folder / "web" / "plain").mkdir(parents=True)
    bucket.fault = lambda request, number: (403, "AccessDenied") if " forbidden/" in request else None
    np.save(folder / "good" / "rows.npy", np.zeros((NUM_FRAMES, 2), np.float32))
    makers = list(_BAD.items())
    lines = []
    for number in range(num_rows):
        if number % 10:
            line = json.dumps(_good_row(folder, web, bucket, number))
            table.good.append(line)
        else:
            kind, make = makers[number // 10 % len(makers)]
            line, name, cause = make(_Place(folder, web, bucket, number))
            table.kinds.add(kind)
            table.causes[name] = cause
        lines.append(line)
    table.path.write_text("\n".join(lines) + "\n")
    return table


def _film(number: int) -> bytes:
    """A video of its own: a free atom at the end of an MP4 file is not looked at."""
    return video_bytes(number % _NUM_FILMS, NUM_FRAMES) + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")


def _good_row(folder: Path, web: str, bucket: S3Server, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        **dict.fromkeys(COLUMNS),
        "url": f"good/{number}.mp4",
        "score": float("nan") if number % 7 == 1 else number,
    }
    where = folder / row["url"]
    if number % 20 == 3:
        row["url"], where = f"{web}/plain/{number}.mp4?signature={'s' * 600}", folder / f"web/plain/{number}.mp4"
    elif number % 20 == 5:
        row["url"] = f"s3://bucket/good/{number} ?#ö.mp4"
        bucket.objects[f"good/{number} ?#ö.mp4"] = _film(number)
    elif number % 20 == 7:
        row["actions"] = "good/rows.npy"
    elif number % 20 == 9:  # a name that is not UTF-8
        name = os.fsdecode(b"caf\xe9-%d.mp4" % number)
        row["url"], where = f"good/{name}", folder / "good" / name
    if not row["url"].startswith("s3:"):
        where.write_bytes(_film(number))
    return row


# ------------------------------------------------------------------------------------------- bad rows


class _Place:
    """Where a bad row stands, and how to write what it names."""

    def __init__(self, folder: Path, web: str, bucket: S3Server, number: int) -> None:
        self.folder, self.web, self.bucket, self.number = folder, web, bucket, number
        self.row_name = f"list.jsonl#line={number + 1}"

    def file(self, content: bytes, suffix: str = ".mp4") -> str:
        """The name of a new file."""
        name = f"bad/{self.number}{suffix}"
        (self.folder / "bad").mkdir(exist_ok=True)
        (self.folder / name).write_bytes(content)
        return name


Bad = tuple[str, str, str]
"""(line of the table, name under which the row is excluded, regular expression of the cause)."""
_Maker = Callable[[_Place], Bad]


def _line(text: str, cause: str) -> _Maker:
    """A line that names no video."""
    return lambda place: (text.replace("NUMBER", str(place.number)), place.row_name, cause)


def _row(cause: str, **cells: Any) -> _Maker:
    """A good video with a bad cell beside it."""

    def make(place: _Place) -> Bad:
        name = place.file(_film(place.number))
        return json.dumps({"url": name, **cells}), name, cause

    return make


def _content(content: Callable[[bytes], bytes], cause: str, suffix: str = ".mp4") -> _Maker:
    def make(place: _Place) -> Bad:
        name = place.file(content(_film(place.number)), suffix)
        return json.dumps({"url": name}), name, cause

    return make


def _url(path: str, cause: str) -> _Maker:
    def make(place: _Place) -> Bad:
        url = f"{place.web}/{path}/{place.number}.mp4"
        return json.dumps({"url": url}), url, cause

    return make


def _object(kind: str, cause: str) -> _Maker:
    def make(place: _Place) -> Bad:
        key = f"{kind}/{place.number}.mp4"
        if kind != "gone":
            place.bucket.objects[key] = _film(place.number)
        if kind == "archived":
            place.bucket.classes[key] = "GLACIER"
        return json.dumps({"url": f"s3://bucket/{key}"}), f"s3://bucket/{key}", cause

    return make


def _actions(content: Callable[[Path], None], cause: str) -> _Maker:
    def make(place: _Place) -> Bad:
        name, actions = place.file(_film(place.number)), f"bad/{place.number}.npy"
        content(place.folder / actions)
        return json.dumps({"url": name, "actions": actions}), name, cause

    return make


def _special(make_file: Callable[[Path], None], cause: str) -> _Maker:
    def make(place: _Place) -> Bad:
        name = f"bad/{place.number}.mp4"
        (place.folder / "bad").mkdir(exist_ok=True)
        make_file(place.folder / name)
        return json.dumps({"url": name}), name, cause

    return make


def _dead_server(place: _Place) -> Bad:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/{place.number}.mp4"
    return json.dumps({"url": url}), url, "did not recover|given up|refused"


def _tar_of(film: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("a.mp4")
        member.size = len(film)
        tar.addfile(member, io.BytesIO(film))
    return buffer.getvalue()


_NO_VIDEO = "^cannot open|^no video stream|^cannot decode|^no frame|damaged"

_BAD: dict[str, _Maker] = {
    "a line that is no JSON": _line('{"url": "good/NUMBER', "it is not JSON"),
    "a list instead of an object": _line('["good/NUMBER.mp4"]', "it is not a JSON object"),
    "an empty name": _line('{"url": " ", "score": NUMBER}', "url is empty"),
    "no name": _line('{"url": null, "score": NUMBER}', "url is empty"),
    "a name that is a list": _line('{"url": ["a"], "score": NUMBER}', "url is a list"),
    "a zero byte in a name": _line('{"url": "a\\u0000b.mp4", "score": NUMBER}', "zero byte"),
    "a span that ends before it begins": _row("ends at 1 s, before it begins", start=2, end=1),
    "a time that is none": _row("must be a number of seconds", start="soon"),
    "an unknown split": _row("must be one of", split="holdout"),
    "a label that is an object": _row("label is an object", label={"a": 1}),
    "half a character": _row("half a character", text="\ud800"),
    "a missing file": _special(lambda path: None, "is missing"),
    "a folder": _special(lambda path: path.mkdir(), "is missing"),
    "a FIFO": _special(os.mkfifo, "is missing"),
    "a link in a circle": _special(lambda path: path.symlink_to(path.name), "is missing|Too many levels"),
    "zeros": _content(lambda film: bytes(1000) + film[-8:], _NO_VIDEO),
    "a text": _content(lambda film: b"no video" + film[-8:], _NO_VIDEO),
    "a file that is cut": _content(lambda film: film[:600] + film[-8:], _NO_VIDEO),
    "an archive": _content(_tar_of, _NO_VIDEO, suffix=".tar"),
    "a playlist": _content(lambda film: b"#EXTM3U\n/etc/passwd\n#" + film[-8:], _NO_VIDEO, suffix=".m3u8"),
    "actions that are missing": _actions(lambda path: None, "is missing"),
    "actions that are pickled": _actions(lambda path: path.write_bytes(pickle.dumps({"a": 1})), "not an .npy file"),
    "too few rows of actions": _actions(lambda path: np.save(path, np.zeros((2, 2), np.float32)), "2 rows of actions"),
    "actions of text": _actions(lambda path: np.save(path, np.array(["a"] * NUM_FRAMES)), "actions must be numbers"),
    "HTTP 401": _url("401", "answers 401"),
    "HTTP 403": _url("403", "answers 403"),
    "HTTP 404": _url("plain", "is missing|answers 404"),
    "HTTP 410": _url("410", "answers 410"),
    "HTTP 451": _url("451", "answers 451"),
    "HTTP 429": _url("429", "HTTP 429|answers 429"),
    "HTTP 503": _url("503", "HTTP 503|answers 503"),
    "a redirection in a circle": _url("loop", "redirects without end"),
    "a body that never ends": _url("endless", "bytes|ends|size|seconds"),
    "a transfer that stalls": _url("stalled", "seconds|s \\(|recover"),
    "a dead server": _dead_server,
    "an archived object": _object("archived", "archived"),
    "a forbidden object": _object("forbidden", "denied|forbidden|Forbidden"),
    "a missing object": _object("gone", "is missing"),
}
