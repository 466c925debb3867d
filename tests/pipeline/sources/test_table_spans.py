"""Tables whose rows are spans of files, or name the origin of a video."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.config import SourceConfig
from clipmill.pipeline.sources import list_videos
from tests.pipeline.corpus import make_plan, video_bytes
from tests.pipeline.sources.fixtures import shard_in_process, source_config, write_videos


def test_rows_can_be_spans_of_one_file_each_with_its_text(tmp_path: Path) -> None:
    (tmp_path / "talk.mp4").write_bytes(video_bytes(1, 50))  # 12.5 frames a second
    (tmp_path / "list.csv").write_text(
        "url,from,to,caption\n"
        "talk.mp4,0.8,2.4,second\n"
        "talk.mp4,,0.8,first\n"
        "talk.mp4,2.4,,rest\n"
        "talk.mp4,,,all\n"
        "talk.mp4,2,1,backwards\n"
        "talk.mp4,2,2,nothing\n"
        "talk.mp4,-1,2,early\n"
        "talk.mp4,nan,2,no number\n"
        "talk.mp4,1,inf,endless\n"
        "talk.mp4,0:01,2,a clock\n"
    )
    columns = {"start": "from", "end": "to", "text": "caption"}
    source = {"type": "table", "url": str(tmp_path / "list.csv"), "columns": columns}
    found = shard_in_process(source_config(tmp_path, source))
    clips = found.described("train")
    spans: dict[str, list[float]] = {}
    for described in clips:
        spans.setdefault(f"{described['source']} {described['text']}", []).append(described["start_seconds"])
    assert {name: pytest.approx(sorted(starts)) for name, starts in spans.items()} == {
        "talk.mp4#t=,0.8 first": [0.0, 0.32],
        "talk.mp4#t=0.8,2.4 second": [0.8, 1.12, 1.44, 1.76, 2.08],
        "talk.mp4#t=2.4 rest": [2.4, 2.72, 3.04, 3.36, 3.68],
        "talk.mp4 all": [0.32 * number for number in range(12)],
    }
    assert len({described["video"] for described in clips}) == 4
    causes = [
        video["cause"] for records in found.records.values() for record in records for video in record["exclusions"]
    ]
    assert sorted(causes) == [
        "line 10: to is 'inf'; it must be a number of seconds, at least 0",
        "line 11: from is '0:01'; it must be a number of seconds, at least 0",
        "line 6: the span ends at 1 s, before it begins at 2 s",
        "line 7: the span ends at 2 s, before it begins at 2 s",
        "line 8: from is '-1'; it must be a number of seconds, at least 0",
        "line 9: from is 'nan'; it must be a number of seconds, at least 0",
    ]


def test_numbers_of_any_kind_bound_a_span(tmp_path: Path) -> None:
    write_videos(tmp_path, 1)
    cells = pa.table({"url": ["0.mp4"] * 3, "s": pa.array([0, 1, None], pa.int8()), "e": [1.5, 2.0, float("nan")]})
    pq.write_table(cells, tmp_path / "a.parquet")
    columns = {"start": "s", "end": "e"}
    source = SourceConfig.model_validate({"type": "table", "url": str(tmp_path / "a.parquet"), "columns": columns})
    videos = list(list_videos(source))
    assert [(video.start_seconds, video.end_seconds) for video in videos] == [(0.0, 1.5), (1.0, 2.0), (None, None)]
    assert videos[2].fault == "row 3: e is 'nan'; it must be a number of seconds, at least 0"


def test_a_column_of_origins_keeps_them_in_one_split(tmp_path: Path) -> None:
    names = write_videos(tmp_path, 24)
    lines = [f"{name},take{number % 6}" for number, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["url,take", *lines]))
    source = {"type": "table", "url": str(tmp_path / "list.csv"), "columns": {"group": "take"}}
    plan = make_plan(source_config(tmp_path, source, val_fraction=0.4))
    takes = {
        split: {
            names.index(video.url) % 6
            for number in range(plan.num_units(split))
            for video in plan.unit(split, number).videos
        }
        for split in ("train", "val")
    }
    assert takes["train"] | takes["val"] == set(range(6))
    assert not takes["train"] & takes["val"]
    assert takes["val"]
