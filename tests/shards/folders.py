"""Small data sets of codes, written as the stages write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Part, Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest

COUNTS = [5, 0, 12, 3, 9]
"""Samples of each unit of the fixture ``manifest``."""
KEYS = [f"{unit:016x}_{clip:06d}" for unit, count in enumerate(COUNTS) for clip in range(count)]


def flip(path: Path) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def code_sample(video: int, clip: int) -> Sample:
    """Codes that begin with the numbers of video and clip."""
    codes = np.arange(12, dtype="<u2").reshape(3, 2, 2)
    codes[0, 0] = video, clip
    actions = np.full((3, 2), video, np.float32)
    members = {
        "json": json_bytes({"label": f"class{video % 2}" if video % 3 else None, "video": f"{video:016x}"}),
        "codes.npy": npy_bytes(codes),
        "actions.npy": npy_bytes(actions),
    }
    return Sample(f"{video:016x}_{clip:06d}", members)


def write_parts(folder: Path, unit: int, num_samples: int, shard_bytes: int = 2**20) -> list[Part]:
    folder.mkdir(parents=True, exist_ok=True)
    writer = UnitWriter(folder, "tokens", unit, shard_bytes)
    for clip in range(num_samples):
        writer.add(code_sample(unit, clip))
    return writer.finish()


def write_dataset(url: Path, scratch: Path, counts: list[int], shard_bytes: int = 2**20) -> Manifest:
    """A frozen data set with one unit for each count."""
    for unit, count in enumerate(counts):
        parts = write_parts(scratch / f"unit{unit}", unit, count, shard_bytes)
        commit_unit(str(url), unit, parts, {"exclusions": []})
    return freeze(str(url), "tokens", range(len(counts)), {"num_codes": 64, "latent_shape": (3, 2, 2)}, {"classes": []})
