"""Makes the plan as a stream: listing, recognizing, sorting and cutting hold only a few batches in memory."""

from clipmill.pipeline.planning.generation import extend_plan, make_plan, retry_videos

__all__ = ["extend_plan", "make_plan", "retry_videos"]
