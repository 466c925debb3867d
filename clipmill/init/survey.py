"""Surveys a folder of videos: lists all of them, and opens some."""

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

__all__ = ["MOST_OPENED", "OpenedVideo", "Survey", "survey_videos"]

MOST_OPENED = 24
"""Maximum number of videos to open. If a source has fewer, all of them are opened."""

_CLIPS_PER_VIDEO = 4
_LIMITS = Limits(cpu_seconds=60, memory_bytes=4 * 2**30, no_progress_seconds=30)


@dataclass(frozen=True)
class OpenedVideo:
    """One video that was opened.

    Attributes:
        name: name relative to the source, for messages.
        url: URL of its file.
        label: its class, from its folder or sidecar; None without a class.
        height: height in pixels, as a player displays it.
        width: width in pixels, as a player displays it.
        fps: frames per second.
        seconds: duration; None if no header states it.
        decode_seconds_per_frame: measured time to decode a frame and shrink it to the size of a clip.
        clip_bytes: mean size of an h264 clip of 16 frames of 64 x 64 pixels; 0 if the video is too short for a clip.
        origin: hash of the video's origin, which decides its split (see `split_share`).
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
    """The result of a survey.

    Attributes:
        url: URL of the folder or bucket prefix; a path if it is local.
        num_videos: number of listed videos.
        num_bytes: size of all listed videos.
        folder_labels: number of videos by the name of their folder; None stands for ``url`` itself.
        other_files: describes the files that are not videos, by suffix; empty if there are none.
        opened: the videos that were opened.
        failures: (name, cause) of the videos that could not be opened.
    """

    url: str
    num_videos: int
    num_bytes: int
    folder_labels: Counter[str | None]
    other_files: str
    opened: list[OpenedVideo]
    failures: list[tuple[str, str]]

    @property
    def is_complete(self) -> bool:
        """Whether every video was opened."""
        return self.num_videos == len(self.opened) + len(self.failures)

    @property
    def mean_seconds(self) -> float:
        """Mean duration of the opened videos that state one; 0 if none does."""
        known = [video.seconds for video in self.opened if video.seconds is not None]
        return statistics.fmean(known) if known else 0.0

    @property
    def total_seconds(self) -> float:
        """Duration of all readable videos, estimated from those that were opened."""
        readable = len(self.opened) / (len(self.opened) + len(self.failures))
        return self.mean_seconds * self.num_videos * readable


def survey_videos(url: str) -> Survey:
    """Lists a folder, a bucket prefix or one file of videos, and opens up to `MOST_OPENED` of them.

    Raises:
        UserError: it does not exist, may not be read, holds no video, or none of the chosen videos can be opened.
        StorageUnavailable: the bucket's server is unreachable.
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
        # Reservoir sampling: every video has the same chance, and only the chosen ones are kept in memory.
        if len(chosen) < MOST_OPENED:
            chosen.append(video)
        elif (place := int(random.integers(num_videos))) < MOST_OPENED:
            chosen[place] = video
    if not chosen:
        raise UserError(f"{url} is not a video; name a folder of videos, or one video")
    opened, failures = _open_all(source, chosen)
    if not opened:
        name, cause = failures[0]
        raise UserError(
            f"none of {len(failures)} videos chosen from {url} can be read ({name}: {cause}); name a folder of "
            "readable videos"
        )
    other_files = describe_files(others) if others else ""
    return Survey(_plain(folder), num_videos, num_bytes, labels, other_files, opened, failures)


def _plain(url: str) -> str:
    """A URL in the form for configs and tables: a path if it is local."""
    return str(storage.local_path(url)) if storage.is_local(url) else url


def _listed(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    with bar("list", total=None, unit="videos") as progress:
        for number, video in enumerate(list_videos(source, others), 1):
            yield video
            if number % 1000 == 0:
                progress.update(number)


def _open_all(source: SourceConfig, videos: list[SourceVideo]) -> tuple[list[OpenedVideo], list[tuple[str, str]]]:
    config = RunConfig(root="unused", data=DataConfig(source=source))
    opened: list[OpenedVideo] = []
    failures: list[tuple[str, str]] = []
    with (
        ScratchFolder("init") as folder,
        Decoder(_LIMITS) as decoder,
        bar("open", total=len(videos), unit="videos") as progress,
    ):
        _try_open(config, videos[0], decoder, folder)  # not timed: includes the start of the child process
        for number, video in enumerate(videos, 1):
            result = _try_open(config, video, decoder, folder)
            if isinstance(result, OpenedVideo):
                opened.append(result)
            else:
                failures.append((storage.shown(video.name), result))
            progress.update(number)
    return opened, failures


def _try_open(config: RunConfig, video: SourceVideo, decoder: Decoder, folder: Path) -> OpenedVideo | str:
    """Opens a video; returns the cause if it cannot be opened."""
    try:
        return _open(config, video, decoder, folder)
    except (ExcludedVideo, BadVideo, DecoderLost, NotMeasurable, OSError, storage.Refused) as error:
        if isinstance(error, StorageUnavailable) and not isinstance(error, storage.Unreadable):
            raise
        return error.cause if isinstance(error, BadVideo) else str(error)


def _open(config: RunConfig, video: SourceVideo, decoder: Decoder, folder: Path) -> OpenedVideo:
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
    clip = config.data.clip.model_copy(update={"max_clips_per_video": _CLIPS_PER_VIDEO})
    with tempfile.TemporaryDirectory(dir=folder) as copies:
        local, _ = fetch_edges(config, planned, Path(copies))
        began = time.perf_counter()
        sizes = [len(made.data) for made in decoder.clips(local.path, clip)]
        seconds = time.perf_counter() - began
    outcome = decoder.outcome
    assert outcome is not None
    if not outcome.num_frames:
        raise NotMeasurable("it has no frames")
    info = outcome.info
    # The decoder stops after the frames of its clips; a video too short for a clip is decoded completely.
    num_decoded = max(outcome.num_needed_frames, 1) if sizes else outcome.num_frames
    height, width = info.geometry.shown_size
    return OpenedVideo(
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
