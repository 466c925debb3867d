"""Estimates how many bytes of shards the videos of a plan will make, from a sample of them.

A listing states the size of files, not their duration: 256 MiB of 4K footage make 2.6 MB of small clips, but 256 MiB of
raw 64 x 64 frames make 256 MiB of them. Therefore a fixed number of videos is opened in a decoding child. The header
gives the number of clips, and the first clips give their size. The plan records the result.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from clipmill import storage
from clipmill.config import ClipConfig, RunConfig
from clipmill.errors import StorageUnavailable
from clipmill.pipeline.fetch import ExcludedVideo, LocalVideo, fetch_video
from clipmill.pipeline.plan import SOURCE_COLUMNS, PlannedVideo
from clipmill.pipeline.samples import clip_sample
from clipmill.pipeline.sidecars import read_sidecars
from clipmill.pipeline.sources import base_url
from clipmill.pipeline.sources.multivideo import KeptFiles
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import Sample
from clipmill.video import BadVideo, Clip, Decoder, DecoderLost, Limits, Outcome
from clipmill.video.kinds import HEAD_BYTES, is_video_head, suffix_of

__all__ = ["NOTHING_KNOWN", "NotMeasurable", "Yield", "fetch_edges", "measure_yield"]

logger = logging.getLogger(__name__)

NUM_MEASURED_VIDEOS = 32
"""The mean of this number of videos is right within about 20 % if the yield per byte varies by a factor of two."""

SMALL_BYTES = 2**20
"""A smaller source is not measured: it is a unit or two in any case."""

_CLIPS_PER_MEASUREMENT = 2
_LIMITS = Limits(cpu_seconds=20, memory_bytes=4 * 2**30, no_progress_seconds=10)
_MOST_FAILURES = 8
"""Measurements that may fail. A broken video costs two children, a hostile one their whole time."""

_EDGE_BYTES = 16 * 2**20
"""Bytes fetched from the start and the end of a large object, which hold the headers and the first clips."""


_MPEG_STREAM = re.compile(rb"\x00\x00\x01|\x00{3}\x01|G|.{4}G", re.DOTALL)
"""Start of program, transport and elementary streams."""


@dataclass(frozen=True)
class Yield:
    """Expected size of the shards that source files make.

    Attributes:
        bytes_per_byte: bytes of shards per byte of source, for whole files.
        bytes_per_clip: bytes of one clip in a shard, with all its members.
        fps: frames per second of the videos, after resampling by the clip rule.
        num_videos: videos that were measured.
    """

    bytes_per_byte: float
    bytes_per_clip: float
    fps: float
    num_videos: int

    @classmethod
    def of_generation(cls, generation: dict[str, Any]) -> Yield:
        """The yield that the document of a generation states."""
        return cls(**generation["yield"])

    @property
    def document(self) -> dict[str, Any]:
        """The fields for the document of a generation."""
        return asdict(self)

    def of(self, table: pa.Table, clip: ClipConfig) -> np.ndarray:
        """float64[n]: expected bytes of shards of these videos.

        Args:
            table: ``bytes``, ``start_seconds`` and ``end_seconds`` of each.
            clip: the clip rule.
        """
        expected = table["bytes"].to_numpy() * self.bytes_per_byte
        starts, ends = (table[name].to_numpy() for name in ("start_seconds", "end_seconds"))  # NaN without a bound
        is_span = ~np.isnan(ends)
        if self.bytes_per_clip and is_span.any():
            frames = np.floor((ends - np.nan_to_num(starts))[is_span] * self.fps)
            expected[is_span] = _num_clips(frames, clip) * self.bytes_per_clip
        return expected


NOTHING_KNOWN = Yield(bytes_per_byte=1.0, bytes_per_clip=0.0, fps=0.0, num_videos=0)
"""Default: as many bytes of shards as of source."""


def measure_yield(config: RunConfig, tables: Iterable[pa.Table], num_bytes: int) -> Yield:
    """Measures up to `NUM_MEASURED_VIDEOS` videos, spread evenly over the bytes of the source in the order of the plan.

    Every byte of the source has the same chance to be chosen. So the mean over the chosen videos estimates the mean
    over all bytes, even if a few large files hold most of them.

    Args:
        config: config of the run.
        tables: `SOURCE_COLUMNS` of the videos, in the order of the plan.
        num_bytes: bytes of all videos.

    Raises:
        UserError, StorageUnavailable: the storage of the source does not answer.
    """
    if num_bytes < SMALL_BYTES:
        return NOTHING_KNOWN
    points = (np.arange(NUM_MEASURED_VIDEOS) + 0.5) / NUM_MEASURED_VIDEOS * num_bytes
    rows: list[dict[str, Any]] = []
    weights: list[int] = []
    first_byte = 0
    for table in tables:
        ends = first_byte + np.cumsum(table["bytes"].to_numpy())
        inside = points[(points >= first_byte) & (points < ends[-1])]
        places, counts = np.unique(np.searchsorted(ends, inside, side="right"), return_counts=True)
        rows += table.select(list(SOURCE_COLUMNS)).take(pa.array(places)).to_pylist()
        weights += counts.tolist()
        first_byte = int(ends[-1])
    measured: list[_Measurement] = []
    measured_weights: list[int] = []
    num_failures = 0
    with ScratchFolder("plan") as folder, Decoder(_LIMITS) as decoder:
        for row, weight in zip(rows, weights, strict=True):
            if num_failures == _MOST_FAILURES:
                break
            try:
                measured.append(_measure_video(config, PlannedVideo(id="0" * 16, **row), decoder, folder))
                measured_weights.append(weight)
            # Not a reason to stop: the video's unit will report the error.
            except (ExcludedVideo, BadVideo, DecoderLost, NotMeasurable, OSError, storage.Refused) as error:
                if isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable):
                    raise  # the bucket does not answer
                logger.debug("cannot measure %s: %s", storage.shown(row["url"]), error)
                num_failures += not isinstance(error, NotMeasurable)
    if not measured:
        return NOTHING_KNOWN
    shares = np.array(measured_weights) / sum(measured_weights)
    num_clips = sum(one.num_clips for one in measured)
    return Yield(
        # Rounded, so that tiny differences between codec versions do not change the units.
        bytes_per_byte=_rounded(sum(share * one.bytes_per_byte for share, one in zip(shares, measured, strict=True))),
        bytes_per_clip=_rounded(sum(one.bytes for one in measured) / num_clips if num_clips else 0.0),
        fps=_rounded(sum(share * one.fps for share, one in zip(shares, measured, strict=True))),
        num_videos=len(measured),
    )


@dataclass(frozen=True)
class _Measurement:
    bytes_per_byte: float
    num_clips: int
    bytes: int
    fps: float


class NotMeasurable(Exception):
    """A measurement would not represent the whole video; the message gives the reason."""


def _measure_video(config: RunConfig, video: PlannedVideo, decoder: Decoder, folder: Path) -> _Measurement:
    data = config.data
    # Rejected clips are known only after decoding, so clips are counted as if none were rejected.
    first = {
        "max_clips_per_video": _CLIPS_PER_MEASUREMENT,
        "reject_static": None,
        "reject_black": None,
        "scene_cut": None,
    }
    with tempfile.TemporaryDirectory(dir=folder) as copies:
        fetched, num_bytes = fetch_edges(config, video, Path(copies))
        video = read_sidecars(data, video)
        encode = (data.format, data.quality)
        # From the beginning of the file, even if the video is a span, so that nothing has to be skipped first.
        clips = decoder.clips(fetched.path, data.clip.model_copy(update=first), encode=encode)
        sizes = [_tar_bytes(clip_sample(data, video, clip, _some_rows(fetched, clip))) for clip in clips]
    outcome = decoder.outcome
    assert outcome is not None
    fps = data.clip.fps or outcome.info.fps
    num_clips = 0
    if sizes:
        num_clips = int(_num_clips(np.array([_num_frames(outcome, fps, data.clip)]), data.clip)[0])
    mean_bytes = sum(sizes) / len(sizes) if sizes else 0.0
    return _Measurement(num_clips * mean_bytes / num_bytes, len(sizes), sum(sizes), fps)


def _some_rows(fetched: LocalVideo, clip: Clip) -> np.ndarray | None:
    """Placeholder actions of the size of a clip's actions; None without actions."""
    if fetched.actions is None:
        return None
    return np.zeros((len(clip.frame_numbers), *fetched.actions.shape[1:]), np.float32)


