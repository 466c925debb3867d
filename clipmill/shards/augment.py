"""Random crops and flips of clips at load time. They depend on (seed, position) only, not on world size or workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipmill.shards.order import AUGMENTATION, derive_keys, splitmix64

__all__ = ["ClipAugmentation"]


@dataclass(frozen=True)
class ClipAugmentation:
    """Mirrors a random half of the clips, and crops each at a random place.

    Attributes:
        seed: seed of the run.
        hflip: whether half of the clips are mirrored left to right.
        crop: (height, width) of the crop in pixels, at most the clip's size; None keeps whole frames.
    """

    seed: int
    hflip: bool
    crop: tuple[int, int] | None

    def __call__(self, sample: dict[str, Any], position: int) -> dict[str, Any]:
        """Augments ``video`` uint8 [T, H, W, 3] of the sample at a position of the run; all frames get the same crop
        and flip.
        """
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
