"""Measures whether the memory of the stage ``shard`` grows with the number of videos.

Sends many small videos through one worker and follows the resident memory of the driver, the worker and its decoding
child. The last line is one JSON object: ``growth_mb`` is the highest total after the first 100 videos, minus the total
at that moment. Goal: at most 100.

    python benchmarks/shard_memory.py --videos 2000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

from clipmill.video import encode_mp4

FIRST_VIDEOS = 100
LIMIT_MB = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=2000)
    num_videos = parser.parse_args().videos
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        source = Path(folder, "source")
        num_bytes = write_videos(source, num_videos)
        config = {
            "root": str(Path(folder, "run")),
            "data": {
                "source": {"url": str(source)},
                "clip": {"num_frames": 8, "resolution": 64},
                "unit_bytes": 20 * num_bytes // num_videos,
            },
            "cluster": {"num_cpus": 2, "fanout_workers": 1},
        }
        Path(folder, "config.yaml").write_text(yaml.safe_dump(config))
        samples = follow(Path(folder, "config.yaml"), Path(folder, "run", "clips"))
    kinds = ("driver", "worker", "child")
    whole = [(done, parts) for done, parts in samples if len(parts) == len(kinds)]
    base = next(parts for done, parts in whole if done >= FIRST_VIDEOS)
    later = [parts for done, parts in whole if done >= FIRST_VIDEOS]
    growth_mb = max(sum(parts.values()) for parts in later) - sum(base.values())
    last = later[-1]
    for kind in kinds:
        print(f"{kind}: {base[kind]:.0f} MB after {FIRST_VIDEOS} videos, {last[kind]:.0f} MB at the end")
    result = {
        "benchmark": "shard_memory",
        "videos": num_videos,
        "first_mb": round(sum(base.values()), 1),
        "last_mb": round(sum(last.values()), 1),
        "growth_mb": round(growth_mb, 1),
        "limit_mb": LIMIT_MB,
    }
    print(json.dumps(result))
    sys.exit(growth_mb > LIMIT_MB)


def write_videos(source: Path, num_videos: int) -> int:
    """Videos of 16 frames of noise, no two alike; the bytes of all."""
    source.mkdir()
    generator = np.random.default_rng(0)
    num_bytes = 0
    for number in range(num_videos):
        coarse = generator.integers(0, 256, (16, 6, 8, 3), dtype=np.uint8)
        data = encode_mp4(coarse.repeat(16, axis=1).repeat(16, axis=2), fps=10, crf=30)
        (source / f"{number:05d}.mp4").write_bytes(data)
        num_bytes += len(data)
    return num_bytes


def follow(config: Path, clips: Path) -> list[tuple[int, dict[str, float]]]:
    """Runs the stage; (videos finished, resident MB of driver, worker and child), several times a second."""
    stage = [sys.executable, "-m", "clipmill.cli", "shard", "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(stage, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    samples = []
    finished: dict[Path, int] = {}
    try:
        while driver.poll() is None:
            for record in set(clips.glob("*/commits/*.json")) - finished.keys():
                finished[record] = len(json.loads(record.read_bytes())["videos"])
            samples.append((sum(finished.values()), resident_mb(psutil.Process(driver.pid))))
            time.sleep(0.3)
    finally:
        driver.kill()
    if driver.returncode:
        sys.exit(f"the stage ended with status {driver.returncode}")
    return samples


def resident_mb(driver: psutil.Process) -> dict[str, float]:
    """Resident megabytes of those of the three that live now."""
    found = {}
    try:
        for process in [driver, *driver.children(recursive=True)]:
            command = " ".join(process.cmdline())
            if process == driver:
                kind = "driver"
            elif "ray::FanoutActor" in command:
                kind = "worker"
            elif "clipmill.video.worker" in command:
                kind = "child"
            else:
                continue
            found[kind] = process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return {}
    return found


if __name__ == "__main__":
    main()
