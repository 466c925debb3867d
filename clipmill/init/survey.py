"""What a folder of videos holds: a listing of all of them, and a look into some."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipmill import storage
from clipmill.config import DataConfig, RunConfig, SourceConfig
from clipmill.errors import StorageUnavailable, UserError
from clipmill.pipeline.fetch import ExcludedVideo
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.planning.listing import origin_of
from clipmill.pipeline.planning.yields import NotMeasurable, fetch_edges
from clipmill.pipeline.sidecars import read_sidecars
from clipmill.pipeline.sources import describe_files, list_videos
from clipmill.pipeline.sources.record import SourceVideo
from clipmill.progress import bar
from clipmill.scratch import ScratchFolder
from clipmill.video import BadVideo, Decoder, DecoderLost, Limits

__all__ = ["MOST_LOOKS", "Look", "Survey", "survey_videos"]

MOST_LOOKS = 24
"""Videos that are opened. A source of fewer videos is opened completely."""

_CLIPS_PER_LOOK = 4
_LIMITS = Limits(cpu_seconds=60, memory_bytes=4 * 2**30, no_progress_seconds=30)


@dataclass(frozen=True)
class Look:
    """One video that was opened.

    Attributes:
        name: relative to the source, for messages.
        url: of its file.
        label: its class by its folder or sidecar, or none.
        height: in pixels, as a player shows it.
        width: as ``height``.
        fps: frames per second.
        seconds: duration; None where no header states it.
        decode_seconds_per_frame: time that this machine took for a frame of it, shrunk to the size of a clip.
        clip_bytes: of a clip of 16 frames of 64 x 64 pixels as h264, mean; 0 if the video is too short for one.
        origin: decides its split (see `split_share`).
    """

    name: str
    url: str
    label: str | None
    height: int
    width: int
    fps: float
    seconds: float | None
    decode_seconds_per_frame: float
    clip_bytes: float
    origin: int


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        url: of the folder or bucket prefix; a path where it is local.
        num_videos: all that were listed.
        num_bytes: of all of them.
        folder_labels: videos by the folder that holds them; None stands for ``url`` itself.
        other_files: files that are no videos, by ending, in words; empty for none.
        looks: the videos that could be opened.
        failures: (name, cause) of those that could not.
    """

    url: str
    num_videos: int
    num_bytes: int
    folder_labels: Counter[str | None]
    other_files: str
    looks: list[Look]
    failures: list[tuple[str, str]]

    @property
    def is_complete(self) -> bool:
        """Whether every video was opened."""
        return self.num_videos == len(self.looks) + len(self.failures)

    @property
    def mean_seconds(self) -> float:
        """Duration of a video: the mean of those that state it, 0 if none does."""
        known = [look.seconds for look in self.looks if look.seconds is not None]
        return statistics.fmean(known) if known else 0.0

    @property
    def total_seconds(self) -> float:
        """Duration of all readable videos, estimated from those that were opened."""
        readable = len(self.looks) / (len(self.looks) + len(self.failures))
        return self.mean_seconds * self.num_videos * readable


def survey_videos(url: str) -> Survey:
    """Lists a folder, a bucket prefix or one file of videos, and opens up to `MOST_LOOKS` of them.

    Raises:
        UserError: it does not exist, may not be read, holds no video, or none of the opened videos can be read.
        StorageUnavailable: the bucket's server is away.
    """
    url = storage.absolute(url)
    is_one_file = storage.is_local(url) and storage.local_path(url).is_file()
    folder, name = storage.split(url) if is_one_file else (url, "")
    source = SourceConfig(url=folder)
    others: Counter[str] = Counter()
    labels: Counter[str | None] = Counter()
    chosen: list[SourceVideo] = []
    num_videos = num_bytes = 0
    random = np.random.default_rng(0)
    for video in _listed(source, others):
        if is_one_file and video.name != name:
            continue
        num_videos, num_bytes = num_videos + 1, num_bytes + video.bytes
        labels[video.label] += 1
        # Reservoir sampling: every video has the same chance, in the memory of a few.
        if len(chosen) < MOST_LOOKS:
            chosen.append(video)
        elif (place := int(random.integers(num_videos))) < MOST_LOOKS:
            chosen[place] = video
    if not chosen:
        raise UserError(f"{url} is no video; name a folder of videos, or one video")
    looks, failures = _look_at_all(source, chosen)
    if not looks:
        name, cause = failures[0]
        raise UserError(f"none of the {len(failures)} videos of {url} that were opened can be read; {name}: {cause}")
    other_files = describe_files(others) if others else ""
    return Survey(_plain(folder), num_videos, num_bytes, labels, other_files, looks, failures)


