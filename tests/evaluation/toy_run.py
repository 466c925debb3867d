"""A run of toy size up to the prior, written as the stages write it; the models are untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmill import storage
from clipmill.config import RunConfig, identity
from clipmill.evaluation.results import folder_url, read_evaluation
from clipmill.lease import Lease
from clipmill.models.export import load_vqvae, require_prior, save_export
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, codes_shape, to_input
from clipmill.sampling import sample
from clipmill.sampling.units import missing_units
from clipmill.sampling.worker import make_worker
from clipmill.shards.commits import commit_unit, committed_units, read_commits
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest

CLASSES = ["down", "left", "up"]
HEIGHT, WIDTH = 12, 16
NUM_CLIPS = {"train": 9, "val": 7}


def metrics_of(config: RunConfig) -> dict[str, Any]:
    """The numbers of the evaluation that a config names."""
    found = read_evaluation(folder_url(config))
    assert found is not None
    return found.metrics


class Unleased(Lease):
    """What a stage holds when no other run is about."""

    def check(self) -> None:
        pass


def toy_config(root: Path, *, num_frames: int = 8, **sample: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "root": str(root),
            "data": {"clip": {"num_frames": num_frames, "resolution": [HEIGHT, WIDTH]}, "format": "npy"},
            "vqvae": {"model": {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 8, "num_codes": 16}},
            "prior": {"model": {"hidden_dim": 24, "num_heads": 2, "num_layers": 2, "class_conditional": True}},
            "sample": {"num_samples": 5, "batch_size": 3, **sample},
            "evaluate": {"batch_size": 3},
            "cluster": {"num_cpus": 2},
        }
    )


def write_run(config: RunConfig, scratch: Path) -> None:
    """Writes clips, a tokenizer, tokens and a prior."""
    clips = write_run_up_to_tokenizer(config, scratch)
    tokens = {split: write_tokens(config, manifest, scratch / "tokens" / split) for split, manifest in clips.items()}
    write_prior(config, tokens["train"])
    for stage in ("vqvae", "prior"):
        records = [{"step": step, "split": "train", "loss": 3 / step} for step in range(1, 9)]
        records += [{"step": step, "split": "val", "loss": 4 / step} for step in (4, 8)]
        lines = "\n".join(map(json.dumps, records))
        storage.publish_bytes(config.folder(stage, "metrics", "000001-0001.jsonl"), lines.encode())


def write_run_up_to_tokenizer(config: RunConfig, scratch: Path) -> dict[str, Manifest]:
    """Writes clips and a tokenizer; the clips of each split."""
    torch.manual_seed(0)
    clips = {split: _write_clips(config, split, scratch / "clips" / split) for split in NUM_CLIPS}
    write_tokenizer(config, clips["train"])
    return clips


def make_samples(config: RunConfig) -> None:
    """The stage ``sample`` in this process: its units one after the other, then the stage, which finds them done."""
    lease = Unleased(sample.folder_url(config), 1)
    job = sample.new_job(config, lease, require_prior(config.folder("prior"))[0])
    work = make_worker(job)
    url = sample.folder_url(config)
    records = read_commits(url, committed_units(url))
    committed = {record["unit"]: sum(part["samples"] for part in record["parts"]) for record in records}
    for unit in missing_units(config.sample.num_samples, job.recipe["sample"]["batch_size"], committed):
        work(unit)
    sample.run(config, lease)


def clip_pixels(split: str, number: int, num_frames: int = 8) -> np.ndarray:
    """uint8 [num_frames, HEIGHT, WIDTH, 3]: noise of its own for every clip."""
    random = np.random.default_rng([number, len(split)])
    return random.integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


def _write_clips(config: RunConfig, split: str, folder: Path) -> Manifest:
    folder.mkdir(parents=True)
    writer = UnitWriter(folder, "clips", 0, 2**20)
    for number in range(NUM_CLIPS[split]):
        about = json_bytes({"label": CLASSES[number % 3], "fps": 8})
        pixels = npy_bytes(clip_pixels(split, number, config.data.clip.num_frames))
        writer.add(Sample(f"{number:016x}_000000", {"npy": pixels, "json": about}))
    url = config.folder("clips", split)
    commit_unit(url, 0, writer.finish(), {})
    recipe = {"clip": identity(config.data.clip), "format": "npy", "quality": None}
    return freeze(url, "clips", [0], recipe, {"classes": CLASSES, "pixel_variance": 0.08, "num_units": 1})


def write_tokenizer(config: RunConfig, clips: Manifest, step: int = 8) -> str:
    clip = config.data.clip
    model = VQVAE(config.vqvae.model, pixel_variance=0.08)
    pixels = np.stack([clip_pixels("train", number, clip.num_frames) for number in range(4)])
    for _ in range(30):  # until batch norm knows its statistics: before, all latents get one code
        model(to_input(torch.from_numpy(pixels)))
    body = {
        "kind": "vqvae",
        "model": identity(config.vqvae.model),
        "latent_shape": list(codes_shape(config.vqvae.model, clip.num_frames, clip.size)),
        "num_codes": config.vqvae.model.num_codes,
        "clip": clips.recipe,
        "pixel_variance": 0.08,
        "identity": {},
        "step": step,
    }
    return save_export(config.folder("vqvae"), model, body)


def write_tokens(config: RunConfig, clips: Manifest, folder: Path, num_actions: int = 8) -> Manifest:
    folder.mkdir(parents=True)
    model, body, sha8 = load_vqvae(config.folder("vqvae"))
    split = clips.url.rpartition("/")[2]
    writer = UnitWriter(folder, "tokens", 0, 2**20)
    for number in range(clips.num_samples):
        with torch.inference_mode():
            pixels = clip_pixels(split, number, config.data.clip.num_frames)
            codes = model.encode(to_input(torch.from_numpy(pixels[None])))
        members = {
            "codes.npy": npy_bytes(codes[0].numpy().astype(np.uint8)),
            "json": json_bytes({"label": CLASSES[number % 3]}),
            "actions.npy": npy_bytes(np.full((num_actions, 2), number, np.float32)),
        }
        writer.add(Sample(f"{number:016x}_000000", members))
    url = config.folder("tokens", split)
    commit_unit(url, 0, writer.finish(), {})
    recipe = {
        "tokenizer": sha8,
        "condition_frames": 0,
        "num_codes": body["num_codes"],
        "latent_shape": body["latent_shape"],
        "clip": clips.recipe,
    }
    shapes: dict[str, list[int]] = {"label": [], "actions": [num_actions, 2]}
    fields = {name: {"clips": clips.num_samples, "shapes": [shape]} for name, shape in shapes.items()}
    return freeze(url, "tokens", [0], recipe, {"classes": CLASSES, "clips": clips.fingerprint, "fields": fields})


def write_prior(config: RunConfig, tokens: Manifest) -> str:
    tokenizer, tokenizer_body, _ = load_vqvae(config.folder("vqvae"))
    classes = CLASSES if config.prior.model.class_conditional else []
    shape = tuple(tokens.recipe["latent_shape"])
    condition_shape = (8, 2) if config.prior.model.condition == "actions" else None
    codebook = tokenizer.quantizer.codebook
    prior = Prior(config.prior.model, shape, tokens.recipe["num_codes"], codebook, len(classes), condition_shape)
    torch.nn.init.normal_(prior.head.weight, std=0.3)  # it starts at zero: all codes alike
    body = {
        "kind": "prior",
        "model": identity(config.prior.model),
        "latent_shape": list(shape),
        "num_codes": tokens.recipe["num_codes"],
        "num_classes": len(classes),
        "classes": classes,
        "condition_shape": condition_shape,
        "tokenizer": tokenizer_body,
        "identity": {"tokens": tokens.fingerprint},
        "step": 8,
    }
    return save_export(config.folder("prior"), prior, body, tokenizer=tokenizer)
