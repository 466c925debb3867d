"""Counts the requests and bytes, and the time, of a resume and a freeze over many committed units.

    python benchmarks/tally.py [--units 100000] [--root s3://bucket/prefix]

Commit records of units of 25 videos are written first. Then the tally is read without segments (as after
`clips/tally/` was lost), published, read again with them, and both splits are frozen. A listing of n names counts as
n / 1,000 requests, as in a bucket. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.pipeline import tally
from clipmill.shards import commits
from clipmill.shards.freeze import freeze

PUT_THREADS = 32
HASH = "0" * 64
NUM_VIDEOS = 25
"""Of a unit."""


def main() -> None:
    """Writes the records and counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--root", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        numbers = measure(arguments.root or folder, arguments.units)
    print(json.dumps({"benchmark": "tally", "units": arguments.units, **numbers}))


def measure(root: str, num_units: int) -> dict[str, dict[str, float]]:
    """Requests, bytes read and seconds of each step."""
    config = RunConfig.model_validate({"root": root, "data": {"source": {"url": "s3://bucket/videos"}}})
    plan = SimpleNamespace(num_units=lambda split: {"train": num_units, "val": 0}[split], is_retried=lambda *_: False)
    url = config.folder("clips", "train")
    with ThreadPoolExecutor(PUT_THREADS) as writers:
        list(writers.map(lambda unit: _publish_record(url, unit), range(num_units)))
    steps: dict[str, dict[str, float]] = {}
    counted = _count(steps, "read_without_segments", lambda: tally.read_tally(config, plan))
    _count(steps, "publish", lambda: _publish_in_segments(config, counted))
    again = _count(steps, "read_with_segments", lambda: tally.read_tally(config, plan))
    assert again.total("num_videos") == NUM_VIDEOS * num_units
    known = again.parts["train"]
    _count(steps, "freeze", lambda: freeze(url, "clips", range(num_units), {}, {}, known=known))
    return steps


def _publish_in_segments(config: RunConfig, counted: tally.Tally) -> None:
    """As a driver does, which publishes after every segment's worth of units."""
    units = list(counted.unpublished)
    for first in range(0, len(units), tally.SEGMENT_UNITS):
        counted.unpublished = units[first : first + tally.SEGMENT_UNITS]
        tally.publish_tally(config, counted)


def _count(steps: dict[str, dict[str, float]], name: str, step: Callable[[], Any]) -> Any:
    """Runs a step and notes what it asked of the storage."""
    counts: Counter[str] = Counter()
    read_bytes, list_folder = storage.documents.read_bytes, storage.list_folder

    def reading(url: str) -> bytes:
        content = read_bytes(url)
        counts.update(requests=1, bytes=len(content))
        return content

    def listing(url: str) -> list[storage.Entry]:
        entries = list_folder(url)
        counts.update(requests=len(entries) // 1000 + 1)
        return entries

    storage.documents.read_bytes, storage.list_folder = reading, listing
    began = time.monotonic()
    try:
        result = step()
    finally:
        storage.documents.read_bytes, storage.list_folder = read_bytes, list_folder
    steps[name] = {**counts, "seconds": round(time.monotonic() - began, 2)}
    print(f"{name}: {steps[name]}", flush=True)
    return result


def _publish_record(url: str, unit: int) -> None:
    name = f"clips-{unit:06d}-00-{unit:08x}.tar"
    part = {"name": name, "bytes": 2**27, "sha256": HASH, "index_sha256": HASH, "samples": 1000}
    video = {
        "id": "0" * 16,
        "url": "class-000/video-000000000.mp4",
        "label": "class-000",
        "clips": 10,
        "short": False,
        "static": 0,
        "black": 0,
        "truncated": False,
        "filtered": None,
        "damaged_frames": 0,
        "joins": 0,
        "actions": False,
        "num_frames": 250,
        "info": {"codec": "h264", "width": 640, "height": 480, "fps": 25.0, "duration": 10.0},
    }
    body = {
        "unit": unit,
        "split": "train",
        "parts": [part],
        "videos": [video] * NUM_VIDEOS,
        "exclusions": [],
        "num_short": 0,
        "pixels": {"num_values": 1, "pixel_sum": 1, "pixel_square_sum": 1},
        "encoding": {"num_measured_clips": 0, "num_measured_values": 0, "squared_error": 0},
        "versions": {"clipmill": "0"},
    }
    record_url = storage.join(url, "commits", f"{unit:06d}.json")
    if not storage.is_local(record_url):
        storage.publish_document(record_url, body, commits.SCHEMA)
        return
    path = storage.local_path(record_url)  # not synced: that would take most of the time, and is not measured
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": commits.SCHEMA, **body}))


if __name__ == "__main__":
    main()
