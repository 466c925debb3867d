"""One unit of the plan becomes clip shards and a commit record: what a worker of the stage ``shard`` does.

A video gives all of its clips or none. A bad video (or one whose actions do not fit) is excluded with its
cause; a failure of the environment raises, so that the unit stays uncommitted and is tried again. The bytes
of a unit depend on the plan, the versions of the codecs and the CPU's instruction class only, all recorded.
"""

from __future__ import annotations

import functools
import platform
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import clipmill
from clipmill.config import DataConfig, RunConfig
from clipmill.lease import Lease
from clipmill.pipeline.blame import blame, scrub
from clipmill.pipeline.digest import digest
from clipmill.pipeline.fetch import ExcludedVideo, LocalVideo, fetch_video
from clipmill.pipeline.pairing import rows_of
from clipmill.pipeline.plan import PlannedVideo, Unit
from clipmill.pipeline.samples import HeldSamples, clip_sample
from clipmill.pipeline.sidecars import read_sidecars
from clipmill.pipeline.sources.many import KeptFiles
from clipmill.pipeline.sources.record import edges_sha256
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import UnitWriter
from clipmill.shards.manifest import commit_unit
from clipmill.video import BadVideo, Decoder, Limits, Outcome, decord_version

__all__ = ["FIRST_VIDEOS", "Allowance", "allowed_failures", "make_worker"]

FIRST_VIDEOS = 20
"""When the videos of this many files of a new source fail from the start and none succeeds, the fault is not theirs."""


def allowed_failures(data: DataConfig, num_finished: int) -> int:
    """The budget: how many of the videos that are finished may have failed."""
    return max(data.max_failed_videos, int(data.max_failed_share * num_finished))


@dataclass(frozen=True)
class Allowance:
    """What a unit may lose before its worker gives it up.

    Attributes:
        num_videos: failed videos that the budget allows in the whole plan.
        is_new: nothing of this source has succeeded yet.
    """

    num_videos: int
    is_new: bool

    def is_exceeded(self, data: DataConfig, unit: Unit, num_tried: int, num_failed: int) -> bool:
        """Whether the failures of a unit are hardly the fault of its videos."""
        if num_failed > self.num_videos:
            return True
        if not self.is_new or num_failed < num_tried or num_failed <= allowed_failures(data, num_tried):
            return False
        return len({video.url for video in unit.videos[:num_tried]}) >= FIRST_VIDEOS


