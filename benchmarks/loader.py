"""Compares four loaders on per-clip codes: samples per second of one process, first batch, resume, memory.

    python benchmarks/loader.py [--samples 50000] [--shape 4,16,16] [--folder DIR] [--others-python PYTHON]
    python benchmarks/loader.py --s3 s3://bucket/folder

Each loader reads the same codes, shuffled as widely as it can, in batches of 64 int64 tensors with their labels, in its
own process. webdataset reads the same shards as clipmill; for litdata and mosaicml-streaming they are first converted
to their own formats. Resume is the time from a fresh process to the batch after half an epoch; webdataset can only read
everything before it.

From the local disk (warm page cache), the rate is that of a running training. From a bucket (AWS_ENDPOINT_URL and
credentials as usual; ``python -m tests.s3.gateway`` starts a server), it is that of the first epoch with an empty
cache, measured from after the imports.

A loader that is not installed is skipped. The pinned versions of litdata and mosaicml-streaming conflict with our s3fs,
so they need a separate environment, whose interpreter ``--others-python`` names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
SHARD_BYTES = 16 * 2**20
LABELS = 10
OURS, OTHERS = ("clipmill", "webdataset"), ("litdata", "streaming")
"""Loaders by the environment that they are in; each has the name of its module."""

Batches = Callable[[int], Iterator[Any]]
"""Number of batches to leave out -> the batches from there on."""


@dataclass(frozen=True)
class Place:
    """Where a loader finds its data set, and where it may keep what it downloads."""

    url: str
    cache: Path

    @property
    def is_remote(self) -> bool:
        return self.url.startswith("s3://")


# ----------------------------------------------------------------------------------------- the data sets


def write(name: str, folder: Path, num_samples: int, shape: tuple[int, ...]) -> None:
    """The data set of one loader, in the folder of its name."""
    codes = np.random.default_rng(0).integers(0, 2048, (num_samples, *shape), dtype=np.uint16)
    if name in OURS:
        write_shards(folder, codes)
    elif name == "litdata":
        from litdata.streaming import Cache

        cache = Cache(str(folder / name), chunk_bytes=SHARD_BYTES)
        for index, sample in enumerate(codes):
            cache[index] = {"codes": sample, "label": index % LABELS}
        cache.done()
        cache.merge()
    else:
        from streaming import MDSWriter

        columns = {"codes": "ndarray:uint16", "label": "int"}
        with MDSWriter(out=str(folder / name), columns=columns, size_limit=SHARD_BYTES) as writer:
            for index, sample in enumerate(codes):
                writer.write({"codes": sample, "label": index % LABELS})


def write_shards(folder: Path, codes: np.ndarray) -> None:
    from clipmill.shards.commits import commit_unit
    from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
    from clipmill.shards.freeze import freeze

    (staging := folder / "staging").mkdir()
    writer = UnitWriter(staging, "tokens", 0, SHARD_BYTES)
    for index, sample in enumerate(codes):
        members = {"codes.npy": npy_bytes(sample), "json": json_bytes({"label": str(index % LABELS)})}
        writer.add(Sample(f"{index // 10:016x}_{index % 10:06d}", members))
    url = str(folder / OURS[0])
    commit_unit(url, 0, writer.finish(), {})
    freeze(url, "tokens", [0], {}, {})


def upload(folder: Path, url: str) -> None:
    from clipmill import storage

    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.parent.name != "staging":
            storage.publish_file(path, storage.join(url, path.relative_to(folder).as_posix()))


# ------------------------------------------------------------------------------------------- the loaders


def clipmill(place: Place) -> Batches:
    from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
    from clipmill.shards.manifest import Manifest

    if place.is_remote:
        import s3fs  # noqa: F401  which fsspec would import only when it is asked for a bucket

    def batches(first: int) -> Iterator[Any]:
        dataset = ShardDataset(Manifest.load(place.url, "tokens"), decode_codes, place.cache)
        order = dataset.order(seed=0, global_batch=BATCH, window=4096)
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


def webdataset(place: Place) -> Batches:
    import webdataset as wds

    from clipmill import storage
    from clipmill.shards.format import parse_npy

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        # Our own reader of npy files, which is faster than numpy's: the difference shown is the pipelines', not its.
        return parse_npy(sample["codes.npy"]), json.loads(sample["json"])["label"]

    names = sorted(entry.name for entry in storage.list_folder(place.url) if entry.name.endswith(".tar"))
    urls = [_signed(place.url, name) if place.is_remote else f"{place.url}/{name}" for name in names]
    cache: dict[str, Any] = {"cache_dir": str(place.cache)} if place.is_remote else {}

    def batches(first: int) -> Iterator[Any]:
        place.cache.mkdir(exist_ok=True)
        shards = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False, **cache)
        pipeline = shards.shuffle(4096).map(decode).repeat().batched(BATCH, collation_fn=_stack)
        yield from itertools.islice(pipeline, first, None)

    return batches


def _signed(url: str, name: str) -> str:
    """A URL for curl, which is how webdataset reads."""
    import botocore.session

    bucket, _, folder = url.removeprefix("s3://").partition("/")
    client = botocore.session.get_session().create_client("s3")
    return client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": f"{folder}/{name}"}, ExpiresIn=86400)


def _stack(samples: list[tuple[np.ndarray, Any]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([codes for codes, _ in samples], dtype=np.int64))


def litdata(place: Place) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    cache: dict[str, Any] = {"cache_dir": str(place.cache)} if place.is_remote else {}

    def batches(first: int) -> Iterator[Any]:
        dataset = StreamingDataset(place.url, shuffle=True, seed=0, **cache)
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


def streaming(place: Place) -> Batches:
    from streaming import StreamingDataLoader, StreamingDataset

    os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
    where = {"remote": place.url, "local": str(place.cache)} if place.is_remote else {"local": place.url}

    def batches(first: int) -> Iterator[Any]:
        dataset = StreamingDataset(**where, shuffle=True, shuffle_seed=0, batch_size=BATCH)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_stack_dicts)
        if first:
            loader.load_state_dict(dataset.state_dict(first * BATCH, False))
        while True:
            yield from loader

    return batches


def _stack_dicts(samples: list[dict[str, Any]]) -> Any:
    return _stack([(sample["codes"], sample["label"]) for sample in samples])


# ------------------------------------------------------------------------------------------- measurement


def measure(name: str, place: Place, num_samples: int, seconds: float) -> dict[str, float]:
    """In a process of its own: memory is its peak, and no loader warms another's imports."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    batches = {"clipmill": clipmill, "webdataset": webdataset, "litdata": litdata, "streaming": streaming}[name](place)
    cpu = time.process_time()
    running = batches(0)
    imported = time.perf_counter()
    first = next(running)
    first_seconds = time.perf_counter() - began
    assert first.dtype == torch.int64
    assert len(first) == BATCH

    count = BATCH
    if not place.is_remote:
        for _ in range(50):
            next(running)
        count, imported, cpu = 0, time.perf_counter(), time.process_time()
    is_done = (lambda: count >= num_samples) if place.is_remote else (lambda: time.perf_counter() - imported >= seconds)
    while not is_done():
        next(running)
        count += BATCH
    elapsed, cpu_seconds = time.perf_counter() - imported, time.process_time() - cpu
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
    parser.add_argument("--s3", metavar="URL", help="an empty folder of a bucket to read from")
    parser.add_argument("--others-python", default=sys.executable, help="interpreter of the other loaders' environment")
    for hidden in ("--write", "--measure", "--url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write, options.folder, options.samples, tuple(map(int, options.shape.split(","))))
    elif options.measure:
        place = Place(options.url, options.folder)
        print(json.dumps(measure(options.measure, place, options.samples, options.seconds)), flush=True)
    else:
        compare(options)
    sys.stdout.flush()
    os._exit(0)  # some loaders leave threads that never end


def compare(options: argparse.Namespace) -> None:
    names = [*OURS, *(name for name in OTHERS if _is_installed(name, options.others_python))]
    with tempfile.TemporaryDirectory(prefix="clipmill-benchmark-", dir=options.folder) as scratch:
        folder = Path(scratch)
        for name in names[:1] + names[2:]:  # webdataset reads our shards
            _run(name, options, "--write", name, "--folder", scratch, "--shape", options.shape)
        if options.s3:
            upload(folder, options.s3)
        rounds = []
        for number in range(options.rounds):
            rounds.append({})
            for name in names:
                data = OURS[0] if name in OURS else name
                url = f"{options.s3.rstrip('/') if options.s3 else folder}/{data}"
                cache = folder / f"cache-{name}-{number if options.s3 else 0}"
                output = _run(name, options, "--measure", name, "--url", url, "--folder", str(cache))
                rounds[-1][name] = json.loads(output.splitlines()[-1])
    result = {
        name: {key: float(np.median([each[name][key] for each in rounds])) for key in rounds[0][name]} for name in names
    }
    for name, facts in result.items():
        print(f"{name:12}", "  ".join(f"{key} {value:.4g}" for key, value in facts.items()))
    ratios = {
        key: {name: result["clipmill"][key] / facts[key] for name, facts in result.items()}
        for key in ("samples_per_second", "samples_per_cpu_second")
    }
    where = "s3" if options.s3 else "disk"
    print(
        json.dumps(
            {"benchmark": "loader", "from": where, "samples": options.samples, "clipmill_over": ratios, **result}
        )
    )


def _is_installed(module: str, python: str) -> bool:
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", find]).returncode == 0


def _run(name: str, options: argparse.Namespace, *arguments: str) -> str:
    """This program again, in the loader's environment."""
    python = options.others_python if name in OTHERS else sys.executable
    command = [python, __file__, "--samples", str(options.samples), "--seconds", str(options.seconds), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
