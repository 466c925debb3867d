from __future__ import annotations

import csv
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos
from clipmill.tables import UnreadableTable, read_rows
from tests.pipeline.corpus import video_bytes
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


def parquet_of_two_columns(name: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table([["0.mp4"], ["1.mp4"]], names=[name, name]), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "path,text\n0.mp4,x\n", {}, r"no column 'url' \(found: path, text\); correct .*columns\.url"),
        ("a.csv", "url;text\n0.mp4;x\n", {}, r"no column 'url' \(found: url;text\)"),
        ("a.csv", "url,text\n0.mp4,x\n", {"label": "gerne"}, r"no column 'gerne' .*columns\.label"),
        ("a.jsonl", '{"url": "0.mp4"}\n', {"text": "caption"}, r"no column 'caption'"),
        (
            "a.csv",
            "url,part\n0.mp4,exam\n",
            {"split": "part"},
            "the first has this fault: line 2: part is 'exam'; it must be one of train",
        ),
        (
            "a.csv",
            "url,text\n,x\n",
            {},
            "none of the 1 rows .* gives a video; the first has this fault: line 2: url is empty",
        ),
        ("a.jsonl", "[1]\n", {}, "line 1: it is not a JSON object"),
        ("a.parquet", "no parquet", {}, "cannot be read as .parquet"),
        ("a.txt", "0.mp4\n", {}, "must end in .csv, .tsv, .jsonl, .parquet"),
        (
            "a.csv",
            "url\ngone.mp4\nlost.mp4\n",
            {},
            r"none of the 2 rows .*: gone\.mp4 is missing \(relative names refer",
        ),
        ("a.csv", "url\n", {}, "holds no video; name another file"),
        ("a.csv", "url\n0.mp4\n".encode("utf-16"), {}, "the file is UTF-16; save it as UTF-8"),
        ("a.csv", "url,text, url\n0.mp4,x,1.mp4\n", {}, "2 columns are called 'url'; rename all but one"),
        ("a.tsv", "url\ttext\ttext\n0.mp4\tx\ty\n", {}, "2 columns are called 'text'"),
        ("a.parquet", parquet_of_two_columns("url"), {}, "2 columns are called 'url'"),
        ("a.jsonl", '{"url": "0.mp4", "url": "1.mp4"}\n', {}, "line 1: it is not JSON .the key 'url' occurs twice"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_line(
    tmp_path: Path, name: str, text: str | bytes, columns: dict[str, str], message: str
) -> None:
    write_videos(tmp_path, 1)
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    source = SourceConfig.model_validate({"type": "table", "url": str(tmp_path / name), "columns": columns})
    with pytest.raises(UserError, match=message) as error:
        list(list_videos(source))
    assert "\n" not in str(error.value)


def listed(folder: Path, name: str, content: str | bytes | pa.Table, **columns: str) -> dict[str, str | None]:
    """Lists a table: the name of each row's video, with its text or its fault."""
    write_videos(folder, 3)
    if isinstance(content, pa.Table):
        pq.write_table(content, folder / name)
    else:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    columns = {"text": "text", **columns}
    source = SourceConfig.model_validate({"type": "table", "url": str(folder / name), "columns": columns})
    rows = [vars(video) for video in list_videos(source)]
    assert len({row["identity"] or row["name"] for row in rows}) == len(rows)  # none counts as a repetition of another
    return {row["name"]: row["text"] if row["fault"] is None else f"FAULT {row['fault']}" for row in rows}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bom.csv", "\ufeffurl,text\n0.mp4,hé\n", {"0.mp4": "hé"}),
        ("carriage.csv", "url,text\r0.mp4,a\r1.mp4,b\r", {"0.mp4": "a", "1.mp4": "b"}),
        ("blank.csv", "url,text\n\n0.mp4,a\r\n\r\n", {"0.mp4": "a"}),
        ("spaces.csv", "url , text\n 0.mp4, a b \n", {"0.mp4": "a b"}),
        ("spreadsheet.csv", "url,text\n0.mp4,a,,\n", {"0.mp4": "a"}),
        ("quoted.csv", 'url,text\n0.mp4,"two\nlines, ""q"""\n1.mp4,b\n', {"0.mp4": 'two\nlines, "q"', "1.mp4": "b"}),
        ("large.csv", f"url,text\n0.mp4,{'word ' * 40_000}x\n", {"0.mp4": f"{'word ' * 40_000}x"}),
        ("nul.csv", "url,text\n0.mp4,a\0b\n", {"0.mp4": "a\0b"}),
        ("quotes.tsv", 'url\ttext\n0.mp4\ta "q" word\n1.mp4\t"start\n', {"0.mp4": 'a "q" word', "1.mp4": '"start'}),
        ("said.tsv", 'url\ttext\n0.mp4\t"Hello" he said\n', {"0.mp4": '"Hello" he said'}),
        ("whole.tsv", 'url\ttext\n0.mp4\t"a ""q"" word"\n', {"0.mp4": 'a "q" word'}),
        ("tab.tsv", 'url\ttext\n0.mp4\t"a\tb"\n1.mp4\tc\n', {"0.mp4": "a\tb", "1.mp4": "c"}),
        ("lines.tsv", 'url\ttext\n0.mp4\t"two\nlines"\n1.mp4\tc\n', {"0.mp4": "two\nlines", "1.mp4": "c"}),
        (
            "swallow.tsv",
            'url\ttext\n0.mp4\t"start\n1.mp4\tmiddle\n2.mp4\tend"\n',
            {"0.mp4": '"start', "1.mp4": "middle", "2.mp4": 'end"'},
        ),
        ("nan.jsonl", '{"url": "0.mp4", "text": NaN}\n{"url": "1.mp4"}\n', {"0.mp4": None, "1.mp4": None}),
        ("captions.jsonl", '{"url": "0.mp4", "text": ["a", "b"]}\n', {"0.mp4": "a"}),
        ("number.jsonl", '{"url": "0.mp4", "text": 3.0}\n', {"0.mp4": "3"}),
        ("null.parquet", pa.table({"url": ["0.mp4", "1.mp4"], "text": [None, "b"]}), {"0.mp4": None, "1.mp4": "b"}),
        ("words.parquet", pa.table({"url": ["0.mp4"], "text": pa.array(["a"]).dictionary_encode()}), {"0.mp4": "a"}),
    ],
)
def test_cells_are_read_as_they_were_meant(
    tmp_path: Path, name: str, content: str | pa.Table, expected: dict[str, str]
) -> None:
    assert listed(tmp_path, name, content) == expected


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"b"]).buffers())


