"""Compares the speed of the stage ``tokenize`` with a bare loop of the encoder over clips in memory, and two workers.

A worker's own code (`clipmill.tokenize.unit`: read, verify, decode, encode, pack, commit) and the bare loop encode the
same clips in the same batches. Each has one core for the model; the worker has a second core for decoding. Then two
workers, each with one core for model and decoding, share the units of one. Runs alternate; the results are medians.

    python benchmarks/tokenization.py [--rounds 5] [--clips 480] [--hidden-dim 32] [--format mp4]
    python benchmarks/tokenization.py --device cuda --hidden-dim 240 --decode-cpus 8    # on a GPU, one worker

prints the ratios and, as the last line, one JSON document. `--format mkv` is MJPEG. (A ``tokenize.py`` here would hide
the standard library's module of that name from all programs of this folder.)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import device_name

from clipmill.config import RunConfig, identity
from clipmill.demo import draw_video
from clipmill.lease import hold
from clipmill.models.export import load_vqvae, save_export
from clipmill.models.vqvae import VQVAE, latent_shape
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import SPLITS, Manifest
from clipmill.tokenize.ahead import ClipsAhead
from clipmill.tokenize.encoder import make_encoder
from clipmill.tokenize.unit import TIMES, Unit, make_worker
from clipmill.video import encode_mjpeg, encode_mp4

GOALS = {"stage_over_bare": 0.9, "two_workers_speedup": 1.7}
NUM_FRAMES, SIDE, NUM_UNITS = 16, 64, 4


def make_run(root: Path, arguments: argparse.Namespace) -> RunConfig:
    """Clips of the demo's videos in units of equal size, and a tokenizer of random weights."""
    config = RunConfig.model_validate(
        {
            "root": str(root),
            "data": {"clip": {"num_frames": NUM_FRAMES, "resolution": SIDE}},
            "vqvae": {
                "model": {
                    "hidden_dim": arguments.hidden_dim,
                    "num_res_layers": 2,
                    "axial_attention": arguments.axial_attention,
                    "downsample": (4, 4, 4),
                }
            },
            "tokenize": {
                "precision": arguments.precision,
                "batch_size": arguments.batch_size,
                "decode_cpus": arguments.decode_cpus,
            },
            "cluster": {"use_gpu": arguments.device == "cuda"},
        }
    )
    encode = encode_mp4 if arguments.format == "mp4" else encode_mjpeg
    videos = [draw_video(0, number)[1] for number in range(-(-arguments.clips // 2))]
    clips = [
        encode(video[first : first + NUM_FRAMES], 12.5, 90 if arguments.format == "mkv" else 16)
        for video in videos
        for first in (0, 20)
    ]
    about = json_bytes({"label": None, "text": None})
    for split in SPLITS:
        for number in range(NUM_UNITS):
            parts = root / "parts" / split / str(number)
            parts.mkdir(parents=True)
            writer = UnitWriter(parts, "clips", number, 2**27)
            for ordinal, clip in enumerate(clips[number::NUM_UNITS] if split == "train" else clips[:1]):
                writer.add(Sample(f"{number:016x}_{ordinal:06d}", {arguments.format: clip, "json": about}))
            commit_unit(config.folder("clips", split), number, writer.finish(), {})
        recipe = {"clip": identity(config.data.clip)}
        freeze(config.folder("clips", split), "clips", range(NUM_UNITS), recipe, {"num_units": NUM_UNITS})
    model = VQVAE(config.vqvae.model, 0.06)
    body = {
        "kind": "vqvae",
        "model": identity(config.vqvae.model),
        "latent_shape": latent_shape(config.vqvae.model, NUM_FRAMES, (SIDE, SIDE)),
        "num_codes": config.vqvae.model.num_codes,
        "clip": recipe,
        "pixel_variance": 0.06,
        "step": 0,
    }
    save_export(config.folder("vqvae"), model, body)
    return config


# ------------------------------------------------------------------------------------------ one process


def serve(pipe: Connection, config: RunConfig, cores: list[int], units: list[int]) -> None:
    """Encodes the units, as a worker and in the bare loop, whenever it is asked to; answers with seconds."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    manifest = Manifest.load(config.folder("clips", "train"), "clips")
    work = [Unit("train", number, (manifest.shards[number].name,)) for number in units]
    _, _, tokenizer = load_vqvae(config.tokenizer_url)
    tokens = Path(config.folder("tokens"))
    with tempfile.TemporaryDirectory() as own:
        config = config.model_copy(update={"root": own})
        for name in ("clips", "vqvae"):
            Path(own, name).symlink_to(tokens.with_name(name))
        with hold(config.folder("tokens"), "tokenize") as lease:
            encode_unit = make_worker(config, lease, tokenizer)
            calls = {"stage": lambda: _stage(config, encode_unit, work), "bare": _bare_loop(config, manifest, work)}
            pipe.send("ready")
            while (name := pipe.recv()) is not None:
                began = time.perf_counter()
                times = calls[name]()
                pipe.send({"wall": time.perf_counter() - began, **times})


def _stage(config: RunConfig, encode_unit: Callable[[Unit], dict[str, Any]], work: list[Unit]) -> dict[str, float]:
    shutil.rmtree(config.folder("tokens", "train"), ignore_errors=True)
    results = [encode_unit(unit) for unit in work]
    return {name: sum(result[name] for result in results) for name in TIMES}


def _bare_loop(config: RunConfig, manifest: Manifest, work: list[Unit]) -> Callable[[], dict[str, float]]:
    model, body, _ = load_vqvae(config.tokenizer_url)
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    encoder = make_encoder(model, body["num_codes"], device, config.tokenize, body["clip"]["clip"])
    batches: list[list[np.ndarray]] = []
    for unit in work:
        with ClipsAhead(manifest, unit.shards, Path(tempfile.gettempdir()), encoder.batch_size, 1) as ahead:
            batches += [[clip.video for clip in batch] for batch in ahead]

    def loop() -> dict[str, float]:
        codes = [encoder.start(batch) for batch in batches]
        for each in codes:
            encoder.finish(each)
        return {}

    return loop


class Process:
    """A process that encodes on its own cores."""

    def __init__(self, config: RunConfig, cores: list[int], units: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, config, cores, units))
        self.process.start()
        assert self.pipe.recv() == "ready"

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def go(processes: list[Process], name: str) -> dict[str, float]:
    """All processes at once; the times of the first, and the wall time of all."""
    began = time.perf_counter()
    for process in processes:
        process.pipe.send(name)
    answers = [process.pipe.recv() for process in processes]
    return {**answers[0], "wall": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--hidden-dim", type=int, default=32)
    parser.add_argument("--axial-attention", action="store_true")
    parser.add_argument("--format", choices=("mp4", "mkv"), default="mp4")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--decode-cpus", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    units = list(range(NUM_UNITS))
    result: dict[str, Any] = {"benchmark": "tokenize", "device": device_name(), "goals": GOALS, **vars(arguments)}
    result["load"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        config = make_run(Path(folder), arguments)
        groups = {"beside": [Process(config, cores, units)]}
        if arguments.device == "cpu" and len(cores) > 1:
            groups["one"] = [Process(config, cores[:1], units)]
            groups["two"] = [Process(config, [core], units[place::2]) for place, core in enumerate(cores[:2])]
        runs = {"bare": ("beside", "bare"), "stage": ("beside", "stage")}
        runs |= {name: (name, "stage") for name in groups.keys() - {"beside"}}
        times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for number in range(arguments.rounds + 1):
            for name, (group, call) in runs.items():
                measured = go(groups[group], call)
                if number:  # the first round warms up
                    times[name].append(measured)
        for processes in groups.values():
            for process in processes:
                process.end()
    result |= summary(times, arguments.clips)
    print(json.dumps(result))


def summary(times: dict[str, list[dict[str, float]]], num_clips: int) -> dict[str, Any]:
    """Ratios of medians, and how long the encoder waited."""
    wall = {name: statistics.median(each["wall"] for each in runs) for name, runs in times.items()}
    found: dict[str, Any] = {
        "bare_clips_per_second": num_clips / wall["bare"],
        "stage_clips_per_second": num_clips / wall["stage"],
        "stage_over_bare": statistics.median(
            bare["wall"] / stage["wall"] for bare, stage in zip(times["bare"], times["stage"], strict=True)
        ),
        **{name: statistics.median(each[name] for each in times["stage"]) for name in TIMES},
    }
    if "two" in times:
        found["two_workers_speedup"] = statistics.median(
            one["wall"] / two["wall"] for one, two in zip(times["one"], times["two"], strict=True)
        )
    for name, value in found.items():
        print(f"{name:28} {value:.3f}")
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
