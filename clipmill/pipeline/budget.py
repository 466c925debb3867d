"""How many videos may fail before the fault is hardly theirs."""

from __future__ import annotations

from dataclasses import dataclass

from clipmill.config import DataConfig
from clipmill.pipeline.plan import Unit

__all__ = ["FIRST_VIDEOS", "Allowance", "allowed_failures"]

FIRST_VIDEOS = 20
"""When the videos of this many files of a new source fail from the start and none succeeds, the fault is not theirs."""


def allowed_failures(data: DataConfig, num_finished: int) -> int:
    """The budget: how many of the videos that are finished may have failed."""
    return max(data.max_failed_videos, int(data.max_failed_share * num_finished))


@dataclass(frozen=True)
class Allowance:
    """What a unit may lose before its worker gives it up.

    Attributes:
        num_videos: failed videos that the budget allows in the whole plan.
        is_new: nothing of this source has succeeded yet.
    """

    num_videos: int
    is_new: bool

    def is_exceeded(self, data: DataConfig, unit: Unit, num_tried: int, num_failed: int) -> bool:
        """Whether the failures of a unit are hardly the fault of its videos."""
        if num_failed > self.num_videos:
            return True
        if not self.is_new or num_failed < num_tried or num_failed <= allowed_failures(data, num_tried):
            return False
        return len({video.url for video in unit.videos[:num_tried]}) >= FIRST_VIDEOS
