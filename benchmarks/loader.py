"""Per-clip codes through four loaders: samples a second of one process, first batch, resume, memory.

    python benchmarks/loader.py [--samples 50000] [--shape 4,16,16] [--folder DIR]

Each loader reads the same codes from the local disk (page cache warm), shuffled over its whole reach, in batches of 64
int64 tensors with their labels, in a process of its own. webdataset reads the very shards that we read; litdata and
mosaicml-streaming get them converted to their own formats first. Resume is the time from a fresh process state to the
batch after half an epoch; webdataset has no other way than to read everything before it. One that is not installed is
left out (`pip install litdata mosaicml-streaming`; their pins of boto3 may ask for an environment of their own).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
SHARD_BYTES = 16 * 2**20
LABELS = 10
NAMES = {"clipmill": "clipmill", "webdataset": "webdataset", "litdata": "litdata", "streaming": "streaming"}
"""Loaders, and the module that each one needs."""

Batches = Callable[[int], Iterator[Any]]
"""Number of batches to leave out -> the batches from there on."""


# ----------------------------------------------------------------------------------------- the data sets


def write_all(folder: Path, num_samples: int, shape: tuple[int, ...], names: list[str]) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 2048, (num_samples, *shape), dtype=np.uint16)
    write_shards(folder, codes)
    if "litdata" in names:
        from litdata.streaming import Cache

        cache = Cache(str(folder / "litdata"), chunk_bytes=SHARD_BYTES)
        for index, sample in enumerate(codes):
            cache[index] = {"codes": sample, "label": index % LABELS}
        cache.done()
        cache.merge()
    if "streaming" in names:
        from streaming import MDSWriter

        columns = {"codes": "ndarray:uint16", "label": "int"}
        with MDSWriter(out=str(folder / "streaming"), columns=columns, size_limit=SHARD_BYTES) as writer:
            for index, sample in enumerate(codes):
                writer.write({"codes": sample, "label": index % LABELS})


def write_shards(folder: Path, codes: np.ndarray) -> None:
    from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
    from clipmill.shards.manifest import commit_unit, freeze

    (staging := folder / "staging").mkdir()
    writer = UnitWriter(staging, "tokens", 0, SHARD_BYTES)
    for index, sample in enumerate(codes):
        members = {"codes.npy": npy_bytes(sample), "json": json_bytes({"label": str(index % LABELS)})}
        writer.add(Sample(f"{index // 10:016x}_{index % 10:06d}", members))
    url = str(folder / "tokens")
    commit_unit(url, 0, writer.finish(), {})
    freeze(url, "tokens", [0], {}, {})


# ------------------------------------------------------------------------------------------- the loaders


def clipmill(folder: Path) -> Batches:
    from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
    from clipmill.shards.manifest import Manifest
    from clipmill.shards.order import Order, num_streams

    dataset = ShardDataset(Manifest.load(str(folder / "tokens"), "tokens"), decode_codes, folder / "cache")
    order = Order(dataset.manifest.counts, 0, num_streams(BATCH), 4096)

    def batches(first: int) -> Iterator[Any]:
        steps = train_batches(
            dataset,
            order,
            global_batch=BATCH,
            micro_batch=None,
            rank=0,
            world_size=1,
            first_step=first,
            num_workers=0,
        )
        for (batch,) in steps:
            yield batch["codes"]

    return batches


def webdataset(folder: Path) -> Batches:
    import webdataset as wds

    from clipmill.shards.format import parse_npy

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        # Our own reader of npy files, which is faster than numpy's: the difference shown is the pipelines', not its.
        return parse_npy(sample["codes.npy"]).astype(np.int64), json.loads(sample["json"])["label"]

    urls = sorted(map(str, (folder / "tokens").glob("*.tar")))

    def batches(first: int) -> Iterator[Any]:
        pipeline = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(4096).map(decode)
        for number, batch in enumerate(pipeline.repeat().batched(BATCH, collation_fn=_stack)):
            if number >= first:
                yield batch

    return batches


def _stack(samples: list[tuple[np.ndarray, str]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([codes for codes, _ in samples]))


def litdata(folder: Path) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    def batches(first: int) -> Iterator[Any]:
        dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, seed=0)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_stack_dicts)
        if first:  # as a checkpoint of this loader holds it
            loader.load_state_dict(_litdata_state(dataset, first))
        while True:
            yield from loader

    return batches


def _litdata_state(dataset: Any, num_batches: int) -> dict[str, Any]:
    state = dataset.state_dict(num_samples_yielded=num_batches * BATCH, num_workers=0, batch_size=BATCH)
    return {
        "dataset": state,
        "current_epoch": 1,
        "latest_worker_idx": 0,
        "num_samples_yielded": num_batches * BATCH,
    }


def streaming(folder: Path) -> Batches:
    from streaming import StreamingDataLoader, StreamingDataset

    def batches(first: int) -> Iterator[Any]:
        dataset = StreamingDataset(local=str(folder / "streaming"), shuffle=True, shuffle_seed=0, batch_size=BATCH)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_stack_dicts)
        if first:
            loader.load_state_dict(dataset.state_dict(first * BATCH, False))
        while True:
            yield from loader

    return batches


def _stack_dicts(samples: list[dict[str, Any]]) -> Any:
    return _stack([(sample["codes"].astype(np.int64), sample["label"]) for sample in samples])


# ------------------------------------------------------------------------------------------- measurement


def measure(name: str, folder: Path, num_samples: int, seconds: float) -> dict[str, float]:
    """In a process of its own: memory is its peak, and no loader warms another's imports."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    batches = {"clipmill": clipmill, "webdataset": webdataset, "litdata": litdata, "streaming": streaming}[name](folder)
    running = batches(0)
    first = next(running)
    first_seconds = time.perf_counter() - began
    assert first.dtype == torch.int64
    assert len(first) == BATCH

    for _ in range(50):
        next(running)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - began) < seconds:
        next(running)
        count += BATCH
    cpu_seconds = time.process_time() - cpu
    memory_mb = _peak_memory_mb()
    del running

    began = time.perf_counter()
    next(batches(num_samples // BATCH // 2))
    return {
        "samples_per_second": count / elapsed,
        "samples_per_cpu_second": count / cpu_seconds,
        "first_batch_seconds": first_seconds,
        "resume_seconds": time.perf_counter() - began,
        "peak_memory_mb": memory_mb,
    }


def _peak_memory_mb() -> float:
    """Of this process with torch and the mapped shards; rusage would show the parent's, which exec hands down."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--shape", default="4,16,16")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3, help="the loaders take turns; the medians count")
    parser.add_argument("--folder", type=Path, help="where to write the data sets; none: a temporary folder")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.folder, options.samples, options.seconds)), flush=True)
        os._exit(0)  # some loaders leave threads that never end
    names = [name for name, module in NAMES.items() if importlib.util.find_spec(module)]
    with tempfile.TemporaryDirectory(prefix="clipmill-benchmark-", dir=options.folder) as scratch:
        folder = Path(scratch)
        write_all(folder, options.samples, tuple(map(int, options.shape.split(","))), names)
        rounds = [{name: _measure_alone(name, folder, options) for name in names} for _ in range(options.rounds)]
    result = {
        name: {key: float(np.median([each[name][key] for each in rounds])) for key in rounds[0][name]} for name in names
    }
    for name, facts in result.items():
        print(f"{name:12}", "  ".join(f"{key} {value:.4g}" for key, value in facts.items()))
    ratios = {
        name: result["clipmill"]["samples_per_cpu_second"] / facts["samples_per_cpu_second"]
        for name, facts in result.items()
    }
    print(json.dumps({"benchmark": "loader", "samples": options.samples, "clipmill_over": ratios, **result}))


def _measure_alone(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder)]
    command += ["--samples", str(options.samples), "--seconds", str(options.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
