"""The few clips that people look at: chosen and stored by ``evaluate``, shown by ``report``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipmill import storage

__all__ = ["Gallery", "GalleryPicker", "clips_per_class"]

MAX_CLASSES = 12
MAX_CLIPS = 24
"""Over all classes, as long as each still gets `MIN_PER_CLASS`."""
MIN_PER_CLASS, MAX_PER_CLASS = 3, 8


@dataclass(frozen=True)
class Gallery:
    """Real clips and their reconstructions, pixel for pixel as they were scored."""

    real: NDArray[np.uint8]
    """[N, T, H, W, 3]"""
    reconstruction: NDArray[np.uint8]
    """[N, T, H, W, 3]"""
    labels: tuple[str | None, ...]
    """Class of each clip, none without classes."""

    def save(self, url: str) -> None:
        """Publishes one npz file."""
        file = io.BytesIO()
        labels = np.array([label or "" for label in self.labels], dtype=np.str_)  # no class has an empty name
        np.savez_compressed(file, real=self.real, reconstruction=self.reconstruction, labels=labels)
        storage.publish_bytes(url, file.getvalue())

    @classmethod
    def load(cls, url: str) -> Gallery:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
        """
        with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
            labels = tuple(str(label) or None for label in arrays["labels"])
            return cls(arrays["real"], arrays["reconstruction"], labels)


def clips_per_class(classes: list[str]) -> dict[str | None, int]:
    """How many clips of which classes are worth showing: all of few classes, some of many; {None: n} without any."""
    shown: list[str | None] = list(classes[:MAX_CLASSES]) or [None]
    number = min(MAX_PER_CLASS, max(MIN_PER_CLASS, MAX_CLIPS // len(shown)))
    return dict.fromkeys(shown, number)


class GalleryPicker:
    """Takes the first clips of each class that is shown.

    Args:
        classes: of the data; none: clips without a class are shown.
    """

    def __init__(self, classes: list[str]) -> None:
        self._wanted = clips_per_class(classes)
        self._real: list[NDArray[np.uint8]] = []
        self._reconstruction: list[NDArray[np.uint8]] = []
        self._labels: list[str | None] = []

    def add(self, real: NDArray[np.uint8], reconstruction: NDArray[np.uint8], labels: Sequence[str | None]) -> None:
        """Looks at clips uint8 [B, T, H, W, 3], their reconstructions, and their B classes."""
        for clip, copy, label in zip(real, reconstruction, labels, strict=True):
            label = label if label in self._wanted else None
            if self._wanted.get(label, 0) > 0:
                self._wanted[label] -= 1
                self._real.append(clip.copy())  # the row itself would keep its whole batch
                self._reconstruction.append(copy.copy())
                self._labels.append(label)

    def gallery(self) -> Gallery:
        """What was taken, in order; at least one clip has been looked at."""
        return Gallery(np.array(self._real), np.array(self._reconstruction), tuple(self._labels))
