"""Stage ``train-vqvae``: clip shards -> ``vqvae/exports``."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipmill.config import RunConfig, frame_size, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import Dtype, load_vqvae, save_export
from clipmill.models.quantizers import codebook_metrics
from clipmill.models.tensor_file import Deferred
from clipmill.models.vqvae import VQVAE, codes_shape, to_input, to_pixels
from clipmill.shards.augment import ClipAugmentation
from clipmill.shards.dataset import Decode, decode_clip, decode_clip_filled_up
from clipmill.shards.manifest import Manifest
from clipmill.shards.mixture import NUM_SLOTS
from clipmill.training.checkpoint import newest_step
from clipmill.training.exports import export_checkpoint, find_checkpoint
from clipmill.training.fit import fit
from clipmill.training.initial import Source, initial_facts, initialise
from clipmill.training.inputs import (
    finished_step,
    identity_of,
    open_dataset,
    require_manifests,
    require_rows,
    slots_of,
)
from clipmill.training.job import Job
from clipmill.training.previews import Studio
from clipmill.training.sharpness import Sharpness, networks_sha256
from clipmill.training.telemetry import Report, summarise
from clipmill.training.throughput import vqvae_flops_per_clip
from clipmill.training.world import join_world

__all__ = [
    "clip_recipes",
    "committed_steps",
    "export",
    "folder_url",
    "is_finished",
    "is_usable",
    "summary",
    "train",
]


LEAST_VARIANCE = 1e-8
"""Minimum variance of pixels in [0, 1], by which the loss is divided: one pixel of 1,500 differs by a grey level."""


def folder_url(config: RunConfig) -> str:
    """The training folder of this stage."""
    return config.folder("vqvae")


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips, by the URL of the clips.

    Raises:
        UserError: there are no clips yet.
    """
    clips = require_manifests(config, "clips", "train")
    longest = _longest(clips)
    recipes = {longest.url: longest.recipe}
    for each in clips:
        rule = each.recipe["clip"]
        if rule["num_frames"] < longest.recipe["clip"]["num_frames"]:  # pictures, which the config does not describe
            rule = {key: value for key, value in rule.items() if key != "num_frames"}
        recipes.setdefault(each.url, {**each.recipe, "clip": rule})
    return recipes


def is_finished(config: RunConfig) -> bool:
    """Whether there is an export of ``steps`` steps or more.

    Raises:
        UserError: there are no clips yet, they differ in shape, the downsampling or the crop does not fit them, or the
            folder holds another model.
    """
    clips = _clips(config)
    _codes_shape(config, clips)
    training = config.vqvae.training
    return finished_step(folder_url(config), _identity(config, clips), training) >= training.steps


def train(config: RunConfig, lease: Lease | None, report: Report, studio: Studio | None = None) -> None:
    """Trains and exports, as one rank of this process's group. Collective.

    Args:
        config: of the run.
        lease: see `fit`.
        report: see `fit`.
        studio: encodes the pictures of validations as files; None writes none.

    Raises:
        UserError: the ranks cannot share the global batch as this model needs it.
    """
    training = config.vqvae.training
    world = join_world()
    _require_even_rows(config, world.size)
    clips = _clips(config)
    clip = _longest(clips).recipe["clip"]
    size = frame_size(training.random_crop or clip["resolution"])
    torch.manual_seed(config.seed)  # of the initial weights
    model = VQVAE(config.vqvae.model, pixel_variance=_pixel_variance(config, clips))
    initialise(model, training, folder_url(config), world, lambda url: _source(config, url))
    objective = VQVAEObjective(model, Sharpness(config.vqvae.sharpness, world.device))
    job = Job(
        folder_url=folder_url(config),
        objective=objective,
        prepare=lambda batch: {name: batch[name] for name in ("video", "weight", "num_frames") if name in batch},
        train=open_dataset(config, clips, _decode(clips), training),
        val=open_dataset(config, require_manifests(config, "clips", "val"), _decode(clips), training),
        config=training,
        seed=config.seed,
        identity=_identity(config, clips),
        batch_statistics=config.vqvae.model.has_batch_statistics,
        export=lambda weights, step: _export(config, clips, weights, step, "float32"),
        score_counts=objective.score_counts,
        flops_per_clip=lambda: vqvae_flops_per_clip(config.vqvae.model, clip["num_frames"], size),
        augment=_augmentation(config),
        studio=studio,
    )
    fit(job, world, lease, report)