@pytest.mark.parametrize(
    ("name", "content", "faulty", "fault"),
    [
        ("empty.csv", "url,text\n0.mp4,a\n,b\n1.mp4,c\n", "empty.csv#line=3", "line 3: url is empty"),
        (
            "few.csv",
            "url,text\n0.mp4,a\n2.mp4\n1.mp4,c\n",
            "2.mp4",
            "line 3: it has 1 cells, but the first line has 2",
        ),
        ("many.csv", "url,text\n0.mp4,a\n2.mp4,b,c\n1.mp4,c\n", "2.mp4", "line 3: it has 3 cells"),
        ("many.tsv", "url\ttext\n0.mp4\ta\n2.mp4\tb\tc\n1.mp4\tc\n", "2.mp4", "a cell may hold no tab"),
        (
            "open.csv",
            'url,text\n0.mp4,a\n2.mp4,"start\n1.mp4,"c"\n',
            "open.csv#line=3",
            "line 3: its quotes do not match",
        ),
        (
            "last.csv",
            'url,text\n0.mp4,a\n1.mp4,"c"\n2.mp4,"start\n',
            "last.csv#line=4",
            "line 4: its quotes do not match",
        ),
        ("latin.csv", b"url,text\n0.mp4,a\n2.mp4,h\xe9\n1.mp4,c\n", "2.mp4", "line 3: text is not UTF-8; convert it"),
        (
            "half.jsonl",
            '{"url": "0.mp4", "text": "a"}\n{"url": "2.mp4", "text": "\\ud83d!"}\n{"url": "1.mp4", "text": "c"}\n',
            "2.mp4",
            r"line 2: text holds half a character (\ud83d)",
        ),
        (
            "half-name.jsonl",
            '{"url": "0.mp4", "text": "a"}\n{"url": "2\\ud83d.mp4", "text": "b"}\n{"url": "1.mp4", "text": "c"}\n',
            "half-name.jsonl#line=2",
            r"line 2: url holds half a character (\ud83d)",
        ),
        (
            "object.jsonl",
            '{"url": "0.mp4", "text": "a"}\n{"url": "2.mp4", "text": {"en": "b"}}\n{"url": "1.mp4", "text": "c"}\n',
            "2.mp4",
            "line 2: text is an object, not one value",
        ),
        (
            "broken.jsonl",
            '{"url": "0.mp4", "text": "a"}\n{"url"\n{"url": "1.mp4", "text": "c"}\n',
            "broken.jsonl#line=2",
            "line 2: it is not JSON",
        ),
        (
            "deep.jsonl",
            f'{{"url": "0.mp4", "text": "a"}}\n{"[" * 100_000}\n{{"url": "1.mp4", "text": "c"}}\n',
            "deep.jsonl#line=2",
            "line 2: it is not JSON",
        ),
        ("zero.csv", "url,text\n0.mp4,a\na\0b.mp4,b\n1.mp4,c\n", "zero.csv#line=3", "line 3: url holds a zero byte"),
        ("long.csv", f"url,text\n0.mp4,a\n{'n' * 300}.mp4,b\n1.mp4,c\n", f"{'n' * 300}.mp4", "File name too long"),
        ("scheme.csv", "url,text\n0.mp4,a\nno://x.mp4,b\n1.mp4,c\n", "no://x.mp4", "cannot open no://x.mp4"),
        ("host.csv", "url,text\n0.mp4,a\nhttp://[x/a.mp4,b\n1.mp4,c\n", "http://[x/a.mp4", "Invalid IPv6 URL"),
        (
            "null.parquet",
            pa.table({"url": ["0.mp4", None, "1.mp4"], "text": ["a", "b", "c"]}),
            "null.parquet#row=2",
            "row 2: url is empty",
        ),
    ],
)
def test_a_bad_row_costs_itself(
    tmp_path: Path, name: str, content: str | bytes | pa.Table, faulty: str, fault: str
) -> None:
    rows = listed(tmp_path, name, content)
    assert rows.pop(faulty).startswith("FAULT ")
    assert rows == {"0.mp4": "a", "1.mp4": "c"}
    assert fault in listed(tmp_path, name, content)[faulty]