def _num_frames(outcome: Outcome, fps: float, clip: ClipConfig) -> int:
    """Frames of the whole video, after resampling by the clip rule."""
    info = outcome.info
    if clip.fps is None and info.container_frames is not None:
        return info.container_frames
    if info.duration_seconds is not None:
        return int(info.duration_seconds * fps)
    raise NotMeasurable("its header states no duration")


def _num_clips(frames: np.ndarray, clip: ClipConfig) -> np.ndarray:
    """float64[n]: samples that videos with these numbers of frames yield, views counted."""
    clips = np.where(frames < clip.span, 0, 1 + (frames - clip.span) // clip.step)
    return np.minimum(clips, clip.max_clips_per_video or np.inf) * clip.views_per_clip


def _tar_bytes(sample: Sample) -> int:
    """Bytes of a sample in a tar: a header for each member, and its content in whole blocks."""
    return sum(512 + -(-len(content) // 512) * 512 for content in sample.members.values())


def fetch_edges(config: RunConfig, video: PlannedVideo, folder: Path) -> tuple[LocalVideo, int]:
    """Fetches a video, or only the edges of a large one. Returns it, and the bytes of source that it represents.

    For a large object, the local file has the same size but holds only the beginning and the end, where headers are. A
    large MPEG stream has no such headers: its beginning alone is fetched, which is a video by itself.

    Raises:
        NotMeasurable: the file does not begin like a video.
    """
    if video.member is not None:
        return fetch_video(config.data, video, folder, KeptFiles(folder / "kept")), video.bytes
    url = storage.resolve(base_url(config.data.source), video.url)
    head = storage.read_start(url, HEAD_BYTES)
    if not is_video_head(head):  # checked first, because a child that fails must be replaced
        raise NotMeasurable("it does not begin like a video")
    if storage.is_local(url) or video.bytes <= 4 * _EDGE_BYTES:
        return fetch_video(config.data, video, folder, KeptFiles(folder / "kept")), video.bytes
    path = folder / f"video{suffix_of(urlsplit(video.url).path)}"
    with storage.open_to_read(url, _EDGE_BYTES) as remote, path.open("wb") as copy:
        copy.write(remote.read(_EDGE_BYTES))
        if _MPEG_STREAM.match(head):
            return LocalVideo(path, None), _EDGE_BYTES
        for file in (remote, copy):
            file.seek(video.bytes - _EDGE_BYTES)
        copy.write(remote.read(_EDGE_BYTES))
    return LocalVideo(path, None), video.bytes


def _rounded(number: float) -> float:
    """Rounds to two significant digits."""
    return float(f"{number:.2g}")