def is_usable(config: RunConfig, num_workers: int) -> bool:
    """Whether the training can run on this number of ranks.

    With batch statistics, a micro-step must have as many clips as on the largest number of ranks.
    """
    training, most = config.vqvae.training, config.cluster.most_workers
    if not config.vqvae.model.has_batch_statistics:
        return num_workers <= training.global_batch
    (rows, accumulation), (most_rows, _) = map(training.rows_and_accumulation, (num_workers, most))
    return rows * accumulation * num_workers == training.global_batch and rows * num_workers == most_rows * most


def committed_steps(config: RunConfig) -> int:
    """Steps behind the newest checkpoint."""
    return newest_step(folder_url(config))


def export(config: RunConfig, step: int | None, dtype: Dtype) -> str:
    """Exports a committed checkpoint and makes it the folder's latest export.

    Args:
        config: of the run.
        step: of the checkpoint; None takes the newest.
        dtype: of the weights in the export.

    Returns:
        The export's sha8.

    Raises:
        UserError: there is no such checkpoint, or it has other settings.
    """
    clips = _clips(config)
    found = find_checkpoint(folder_url(config), step, _identity(config, clips), config.vqvae.training)
    return export_checkpoint(found, lambda weights, step: _export(config, clips, weights, step, dtype))


def summary(config: RunConfig) -> dict[str, Any]:
    """The result of the run in numbers."""
    return summarise(folder_url(config)) | initial_facts(folder_url(config))


def _source(config: RunConfig, url: str) -> Source:
    """The weights of another tokenizer. A codebook is only copied from the same quantizer, and with its counts."""
    model, _, sha8 = load_vqvae(url)
    mine, its = config.vqvae.model, model.config
    keys = ("quantizer", "distance", "num_codebooks")
    changed = [key for key in keys if getattr(mine, key) != getattr(its, key)]
    strange = {"quantizer.": f"the export has another {' and '.join(changed)}"} if changed else {}
    return Source(sha8, model.state_dict(), strange, whole=("quantizer.",))


