from __future__ import annotations

import hashlib
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.pipeline.generation import cut_units, make_plan
from clipmill.pipeline.plan import Plan, load_plan
from clipmill.pipeline.sources.record import EDGE_BYTES


def fill(source, names, sizes=None):
    for index, name in enumerate(names):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(name.encode()).digest() * (sizes[index] if sizes else 4))


def config_for(tmp_path, run="run", source="source", **data):
    data = {"source": {"url": str(tmp_path / source)}, "val_fraction": 0.3, "unit_bytes": 1000, **data}
    return RunConfig.model_validate({"root": str(tmp_path / run), "data": data})


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
    assert plans[0].document == plans[1].document
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
    file = tmp_path / "run" / "clips" / "plan" / "gen-0000.parquet"
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
    (tmp_path / "run" / "clips" / "plan" / "plan.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_plan(config)
    assert rows_of(make_plan(config)) == made


def test_the_columns_on_disk(tmp_path):
    fill(tmp_path / "source", ["a/one.mp4"])
    plan = make_plan(config_for(tmp_path))
    table = pq.read_table(tmp_path / "run" / "clips" / "plan" / "gen-0000.parquet")
    assert table.column_names == (
        ["split", "unit", "ordinal", "id", "url", "bytes", "etag", "label", "actions", "text", "member", "metadata"]
    )
    (row,) = table.to_pylist()
    assert row["url"] == "a/one.mp4"
    assert row["bytes"] == 128
    (generation,) = plan.document["generations"]
    assert generation["file"] == "gen-0000.parquet"
    assert generation["units"] == {row["split"]: 1, ({"train", "val"} - {row["split"]}).pop(): 0}


@given(
    sizes=st.lists(st.integers(0, 50), max_size=60),
    num_train=st.integers(0, 60),
    unit_bytes=st.integers(1, 120),
)
def test_units_are_consecutive_and_bounded(sizes, num_train, unit_bytes):
    is_val = np.arange(len(sizes)) >= num_train
    units, ordinals = cut_units(np.array(sizes, np.int64), is_val, unit_bytes)
    for in_val in (False, True):
        numbers, places = units[is_val == in_val].tolist(), ordinals[is_val == in_val].tolist()
        held = np.array(sizes)[is_val == in_val]
        assert sorted(set(numbers)) == list(range(len(set(numbers))))
        for number in set(numbers):
            rows = [row for row, unit in enumerate(numbers) if unit == number]
            assert rows == list(range(rows[0], rows[-1] + 1))
            assert [places[row] for row in rows] == list(range(len(rows)))
            assert held[rows].sum() <= unit_bytes or len(rows) == 1
            following = rows[-1] + 1
            if following < len(numbers):
                assert held[rows].sum() + held[following] > unit_bytes
