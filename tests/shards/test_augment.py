from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from clipmill.shards.augment import ClipAugmentation
from clipmill.shards.commits import commit_unit
from clipmill.shards.dataset import ShardDataset, decode_clip, train_batches
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze

CROP = (5, 6)
FRAMES = np.random.default_rng(0).integers(0, 255, (3, 8, 9, 3), np.uint8)


@pytest.fixture
def clips(tmp_path):
    writer = UnitWriter(tmp_path, "clips", 0, 2**14)
    random = np.random.default_rng(1)
    for number in range(30):
        frames = random.integers(0, 255, (2, 8, 8, 3), np.uint8)
        writer.add(Sample(f"clip{number}", {"npy": npy_bytes(frames), "json": json_bytes({"label": None})}))
    commit_unit(str(tmp_path / "clips"), 0, writer.finish(), {})
    return ShardDataset(freeze(str(tmp_path / "clips"), "clips", [0], {}, {}), decode_clip, tmp_path / "cache")


def take(clips, first_step, num_steps, **changes):
    arguments = {"micro_batch": None, "rank": 0, "world_size": 1, "num_workers": 0, **changes}
    order = clips.order(seed=3, global_batch=12, window=8)
    augment = ClipAugmentation(3, hflip=True, crop=CROP)
    batches = train_batches(clips, order, global_batch=12, first_step=first_step, augment=augment, **arguments)
    return list(itertools.islice(batches, num_steps))


def rows_of(steps):
    """(Key, pixels) of the rows that count, step by step."""
    rows = []
    for step in steps:
        each = [zip(batch["key"], batch["video"], batch["weight"].tolist(), strict=True) for batch in step]
        rows.append([(key, video) for key, video, weight in itertools.chain(*each) if weight])
    return rows


def assert_equal(one, other):
    for left, right in zip(one, other, strict=True):
        assert [key for key, _ in left] == [key for key, _ in right]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(left, right, strict=True))


def test_whatever_the_world_size_workers_and_resume_a_position_looks_the_same(clips):
    whole = rows_of(take(clips, 0, 6))
    assert whole[0][0][1].shape == (2, *CROP, 3)
    for world_size in (2, 3, 5):
        ranks = [
            rows_of(take(clips, 0, 6, rank=rank, world_size=world_size, micro_batch=2)) for rank in range(world_size)
        ]
        assert_equal([[row for rank in ranks for row in rank[step]] for step in range(6)], whole)
    assert_equal(rows_of(take(clips, 4, 2)), whole[4:])
    assert_equal(rows_of(take(clips, 0, 6, num_workers=1)), whole)
    seen = {}
    for key, video in itertools.chain(*whole):
        seen.setdefault(key, []).append(video)
    assert any(not torch.equal(views[0], views[1]) for views in seen.values())  # of two epochs


def windows(frames):
    height, width = CROP
    return {
        (top, left, mirrored): (frames[:, :, ::-1] if mirrored else frames)[:, top : top + height, left : left + width]
        for top in range(frames.shape[1] - height + 1)
        for left in range(frames.shape[2] - width + 1)
        for mirrored in (False, True)
    }


def test_every_place_and_both_sides_are_cut_about_equally_often():
    places = {window.tobytes(): place for place, window in windows(FRAMES).items()}
    augment = ClipAugmentation(7, hflip=True, crop=CROP)
    found = [places[augment({"video": FRAMES}, position)["video"].tobytes()] for position in range(4000)]
    times = np.array([found.count(place) for place in places.values()])
    assert len(times) == 4 * 4 * 2
    expected = 4000 / len(times)
    assert np.sum((times - expected) ** 2) / expected < 31 + 4 * np.sqrt(2 * 31)  # chi-squared


def test_one_without_the_other():
    sides = {
        ClipAugmentation(0, hflip=True, crop=None)({"video": FRAMES}, place)["video"].tobytes() for place in range(64)
    }
    assert sides == {FRAMES.tobytes(), FRAMES[:, :, ::-1].tobytes()}
    cuts = {place: window.tobytes() for place, window in windows(FRAMES).items() if not place[2]}
    augment = ClipAugmentation(0, hflip=False, crop=CROP)
    assert {augment({"video": FRAMES}, place)["video"].tobytes() for place in range(400)} == set(cuts.values())
    whole = ClipAugmentation(0, hflip=False, crop=(9, 7))
    frames = np.zeros((1, 9, 7, 3), np.uint8)
    assert whole({"video": frames, "label": "a"}, 5)["label"] == "a"
    assert whole({"video": frames}, 5)["video"].shape == frames.shape