def test_bytes_that_are_not_utf8_in_a_parquet_file_cost_their_row(tmp_path: Path) -> None:
    rows = listed(tmp_path, "a.parquet", pa.table({"url": ["0.mp4", "1.mp4"], "text": NOT_UTF8}))
    assert rows == {"0.mp4": "FAULT row 1: text is not UTF-8; convert it", "1.mp4": "b"}


def test_a_table_can_name_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4"), "wb") as file:
        file.write(video_bytes(1, 8))
    rows = listed(tmp_path, "a.csv", b"url,text\ncaf\xe9.mp4,a\n")
    assert rows == {"caf\\xe9.mp4": "a"}
    assert rows == listed(tmp_path, "a.parquet", pa.table({"url": [b"caf\xe9.mp4"], "text": ["a"]}))


def test_file_urls_are_percent_encoded_and_relative_names_are_not(tmp_path: Path) -> None:
    for name in ("sp ace.mp4", "per%20cent.mp4"):
        (tmp_path / name).write_bytes(video_bytes(len(name), 8))
    url = f"file://{tmp_path}/sp%20ace.mp4"
    assert listed(tmp_path, "a.csv", f"url,text\n{url},a\nper%20cent.mp4,b\n") == {url: "a", "per%20cent.mp4": "b"}


