"""Makes the plan, in the memory of a few batches: listing, recognizing, sorting and cutting go over scratch files."""

from clipmill.pipeline.planning.generation import extend_plan, make_plan, retry_videos

__all__ = ["extend_plan", "make_plan", "retry_videos"]
