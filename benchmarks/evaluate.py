"""Times an evaluation of 2,048 clips of 16 x 64 x 64 and as many samples, without networks, and follows its memory.

The models are those of the config `demo`, untrained: their numbers are meaningless, but their cost is the same. Clips
are random noise in mp4; samples are the same clips with their codes. The command runs as users run it, on workers that
Ray starts. The resident memory of all its processes is measured over time.

    python benchmarks/evaluate.py [--clips 2048]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from clipmill.config import RunConfig, identity, load_config
from clipmill.models.export import load_vqvae, save_export
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, codes_shape, to_input
from clipmill.sampling import sample
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest
from clipmill.video.encode import encode_mp4

GOAL_SECONDS = 120
EVERY_SECONDS = 0.5


def pixels_of(number: int) -> np.ndarray:
    """uint8 [16, 64, 64, 3]: coarse noise that drifts, other noise for every number."""
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (1, 8, 16, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    return np.concatenate([np.roll(coarse, frame, axis=2)[:, :, :64] for frame in range(16)])


def write_set(
    config: RunConfig, url: str, kind: Any, samples: list[Sample], recipe: dict[str, Any], **facts: Any
) -> Manifest:
    """A frozen data set of one unit."""
    with tempfile.TemporaryDirectory() as folder:
        writer = UnitWriter(Path(folder), kind, 0, config.data.shard_bytes)
        for each in samples:
            writer.add(each)
        body = {"recipe": recipe} if kind == "samples" else {}
        commit_unit(url, 0, writer.finish(), body)
    return freeze(url, kind, [0], recipe, {"classes": [], "num_units": 1, **facts})


def write_run(config: RunConfig, num_clips: int) -> None:
    """Clips, tokens, models and samples, as the stages write them."""
    about = json_bytes({"label": None, "fps": 8})
    videos = [encode_mp4(pixels_of(number), 8, config.data.crf) for number in range(num_clips)]
    keys = [f"{number:016x}_000000" for number in range(num_clips)]
    recipe = {"clip": identity(config.data.clip), "format": "mp4", "quality": config.data.crf}
    clips = {}
    for split, taken in (("train", 64), ("val", num_clips)):
        samples = [Sample(key, {"mp4": video, "json": about}) for key, video in zip(keys, videos, strict=True)][:taken]
        clips[split] = write_set(config, config.folder("clips", split), "clips", samples, recipe, pixel_variance=0.08)
    shape = codes_shape(config.vqvae.model, config.data.clip.num_frames, config.data.clip.size)
    tokenizer = VQVAE(config.vqvae.model, pixel_variance=0.08)
    tokenizer(to_input(torch.from_numpy(np.stack([pixels_of(number) for number in range(8)]))))
    body = {"kind": "vqvae", "model": identity(config.vqvae.model), "latent_shape": list(shape), "clip": recipe}
    body |= {"num_codes": config.vqvae.model.num_codes, "pixel_variance": 0.08, "identity": {}, "step": 1}
    sha8 = save_export(config.folder("vqvae"), tokenizer, body)
    tokenizer, tokenizer_body, _ = load_vqvae(config.folder("vqvae"))
    codes = np.random.default_rng(0).integers(0, config.vqvae.model.num_codes, (num_clips, *shape), dtype=np.uint8)
    coded = [npy_bytes(each) for each in codes]
    token_recipe = {"tokenizer": sha8, "num_codes": body["num_codes"], "latent_shape": list(shape), "clip": recipe}
    for split, manifest in clips.items():
        samples = [Sample(key, {"codes.npy": each, "json": about}) for key, each in zip(keys, coded, strict=True)]
        write_set(
            config,
            config.folder("tokens", split),
            "tokens",
            samples[: manifest.num_samples],
            token_recipe | {"condition_frames": 0},
            clips=manifest.fingerprint,
            fields={},
        )
    prior = Prior(config.prior.model, shape, body["num_codes"], tokenizer.quantizer.codebook, 0, None)
    body = {"kind": "prior", "model": identity(config.prior.model), "latent_shape": list(shape), "num_classes": 0}
    body |= {"num_codes": tokenizer_body["num_codes"], "classes": [], "condition_shape": None, "identity": {}}
    prior_sha8 = save_export(
        config.folder("prior"), prior, {**body, "tokenizer": tokenizer_body, "step": 1}, tokenizer=tokenizer
    )
    samples = [
        Sample(key, {"mp4": video, "codes.npy": each, "json": about})
        for key, video, each in zip(keys, videos, coded, strict=True)
    ]
    recipe = {"sample": identity(config.sample), "prior": prior_sha8}
    write_set(config, sample.folder_url(config), "samples", samples, recipe)


def follow(command: list[str]) -> tuple[float, list[float], dict[str, Any]]:
    """Runs a command: its seconds, the resident MB of all its processes over time, and its last line."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    root, resident = psutil.Process(process.pid), []
    while process.poll() is None:
        total = 0
        for one in [root, *root.children(recursive=True)]:
            try:
                if "Actor" in one.name() or one.pid == process.pid:
                    total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        resident.append(total / 2**20)
        time.sleep(EVERY_SECONDS)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"the evaluation ended with {process.returncode}")
    return time.monotonic() - began, resident, json.loads(lines[-1])


def main() -> None:
    """Ends in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--what", choices=("vqvae", "all"), default="all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        assignments = [f"root={folder}/run", "cluster.num_cpus=2", "prior.model.class_conditional=false"]
        assignments += [f"evaluate.what={arguments.what}"]
        config = load_config(["demo"], assignments)
        write_run(config, arguments.clips)
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "clipmill", "evaluate", "--config", str(path)]
        seconds, resident, summary = follow(command)
    middle, last = resident[len(resident) // 2], max(resident[len(resident) * 3 // 4 :])
    result = {
        "benchmark": "evaluate",
        "what": arguments.what,
        "clips": arguments.clips,
        "seconds": round(seconds, 1),
        "goal_seconds": GOAL_SECONDS,
        "clips_per_second": round(summary["clips_per_second"], 1),
        "mb_at_half": round(middle),
        "mb_in_last_quarter": round(last),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
