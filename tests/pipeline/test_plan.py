from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.pipeline.plan import Plan, load_plan
from clipmill.pipeline.planning.units import UnitCutter, unit_goal
from clipmill.pipeline.sources.record import EDGE_BYTES, SourceVideo
from tests.pipeline.corpus import extend_plan, make_plan


def fill(source, names, sizes=None):
    for index, name in enumerate(names):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(name.encode()).digest() * (sizes[index] if sizes else 4))


def config_for(tmp_path, run="run", source="source", **data):
    data = {"source": {"url": str(tmp_path / source)}, "val_fraction": 0.3, "unit_bytes": 1000, **data}
    return RunConfig.model_validate({"root": str(tmp_path / run), "data": data})


def plan_file(tmp_path, ending, run="run"):
    (path,) = (tmp_path / run / "clips" / "plan").glob(f"gen-0000{ending}")
    return path


def rows_of(plan: Plan):
    return [
        (split, number, video)
        for split in ("train", "val")
        for number in range(plan.num_units(split))
        for video in plan.unit(split, number).videos
    ]


def test_the_plan_is_a_function_of_the_source(tmp_path):
    fill(tmp_path / "source", [f"class{index % 3}/{index}.mp4" for index in range(40)])
    plans = [make_plan(config_for(tmp_path, run)) for run in ("one", "two")]
    assert rows_of(plans[0]) == rows_of(plans[1])
    assert plans[0].generations == plans[1].generations
    rows = rows_of(plans[0])
    assert len({video.id for _, _, video in rows}) == plans[0].num_videos == 40
    assert {video.label for _, _, video in rows} == {"class0", "class1", "class2"}
    for split in ("train", "val"):
        ids = [video.id for in_split, _, video in rows if in_split == split]
        assert ids == sorted(ids)
        assert len(ids) > 3


def test_a_moved_and_renamed_corpus_is_the_same_corpus(tmp_path):
    fill(tmp_path / "source", [f"a/{index}.mp4" for index in range(12)])
    before = rows_of(make_plan(config_for(tmp_path)))
    os.rename(tmp_path / "source" / "a", tmp_path / "source" / "b")
    os.rename(tmp_path / "source", tmp_path / "elsewhere")
    after = rows_of(make_plan(config_for(tmp_path, "run2", "elsewhere")))
    assert [(split, unit, video.id) for split, unit, video in before] == [
        (split, unit, video.id) for split, unit, video in after
    ]


def test_additions_never_move_a_video_to_the_other_split(tmp_path):
    fill(tmp_path / "source", [f"{index}.mp4" for index in range(30)])
    before = {video.id: split for split, _, video in rows_of(make_plan(config_for(tmp_path)))}
    fill(tmp_path / "source", [f"new/{index}.mp4" for index in range(60)])
    after = {video.id: split for split, _, video in rows_of(make_plan(config_for(tmp_path, "run2")))}
    assert len(after) == 90
    assert before.items() <= after.items()


def test_a_larger_share_for_val_only_moves_videos_to_val(tmp_path):
    fill(tmp_path / "source", [f"{index}.mp4" for index in range(60)])
    small, large = (
        {video.id for split, _, video in rows_of(make_plan(config_for(tmp_path, f"run{share}", val_fraction=share)))
         if split == "val"}
        for share in (0.2, 0.5)
    )  # fmt: skip
    assert small < large


def test_repeated_files_count_as_duplicates(tmp_path):
    fill(tmp_path / "source", ["a/one.mp4", "two.mp4"])
    (tmp_path / "source" / "b.mp4").write_bytes((tmp_path / "source" / "a/one.mp4").read_bytes())
    plan = make_plan(config_for(tmp_path))
    assert plan.num_duplicates == 1
    assert {video.url for _, _, video in rows_of(plan)} == {"a/one.mp4", "two.mp4"}


def test_equal_edges_with_different_middles_are_different_videos(tmp_path):
    edge = bytes(EDGE_BYTES)
    source = tmp_path / "source"
    source.mkdir()
    for name, middle in [("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", b"3")]:
        (source / f"{name}.mp4").write_bytes(edge + middle + edge)
    rows = rows_of(make_plan(config_for(tmp_path)))
    assert {video.url for _, _, video in rows} == {"a.mp4", "b.mp4", "d.mp4"}
    assert len({video.id for _, _, video in rows}) == 3
    assert len({split for split, _, _ in rows}) == 1  # look-alikes must not leak into the other split
    by_content = {video.url: video.id for _, _, video in rows}
    os.rename(source / "d.mp4", source / "0.mp4")
    renamed = {video.url: video.id for _, _, video in rows_of(make_plan(config_for(tmp_path, "run2")))}
    assert renamed["0.mp4"] == by_content["d.mp4"]


