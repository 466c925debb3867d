"""What planning costs at scale: the listing of a bucket of many videos, and the resume decision over many units.

    python benchmarks/plan.py --videos 10000000 --units 100000 [--root FOLDER]

Prints seconds and the peak resident set of each, and one JSON line last. The bucket is an S3 server in a process of its
own on this machine, which makes pages of 1,000 objects up; its work is part of the seconds. ``--root``: where plan and
commit records go, a new temporary folder unless it is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import hold
from clipmill.pipeline import tally
from clipmill.pipeline.plan import load_plan
from clipmill.pipeline.planning import generation, listing
from clipmill.pipeline.planning.yields import NOTHING_KNOWN
from clipmill.pipeline.sources.record import SourceVideo

VIDEO_BYTES = 2 * 2**20
PUT_THREADS = 32


def main() -> None:
    """Runs both measurements, each on a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=10_000_000)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--root", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        root = arguments.root or folder
        numbers = measure_plan(f"{root}/plan", arguments.videos) if arguments.videos else {}
        if arguments.units:
            numbers |= measure_resume(f"{root}/resume", arguments.units)
    print(json.dumps({"benchmark": "plan", **numbers}))


def measure_plan(root: str, num_videos: int) -> dict[str, float]:
    """Plans a bucket, loads the plan as a resumed run does, and extends it by what has not been there."""
    num_more = num_videos + num_videos // 100
    with _emulated_s3(num_videos, num_more):
        return _measure_plan(root, f"s3://b{num_videos}/raw", f"s3://b{num_more}/raw", num_videos)


def _measure_plan(root: str, url: str, more_url: str, num_videos: int) -> dict[str, float]:
    config = _config(root, unit_bytes=256 * 2**20, url=url)
    generation.measure_yield = lambda *_: NOTHING_KNOWN  # the objects have no content
    start_mib = _peak_gib() * 1024
    next(iter(storage.walk(url)))
    first_mib = _peak_gib() * 1024 - start_mib
    print(f"first entry of the listing: {first_mib:.0f} MiB more than the {start_mib:.0f} before", flush=True)
    began = time.monotonic()
    with hold(config.folder("clips"), "shard") as lease:
        generation.make_plan(config, lease)
    seconds = time.monotonic() - began
    peak_gib = _peak_gib()
    print(f"planned {num_videos:,} videos in {seconds:.1f} s, peak {peak_gib:.2f} GiB", flush=True)
    began = time.monotonic()
    plan = load_plan(config)
    load_seconds = time.monotonic() - began
    config = _config(root, unit_bytes=256 * 2**20, url=more_url)
    began = time.monotonic()
    with hold(config.folder("clips"), "shard") as lease:
        generation.extend_plan(config, lease, plan)
    extend_seconds = time.monotonic() - began
    print(
        f"loaded it in {load_seconds:.1f} s; extended it by 1 % in {extend_seconds:.1f} s, peak {_peak_gib():.2f} GiB"
    )
    return {
        "videos": num_videos,
        "first_entry_mib": round(first_mib, 1),
        "plan_seconds": round(seconds, 2),
        "plan_peak_gib": round(peak_gib, 3),
        "load_seconds": round(load_seconds, 2),
        "extend_seconds": round(extend_seconds, 2),
        "extend_peak_gib": round(_peak_gib(), 3),
    }


def measure_resume(root: str, num_units: int) -> dict[str, float]:
    """Decides what is left to do, where so many units are committed: first from the records, then from the tally."""
    config = _config(root, unit_bytes=1)
    generation.measure_yield = lambda *_: NOTHING_KNOWN
    listing.list_videos = lambda *_: _listed(num_units)
    with hold(config.folder("clips"), "shard") as lease:
        plan = generation.make_plan(config, lease)
    with ThreadPoolExecutor(PUT_THREADS) as writers:
        for split in ("train", "val"):
            url = config.folder("clips", split)
            record = json.dumps(_record(split)).encode()
            list(
                writers.map(
                    lambda number, url=url, record=record: storage.publish_bytes(
                        f"{url}/commits/{number:06d}.json", record.replace(b'"unit": 0', f'"unit": {number}'.encode())
                    ),
                    range(plan.num_units(split)),
                )
            )
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        counted = tally.read_tally(config, load_plan(config))
        seconds.append(time.monotonic() - began)
        assert counted.total("num_videos") == num_units
        tally.publish_tally(config, counted)
    print(f"resume of {num_units:,} units: {seconds[0]:.1f} s from the records, {seconds[1]:.1f} s with the tally")
    return {"units": num_units, "first_resume_seconds": round(seconds[0], 2), "resume_seconds": round(seconds[1], 2)}


@contextmanager
def _emulated_s3(*nums_objects: int) -> Iterator[None]:
    """A server of buckets of so many objects, ``b<number>``; this process reaches it by the usual variables."""
    command = [sys.executable, "-m", "tests.s3.emulated", *map(str, nums_objects)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        yield


def _config(root: str, unit_bytes: int, url: str = "s3://bucket/videos") -> RunConfig:
    data = {"source": {"url": url}, "unit_bytes": unit_bytes}
    return RunConfig.model_validate({"root": root, "data": data})


def _listed(num_videos: int) -> Iterator[SourceVideo]:
    for number in range(num_videos):
        etag = hashlib.md5(number.to_bytes(8), usedforsecurity=False).hexdigest()
        name = f"class-{number % 400:03d}/video-{number:09d}.mp4"
        yield SourceVideo(name, VIDEO_BYTES + number % 4096, etag, label=f"class-{number % 400:03d}")


def _record(split: str) -> dict[str, object]:
    """A commit record as a unit of 100 videos would leave it, but for one video that is counted."""
    video = {
        "id": "0" * 16,
        "url": "class-000/video-000000000.mp4",
        "label": "class-000",
        "clips": 1,
        "short": False,
        "static": 0,
        "black": 0,
        "truncated": False,
        "actions": False,
    }
    return {
        "schema": 1,
        "unit": 0,
        "split": split,
        "parts": [],
        "videos": [video],
        "exclusions": [],
        "num_short": 0,
        "pixels": {"num_values": 1, "pixel_sum": 1, "pixel_square_sum": 1},
        "encoding": {"num_measured_clips": 0, "num_measured_values": 0, "squared_error": 0},
        "versions": {"clipmill": "0"},
        "padding": [video] * 99,
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
