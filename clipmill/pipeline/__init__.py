"""Stage ``shard``: raw videos become clip shards."""

from __future__ import annotations

from clipmill.pipeline.plan import Plan, load_plan, make_plan
from clipmill.pipeline.sources import SourceVideo, list_videos

__all__ = ["Plan", "SourceVideo", "list_videos", "load_plan", "make_plan"]
