"""Makes the sample of a clip: its frames and the facts about it."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from clipmill.config import DataConfig
from clipmill.pipeline.plan import PlannedVideo
from clipmill.shards.format import Sample, check_sample, json_bytes, npy_bytes
from clipmill.video import Clip

__all__ = ["SampleBuffer", "clip_sample"]

_MOST_HELD_BYTES = 2**26
"""Bytes of samples that are held in memory; beyond that they go to a file."""


class SampleBuffer:
    """Buffers the samples of one video until all are made, because a video gives all of its clips or none."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MOST_HELD_BYTES)  # noqa: SIM115  closed by __exit__
        self._num_samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Appends a sample.

        Raises:
            ValueError: a name or a size does not fit the format.
        """
        check_sample(sample)
        pickle.dump(sample, self._file)
        self._num_samples += 1

    def __iter__(self) -> Iterator[Sample]:
        self._file.seek(0)
        for _ in range(self._num_samples):
            yield pickle.load(self._file)


def clip_sample(data: DataConfig, video: PlannedVideo, clip: Clip, actions: np.ndarray | None) -> Sample:
    """The sample of a clip: its frames, a json with their origin, and its rows of actions.

    Args:
        data: gives the format and the clip rule.
        video: the clip's video.
        clip: the clip from the decoder.
        actions: float32 [num_frames, ...], one row per frame; None without actions.
    """
    key = f"{video.id}_{clip.ordinal:06d}"
    crop: dict[str, Any] = {"crop": "center" if data.clip.fit == "crop" else data.clip.fit}
    if clip.view is not None:
        number, view = clip.view
        key, crop = f"{key}_v{number}", {"crop": "random", "view": {"number": number, **view._asdict()}}
    members = {
        data.clip_suffix: clip.data if isinstance(clip.data, bytes) else npy_bytes(clip.data),
        "json": json_bytes(
            {
                "source": video.name,
                "video": video.id,
                "start_seconds": clip.start_seconds,
                "end_seconds": clip.end_seconds,
                "first_frame": clip.frame_numbers[0],
                "frame_stride": data.clip.frame_stride if data.clip.fps is None else None,
                "fps": clip.fps,
                **crop,
                "label": video.label,
                "text": video.text,
                "metadata": None if video.metadata is None else json.loads(video.metadata),
            }
        ),
    }
    if actions is not None:
        members["actions.npy"] = npy_bytes(actions)
    return Sample(key, members)
