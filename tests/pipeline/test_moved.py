"""A corpus that moves between a disk and buckets, or is uploaded anew, is the same corpus."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipmill.config import RunConfig
from clipmill.pipeline.plan import load_plan
from clipmill.pipeline.sources.record import edges_sha256
from clipmill.shards.commits import commit_unit
from clipmill.shards.manifest import SPLITS
from tests.pipeline.corpus import extend_plan, make_plan, run_config
from tests.storage.s3_server import S3Server

NUM_VIDEOS = 12
VIDEO_BYTES = 3 * 2**16
"""Of all videos: every one is a candidate for every other."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    server.use(monkeypatch)
    yield server
    server.stop()


def content_of(number: int) -> bytes:
    return number.to_bytes(8) * (VIDEO_BYTES // 8)


def put_on_disk(folder: Path, numbers: range = range(NUM_VIDEOS)) -> str:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:02d}.mp4").write_bytes(content_of(number))
    return str(folder)


def put_in_bucket(
    bucket: S3Server, name: str, part_bytes: int | None = None, numbers: range = range(NUM_VIDEOS)
) -> str:
    for number in numbers:
        bucket.put(name, f"raw/{number:02d}.mp4", content_of(number), part_bytes)
    return f"s3://{name}/raw"


def splits_of(config: RunConfig) -> dict[str, set[str]]:
    plan = load_plan(config)
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        for number in range(plan.num_units(split)):
            for video in plan.unit(split, number).videos:
                splits.setdefault(video.url, set()).add(split)
    return splits


@pytest.mark.parametrize("number_of_new", [0, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("disk", "disk"),
        ("disk", "whole"),
        ("disk", "parts"),
        ("whole", "disk"),
        ("whole", "whole"),
        ("whole", "parts"),
        ("parts", "disk"),
        ("parts", "whole"),
        ("parts", "parts"),
    ],
)
def test_a_moved_corpus_is_planned_once(
    tmp_path: Path, bucket: S3Server, before: str, after: str, number_of_new: int
) -> None:
    def put(kind: str, name: str, part_bytes: int, numbers: range = range(NUM_VIDEOS)) -> str:
        if kind == "disk":
            return put_on_disk(tmp_path / name, numbers)
        return put_in_bucket(bucket, name, part_bytes if kind == "parts" else None, numbers)

    config = run_config(tmp_path / "run", Path(put(before, "one", 2**16)), val_fraction=0.4)
    config = moved(config, put(before, "one", 2**16))
    make_plan(config)
    planned = splits_of(config)
    config = moved(config, put(after, "two", 2**15, range(NUM_VIDEOS + number_of_new)))
    assert extend_plan(config) == (number_of_new > 0)
    now = splits_of(config)
    assert len(now) == NUM_VIDEOS + number_of_new
    assert planned.items() <= now.items()
    assert all(len(splits) == 1 for splits in now.values())


def moved(config: RunConfig, url: str) -> RunConfig:
    source = config.data.source.model_copy(update={"url": url})
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def test_growth_where_etags_are_md5s_costs_no_look(tmp_path: Path, bucket: S3Server) -> None:
    config = moved(run_config(tmp_path / "run", Path("x"), val_fraction=0.4), put_in_bucket(bucket, "one"))
    make_plan(config)
    put_in_bucket(bucket, "one", numbers=range(NUM_VIDEOS, NUM_VIDEOS + 5))
    bucket.requests.clear()
    assert extend_plan(config)
    assert bucket.requests == {"LIST": 1}
    assert len(splits_of(config)) == NUM_VIDEOS + 5


def test_what_workers_recorded_tells_files_that_are_gone(
    tmp_path: Path, bucket: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploaded in other parts, and the old objects were removed: only the commit records know their edges."""
    config = moved(run_config(tmp_path / "run", Path("x"), val_fraction=0.4), put_in_bucket(bucket, "one", 2**16))
    plan = make_plan(config)
    put_on_disk(tmp_path / "copy")
    for split in SPLITS:
        for number in range(plan.num_units(split)):
            videos = [
                {"id": video.id, "edges": edges_sha256(str(tmp_path / "copy" / video.url), video.bytes)}
                for video in plan.unit(split, number).videos
            ]
            commit_unit(config.folder("clips", split), number, [], {"videos": videos})
    planned = splits_of(config)
    del bucket.buckets["one"]
    config = moved(config, put_in_bucket(bucket, "two", 2**15))
    assert not extend_plan(config)
    for split in SPLITS:
        shutil.rmtree(Path(config.folder("clips", split), "commits"), ignore_errors=True)
    assert not extend_plan(config)  # rather none than one in both splits
    assert splits_of(config) == planned
    assert f"skipped {NUM_VIDEOS} videos, such as s3://two/raw/" in caplog.text


def test_one_content_uploaded_in_two_ways_is_one_video(tmp_path: Path, bucket: S3Server) -> None:
    put_in_bucket(bucket, "one")
    for number in range(NUM_VIDEOS):
        bucket.put("one", f"raw/again/{number:02d}.mp4", content_of(number), 2**16)
    config = moved(run_config(tmp_path / "run", Path("x"), val_fraction=0.4), "s3://one/raw")
    plan = make_plan(config)
    assert (plan.num_videos, plan.num_duplicates) == (NUM_VIDEOS, NUM_VIDEOS)
    assert not extend_plan(config)


def test_the_videos_of_a_moved_tar_are_planned_once(tmp_path: Path, bucket: S3Server) -> None:
    (tmp_path / "one").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "one" / f"{name}.tar", "w") as tar:
            for number in range(6):
                member = tarfile.TarInfo(f"{name}{number}.mp4")
                member.size = VIDEO_BYTES
                tar.addfile(member, io.BytesIO(content_of(number + 10 * ord(name))))
        bucket.put("two", f"raw/{name}.tar", (tmp_path / "one" / f"{name}.tar").read_bytes(), 2**18)
    source = {"type": "webdataset", "url": str(tmp_path / "one")}
    config = run_config(tmp_path / "run", Path("x"), val_fraction=0.4, source=source)
    assert make_plan(config).num_videos == 12
    assert not extend_plan(moved(config, "s3://two/raw"))


def test_spans_of_a_moved_film_stay_in_its_split(tmp_path: Path, bucket: S3Server) -> None:
    put_on_disk(tmp_path / "one")
    put_in_bucket(bucket, "two", 2**16)
    table, columns = tmp_path / "t.csv", {"start": "start", "end": "end"}

    def rows(base: str, spans: range) -> None:
        lines = [f"{base}/{n:02d}.mp4,{span},{span + 1}" for n in range(NUM_VIDEOS) for span in spans]
        table.write_text("\n".join(["url,start,end", *lines]))

    config = run_config(
        tmp_path / "run", table, val_fraction=0.4, source={"type": "table", "url": str(table), "columns": columns}
    )
    rows(str(tmp_path / "one"), range(2))
    make_plan(config)
    planned = {Path(url).name: splits for url, splits in splits_of(config).items()}
    rows("s3://two/raw", range(3))  # the same two of each, and one more
    assert extend_plan(config)
    plan = load_plan(config)
    assert plan.num_videos == 3 * NUM_VIDEOS
    for url, splits in splits_of(config).items():
        assert splits == planned[Path(url).name]
