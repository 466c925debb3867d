"""Trainings of toy size: random clips and tokens, the stages' commands on them, and the curves that come of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml

from clipmill.config import load_config
from clipmill.metrics import read_metrics
from clipmill.models.export import save_export
from clipmill.models.vqvae import VQVAE
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.freeze import freeze

STEPS = 40
CHECKPOINT_EVERY = 8
NUM_CODES = 16
CLASSES = ["left", "right"]
CONFIG = {
    "vqvae": {
        "model": {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 4, "num_codes": NUM_CODES},
        "training": {"global_batch": 4, "steps": STEPS},
    },
    "prior": {
        "model": {
            "hidden_dim": 12,
            "num_heads": 2,
            "num_layers": 2,
            "dropout": 0.2,
            "attention_dropout": 0.1,
            "class_conditional": True,
        },
        "training": {"global_batch": 6, "micro_batch": 2, "steps": STEPS, "lr": 1e-3, "warmup_steps": 4},
    },
}
SHARED = {"log_every": 1, "val_every": 10, "val_clips": 8, "checkpoint_every": CHECKPOINT_EVERY, "loader_workers": 0}
EXACT = ["prior.model.dropout=0", "prior.model.attention_dropout=0", "prior.training.schedule=constant"]
"""What leaves rounding as the only difference between two ways to compute one training."""


def write_inputs(folder: Path) -> None:
    """Clips, tokens and their tokenizer, of random content, in a folder that roots share by configuration."""
    random = np.random.default_rng(0)
    for split, num_clips in (("train", 21), ("val", 5)):
        for kind in ("clips", "tokens"):
            staging = folder / f"staging-{kind}-{split}"
            staging.mkdir()
            writer = UnitWriter(staging, kind, 0, shard_bytes=40_000)
            for index in range(num_clips):
                members = {"json": json_bytes({"label": CLASSES[index % 2]})}
                if kind == "clips":
                    members["npy"] = npy_bytes(random.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
                else:
                    members["codes.npy"] = npy_bytes(random.integers(0, NUM_CODES, (1, 4, 4), dtype=np.uint8))
                writer.add(Sample(f"{index:016x}_000000", members))
            url = str(folder / "root" / kind / split)
            commit_unit(url, 0, writer.finish(), {})
            recipe = {"clip": {"num_frames": 4, "resolution": 16}}
            if kind == "tokens":
                recipe = {"clip": recipe, "num_codes": NUM_CODES, "latent_shape": [1, 4, 4]}
                recipe["tokenizer"] = _tokenizer(folder)
            facts = {"classes": CLASSES, "pixel_variance": 0.08, "num_units": 1}
            freeze(url, kind, [0], recipe, facts | {"fields": {"label": {"clips": num_clips, "shapes": [[]]}}})


def _tokenizer(folder: Path) -> str:
    torch.manual_seed(0)
    config = load_config([], ["root=x", *_assignments(CONFIG)])
    body = {"kind": "vqvae", "model": config.vqvae.model.model_dump(mode="json"), "pixel_variance": 0.08}
    return save_export(str(folder / "tokenizer"), VQVAE(config.vqvae.model, 0.08), body)


def _assignments(values: dict, prefix: str = "") -> list[str]:
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += _assignments(value, f"{name}.") if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
    return pairs


def stage_command(workspace: Path, root: Path, stage: str, zero_stage: int, *assignments: str) -> list[str]:
    """The stage's command on a root of its own that shares the inputs.

    Args:
        workspace: where `write_inputs` wrote.
        root: of the run; its ``run.yaml`` is written.
        stage: ``train-vqvae`` or ``train-prior``.
        zero_stage: of its training.
        assignments: over the configuration.
    """
    root.mkdir(exist_ok=True)
    for kind in ("clips", "tokens"):
        if not (root / kind).exists():
            (root / kind).symlink_to(workspace / "root" / kind)
    config = json.loads(json.dumps(CONFIG))
    config |= {"root": str(root), "tokenize": {"tokenizer": str(workspace / "tokenizer")}}
    config["cluster"] = {"training_launcher": "process"}
    for section in ("vqvae", "prior"):
        config[section]["training"] |= {**SHARED, "zero_stage": zero_stage}
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return [stage, "--config", str(path), *assignments]


def read_losses(folder: Path | str) -> dict[int, float]:
    """The curve of a training folder: loss by steps done, over all its attempts."""
    return {record["step"]: record["loss"] for record in read_metrics(str(folder)) if record["split"] == "train"}
