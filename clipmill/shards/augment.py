"""Random crops and flips of clips as they are read: functions of (seed, position), for any world size and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipmill.shards.order import AUGMENTATION, derive_keys, splitmix64

__all__ = ["ClipAugmentation"]


@dataclass(frozen=True)
class ClipAugmentation:
    """Mirrors half of the clips, at random, and crops each at a random place.

    Attributes:
        seed: of the run.
        hflip: whether clips are mirrored.
        crop: (height, width) of the crop in pixels, at most the clip's; None keeps whole frames.
    """

    seed: int
    hflip: bool
    crop: tuple[int, int] | None

    def __call__(self, sample: dict[str, Any], position: int) -> dict[str, Any]:
        """Changes ``video`` uint8 [T, H, W, 3] of the sample at a position of the run, all of its frames alike."""
        key = derive_keys(self.seed, AUGMENTATION, np.array([position]))
        mirror, top, left = (int(number) for number in splitmix64(key, np.arange(3, dtype=np.uint64)))
        video = sample["video"]
        if self.crop is not None:
            height, width = self.crop
            top, left = top % (video.shape[1] - height + 1), left % (video.shape[2] - width + 1)
            video = video[:, top : top + height, left : left + width]
        if self.hflip and mirror % 2:
            video = video[:, :, ::-1]
        return {**sample, "video": video}
