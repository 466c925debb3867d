"""Checks that sharding from and to a distant bucket is limited by decoding: compares it with the same on a local disk.

    python benchmarks/overlap.py [--videos 96] [--format mp4] [--delay 0.05] [--megabytes-per-second 20]

Both jobs run in this process with one decoding child, and alternate after each unit, so only the storage differs. The
bucket (`slow_s3.py`) answers each request after ``--delay`` seconds, at ``--megabytes-per-second`` per stream. Prints
the seconds of each, their ratio (1: the distance costs nothing), and the share of time in which no video was decoded
because of storage (which a busy machine hardly affects). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from slow_s3 import serve

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import hold
from clipmill.pipeline import unit
from clipmill.pipeline.ahead import FetchAhead
from clipmill.pipeline.budget import Allowance
from clipmill.pipeline.planning import make_plan
from clipmill.pipeline.unit import make_worker
from clipmill.pipeline.uploads import Uploads
from clipmill.video import encode_mp4

NUM_DIFFERENT = 4
"""Videos that are encoded; the others are copies with another end."""
NUM_UNITS = 4


def main() -> None:
    """Makes the videos, shards them in both places and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--format", choices=["mp4", "npy", "mjpeg"], default="mp4")
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--megabytes-per-second", type=float, default=20.0)
    arguments = parser.parse_args()
    videos = _videos(arguments.videos)
    with (
        tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder,
        serve(arguments.delay, arguments.megabytes_per_second * 1e6),
    ):
        roots = {"disk": folder, "bucket": "s3://bench"}
        for root in roots.values():
            for number, content in enumerate(videos):
                storage.publish_bytes(f"{root}/raw/{number:04d}.mp4", content)
        seconds, waited = _shard(roots, arguments.format, sum(map(len, videos)) // NUM_UNITS + 1)
    ratio, share = seconds["bucket"] / seconds["disk"], waited / sum(seconds.values())
    print(
        f"disk {seconds['disk']:.1f} s, bucket {seconds['bucket']:.1f} s: {ratio:.3f}; {share:.1%} waiting for storage"
    )
    numbers = {
        "ratio": round(ratio, 3),
        "waiting_share": round(share, 3),
        **{f"{name}_seconds": round(value, 2) for name, value in seconds.items()},
    }
    print(json.dumps({"benchmark": "overlap", **vars(arguments), **numbers}))


def _videos(count: int) -> list[bytes]:
    """Films of 8 s, some 1.5 MB each."""
    films = []
    for seed in range(NUM_DIFFERENT):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (200, 30, 40, 3), np.uint8)
        films.append(encode_mp4(coarse.repeat(12, axis=1).repeat(12, axis=2), 25, 30))
    return [films[number % NUM_DIFFERENT] + b"\0\0\0\x0cfree%04d" % number for number in range(count)]


def _shard(roots: dict[str, str], form: str, unit_bytes: int) -> tuple[dict[str, float], float]:
    """Seconds of all units but the first in each place; and those in which the decoder waited for storage, of both."""
    waits: list[float] = []
    FetchAhead.take = _timed(FetchAhead.take, waits)  # type: ignore[method-assign]
    Uploads.wait = _timed(Uploads.wait, waits)  # type: ignore[method-assign]
    unit.commit_unit = _timed(unit.commit_unit, waits)
    configs = {name: _config(root, form, unit_bytes) for name, root in roots.items()}
    seconds = dict.fromkeys(roots, 0.0)
    with (
        hold(configs["disk"].folder("clips"), "shard") as disk,
        hold(configs["bucket"].folder("clips"), "shard") as far,
    ):
        leases = {"disk": disk, "bucket": far}
        plans = {name: make_plan(configs[name], leases[name]) for name in roots}
        workers = {name: make_worker(configs[name], leases[name], Allowance(0, is_new=False)) for name in roots}
        for number in range(plans["disk"].num_units("train")):
            for name in roots:
                began = time.monotonic()
                workers[name](plans[name].unit("train", number))
                if number:  # the first one warms up
                    seconds[name] += time.monotonic() - began
                elif name == "bucket":
                    waits.clear()
        return seconds, sum(waits)


def _timed(method: Callable[..., Any], waits: list[float]) -> Callable[..., Any]:
    """The method, which notes how long it takes."""

    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return method(*arguments, **options)
        finally:
            waits.append(time.monotonic() - began)

    return timed


def _config(root: str, form: str, unit_bytes: int) -> RunConfig:
    data = {
        "source": {"url": f"{root}/raw"},
        "clip": {"num_frames": 16, "resolution": 128},
        "format": form,
        "val_fraction": 0.0,
        "unit_bytes": unit_bytes,
    }
    return RunConfig.model_validate({"root": f"{root}/run", "data": data})


if __name__ == "__main__":
    main()