class VQVAEObjective(nn.Module):
    """The tokenizer's loss in the form that the loop needs (see `clipmill.training.zero.engine.Engine`).

    Args:
        model: the tokenizer.
        sharpness: additional terms of the training loss.
    """

    def __init__(self, model: VQVAE, sharpness: Sharpness) -> None:
        super().__init__()
        self.model = model
        self.sharpness = sharpness

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch: ``video`` uint8 [B, T, H, W, 3], ``weight`` float32 [B], ``num_frames`` [B] in a mix with pictures,
        ``step`` in training.

        In eval mode the metrics also contain the 1-d ``code_counts`` (see `score_counts`) and the ``reconstruction``,
        uint8 [B, T, H, W, 3].
        """
        video = to_input(batch["video"])
        output = self.model(video, batch["weight"], batch.get("num_frames"))
        if self.training:
            loss, metrics = self.sharpness(
                output.loss, output.reconstruction, video, batch["step"], batch.get("num_frames")
            )
            return loss, output.metrics | metrics
        shown = {"code_counts": output.counts, "reconstruction": to_pixels(output.reconstruction)}
        return output.loss, output.metrics | shown

    def score_counts(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """Usage and perplexity of the codebook over all counted codes. They are not means over batches."""
        scores = codebook_metrics(counts["code_counts"], self.model.config.num_codebooks)
        return {name: value.item() for name, value in scores.items()}


def _require_even_rows(config: RunConfig, world_size: int) -> None:
    """Refuses padding rows if they would enter batch statistics."""
    training = config.vqvae.training
    if not config.vqvae.model.has_batch_statistics:
        require_rows(training, world_size, "vqvae")
        return
    rows, accumulation = training.rows_and_accumulation(world_size)
    if rows * accumulation * world_size != training.global_batch:
        usable = [size for size in range(1, training.global_batch + 1) if training.global_batch % size == 0]
        raise UserError(
            f"vqvae.training.global_batch {training.global_batch} does not split evenly over {world_size} workers with "
            f"{accumulation} micro-batches each, and padding would enter the batch statistics; usable numbers of "
            f"workers: {usable}, and micro_batch must divide their share"
        )


def _clips(config: RunConfig) -> list[Manifest]:
    """The training clips. They must have one size, and one length unless the model can also take pictures."""
    clips, model = require_manifests(config, "clips", "train"), config.vqvae.model
    for manifest in clips:
        wanted, found = (each.recipe["clip"] for each in (_longest(clips), manifest))
        keys = [key for key in ("num_frames", "resolution") if wanted[key] != found[key]]
        if keys == ["num_frames"] and model.causal and model.norm == "group":
            codes_shape(model, found["num_frames"], frame_size(found["resolution"]))
        elif keys:
            key = keys[0]
            raise UserError(
                f"data.mix: the clips at {_longest(clips).url} have {key}={wanted[key]}, those at {manifest.url} "
                f"{found[key]}; shard them alike, or remove one (pictures, clips of one frame, train beside others "
                "with vqvae.model.causal=true and vqvae.model.norm=group)"
            )
    crop, resolution = config.vqvae.training.random_crop, clips[0].recipe["clip"]["resolution"]
    if crop is not None and any(map(operator.gt, frame_size(crop), frame_size(resolution))):
        raise UserError(
            f"vqvae.training.random_crop={crop} is larger than the clips at {clips[0].url}, whose resolution is "
            f"{resolution}; choose {resolution} or less"
        )
    if _pixel_variance(config, clips) < LEAST_VARIANCE:
        urls = " and ".join(manifest.url for manifest in clips)
        raise UserError(
            f"all pixels of the clips at {urls} have one colour, so there is nothing to learn; look at them with "
            "`clipmill inspect`, correct the videos or the crop, and shard into another root "
            "(data.clip.reject_black=10 drops black clips)"
        )
    return clips


def _longest(clips: list[Manifest]) -> Manifest:
    """The first of the data sets with the longest clips; these are what the tokenizer is for."""
    return max(clips, key=lambda each: each.recipe["clip"]["num_frames"])


def _decode(clips: list[Manifest]) -> Decode:
    """Decodes batches of clips to one length, also if the data sets have different lengths."""
    lengths = {each.recipe["clip"]["num_frames"] for each in clips}
    return decode_clip if len(lengths) == 1 else functools.partial(decode_clip_filled_up, num_frames=max(lengths))


def _identity(config: RunConfig, clips: list[Manifest]) -> dict[str, Any]:
    keys = {"vqvae": identity(config.vqvae), "clips": identity_of(config, clips), "seed": config.seed}
    networks = networks_sha256(config.vqvae.sharpness)
    return keys | ({"sharpness_networks": networks} if networks else {})


def _codes_shape(config: RunConfig, clips: list[Manifest]) -> tuple[int, ...]:
    clip = _longest(clips).recipe["clip"]
    return codes_shape(config.vqvae.model, clip["num_frames"], frame_size(clip["resolution"]))


def _pixel_variance(config: RunConfig, clips: list[Manifest]) -> float:
    """Variance of all pixels, weighted by the mixture's shares: mean of the variances plus variance of the means."""
    if len(clips) == 1:
        return float(clips[0].facts["pixel_variance"])
    shares = slots_of(config) / NUM_SLOTS
    means, variances = (np.array([each.facts[name] for each in clips]) for name in ("pixel_mean", "pixel_variance"))
    return float(shares @ (variances + means**2) - (shares @ means) ** 2)


def _augmentation(config: RunConfig) -> ClipAugmentation | None:
    training = config.vqvae.training
    if not training.hflip and training.random_crop is None:
        return None
    crop = None if training.random_crop is None else frame_size(training.random_crop)
    return ClipAugmentation(config.seed, training.hflip, crop)


def _export(config: RunConfig, clips: list[Manifest], weights: dict[str, Deferred], step: int, dtype: Dtype) -> str:
    with torch.device("meta"):  # for names and shapes
        model = VQVAE(config.vqvae.model, pixel_variance=_pixel_variance(config, clips))
    body = {
        "kind": "vqvae",
        "model": identity(config.vqvae.model),
        "latent_shape": list(_codes_shape(config, clips)),
        "num_codes": config.vqvae.model.num_codes,
        "clip": _longest(clips).recipe,
        "pixel_variance": model.pixel_variance,
        "identity": _identity(config, clips),
        "step": step,
    }
    return save_export(folder_url(config), model, body, dtype=dtype, weights=weights)
