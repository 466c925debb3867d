"""A folder of tiny videos in four classes, and three files that give no clips."""

from __future__ import annotations

import functools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipmill.config import RunConfig
from clipmill.lease import hold
from clipmill.pipeline import planning, shard
from clipmill.pipeline.plan import SOURCE_COLUMNS, Plan, load_plan
from clipmill.pipeline.sources import list_videos
from clipmill.video import encode_mp4

CLASSES = ("down", "left", "right", "up")
NUM_FRAMES = 4
"""Frames of a clip."""
RESOLUTION = 64


@functools.cache
def video_bytes(seed: int, num_frames: int) -> bytes:
    """An h264 file of a square that moves over a slope."""
    frames = np.empty((num_frames, 48, 64, 3), np.uint8)
    frames[:] = (np.arange(64)[:, None] * (1, 2, 3) + 40 + seed).clip(0, 255)
    for index in range(num_frames):
        left = (3 * index + 5 * seed) % 48
        frames[index, 10:26, left : left + 16] = (200, 30 + 2 * seed, 90)
    return encode_mp4(frames, fps=12.5, crf=20)


def num_clips_of(seed: int) -> int:
    """Clips in the video of a seed: 9 to 17 frames make two to four clips."""
    return (9 + 2 * (seed % 5)) // NUM_FRAMES


def write_corpus(source: Path, videos_per_class: int = 3, *, with_bad: bool = True) -> None:
    """Good videos, and a truncated one, a text named .mp4, and one shorter than a clip."""
    for number, name in enumerate(CLASSES * videos_per_class):
        path = source / name / f"{number:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video_bytes(number, 9 + 2 * (number % 5)))
    if with_bad:
        (source / "up" / "broken.mp4").write_bytes(video_bytes(77, 20)[:900])
        (source / "up" / "readme.mp4").write_text("this is no video\n" * 50)
        (source / "short.mp4").write_bytes(video_bytes(78, NUM_FRAMES - 1))


def run_config(root: Path, source: Path, /, num_workers: int = 1, **data: Any) -> RunConfig:
    """Several small units in each split."""
    clip = {"num_frames": NUM_FRAMES, "resolution": RESOLUTION}
    defaults = {"source": {"url": str(source)}, "clip": clip, "val_fraction": 0.3, "unit_bytes": 6000}
    return RunConfig.model_validate(
        {
            "root": str(root),
            "data": {**defaults, **data},
            "cluster": {"num_cpus": 2, "fanout_workers": num_workers, "max_failures": 1},
        }
    )


def listed(config: RunConfig) -> pa.Table:
    """All rows of the source's listing, with the columns of a plan."""
    columns = {name: [] for name in SOURCE_COLUMNS}
    for video in list_videos(config.data.source):
        for name in columns:
            columns[name].append(getattr(video, "name" if name == "url" else name))
    return pa.table(columns, pa.schema(SOURCE_COLUMNS))


def make_plan(config: RunConfig) -> Plan:
    """Plans what the source holds."""
    with hold(shard.folder_url(config), "shard") as lease:
        return planning.make_plan(config, lease)


def extend_plan(config: RunConfig) -> bool:
    """Plans what the source holds beyond the plan."""
    with hold(shard.folder_url(config), "shard") as lease:
        return planning.extend_plan(config, lease, load_plan(config))


def run_shard(config: RunConfig) -> dict[str, Any]:
    """The stage as `clipmill.stages` runs it."""
    with hold(shard.folder_url(config), "shard") as lease:
        return shard.run(config, lease)


def facts_of(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without speeds and times, which belong to one run and not to the data set."""
    return {name: value for name, value in summary.items() if not name.endswith(("_per_second", "_seconds"))}


def files_of(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Content by relative name, without what each attempt writes about itself."""
    not_hashed = ("_lease/", "status.json", "logs/", *but)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not str(path.relative_to(folder)).startswith(not_hashed)
    }


def members_of(config: RunConfig) -> dict[str, bytes]:
    """What a finished data set holds: the members of all samples, as ``split/video_clip.member``, each once."""
    found: dict[str, bytes] = {}
    for split in ("train", "val"):
        folder = Path(config.folder("clips", split))
        for name in (folder / "shards.txt").read_text().split():
            with tarfile.open(folder / name) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    assert f"{split}/{member.name}" not in found
                    found[f"{split}/{member.name}"] = content.read()
    return found
