"""One unit of the plan becomes clip shards and a commit record: what a worker of the stage ``shard`` does.

A video gives all of its clips or none. A bad video (or one whose actions do not fit) is excluded with its
cause; a failure of the environment raises, so that the unit stays uncommitted and is tried again. The bytes
of a unit depend on the plan, the versions of the codecs and the CPU's instruction class only, all recorded.
"""

from __future__ import annotations

import functools
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import clipmill
from clipmill.config import RunConfig
from clipmill.lease import Lease
from clipmill.pipeline.fetch import ExcludedVideo, LocalVideo, fetch_video
from clipmill.pipeline.pairing import after_check, rows_of
from clipmill.pipeline.plan import PlannedVideo, Unit
from clipmill.pipeline.samples import clip_sample
from clipmill.pipeline.sidecars import read_sidecars
from clipmill.pipeline.sources.many import KeptFiles
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import UnitWriter
from clipmill.shards.manifest import commit_unit
from clipmill.video import BadVideo, Decoder, Limits, Outcome, decord_version

__all__ = ["FIRST_VIDEOS", "digest", "make_worker"]

FIRST_VIDEOS = 20
"""When so many videos fail from the start and none succeeds, the fault is not theirs."""


def make_worker(config: RunConfig, lease: Lease, allowed_failures: int) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor; the function that it returns keeps one decoding child from unit to unit."""
    data = config.data
    if data.decoder == "decord":
        decord_version()  # raises where it is not installed, which is no fault of the videos
    decoder = Decoder(Limits(data.cpu_seconds_per_video, data.memory_bytes_per_video, data.no_progress_seconds))
    return functools.partial(_shard_unit, config, lease, allowed_failures, decoder)


def _shard_unit(config: RunConfig, lease: Lease, allowed_failures: int, decoder: Decoder, unit: Unit) -> dict[str, Any]:
    """Decodes, packs and commits one unit.

    Returns:
        The unit's `digest`. Where its failures alone exceed the budget nothing is committed, since the fault is
        then hardly the videos': only ``exclusions`` and ``tried`` are returned.
    """
    videos: list[dict[str, Any]] = []
    exclusions: list[dict[str, Any]] = []
    pixels = {"num_values": 0, "pixel_sum": 0, "pixel_square_sum": 0}
    encoding = {"num_measured_clips": 0, "num_measured_values": 0, "squared_error": 0}
    with ScratchFolder("shard") as folder:
        finished, kept = folder / "finished", KeptFiles(folder / "kept")
        finished.mkdir()
        writer = UnitWriter(finished, "clips", unit.number, config.data.shard_bytes)
        for tried, video in enumerate(unit.videos, start=1):
            try:
                with tempfile.TemporaryDirectory(dir=folder) as copies:
                    fetched = fetch_video(config.data, video, Path(copies), kept)
                    described = read_sidecars(config.data, video)
                    videos.append(_shard_video(config, described, fetched, decoder, writer, pixels, encoding))
            except ExcludedVideo as excluded:
                exclusions.append({"id": video.id, "url": video.name, **excluded.document})
                if len(exclusions) > allowed_failures or FIRST_VIDEOS <= tried == len(exclusions):
                    return {"exclusions": exclusions, "tried": tried}
        body = {
            "split": unit.split,
            "videos": videos,
            "exclusions": exclusions,
            "num_short": sum(video["short"] for video in videos),
            "pixels": pixels,
            "encoding": encoding,
            "versions": _versions(config.data.decoder),
        }
        parts = writer.finish()
        lease.check()
        url = config.folder("clips", unit.split)
        return digest(commit_unit(url, unit.number, parts, body))


def digest(record: dict[str, Any]) -> dict[str, Any]:
    """What the driver keeps of a commit record: small, whatever the number of videos in the unit."""
    labels: Counter[str] = Counter()
    for video in record["videos"]:
        if video["label"] is not None and video["clips"]:
            labels[video["label"]] += video["clips"]
    return {
        "split": record["split"],
        "unit": record["unit"],
        "counts": {
            "num_videos": len(record["videos"]) + len(record["exclusions"]),
            "num_clips": sum(video["clips"] for video in record["videos"]),
            "num_short": record["num_short"],
            "num_static": sum(video["static"] for video in record["videos"]),
            "num_black": sum(video["black"] for video in record["videos"]),
            "num_truncated": sum(video["truncated"] for video in record["videos"]),
            "num_filtered": sum(video["filtered"] is not None for video in record["videos"]),
            "num_damaged_frames": sum(video["damaged_frames"] for video in record["videos"]),
            "num_joins": sum(video["joins"] for video in record["videos"]),
            "num_with_actions": sum(video["actions"] for video in record["videos"]),
            "num_excluded": len(record["exclusions"]),
            **record["pixels"],
            **record["encoding"],
        },
        "labels": labels,
        "exclusions": [
            {"split": record["split"], "unit": record["unit"], **exclusion} for exclusion in record["exclusions"]
        ],
        "versions": record["versions"],
    }


def _shard_video(
    config: RunConfig,
    video: PlannedVideo,
    fetched: LocalVideo,
    decoder: Decoder,
    writer: UnitWriter,
    pixels: dict[str, int],
    encoding: dict[str, int],
) -> dict[str, Any]:
    """Adds all clips of a video to the unit, or none.

    Returns:
        Its entry in the commit record.

    Raises:
        ExcludedVideo: the video or its actions are bad; nothing has been added.
        OSError, DecoderLost: the environment failed.
    """
    data = config.data
    path, actions = fetched.path, fetched.actions
    rows = functools.partial(rows_of, video=fetched, start_seconds=video.span[0] or 0.0)
    encode, key = (data.format, data.quality), f"{config.seed}:{video.id}"
    clips = decoder.clips(path, data.clip, data.decoder, encode=encode, key=key, span=video.span)
    try:
        for clip in clips if fetched.action_seconds is None else after_check(clips, rows):
            outcome = _finished(decoder)
            if actions is not None and clip.ordinal == 0 and fetched.action_seconds is None:
                _check_rows(len(actions), outcome.num_needed_frames)
            writer.add(clip_sample(data, video, clip, None if actions is None else rows(clip)))
            pixels["num_values"] += clip.num_values
            pixels["pixel_sum"] += clip.pixel_sum
            pixels["pixel_square_sum"] += clip.pixel_square_sum
            if clip.squared_error is not None:
                encoding["num_measured_clips"] += 1
                encoding["num_measured_values"] += clip.num_values
                encoding["squared_error"] += clip.squared_error
    except BadVideo as bad:
        scrub = functools.partial(_scrub, path=path, name=video.name)
        attempts = [scrub(attempt) for attempt in bad.attempts]
        raise ExcludedVideo("decode", scrub(bad.cause), attempts, scrub(bad.stderr_tail)) from bad
    outcome = _finished(decoder)
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
        "actions": actions is not None,
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


def _scrub(text: str, path: Path, name: str) -> str:
    """Takes out of a message what differs from run to run: where the file lay, and addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0x..", text.replace(str(path), name))


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
