"""Near-duplicates: copies are found, other clips are not, and one clip of each group stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from clipmill.cli.command import app
from clipmill.errors import UserError
from clipmill.pipeline.duplicates import LARGEST_DIFFERENCE, find_pairs, write_duplicates
from clipmill.shards.commits import commit_unit
from clipmill.shards.exclusions import exclude, read_exclusions
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest
from clipmill.shards.signatures import publish_signatures, signature_of
from clipmill.video.encode import decode_mp4, encode_mp4
from tests.shards.folders import write_parts

NUM_FRAMES = 16


def video_of(number: int) -> np.ndarray:
    """uint8 [32, 80, 80, 3]: blots that drift over a picture, other ones for every number."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:80, :80]
    ground = sum(
        random.uniform(20, 60) * np.sin(random.uniform(-0.2, 0.2) * x + random.uniform(-0.2, 0.2) * y) for _ in range(3)
    )
    place, speed = random.uniform(15, 65, (3, 2)), random.uniform(-1.2, 1.2, (3, 2))
    frames = []
    for frame in range(32):
        picture = 110 + ground
        for (down, across), height in zip(place + frame * speed, (90, -90, 70), strict=True):
            picture = picture + height * np.exp(-((y - down) ** 2 + (x - across) ** 2) / 60)
        frames.append(picture.clip(0, 255))
    return np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, axis=3)


def shrunk(video: np.ndarray) -> np.ndarray:
    """A square video at 40 x 40 pixels, by linear interpolation."""
    side = video.shape[1]
    places = (np.arange(40) + 0.5) / 40 * side - 0.5
    below = np.floor(places).astype(int).clip(0, side - 2)
    share = (places - below)[:, None, None]
    rows = video[:, below] * (1 - share) + video[:, below + 1] * share
    share = share[:, 0]
    return (rows[:, :, below] * (1 - share) + rows[:, :, below + 1] * share).round().astype(np.uint8)


WAYS = {
    "recoded": lambda video: decode_mp4(encode_mp4(shrunk(video)[:NUM_FRAMES], 10, 34)),
    "cropped": lambda video: shrunk(video[:, 3:79, 1:77])[:NUM_FRAMES],
    "trimmed": lambda video: shrunk(video)[7 : 7 + NUM_FRAMES],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_found_and_nothing_else(way: str) -> None:
    numbers = range(12)
    clips = [shrunk(video_of(number))[:NUM_FRAMES] for number in numbers]
    copies = [WAYS[way](video_of(number)) for number in numbers]
    grey = np.stack([signature_of(clip) for clip in (*clips, *copies)])
    pairs = find_pairs(grey, np.arange(len(grey)))
    assert {pair[:2] for pair in pairs} == {(number, number + 12) for number in numbers}
    assert all(pair.difference <= LARGEST_DIFFERENCE for pair in pairs)
    assert find_pairs(grey, np.tile(np.arange(12), 2)) == []  # clips of one video are no copies


def test_pictures_and_clips_without_any_contrast() -> None:
    grey = np.stack([signature_of(shrunk(video_of(number))[:1]) for number in (0, 1, 0)])
    assert [pair[:2] for pair in find_pairs(grey, np.arange(3))] == [(0, 2)]
    black = np.zeros((4, 5, 16, 16), np.uint8)
    assert len(find_pairs(black, np.arange(4))) == 6
    assert find_pairs(black[:1], np.arange(1)) == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Tokens of both splits, with signatures: 2 of train is a copy of 0 of val, and 1, 3 and 4 of train are alike."""
    for split, numbers in (("train", [5, 1, 0, 1, 1]), ("val", [0, 7])):
        url = str(tmp_path / "run" / "tokens" / split)
        parts = write_parts(tmp_path / split, 0, len(numbers))
        keys = [f"{index:015x}{split[0] == 'v':d}_000000" for index in range(len(numbers))]
        grey = [signature_of(shrunk(video_of(number))[:NUM_FRAMES]) for number in numbers]
        publish_signatures(url, 0, keys, grey)
        commit_unit(url, 0, parts, {"clips": [f"clips-000000-00-{split:a>8}.tar"]})
        freeze(url, "tokens", [0], {}, {"num_units": 1})
    return tmp_path / "run"


def test_one_of_each_group_stays_and_rather_that_of_val(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "duplicates.jsonl"
    result = CliRunner().invoke(app, ["inspect", str(root), "--duplicates", str(out)])
    assert "excluded: 3" in result.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((int(line["key"][:15]), line["key"][15], line["row"]) for line in lines) == [
        (2, "0", 2),
        (3, "0", 3),
        (4, "0", 4),
    ]
    assert {line["kept"][15] for line in lines if line["row"] == 2} == {"1"}
    tokens = {split: Manifest.load(str(root / "tokens" / split)) for split in ("train", "val")}
    left = {split: exclude(manifest, read_exclusions(str(out))) for split, manifest in tokens.items()}
    assert (left["train"].num_samples, left["val"].num_samples) == (2, 2)


def test_tokens_without_signatures_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "tokens" / "train" / "signatures" / "000000.npz").unlink()
    with pytest.raises(UserError, match=r"000000\.npz is missing"):
        write_duplicates([str(root / "tokens" / "train")], str(tmp_path / "out"))
    with pytest.raises(UserError, match="run `clipmill tokenize`"):
        write_duplicates([], str(tmp_path / "out"))