@given(rows=st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2), max_size=8))
def test_what_python_writes_as_csv_is_read_back(rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["a", "b"], *rows])
    found = list(read_rows(io.BytesIO(text.getvalue().encode()), ".csv"))
    assert [[*row.cells.values()] for row in found] == rows
    assert not any(row.fault for row in found)


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_no_bytes_end_the_reading(data: bytes, suffix: str) -> None:
    with suppress(UnreadableTable):  # two columns of one name
        for row in read_rows(io.BytesIO(b"a" + data), suffix):
            assert isinstance(row.cells, dict)


def test_columns_without_a_name_are_told_apart_by_their_places() -> None:
    (row,) = read_rows(io.BytesIO(b",url,,text\n7,0.mp4,x,y\n"), ".csv")
    assert row.cells == {"column 1": "7", "url": "0.mp4", "column 3": "x", "text": "y"}


def test_metadata_is_always_json(tmp_path: Path) -> None:
    write_videos(tmp_path, 2)
    columns = {"score": [float("nan"), 1.5], "ts": pa.array([10**15, 1000], pa.timestamp("ms")), "raw": [b"\xff", b"x"]}
    pq.write_table(pa.table({"url": ["0.mp4", "1.mp4"], **columns}), tmp_path / "a.parquet")
    found = shard_in_process(source_config(tmp_path, {"type": "table", "url": str(tmp_path / "a.parquet")}))
    metadata = {described["source"]: described["metadata"] for described in found.described("train")}
    assert metadata["0.mp4"] == {"score": None, "ts": metadata["0.mp4"]["ts"], "raw": "\ufffd"}
    assert metadata["1.mp4"] == {"score": 1.5, "ts": "1970-01-01 00:00:01", "raw": "x"}


# ------------------------------------------------------------------------------- spans and groups


@pytest.mark.parametrize(
    ("on_disk", "cell"),
    [
        (b"end .mp4 ", "end .mp4 "),
        (b"plain.mp4", " plain.mp4 "),
        (b"back\\xe9.mp4", "back\\xe9.mp4"),
        (b"byte\xe9.mp4", "byte\\xe9.mp4"),
        (b"new\nline\x1b.mp4", '"new\nline\x1b.mp4"'),
        (b"a:b.mp4", "a:b.mp4"),
    ],
)
def test_a_cell_finds_the_file_whatever_its_name_holds(tmp_path: Path, on_disk: bytes, cell: str) -> None:
    (good,) = write_videos(tmp_path, 1)
    os.rename(tmp_path / good, os.path.join(os.fsencode(tmp_path), on_disk))
    (tmp_path / "list.csv").write_text(f"url\n{cell}\n")
    (video,) = list_videos(SourceConfig.model_validate({"type": "table", "url": str(tmp_path / "list.csv")}))
    assert video.fault is None
    assert os.fsencode(storage.local_path(storage.resolve(str(tmp_path), video.name)).name) == on_disk


def test_whatever_is_wrong_with_a_row_is_its_own_fault(tmp_path: Path) -> None:
    write_videos(tmp_path, 4)
    deep = "[" * 600 + "]" * 600
    lines = [
        '{"url": "0.mp4"}',
        f'{{"url": "1.mp4", "deep": {deep}}}',
        '{"url": "2.mp4", "odd": [NaN, Infinity, {"a": -Infinity}]}',
        '{"url": {"a": 1}}',
        '{"url": "3.mp4", "text": 1%s}' % ("0" * 5000),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    videos = list(list_videos(SourceConfig.model_validate({"type": "table", "url": str(tmp_path / "list.jsonl")})))
    assert [video.fault is None for video in videos] == [True, False, True, False, False]
    assert "nested too deeply" in (videos[1].fault or "")
    assert videos[2].metadata == '{"odd": [null, null, {"a": null}]}'
