"""Turns one planned video into samples (all of its clips, or none) and an entry of the commit record."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipmill.config import RunConfig
from clipmill.pipeline.ahead import Fetched
from clipmill.pipeline.exclusion import exclude_on_error, scrub
from clipmill.pipeline.fetch import ExcludedVideo, LocalVideo
from clipmill.pipeline.pairing import rows_of
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.samples import SampleBuffer, clip_sample
from clipmill.pipeline.sources.record import edges_sha256
from clipmill.video import BadVideo, Decoder, Outcome

__all__ = ["make_samples"]


def make_samples(
    config: RunConfig, fetched: Fetched, decoder: Decoder, samples: SampleBuffer, scratch: Path
) -> tuple[dict[str, Any], Counter[str]]:
    """Makes all samples of a video.

    Args:
        config: config of the run.
        fetched: the video on this machine.
        decoder: the worker's decoder.
        samples: empty buffer that gets the samples.
        scratch: the temporary folder of this machine.

    Returns:
        The video's entry for the commit record, and what its clips add to the sums over the unit.

    Raises:
        ExcludedVideo: the video, its actions or its sidecars are bad.
        OSError, DecoderLost, MemoryError: the environment failed.
    """
    video, local = fetched
    with exclude_on_error("decode", video.name, scratch):
        sums = _decode(config, video, local, decoder, samples, scratch)
        entry = _entry(video, _finished(decoder), has_actions=local.actions is not None)
        return {**entry, "edges": _edges(video, local)}, sums


def _decode(
    config: RunConfig,
    video: PlannedVideo,
    local: LocalVideo,
    decoder: Decoder,
    samples: SampleBuffer,
    scratch: Path,
) -> Counter[str]:
    """Decodes a video and packs its clips. Returns the sums over them."""
    data, actions = config.data, local.actions
    sums: Counter[str] = Counter()
    encode, key = (data.format, data.quality), f"{config.seed}:{video.id}"
    try:
        for clip in decoder.clips(local.path, data.clip, data.decoder, encode=encode, key=key, span=video.span):
            if actions is not None and clip.ordinal == 0 and local.action_seconds is None:
                _check_rows(len(actions), _finished(decoder).num_needed_frames)
            with exclude_on_error("pack", video.name, scratch):
                rows = None if actions is None else rows_of(clip, local, video.start_seconds or 0.0)
                samples.add(clip_sample(data, video, clip, rows))
            sums.update(num_values=clip.num_values, pixel_sum=clip.pixel_sum, pixel_square_sum=clip.pixel_square_sum)
            if clip.squared_error is not None:
                sums.update(num_measured_clips=1, num_measured_values=clip.num_values, squared_error=clip.squared_error)
    except BadVideo as bad:
        clean = functools.partial(scrub, path=local.path, name=video.name)
        attempts = [clean(attempt) for attempt in bad.attempts]
        raise ExcludedVideo("decode", clean(bad.cause), attempts, clean(bad.stderr_tail)) from bad
    return sums


def _edges(video: PlannedVideo, local: LocalVideo) -> str | None:
    """Hash of the file's edges, to recognize a bucket file that is moved or uploaded again; None if the identity has
    it.
    """
    if video.etag is None or video.member is not None:
        return None
    return edges_sha256(str(local.path), local.path.stat().st_size)


def _entry(video: PlannedVideo, outcome: Outcome, has_actions: bool) -> dict[str, Any]:
    """The commit record's entry of a video that is not excluded."""
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
    """The outcome of the current video; known at its first clip, because the whole video is decoded before that."""
    assert decoder.outcome is not None
    return decoder.outcome
