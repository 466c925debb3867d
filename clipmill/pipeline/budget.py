"""How many videos may fail before the stage assumes a common cause and stops."""

from __future__ import annotations

from dataclasses import dataclass

from clipmill.config import DataConfig
from clipmill.pipeline.plan import Unit

__all__ = ["FIRST_VIDEOS", "Allowance", "allowed_failures"]

FIRST_VIDEOS = 20
"""If all videos of a new source fail from its start, up to this number of files, the stage assumes a common cause."""


def allowed_failures(data: DataConfig, num_finished: int) -> int:
    """The budget: how many of the finished videos may have failed."""
    return max(data.max_failed_videos, int(data.max_failed_share * num_finished))


@dataclass(frozen=True)
class Allowance:
    """Failures that a worker accepts in one unit before it gives the unit up.

    Attributes:
        num_videos: failed videos that the budget allows in the whole plan.
        is_new: whether no video of this source has succeeded yet.
    """

    num_videos: int
    is_new: bool

    def is_exceeded(self, data: DataConfig, unit: Unit, num_tried: int, num_failed: int) -> bool:
        """Whether the failures of a unit exceed the allowance, so that a common cause is assumed."""
        if num_failed > self.num_videos:
            return True
        if not self.is_new or num_failed < num_tried or num_failed <= allowed_failures(data, num_tried):
            return False
        return len({video.url for video in unit.videos[:num_tried]}) >= FIRST_VIDEOS
