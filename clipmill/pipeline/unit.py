"""The worker of the stage ``shard``: turns one unit of the plan into clip shards and a commit record.

A video gives all of its clips or none. A bad video (or one whose actions do not fit) is excluded with its cause. A
failure of the environment raises, so that the unit stays uncommitted and is tried again. The bytes of a unit depend
only on the plan, the versions of the codecs and the CPU's instruction class; all are recorded.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmill.config import RunConfig
from clipmill.lease import Lease
from clipmill.pipeline.ahead import FetchAhead, Fetched, fetch_pool
from clipmill.pipeline.budget import Allowance
from clipmill.pipeline.clips import make_samples
from clipmill.pipeline.digest import digest
from clipmill.pipeline.fetch import ExcludedVideo
from clipmill.pipeline.plan import Unit
from clipmill.pipeline.restore import LostUnit, restore
from clipmill.pipeline.samples import SampleBuffer
from clipmill.pipeline.uploads import Uploads
from clipmill.pipeline.versions import versions
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import UnitWriter
from clipmill.video import Decoder, Limits, decord_version

__all__ = ["make_worker"]

_PIXEL_SUMS = ("num_values", "pixel_sum", "pixel_square_sum")
_ENCODING_SUMS = ("num_measured_clips", "num_measured_values", "squared_error")


def make_worker(config: RunConfig, lease: Lease, allowance: Allowance) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor. The returned function reuses one decoding child for all units."""
    data = config.data
    if data.decoder == "decord":
        decord_version()  # raises if it is not installed, before any video is excluded for it
    decoder = Decoder(Limits(data.cpu_seconds_per_video, data.memory_bytes_per_video, data.no_progress_seconds))
    return functools.partial(_shard_unit, config, lease, allowance, decoder, fetch_pool(data))


@dataclass
class _UnitResult:
    """The results of the videos of a unit so far."""

    videos: list[dict[str, Any]] = field(default_factory=list)
    exclusions: list[dict[str, Any]] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)

    def body(self, split: str, decoder: str) -> dict[str, Any]:
        """The commit record, without the shards."""
        return {
            "split": split,
            "videos": self.videos,
            "exclusions": self.exclusions,
            "num_short": sum(video["short"] for video in self.videos),
            "pixels": {name: self.sums[name] for name in _PIXEL_SUMS},
            "encoding": {name: self.sums[name] for name in _ENCODING_SUMS},
            "versions": versions(decoder),
        }


def _shard_unit(
    config: RunConfig, lease: Lease, allowance: Allowance, decoder: Decoder, pool: ThreadPoolExecutor, unit: Unit
) -> dict[str, Any]:
    """Decodes, packs and commits one unit, or restores a damaged one.

    Returns:
        The unit's `digest`. If its failures exceed the allowance, which points to a common cause, nothing is committed
        and only ``exclusions`` and ``tried`` are returned. For a `LostUnit` see `restore`.
    """
    is_restored = isinstance(unit, LostUnit)
    result, url = _UnitResult(), config.folder("clips", unit.split)
    with ScratchFolder("shard") as folder:
        copies, finished = folder / "copies", folder / "finished"
        copies.mkdir()
        finished.mkdir()
        writer = UnitWriter(finished, "clips", unit.number, config.data.shard_bytes)
        with FetchAhead(pool, config.data, unit.videos, copies) as ahead, Uploads(url, lease) as uploads:
            for index, video in enumerate(unit.videos):
                try:
                    _shard_video(config, decoder, ahead.take(index), writer, result, copies)
                except ExcludedVideo as excluded:
                    result.exclusions.append({"id": video.id, "url": video.name, **excluded.document})
                    num_failed = len(result.exclusions)
                    if not is_restored and allowance.is_exceeded(config.data, unit, index + 1, num_failed):
                        return {"exclusions": result.exclusions, "tried": index + 1}
                ahead.release(index)
                if not is_restored:
                    uploads.begin(writer.closed)
            parts, body = writer.finish(), result.body(unit.split, config.data.decoder)
            if isinstance(unit, LostUnit):
                lease.check()
                return restore(url, unit, parts, body)
            uploads.begin(parts)
            uploads.wait()
        lease.check()
        record = commit_unit(url, unit.number, parts, body, are_published=True)
        return digest(record) | {"work": _work(record)}


def _work(record: dict[str, Any]) -> dict[str, int]:
    """What the unit took and made, for metrics."""
    return {
        "clips": sum(video["clips"] for video in record["videos"]),
        "frames": sum(video["num_frames"] for video in record["videos"]),
        "bytes": sum(part["bytes"] for part in record["parts"]),
    }


def _shard_video(
    config: RunConfig, decoder: Decoder, fetched: Fetched, writer: UnitWriter, result: _UnitResult, scratch: Path
) -> None:
    """Adds all clips of a video to a unit, or none.

    Raises:
        ExcludedVideo: the video, its actions or its sidecars are bad.
        OSError, DecoderLost, MemoryError: the environment failed.
    """
    with SampleBuffer() as samples:
        entry, sums = make_samples(config, fetched, decoder, samples, scratch)
        for sample in samples:
            writer.add(sample)
    result.videos.append(entry)
    result.sums.update(sums)