def make_worker(config: RunConfig, lease: Lease, allowance: Allowance) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor; the function that it returns keeps one decoding child from unit to unit."""
    data = config.data
    if data.decoder == "decord":
        decord_version()  # raises where it is not installed, which is no fault of the videos
    decoder = Decoder(Limits(data.cpu_seconds_per_video, data.memory_bytes_per_video, data.no_progress_seconds))
    return functools.partial(_shard_unit, config, lease, allowance, decoder)


def _shard_unit(config: RunConfig, lease: Lease, allowance: Allowance, decoder: Decoder, unit: Unit) -> dict[str, Any]:
    """Decodes, packs and commits one unit.

    Returns:
        The unit's `digest`. Where its failures exceed the allowance nothing is committed, since the fault is
        then hardly the videos': only ``exclusions`` and ``tried`` are returned.
    """
    videos: list[dict[str, Any]] = []
    exclusions: list[dict[str, Any]] = []
    sums: Counter[str] = Counter()
    with ScratchFolder("shard") as folder:
        finished, kept = folder / "finished", KeptFiles(folder / "kept")
        finished.mkdir()
        writer = UnitWriter(finished, "clips", unit.number, config.data.shard_bytes)
        for tried, video in enumerate(unit.videos, start=1):
            try:
                with tempfile.TemporaryDirectory(dir=folder) as copies, HeldSamples() as samples:
                    entry, sums_of_video = _make_samples(config, video, decoder, samples, Path(copies), kept)
                    for sample in samples:
                        writer.add(sample)
                    videos.append(entry)
                    sums.update(sums_of_video)
            except ExcludedVideo as excluded:
                exclusions.append({"id": video.id, "url": video.name, **excluded.document})
                if allowance.is_exceeded(config.data, unit, tried, len(exclusions)):
                    return {"exclusions": exclusions, "tried": tried}
        body = {
            "split": unit.split,
            "videos": videos,
            "exclusions": exclusions,
            "num_short": sum(video["short"] for video in videos),
            "pixels": {name: sums[name] for name in _PIXEL_SUMS},
            "encoding": {name: sums[name] for name in _ENCODING_SUMS},
            "versions": _versions(config.data.decoder),
        }
        parts = writer.finish()
        lease.check()
        url = config.folder("clips", unit.split)
        return digest(commit_unit(url, unit.number, parts, body))


_PIXEL_SUMS = ("num_values", "pixel_sum", "pixel_square_sum")
_ENCODING_SUMS = ("num_measured_clips", "num_measured_values", "squared_error")


def _make_samples(
    config: RunConfig, video: PlannedVideo, decoder: Decoder, samples: HeldSamples, copies: Path, kept: KeptFiles
) -> tuple[dict[str, Any], Counter[str]]:
    """Makes all samples of a video.

    Args:
        config: of the run.
        video: which video.
        decoder: of this worker.
        samples: empty; takes them.
        copies: for files of this video alone.
        kept: local copies that the next videos may need too.

    Returns:
        Its entry in the commit record, and what its clips add to the sums over the unit.

    Raises:
        ExcludedVideo: the video, or something that comes with it, is bad.
        OSError, DecoderLost, MemoryError: the environment failed.
    """
    scratch = copies.parent
    with blame("fetch", video.name, scratch):
        fetched = fetch_video(config.data, video, copies, kept)
    with blame("sidecar", video.name, scratch):
        video = read_sidecars(config.data, video)
    with blame("decode", video.name, scratch):
        sums = _decode(config, video, fetched, decoder, samples, scratch)
    entry = _entry(video, _finished(decoder), has_actions=fetched.actions is not None)
    return {**entry, "edges": _edges(video, fetched)}, sums


def _decode(
    config: RunConfig,
    video: PlannedVideo,
    fetched: LocalVideo,
    decoder: Decoder,
    samples: HeldSamples,
    scratch: Path,
) -> Counter[str]:
    """Decodes a video and packs its clips; the sums over them."""
    data, actions = config.data, fetched.actions
    sums: Counter[str] = Counter()
    encode, key = (data.format, data.quality), f"{config.seed}:{video.id}"
    try:
        for clip in decoder.clips(fetched.path, data.clip, data.decoder, encode=encode, key=key, span=video.span):
            if actions is not None and clip.ordinal == 0 and fetched.action_seconds is None:
                _check_rows(len(actions), _finished(decoder).num_needed_frames)
            with blame("pack", video.name, scratch):
                rows = None if actions is None else rows_of(clip, fetched, video.start_seconds or 0.0)
                samples.add(clip_sample(data, video, clip, rows))
            sums.update(num_values=clip.num_values, pixel_sum=clip.pixel_sum, pixel_square_sum=clip.pixel_square_sum)
            if clip.squared_error is not None:
                sums.update(num_measured_clips=1, num_measured_values=clip.num_values, squared_error=clip.squared_error)
    except BadVideo as bad:
        clean = functools.partial(scrub, path=fetched.path, name=video.name)
        attempts = [clean(attempt) for attempt in bad.attempts]
        raise ExcludedVideo("decode", clean(bad.cause), attempts, clean(bad.stderr_tail)) from bad
    return sums


def _edges(video: PlannedVideo, fetched: LocalVideo) -> str | None:
    """What recognizes a file of a bucket that is moved or uploaded anew; on a disk the identity holds it already."""
    if video.etag is None or video.member is not None:
        return None
    return edges_sha256(str(fetched.path), fetched.path.stat().st_size)


def _entry(video: PlannedVideo, outcome: Outcome, has_actions: bool) -> dict[str, Any]:
    """What the commit record says of a video that is not excluded."""
    return {
        "id": video.id,
        "url": video.name,
        "label": video.label,
        "clips": outcome.num_clips,
        "short": outcome.short,
        "static": outcome.num_static,
        "black": outcome.num_black,
        "truncated": outcome.truncated,
        "filtered": outcome.filtered,
        "damaged_frames": outcome.damaged_frames,
        "joins": outcome.joins,
        "actions": has_actions,
        "num_frames": outcome.num_frames,
        "info": asdict(outcome.info),
    }


def _check_rows(num_rows: int, num_frames: int) -> None:
    if num_rows < num_frames:
        raise ExcludedVideo("actions", f"{num_rows} rows of actions for clips of {num_frames} frames")


def _finished(decoder: Decoder) -> Outcome:
    """The outcome, known from a video's first clip on: a video is decoded to its end before it yields."""
    assert decoder.outcome is not None
    return decoder.outcome


@functools.cache
def _versions(decoder: str) -> dict[str, str]:
    """What the bytes of a unit depend on beside the plan."""
    return {
        "clipmill": clipmill.__version__,
        "av": metadata.version("av"),  # its wheel holds FFmpeg and libx264
        **(decord_version() if decoder == "decord" else {}),
        "pillow": metadata.version("pillow"),  # its wheel holds libjpeg-turbo
        "cpu": f"{platform.machine()} {_vector_instructions()}",
    }


def _vector_instructions() -> str:
    """The widest vector instructions: libx264 and swscale choose their code, and so their rounding, by them."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    return next((name for name in ("avx512f", "avx2", "avx", "sse4_2", "sve", "asimd") if name in flags), "plain")
