"""Times the start-up of a training over a billion samples and the lookup of its batches, with a synthetic manifest.

    python benchmarks/loader_scale.py [--samples 1000000000] [--shards 100000]

Start-up is what a process does before its first batch, without imports: read and check the manifest, and order the
shards of the first epoch. A loader worker receives both as a pickle. Memory is that of the whole process, with torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 4096
WINDOW = 4096
MOST_SECONDS, MOST_MB, MOST_LOOKUP_MS = 3.0, 300.0, 10.0


def write_manifest(folder: Path, num_samples: int, num_shards: int) -> None:
    from clipmill.config import fingerprint

    counts = np.full(num_shards, num_samples // num_shards)
    counts[: num_samples % num_shards] += 1
    shards = []
    for number, samples in enumerate(counts.tolist()):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        name = f"tokens-{number:06d}-00-{digest[:8]}.tar"
        shards.append({"name": name, "bytes": 2**27, "sha256": digest, "index_sha256": digest, "samples": samples})
    identity = [[shard["name"], shard["sha256"], shard["samples"]] for shard in shards]
    document = {
        "schema": 1,
        "kind": "tokens",
        "units": list(range(num_shards)),
        "shards": shards,
        "num_samples": num_samples,
        "fingerprint": fingerprint({"kind": "tokens", "recipe": {}, "shards": identity}),
        "recipe": {},
        "facts": {},
    }
    (folder / "manifest.json").write_text(json.dumps(document))


def measure(folder: Path) -> dict[str, float]:
    from clipmill.shards.dataset import ShardDataset, decode_codes
    from clipmill.shards.manifest import Manifest
    from clipmill.shards.order import num_streams

    imported_mb = _memory_mb("VmRSS")
    began = time.perf_counter()
    dataset = ShardDataset(Manifest.load(str(folder), "tokens"), decode_codes, folder / "cache")
    order = dataset.order(seed=0, global_batch=BATCH, window=WINDOW)
    order.locate(order.batch_positions(0, BATCH))
    seconds = time.perf_counter() - began
    peak_mb = _memory_mb("VmHWM")
    assert order.num_streams == num_streams(BATCH)
    sent: list[bytes] = []
    pickle_seconds = _seconds(lambda: sent.append(pickle.dumps((dataset, order))), times=1)
    unpickle_seconds = _seconds(lambda: pickle.loads(sent[0]), times=1)
    steps = iter(range(1, 10**6, 997))
    return {
        "startup_seconds": seconds,
        "peak_memory_mb": peak_mb,
        "imports_memory_mb": imported_mb,
        "lookup_ms": 1000 * _seconds(lambda: order.locate(order.batch_positions(next(steps), BATCH)), times=20),
        "worker_pickle_seconds": pickle_seconds,
        "worker_unpickle_seconds": unpickle_seconds,
        "worker_pickle_mb": len(sent[0]) / 2**20,
    }


def _seconds(work: Callable[[], Any], times: int) -> float:
    """The median."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**5)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="clipmill-benchmark-") as folder:
        write_manifest(Path(folder), options.samples, options.shards)
        command = [sys.executable, __file__, "--measure", folder]
        facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"start-up           {facts['startup_seconds']:.2f} s      (goal {MOST_SECONDS:g} s)")
    print(f"peak memory        {facts['peak_memory_mb']:.0f} MB      (goal {MOST_MB:g} MB; ", end="")
    print(f"imports alone {facts['imports_memory_mb']:.0f} MB)")
    print(f"lookup of {BATCH}     {facts['lookup_ms']:.2f} ms     (goal {MOST_LOOKUP_MS:g} ms)")
    print(
        f"to a loader worker {facts['worker_pickle_mb']:.0f} MB, pickled in {facts['worker_pickle_seconds']:.2f} s, "
        f"read in {facts['worker_unpickle_seconds']:.2f} s"
    )
    print(json.dumps({"benchmark": "loader_scale", "samples": options.samples, "shards": options.shards, **facts}))


if __name__ == "__main__":
    main()
