"""The clips that a report plays, laid out as films."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipmill import storage
from clipmill.evaluation.film import USUAL_FPS, Film, Row
from clipmill.evaluation.gallery import MAX_CLIPS, Gallery, clips_per_class, pick_clips
from clipmill.evaluation.results import Evaluation
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import Manifest

__all__ = ["Group", "SampledClip", "class_groups", "extreme_films", "nearest_film", "read_samples", "wall_films"]

COLUMNS = 4
"""Clips per row of a film: readable on a phone, while larger screens fit several films side by side."""
WALL_ROWS = 6
MAX_WALL_SAMPLES = 1024


@dataclass(frozen=True)
class SampledClip:
    """A generated sample."""

    name: str
    label: str | None
    video: NDArray[np.uint8]
    """[T, H, W, 3]"""
    fps: float


@dataclass(frozen=True)
class Group:
    """The films of one class."""

    label: str | None
    films: list[Film]
    missing: list[str]
    """Kinds of clips that are missing."""


def read_samples(samples: Manifest, most: int = MAX_WALL_SAMPLES) -> list[SampledClip]:
    """The first samples of a set, at most ``most``."""
    dataset = ShardDataset(samples, decode_clip)
    found = []
    for index in range(min(len(dataset), most)):
        sample = dataset[index]
        fps = sample["meta"].get("fps") or USUAL_FPS
        found.append(SampledClip(f"sample {index}", sample["label"], np.array(sample["video"]), fps))
    return found


def class_groups(
    judged: Evaluation | None, classes: list[str], samples: Sequence[SampledClip], num_given: int
) -> list[Group]:
    """For each class, real clips, reconstructions and samples below each other; without classes, one wide group.

    Args:
        judged: the evaluation that chose the real clips; None before the first evaluation.
        classes: of the data.
        samples: samples to choose from.
        num_given: number of given first frames of the samples.
    """
    gallery = Gallery.load(storage.join(judged.url, "gallery.npz")) if judged else None
    wanted = clips_per_class(classes)
    labels: list[str | None] = list(wanted)
    if classes and any(sample.label is None for sample in samples):  # an unconditional prior on clips with classes
        labels.append(None)
    groups = []
    for label in labels:
        most = wanted.get(label, MAX_CLIPS)
        made = [sample for sample in samples if sample.label == label][:most]
        real = _gallery_rows(gallery, classes, label) if gallery else []
        films = list(_films(label or "clips", gallery, real, made, num_given))
        missing = [kind for kind, clips in (("real", real), ("reconstruction", real), ("sample", made)) if not clips]
        groups.append(Group(label, films, missing))
    return groups


def _gallery_rows(gallery: Gallery, classes: list[str], label: str | None) -> list[int]:
    """Rows of a gallery to show for a class; clips of different videos come first."""
    picked = pick_clips(gallery.keys, [name or "" for name in gallery.labels], classes)
    if not classes:
        return picked
    return [row for row in picked if gallery.labels[row] == label]


def _films(
    name: str, gallery: Gallery | None, real: Sequence[int], made: Sequence[SampledClip], num_given: int
) -> Iterator[Film]:
    """Films of `COLUMNS` clips, with the rows real, reconstruction and sample."""
    for start in range(0, max(len(real), len(made)), COLUMNS):
        rows = []
        if gallery is not None:
            chosen = real[start : start + COLUMNS]
            rates, titles = [gallery.rates[row] for row in chosen], [gallery.keys[row] for row in chosen]
            rows += [Row(kind, [videos[row] for row in chosen], rates, titles) for kind, videos in gallery.rows.items()]
        rows.append(_sample_row("sample", made[start : start + COLUMNS], num_given))
        film = Film.of(f"{name} {start // COLUMNS + 1}", rows)
        if film is not None:
            yield film


def _sample_row(kind: str, samples: Sequence[SampledClip], num_given: int) -> Row:
    return Row(
        kind,
        [sample.video for sample in samples],
        [sample.fps for sample in samples],
        [sample.name for sample in samples],
        num_given,
    )


def wall_films(samples: Sequence[SampledClip], num_given: int) -> Iterator[Film]:
    """All samples, `WALL_ROWS` x `COLUMNS` to a film."""
    per_film = WALL_ROWS * COLUMNS
    for start in range(0, len(samples), per_film):
        shown = samples[start : start + per_film]
        parts = [shown[first : first + COLUMNS] for first in range(0, len(shown), COLUMNS)]
        rows = [_sample_row(f"{part[0].name} on", part, num_given) for part in parts]
        film = Film.of(f"samples {start} to {start + len(shown) - 1}", rows)
        if film is not None:
            yield film


def extreme_films(judged: Evaluation) -> list[Film]:
    """The worst reconstructions, and the best ones."""
    gallery = Gallery.load(storage.join(judged.url, "gallery.npz"))
    films = []
    for end, clips in judged.metrics["extremes"].items():
        rows = [gallery.keys.index(clip["key"]) for clip in clips]
        titles = [f"{clip['key']}, {_quality(clip['psnr_db'])}" for clip in clips]
        rates = [gallery.rates[row] for row in rows]
        film = Film.of(
            end,
            [Row(kind, [videos[row] for row in rows], rates, titles) for kind, videos in gallery.rows.items()],
        )
        if film is not None:
            films.append(film)
    return films


def nearest_film(judged: Evaluation) -> Film | None:
    """The samples that are closest to training clips, above those; None if the evaluation has no such pairs."""
    nearest = judged.metrics.get("samples", {}).get("nearest")
    if not nearest:
        return None
    gallery = Gallery.load(storage.join(judged.url, "nearest.npz"))
    titles = [
        f"sample {pair['numbers'][0]} and {pair['training']}: {pair['distance']:.2f} of the usual distance"
        for pair in nearest["pairs"]
    ]
    return Film.of("nearest", [Row(kind, list(videos), gallery.rates, titles) for kind, videos in gallery.rows.items()])


def _quality(psnr_db: float | None) -> str:
    return "without error" if psnr_db is None else f"PSNR {psnr_db:.2f} dB"