def _plain(url: str) -> str:
    """A URL as a config or a table has it: the path, where it is local."""
    return str(storage.local_path(url)) if storage.is_local(url) else url


def _listed(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    with bar("list", total=None, unit="videos") as progress:
        for number, video in enumerate(list_videos(source, others), 1):
            yield video
            if number % 1000 == 0:
                progress.update(number)


def _look_at_all(source: SourceConfig, videos: list[SourceVideo]) -> tuple[list[Look], list[tuple[str, str]]]:
    config = RunConfig(root="unused", data=DataConfig(source=source))
    looks: list[Look] = []
    failures: list[tuple[str, str]] = []
    with (
        ScratchFolder("init") as folder,
        Decoder(_LIMITS) as decoder,
        bar("open", total=len(videos), unit="videos") as progress,
    ):
        _look_at(config, videos[0], decoder, folder)  # the first one pays for the start of the child
        for number, video in enumerate(videos, 1):
            result = _look_at(config, video, decoder, folder)
            if isinstance(result, Look):
                looks.append(result)
            else:
                failures.append((storage.shown(video.name), result))
            progress.update(number)
    return looks, failures


def _look_at(config: RunConfig, video: SourceVideo, decoder: Decoder, folder: Path) -> Look | str:
    """The look, or why there is none."""
    try:
        return _open(config, video, decoder, folder)
    except (ExcludedVideo, BadVideo, DecoderLost, NotMeasurable, OSError, storage.Refused) as error:
        if isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable):
            raise
        return error.cause if isinstance(error, BadVideo) else str(error)


def _open(config: RunConfig, video: SourceVideo, decoder: Decoder, folder: Path) -> Look:
    planned = PlannedVideo(
        id="0" * 16,
        url=video.name,
        bytes=video.bytes,
        etag=video.etag,
        label=video.label,
        actions=None,
        text=None,
        member=None,
        metadata=None,
        sidecars=video.sidecars,
        fault=video.fault,
    )
    clip = config.data.clip.model_copy(update={"max_clips_per_video": _CLIPS_PER_LOOK})
    with tempfile.TemporaryDirectory(dir=folder) as copies:
        local, _ = fetch_edges(config, planned, Path(copies))
        began = time.perf_counter()
        sizes = [len(made.data) for made in decoder.clips(local.path, clip)]
        seconds = time.perf_counter() - began
    outcome = decoder.outcome
    assert outcome is not None
    if not outcome.num_frames:
        raise NotMeasurable("it has no frame")
    info = outcome.info
    # A reader that stops early delivers the frames of its clips, and of a shorter video all frames.
    num_decoded = max(outcome.num_needed_frames, 1) if sizes else outcome.num_frames
    height, width = info.geometry.shown_size
    return Look(
        name=storage.shown(video.name),
        url=_plain(storage.resolve(config.data.source.url, video.name)),
        label=read_sidecars(config.data, planned).label,
        height=round(height),
        width=round(width),
        fps=info.fps,
        seconds=_seconds(info.duration_seconds, info.container_frames, info.fps),
        decode_seconds_per_frame=seconds / num_decoded,
        clip_bytes=statistics.fmean(sizes) if sizes else 0.0,
        origin=origin_of(config.data.source, video),
    )


def _seconds(stated: float | None, num_frames: int | None, fps: float) -> float | None:
    if stated is not None:
        return stated
    return num_frames / fps if num_frames and fps else None
