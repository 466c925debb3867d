"""The few clips to display: ``evaluate`` chooses and stores them, ``report`` shows them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipmill import storage

__all__ = ["Gallery", "clips_per_class", "pick_clips"]

MAX_CLASSES = 12
MAX_CLIPS = 24
"""Maximum over all classes, unless `MIN_PER_CLASS` needs more."""
MIN_PER_CLASS, MAX_PER_CLASS = 3, 8


@dataclass(frozen=True)
class Gallery:
    """Clips beside each other: real ones and their reconstructions, or samples and their nearest training clips.

    Reconstructions are computed again one by one, and differ from the scored ones by at most one grey level.
    """

    rows: dict[str, NDArray[np.uint8]]
    """Clips [N, T, H, W, 3] by kind (``real``), from top to bottom."""
    labels: tuple[str | None, ...]
    """Class of each clip, None without classes."""
    keys: tuple[str, ...]
    rates: tuple[float, ...]
    """Frames per second of each clip."""

    def save(self, url: str) -> None:
        """Publishes one npz file."""
        file = io.BytesIO()
        labels = np.array([label or "" for label in self.labels], dtype=np.str_)  # no class has an empty name
        keys = np.array(self.keys, dtype=np.str_)
        np.savez_compressed(file, labels=labels, keys=keys, rates=self.rates, **self.rows)  # type: ignore[arg-type]
        storage.publish_bytes(url, file.getvalue())

    @classmethod
    def load(cls, url: str) -> Gallery:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
        """
        with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
            rows = dict(arrays)
        labels = tuple(str(label) or None for label in rows.pop("labels"))
        return cls(rows, labels, tuple(map(str, rows.pop("keys"))), tuple(rows.pop("rates").tolist()))


def clips_per_class(classes: list[str]) -> dict[str | None, int]:
    """Number of clips to show by class: all of few classes, some of many; {None: n} without classes."""
    if not classes:
        return {None: MAX_CLIPS}
    shown: list[str | None] = list(classes[:MAX_CLASSES])
    number = min(MAX_PER_CLASS, max(MIN_PER_CLASS, MAX_CLIPS // len(shown)))
    return dict.fromkeys(shown, number)


def pick_clips(keys: Sequence[str], labels: Sequence[str], classes: list[str]) -> list[int]:
    """Ascending indices of the clips to show: the first ones of each shown class, preferring different videos.

    Args:
        keys: of all clips, in order; the part before ``_`` names the video.
        labels: their classes; "" if they have none.
        classes: of the data; if empty, clips with any label are shown.
    """
    wanted = clips_per_class(classes)
    by_class: dict[str | None, list[int]] = {label: [] for label in wanted}
    for number, label in enumerate(labels):
        by_class.get(label if label in wanted else None, []).append(number)
    picked: list[int] = []
    for shown, numbers in by_class.items():
        rank_in_video: Counter[str] = Counter()
        ranks = {}
        for number in numbers:
            video = keys[number].partition("_")[0]
            ranks[number] = rank_in_video[video]
            rank_in_video[video] += 1
        picked += sorted(numbers, key=lambda number: (ranks[number], number))[: wanted[shown]]
    return sorted(picked)
