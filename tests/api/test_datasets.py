from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import clipmill
from clipmill import UserError
from tests.evaluation.toy_run import CLASSES, HEIGHT, WIDTH, clip_pixels


def test_clips_tokens_and_samples_are_map_style(run_root: Path):
    clips = clipmill.open_dataset(str(run_root), split="val")
    assert (len(clips), clips.kind, clips.classes) == (7, "clips", CLASSES)
    assert np.array_equal(clips[2]["video"].numpy(), clip_pixels("val", 2))
    assert clips[-1]["key"] == clips[6]["key"]
    clips[0]["video"].zero_()  # a copy: the shard stays as it is
    assert np.array_equal(clips[0]["video"].numpy(), clip_pixels("val", 0))
    with pytest.raises(IndexError):
        clips[7]
    tokens = clipmill.open_dataset(str(run_root / "tokens" / "train"))
    assert (tokens[0]["codes"].dtype, tokens[0]["codes"].shape, tokens[0]["label"]) == (torch.int64, (2, 3, 4), "down")
    samples = clipmill.open_dataset(str(run_root), "samples")
    assert samples[4]["video"].shape == (8, HEIGHT, WIDTH, 3)
    assert samples[4]["codes"].shape == (2, 3, 4)
    batch = next(iter(torch.utils.data.DataLoader(tokens, batch_size=3, num_workers=2)))
    assert batch["codes"].shape == (3, 2, 3, 4)


def test_one_integer_resumes_a_loader(run_root: Path):
    clips = clipmill.open_dataset(str(run_root))
    loader = clips.loader(4, seed=3)
    keys = [next(loader)["key"] for _ in range(5)]
    assert loader.state == 5
    assert len({key for batch in keys[:2] for key in batch}) == 8  # of nine clips none comes twice yet
    assert [next(clips.loader(4, seed=3, state=state))["key"] for state in range(5)] == keys
    parts = [next(clips.loader(4, seed=3, state=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [key for part in parts for key in part["key"]] == keys[2]
    assert next(clips.loader(4, seed=4))["key"] != keys[0]


def test_what_is_no_data_set_is_one_line(run_root: Path, tmp_path: Path):
    for call, message in (
        (lambda: clipmill.open_dataset(str(tmp_path)), "there is no data set at .*, and no clips/train below it"),
        (lambda: clipmill.open_dataset(str(run_root), "samples", "other"), "no samples/other below it"),
        (lambda: clipmill.open_dataset(str(run_root)).loader(0), "batch_size=0.* must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            call()
