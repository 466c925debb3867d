"""One unit of the plan becomes clip shards and a commit record: what a worker of the stage ``shard`` does.

A video gives all of its clips or none. A bad video (or one whose actions do not fit) is excluded with its
cause; a failure of the environment raises, so that the unit stays uncommitted and is tried again. The bytes
of a unit depend on the plan, the versions of the codecs and the CPU's instruction class only, all recorded.
"""

from __future__ import annotations

import functools
import io
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

import clipmill
from clipmill import storage
from clipmill.config import DataConfig, RunConfig
from clipmill.lease import Lease
from clipmill.pipeline.plan import PlannedVideo, Unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.manifest import commit_unit
from clipmill.video import BadVideo, Clip, Decoder, Limits, Outcome

__all__ = ["FIRST_VIDEOS", "digest", "make_worker"]

FIRST_VIDEOS = 20
"""When so many videos fail from the start and none succeeds, the fault is not theirs."""


def make_worker(config: RunConfig, lease: Lease, allowed_failures: int) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor; the function that it returns keeps one decoding child from unit to unit."""
    data = config.data
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
    with tempfile.TemporaryDirectory(prefix="clipmill-shard-") as folder:
        finished, copies = Path(folder, "finished"), Path(folder, "copies")
        finished.mkdir()
        copies.mkdir()
        writer = UnitWriter(finished, "clips", unit.number, config.data.shard_bytes)
        for tried, video in enumerate(unit.videos, start=1):
            try:
                videos.append(_shard_video(config.data, video, decoder, writer, copies, pixels))
            except ExcludedVideo as excluded:
                exclusions.append({"id": video.id, "url": video.url, **excluded.document})
                if len(exclusions) > allowed_failures or FIRST_VIDEOS <= tried == len(exclusions):
                    return {"exclusions": exclusions, "tried": tried}
        body = {
            "split": unit.split,
            "videos": videos,
            "exclusions": exclusions,
            "num_short": sum(video["short"] for video in videos),
            "pixels": pixels,
            "versions": _versions(),
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
        "counts": {
            "num_videos": len(record["videos"]) + len(record["exclusions"]),
            "num_clips": sum(video["clips"] for video in record["videos"]),
            "num_short": record["num_short"],
            "num_truncated": sum(video["truncated"] for video in record["videos"]),
            "num_with_actions": sum(video["actions"] for video in record["videos"]),
            "num_excluded": len(record["exclusions"]),
            **record["pixels"],
        },
        "labels": labels,
        "exclusions": [{"split": record["split"], **exclusion} for exclusion in record["exclusions"]],
        "versions": record["versions"],
    }


class ExcludedVideo(Exception):
    """This video gives no clips; ``document`` says why, without anything that differs from run to run."""

    def __init__(self, stage: str, cause: str, attempts: Sequence[str] = (), stderr: str = "") -> None:
        super().__init__(cause)
        self.document = {"stage": stage, "cause": cause, "attempts": list(attempts), "stderr": stderr}


def _shard_video(
    data: DataConfig, video: PlannedVideo, decoder: Decoder, writer: UnitWriter, folder: Path, pixels: dict[str, int]
) -> dict[str, Any]:
    """Adds all clips of a video to the unit, or none.

    Returns:
        Its entry in the commit record.

    Raises:
        ExcludedVideo: the video or its actions are bad; nothing has been added.
        OSError, DecoderLost: the environment failed.
    """
    copy = folder / f"video{PurePosixPath(video.url).suffix}"
    try:
        path = _local_copy(data, video.url, copy)
    except FileNotFoundError as error:
        source = storage.absolute(data.source.url)
        if next(storage.walk(source), None) is None:  # an unmounted disk is no reason to exclude anything
            raise OSError(f"the source {source} is empty or gone") from error
        raise ExcludedVideo("fetch", f"{video.url} is missing") from error
    if path.stat().st_size != video.bytes:
        raise ExcludedVideo("fetch", f"changed since it was planned: {video.bytes} -> {path.stat().st_size} bytes")
    actions = _read_actions(data, video, folder)
    encode = (data.format, data.crf)
    try:
        for clip in decoder.clips(path, data.clip, data.decoder, encode=encode):
            outcome = _finished(decoder)
            if actions is not None and clip.ordinal == 0:
                _check_rows(len(actions), (outcome.num_clips - 1) * data.clip.step + data.clip.span)
            writer.add(_sample(data, video, clip, actions))
            pixels["num_values"] += clip.num_values
            pixels["pixel_sum"] += clip.pixel_sum
            pixels["pixel_square_sum"] += clip.pixel_square_sum
    except BadVideo as bad:
        scrub = functools.partial(_scrub, path=path, url=video.url)
        attempts = [scrub(attempt) for attempt in bad.attempts]
        raise ExcludedVideo("decode", scrub(bad.cause), attempts, scrub(bad.stderr_tail)) from bad
    finally:
        copy.unlink(missing_ok=True)
    outcome = _finished(decoder)
    return {
        "id": video.id,
        "url": video.url,
        "label": video.label,
        "clips": outcome.num_clips,
        "short": outcome.short,
        "truncated": outcome.truncated,
        "actions": actions is not None,
        "num_frames": outcome.num_frames,
        "info": asdict(outcome.info),
    }


def _local_copy(data: DataConfig, name: str, copy: Path) -> Path:
    """A file of the source on this machine: itself where the source is local, else fetched to ``copy``.

    Raises:
        FileNotFoundError: there is none.
    """
    url = storage.join(storage.absolute(data.source.url), name)
    if storage.is_local(url):
        path = storage.local_path(url)
        path.stat()
        return path
    storage.fetch(url, copy)
    return copy


def _read_actions(data: DataConfig, video: PlannedVideo, folder: Path) -> np.ndarray | None:
    """float32 [num_frames, ...]: the actions of a video; none where no file of that name lies beside it."""
    if video.actions is None:
        return None
    try:
        path = _local_copy(data, video.actions, folder / "actions")
    except FileNotFoundError:
        return None
    try:
        actions = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if actions.ndim < 1 or actions.dtype.kind not in "fiub":
            raise ValueError(f"an array {actions.dtype} {list(actions.shape)}")
    except (ValueError, EOFError) as error:
        raise ExcludedVideo("actions", f"{video.actions} is no numeric .npy file with a row for each frame") from error
    return np.asarray(actions, np.float32)


def _check_rows(num_rows: int, num_frames: int) -> None:
    if num_rows < num_frames:
        raise ExcludedVideo("actions", f"{num_rows} rows of actions for clips of {num_frames} frames")


def _finished(decoder: Decoder) -> Outcome:
    """The outcome, known from a video's first clip on: a video is decoded to its end before it yields."""
    assert decoder.outcome is not None
    return decoder.outcome


