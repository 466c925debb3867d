"""Measures the cost of planning at scale, from the listing of a bucket with many videos.

    python benchmarks/plan.py --videos 10000000 [--root FOLDER]

Prints seconds and the peak resident set of each, and one JSON line last. The bucket is an S3 server in a process of its
own on this machine, which makes pages of 1,000 objects up; its work is part of the seconds. ``--root``: where the
plan goes, a new temporary folder unless it is named.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import hold
from clipmill.pipeline.plan import load_plan
from clipmill.pipeline.planning import generation
from clipmill.pipeline.planning.yields import NOTHING_KNOWN


def main() -> None:
    """Measures, and prints the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=10_000_000)
    parser.add_argument("--root", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        numbers = measure_plan(f"{arguments.root or folder}/plan", arguments.videos)
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


@contextmanager
def _emulated_s3(*nums_objects: int) -> Iterator[None]:
    """A server of buckets of so many objects, ``b<number>``; this process reaches it by the usual variables."""
    command = [sys.executable, "-m", "tests.storage.s3_server", *map(str, nums_objects)]
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


def _config(root: str, unit_bytes: int, url: str) -> RunConfig:
    data = {"source": {"url": url}, "unit_bytes": unit_bytes}
    return RunConfig.model_validate({"root": root, "data": data})


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