def test_a_plan_is_resumed_without_its_source(tmp_path):
    fill(tmp_path / "source", [f"{index}.mp4" for index in range(5)])
    config = config_for(tmp_path)
    made = make_plan(config)
    fill(tmp_path / "source", ["later.mp4"])
    os.rename(tmp_path / "source", tmp_path / "gone")
    assert rows_of(load_plan(config)) == rows_of(made)


def test_changed_identity_keys_are_refused_by_name(tmp_path):
    fill(tmp_path / "source", ["one.mp4"])
    make_plan(config_for(tmp_path))
    changed = config_for(tmp_path, crf=30, clip={"num_frames": 8})
    with pytest.raises(UserError, match=r"data\.clip\.num_frames \(16 -> 8\); data\.crf \(16 -> 30\)"):
        load_plan(changed)
    load_plan(config_for(tmp_path, source="elsewhere", max_failed_videos=99))  # free keys


def test_a_damaged_plan_is_refused(tmp_path):
    fill(tmp_path / "source", ["one.mp4"])
    config = config_for(tmp_path)
    make_plan(config)
    file = plan_file(tmp_path, "-*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_plan(config)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_plan(config)


def test_an_interrupted_plan_is_made_again(tmp_path):
    fill(tmp_path / "source", ["one.mp4", "two.mp4"])
    config = config_for(tmp_path)
    made = rows_of(make_plan(config))
    plan_file(tmp_path, ".json").unlink()
    with pytest.raises(FileNotFoundError):
        load_plan(config)
    assert rows_of(make_plan(config)) == made


def test_the_columns_on_disk(tmp_path):
    fill(tmp_path / "source", ["a/one.mp4"])
    plan = make_plan(config_for(tmp_path))
    table = pq.read_table(plan_file(tmp_path, "-*.parquet"))
    assert table.column_names == [
        *("split", "unit", "ordinal", "id", "url", "bytes", "etag", "label", "actions", "text", "member", "metadata"),
        *("start_seconds", "end_seconds", "sidecars", "fault", "file"),
    ]
    (row,) = table.to_pylist()
    assert row["url"] == "a/one.mp4"
    assert row["bytes"] == 128
    (generation,) = plan.generations
    assert (
        generation["file"] == f"gen-0000-{generation['sha256'][:8]}.parquet" == plan_file(tmp_path, "-*.parquet").name
    )
    assert generation["units"] == {row["split"]: 1, ({"train", "val"} - {row["split"]}).pop(): 0}


# ----------------------------------------------------------------------------------------------- units


def units_of(sizes, outputs, is_val, unit_bytes, shard_bytes, batch=7):
    """Both splits, cut batch by batch."""
    sizes, outputs, is_val = np.array(sizes, np.int64), np.array(outputs, float), np.array(is_val, bool)
    goal = unit_goal(outputs.sum(), shard_bytes)
    units, ordinals = np.empty(len(sizes), np.int32), np.empty(len(sizes), np.int32)
    for split in (False, True):
        rows = np.flatnonzero(is_val == split)
        cutter = UnitCutter(outputs[rows].sum(), goal, unit_bytes)
        for first in range(0, len(rows), batch):
            some = rows[first : first + batch]
            units[some], ordinals[some] = cutter.cut(sizes[some], outputs[some])
        assert cutter.num_units == units[rows].max(initial=-1) + 1
    return units, ordinals


@given(
    sizes=st.lists(st.integers(0, 50), max_size=60),
    num_train=st.integers(0, 60),
    unit_bytes=st.integers(1, 120),
    bytes_per_byte=st.sampled_from([0.0, 1e-3, 1.0, 1e6, 1e7]),
)
def test_units_are_consecutive_and_bounded(sizes, num_train, unit_bytes, bytes_per_byte):
    is_val = np.arange(len(sizes)) >= num_train
    outputs = np.array(sizes) * bytes_per_byte
    units, ordinals = units_of(sizes, outputs, is_val, unit_bytes, 2**20)
    for in_val in (False, True):
        numbers, places = units[is_val == in_val].tolist(), ordinals[is_val == in_val].tolist()
        held = np.array(sizes)[is_val == in_val]
        assert sorted(set(numbers)) == list(range(len(set(numbers))))
        for number in set(numbers):
            rows = [row for row, unit in enumerate(numbers) if unit == number]
            assert rows == list(range(rows[0], rows[-1] + 1))
            assert [places[row] for row in rows] == list(range(len(rows)))
            assert held[rows].sum() <= unit_bytes or len(rows) == 1


@given(seed=st.integers(0, 2**32), num_videos=st.integers(400, 2000), share_of_val=st.floats(0, 0.5))
@settings(max_examples=50)
def test_units_of_each_split_make_equal_shares_near_shard_bytes(seed, num_videos, share_of_val):
    shard_bytes = 16 * 2**20
    outputs = np.random.default_rng(seed).exponential(2**19, num_videos).clip(max=2**21)
    is_val = np.arange(len(outputs)) >= len(outputs) * (1 - share_of_val)
    units, _ = units_of(np.zeros(len(outputs)), outputs, is_val, 1, shard_bytes)
    goal = min(shard_bytes, max(2**20, outputs.sum() / 4))
    for split in (False, True):
        made = np.bincount(units[is_val == split], outputs[is_val == split])
        if made.sum() < goal:
            assert len(made) <= 1
            continue
        assert made.max() - made.min() <= 2 * outputs.max()
        assert 0.6 * goal <= made.mean() <= 1.5 * goal


def test_a_small_data_set_is_shared_by_a_few_workers():
    outputs = np.full(200, 2**14)  # 3 MiB in all
    units, _ = units_of(np.ones(200), outputs, np.arange(200) >= 180, 2**40, 128 * 2**20)
    assert (units[:180].max() + 1, units[180:].max() + 1) == (3, 1)
    units, _ = units_of(np.ones(200), outputs * 10, np.arange(200) >= 180, 2**40, 128 * 2**20)
    assert (units[:180].max() + 1, units[180:].max() + 1) == (4, 1)


def test_videos_that_make_nothing_have_no_unit_of_their_own():
    units, _ = units_of([1, 0, 1, 0, 0], [9.0, 0.0, 9.0, 0.0, 0.0], [False] * 5, 2**40, 2**20)
    assert units.tolist() == [0] * 5


def test_a_unit_holds_no_more_videos_than_can_be_done_again():
    units, ordinals = units_of(np.zeros(25_000), np.zeros(25_000), np.zeros(25_000, bool), 1, 1)
    assert np.bincount(units).tolist() == [10_000, 10_000, 5_000]
    assert ordinals.max() == 9_999


def test_the_spans_of_a_file_count_as_one_reading_of_it(tmp_path, monkeypatch):
    spans = [span for name in "abc" for span in spans_of(f"s3://b/{name}.mp4", name, 5)]
    listed(monkeypatch, spans)
    plan = make_plan(config_for(tmp_path, val_fraction=0.0, unit_bytes=20))
    units = [plan.unit("train", number).videos for number in range(plan.num_units("train"))]
    assert [len(videos) for videos in units] == [10, 5]
    assert [len({video.url for video in videos}) for videos in units] == [2, 1]


# ------------------------------------------------------------------------------------ spans and groups


def listed(monkeypatch, videos):
    """The plan's listing is these videos, objects that were put whole, whatever the source's type."""
    videos = [replace(video, etag=hashlib.md5(video.etag.encode()).hexdigest()) for video in videos]
    monkeypatch.setattr("clipmill.pipeline.planning.listing.list_videos", lambda *_: iter(videos))


def splits_of(plan):
    return {video.name: split for split, _, video in rows_of(plan)}


def spans_of(name, etag, count, **keys):
    """``count`` spans of two seconds, one after the other."""
    return [SourceVideo(name, 10, etag, start_seconds=2.0 * i, end_seconds=2.0 * i + 2, **keys) for i in range(count)]


def test_a_span_is_a_video_of_its_own_and_named_as_a_media_fragment(tmp_path, monkeypatch):
    spans = [
        SourceVideo("s3://b/a.mp4", 10, "tag", start_seconds=1.5, end_seconds=3.0),
        SourceVideo("s3://b/a.mp4", 10, "tag", start_seconds=1e-7, text="again"),
        SourceVideo("s3://b/a.mp4", 10, "tag", end_seconds=20.0),
        SourceVideo("s3://b/a.mp4", 10, "tag", end_seconds=20.0, text="the same"),
        SourceVideo("s3://b/a.mp4", 10, "tag"),
        SourceVideo("s3://b/a.tar", 10, "tag", member="x", start_seconds=4.0, identity="x"),
    ]
    listed(monkeypatch, spans)
    plan = make_plan(config_for(tmp_path))
    videos = {video.name: video for _, _, video in rows_of(plan)}
    assert videos.keys() == {
        "s3://b/a.mp4",
        "s3://b/a.mp4#t=1.5,3",
        "s3://b/a.mp4#t=0.0000001",
        "s3://b/a.mp4#t=,20",
        "s3://b/a.tar#x&t=4",
    }
    assert plan.num_duplicates == 1
    assert len({video.id for video in videos.values()}) == 5
    assert videos["s3://b/a.mp4#t=1.5,3"].span == (1.5, 3.0)
    assert videos["s3://b/a.mp4#t=,20"].span == (None, 20.0)
    assert videos["s3://b/a.mp4"].span == (None, None)
    assert videos["s3://b/a.mp4#t=,20"].text is None  # of equal rows the first counts


def test_spans_of_one_file_are_in_one_split_which_is_that_of_the_whole_file(tmp_path, monkeypatch):
    files = [(f"s3://b/{number}.mp4", f"tag{number}") for number in range(30)]
    listed(monkeypatch, [span for name, etag in files for span in spans_of(name, etag, 4)])
    splits = splits_of(make_plan(config_for(tmp_path)))
    listed(monkeypatch, [SourceVideo(name, 10, etag) for name, etag in files])
    whole = splits_of(make_plan(config_for(tmp_path, "run2")))
    assert len(splits) == 120
    assert {(name.split("#")[0], split) for name, split in splits.items()} == set(whole.items())
    assert set(whole.values()) == {"train", "val"}


def test_an_extension_keeps_groups_together(tmp_path, monkeypatch):
    first = [SourceVideo(f"s3://b/{i}.mp4", 10, f"tag{i}", group=f"take{i % 20}") for i in range(40)]
    more = [SourceVideo(f"s3://b/{i}.mp4", 10, f"tag{i}", group=f"take{i % 20}") for i in range(40, 80)]
    config = config_for(tmp_path)
    listed(monkeypatch, first)
    make_plan(config)
    listed(monkeypatch, [*more, *first])
    assert extend_plan(config)
    splits = splits_of(load_plan(config))
    assert len(splits) == 80
    by_take = {}
    for name, split in splits.items():
        by_take.setdefault(int(name[7:-4]) % 20, set()).add(split)
    assert {len(found) for found in by_take.values()} == {1}
    assert set.union(*by_take.values()) == {"train", "val"}


def test_a_split_that_the_source_gives_one_video_holds_for_its_group(tmp_path, monkeypatch):
    groups = [spans_of(f"s3://b/{i}.mp4", f"tag{i}", 3) for i in range(20)]
    given = [[spans[0], replace(spans[1], split="val"), spans[2]] for spans in groups]
    listed(
        monkeypatch, [*(span for spans in given for span in spans), SourceVideo("s3://b/x.mp4", 1, "x", split="train")]
    )
    splits = splits_of(make_plan(config_for(tmp_path)))
    assert splits.pop("s3://b/x.mp4") == "train"
    assert set(splits.values()) == {"val"}


def test_a_group_in_two_splits_is_the_users_mistake(tmp_path, monkeypatch):
    videos = [
        SourceVideo("s3://b/a.mp4", 10, "a", group="one", split="train"),
        SourceVideo("s3://b/b.mp4", 10, "b", split="val"),
        SourceVideo("s3://b/c.mp4", 10, "c", group="one", split="val"),
    ]
    listed(monkeypatch, videos)
    with pytest.raises(
        UserError, match=r"a\.mp4 and s3://b/c\.mp4 belong to one group, .* into train and the second into val"
    ):
        make_plan(config_for(tmp_path))
    assert not (tmp_path / "run" / "clips" / "plan").exists()


def test_a_plan_of_an_earlier_schema_is_refused(tmp_path):
    fill(tmp_path / "source", ["one.mp4"])
    config = config_for(tmp_path)
    make_plan(config)
    path = plan_file(tmp_path, ".json")
    for earlier in (path, path.with_name("plan.json")):  # the plan was one document up to schema 2
        path.rename(earlier)
        earlier.write_text(earlier.read_text().replace('"schema": 3', '"schema": 2'))
        with pytest.raises(UserError, match="planned by an earlier clipmill; choose another root"):
            load_plan(config)