def _sample(data: DataConfig, video: PlannedVideo, clip: Clip, actions: np.ndarray | None) -> Sample:
    members = {
        data.format: clip.data if isinstance(clip.data, bytes) else npy_bytes(clip.data),
        "json": json_bytes(
            {
                "source": video.url,
                "video": video.id,
                "start_seconds": clip.start_seconds,
                "end_seconds": clip.end_seconds,
                "first_frame": clip.first_frame,
                "frame_stride": data.clip.frame_stride,
                "fps": clip.fps,
                "crop": "center" if data.clip.fit == "crop" else data.clip.fit,
                "label": video.label,
                "text": video.text,
            }
        ),
    }
    if actions is not None:
        end_frame = clip.first_frame + data.clip.span
        members["actions.npy"] = npy_bytes(actions[clip.first_frame : end_frame : data.clip.frame_stride])
    return Sample(f"{video.id}_{clip.ordinal:06d}", members)


def _scrub(text: str, path: Path, url: str) -> str:
    """Takes out of a message what differs from run to run: where the file lay, and addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0x..", text.replace(str(path), url))


@functools.cache
def _versions() -> dict[str, str]:
    """What the bytes of a unit depend on beside the plan."""
    return {
        "clipmill": clipmill.__version__,
        "av": metadata.version("av"),  # its wheel holds FFmpeg and libx264
        "decord": metadata.version("decord"),
        "cpu": f"{platform.machine()} {_vector_instructions()}",
    }


def _vector_instructions() -> str:
    """The widest vector instructions: libx264 and swscale choose their code, and so their rounding, by them."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    return next((name for name in ("avx512f", "avx2", "avx", "sse4_2", "sve", "asimd") if name in flags), "plain")
