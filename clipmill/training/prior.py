"""Stage ``train-prior``: token shards -> ``prior/exports``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipmill import storage
from clipmill.config import RunConfig, fingerprint, frame_size, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.conditioning import condition_of
from clipmill.models.export import Dtype, load_prior, load_vqvae, require_vqvae, save_export
from clipmill.models.prior import Prior
from clipmill.models.tensor_file import Deferred
from clipmill.models.vqvae import VQVAE
from clipmill.shards.dataset import MixedDataset, ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.training.checkpoint import newest_step
from clipmill.training.exports import export_checkpoint, find_checkpoint
from clipmill.training.fit import fit
from clipmill.training.initial import Source, initial_facts, initialise
from clipmill.training.inputs import finished_step, identity_of, open_dataset, require_manifests, require_rows
from clipmill.training.job import Job
from clipmill.training.previews import Samples, Studio
from clipmill.training.telemetry import Report, summarise
from clipmill.training.throughput import prior_flops_per_token
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

logger = logging.getLogger(__name__)

_SOURCES = {
    "label": "label every video (data.source.label) and shard and tokenize again",
    "actions": "give every video its actions (data.source.actions_suffix) and shard and tokenize again",
    "text": "remove these tokens and tokenize with tokenize.text_embeddings, which must hold every clip's text",
    "frames": "remove these tokens and tokenize with tokenize.condition_frames=1 or more",
}
_SWITCHES = dict.fromkeys(_SOURCES, "condition=null") | {"label": "class_conditional=false"}


def folder_url(config: RunConfig) -> str:
    """The training folder of this stage."""
    return config.folder("prior")


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips from which the tokens were made, by the URL of the tokens.

    Raises:
        UserError: there are no tokens yet.
    """
    return {
        tokens.url: tokens.recipe.get("clip", {})
        for tokens in require_manifests(_without_pictures(config), "tokens", "train")
    }


def is_finished(config: RunConfig) -> bool:
    """Whether there is an export of ``steps`` steps or more.

    Raises:
        UserError: there are no tokens yet, another tokenizer made them, they lack the prior's condition or class, or
            the folder holds another model.
    """
    config = _without_pictures(config)
    tokens = _tokens(config)
    _condition_shape(config, tokens + require_manifests(config, "tokens", "val"))
    training = config.prior.training
    return finished_step(folder_url(config), _identity(config, tokens), training) >= training.steps


def train(config: RunConfig, lease: Lease | None, report: Report, studio: Studio | None = None) -> None:
    """Trains and exports, as one rank of this process's group. Collective.

    Args:
        config: of the run.
        lease: see `fit`.
        report: see `fit`.
        studio: draws and encodes samples every ``sample_every`` steps; None draws nothing.
    """
    config = _without_pictures(config)
    training = config.prior.training
    world = join_world()
    inputs = _inputs(config)
    tokens, classes, condition_shape = inputs.tokens, inputs.classes, inputs.condition_shape
    require_rows(training, world.size, "prior")
    torch.manual_seed(config.seed)  # of the initial weights
    model = inputs.build(config)
    initialise(model, training, folder_url(config), world, lambda url: _source(inputs, url))
    class_index = {name: index for index, name in enumerate(classes)}
    urls = " or ".join(each.url for each in tokens)

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        _check_codes(batch, inputs.recipe["num_codes"], urls)
        prepared = {"codes": batch["codes"], "weight": batch["weight"]}
        if condition_shape is not None:
            prepared["condition"] = condition_of(batch, config.prior.model)
            _check_condition(prepared["condition"], batch["key"], f"{config.prior.model.condition} at {urls}")
        if classes:
            prepared["label"] = torch.tensor([_index_of(name, class_index) for name in batch["label"]])
        return prepared

    tokens_per_clip = math.prod(inputs.recipe["latent_shape"])
    flops = prior_flops_per_token(model) * tokens_per_clip  # before ZeRO partitions the parameters
    clip = inputs.recipe["clip"]["clip"]
    values_per_clip = math.prod((clip["num_frames"], *frame_size(clip["resolution"]), 3))
    train_set = open_dataset(config, tokens, decode_codes, training)
    val_set = open_dataset(config, inputs.val, decode_codes, training)
    job = Job(
        folder_url=folder_url(config),
        objective=PriorObjective(model, tokens_per_clip / values_per_clip),
        prepare=prepare,
        train=train_set,
        val=val_set,
        config=training,
        seed=config.seed,
        identity=_identity(config, tokens),
        batch_statistics=False,
        export=lambda weights, step: _export(config, inputs, weights, step, "float32"),
        tokens_per_clip=tokens_per_clip,
        flops_per_clip=lambda: flops,
        samples=_samples(config, inputs, prepare, train_set, val_set, studio),
        studio=studio,
    )
    fit(job, world, lease, report)


def _samples(
    config: RunConfig,
    inputs: _Inputs,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    train_set: ShardDataset | MixedDataset,
    val_set: ShardDataset | MixedDataset,
    studio: Studio | None,
) -> Samples | None:
    every = config.prior.training.sample_every
    if studio is None or every is None:
        return None
    if config.prior.training.zero_stage == 3:
        # At stage 3 each submodule gathers its weights when it is called, so all ranks must call submodules in the
        # order of a training step. Drawing on one rank hangs, and a gathered copy breaks DeepSpeed's record of the
        # order.
        logger.info("ZeRO stage 3 shows no samples during training; `clipmill sample` draws them from an export")
        return None
    return Samples(
        every=every,
        studio=studio,
        tokenizer=inputs.tokenizer,
        num_classes=len(inputs.classes),
        clips=None if inputs.condition_shape is None else val_set if len(val_set) else train_set,
        prepare=prepare,
        fps=inputs.recipe["clip"]["clip"].get("fps") or studio.usual_fps,
    )


def is_usable(config: RunConfig, num_workers: int) -> bool:
    """Whether the training can run on this number of ranks."""
    return num_workers <= config.prior.training.global_batch


def committed_steps(config: RunConfig) -> int:
    """Steps behind the newest checkpoint."""
    return newest_step(folder_url(config))


def export(config: RunConfig, step: int | None, dtype: Dtype) -> str:
    """Exports a committed checkpoint with its tokenizer, and makes it the folder's latest export.

    Args:
        config: of the run.
        step: of the checkpoint; None takes the newest.
        dtype: of the prior's weights in the export; the tokenizer's weights stay float32.

    Returns:
        The export's sha8.

    Raises:
        UserError: there is no such checkpoint, or it has other settings.
    """
    config = _without_pictures(config)
    inputs = _inputs(config)
    found = find_checkpoint(folder_url(config), step, _identity(config, inputs.tokens), config.prior.training)
    return export_checkpoint(found, lambda weights, step: _export(config, inputs, weights, step, dtype))


def summary(config: RunConfig) -> dict[str, Any]:
    """The result of the run in numbers."""
    return summarise(folder_url(config)) | initial_facts(folder_url(config))


def _source(inputs: _Inputs, url: str) -> Source:
    """The weights of another prior. Its rows for codes and classes only fit its own tokenizer and classes."""
    model, _, body, sha8 = load_prior(url)
    strange = {"input.codebook": "that of the tokens' tokenizer"}
    if body["tokenizer"]["sha8"] != inputs.tokenizer_body["sha8"]:
        strange |= dict.fromkeys(("input.embedding", "head."), "the export has another tokenizer")
    if body["classes"] != inputs.classes:
        strange["norms.table"] = "the export has other classes"
    return Source(sha8, model.state_dict(), strange)


def _without_pictures(config: RunConfig) -> RunConfig:
    """The config without those data sets of its mix that hold pictures for the tokenizer, and so have no tokens."""
    parts = tuple(part for part in config.data.mix if not _holds_pictures(part.url))
    return config.model_copy(update={"data": config.data.model_copy(update={"mix": parts})})


def _holds_pictures(root: str) -> bool:
    clips, tokens = (storage.join(root, kind, "train") for kind in ("clips", "tokens"))
    if storage.exists(storage.join(tokens, "manifest.json")) or not storage.exists(
        storage.join(clips, "manifest.json")
    ):
        return False
    return Manifest.load(clips, "clips").recipe["clip"].get("num_frames") == 1


class PriorObjective(nn.Module):
    """The prior's loss in the form that the loop needs (see `clipmill.training.zero.engine.Engine`).

    Args:
        model: the prior.
        tokens_per_value: tokens of a clip divided by its pixel values (T x H x W x 3).
    """

    def __init__(self, model: Prior, tokens_per_value: float) -> None:
        super().__init__()
        self.model = model
        self._tokens_per_value = tokens_per_value

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch: ``codes`` int64 [B, t, h, w] or [B, t, h, w, M], ``weight`` float32 [B], ``label`` int64 [B] if the
        prior is class-conditional, ``condition`` if it has one (see `clipmill.models.conditioning`).

        The loss is the mean cross-entropy in nats per token. The metrics give it in bits: ``bits_per_token`` (the
        paper calls this bits per dim) and ``bits_per_dim`` (per pixel value of the clip).
        """
        per_clip = self.model.loss(batch["codes"], batch.get("label"), batch.get("condition"))
        weight = batch["weight"]
        loss = (per_clip * weight).sum() / weight.sum().clamp(min=1)
        bits = loss.detach() / math.log(2)
        return loss, {"bits_per_token": bits, "bits_per_dim": bits * self._tokens_per_value}


class _Inputs(NamedTuple):
    """The parts that a prior is built from."""

    tokens: list[Manifest]
    val: list[Manifest]
    tokenizer: VQVAE
    tokenizer_body: dict[str, Any]
    classes: list[str]
    condition_shape: tuple[int, ...] | None

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe of the tokens. What is read of it is equal in all data sets, because they share a tokenizer."""
        return self.tokens[0].recipe

    def build(self, config: RunConfig) -> Prior:
        """A prior with initial weights."""
        shape, num_codes = tuple(self.recipe["latent_shape"]), self.recipe["num_codes"]
        codebook = self.tokenizer.quantizer.codebook
        return Prior(config.prior.model, shape, num_codes, codebook, len(self.classes), self.condition_shape)


def _inputs(config: RunConfig) -> _Inputs:
    tokens, val = _tokens(config), require_manifests(config, "tokens", "val")
    tokenizer, tokenizer_body, _ = load_vqvae(config.tokenizer_url)
    classes, condition_shape = _classes(config, tokens), _condition_shape(config, tokens + val)
    return _Inputs(tokens, val, tokenizer, tokenizer_body, classes, condition_shape)


def _export(config: RunConfig, inputs: _Inputs, weights: dict[str, Deferred], step: int, dtype: Dtype) -> str:
    with torch.device("meta"):  # for names and shapes
        prior = inputs.build(config)
    body = {
        "kind": "prior",
        "model": identity(config.prior.model),
        "latent_shape": inputs.recipe["latent_shape"],
        "num_codes": inputs.recipe["num_codes"],
        "num_classes": len(inputs.classes),
        "classes": inputs.classes,
        "condition_shape": inputs.condition_shape,
        "tokenizer": inputs.tokenizer_body,
        "identity": _identity(config, inputs.tokens),
        "step": step,
    }
    return save_export(folder_url(config), prior, body, tokenizer=inputs.tokenizer, dtype=dtype, weights=weights)


def _tokens(config: RunConfig) -> list[Manifest]:
    """The training tokens; refuses those of another tokenizer than the configured one."""
    manifests = require_manifests(config, "tokens", "train")
    _, sha8 = require_vqvae(config.tokenizer_url)
    for tokens in manifests:
        _check_tokens(config, tokens, sha8)
    return manifests


def _check_tokens(config: RunConfig, tokens: Manifest, sha8: str) -> None:
    if tokens.recipe["tokenizer"] != sha8:
        raise UserError(
            f"the tokens at {tokens.url} were made by tokenizer {tokens.recipe['tokenizer']}, the one at "
            f"{config.tokenizer_url} is {sha8}; set tokenize.tokenizer to theirs, or remove the tokens and run "
            "`clipmill tokenize` again"
        )
    if config.prior.model.class_conditional and not tokens.facts["classes"]:
        raise UserError(
            f"the tokens at {tokens.url} have no classes; set prior.model.class_conditional=false, or label the "
            "videos (data.source.label) and shard again"
        )


def _index_of(name: str | None, class_index: dict[str, int]) -> int:
    if name is None:
        raise UserError("a training clip has no class; label every video, or set prior.model.class_conditional=false")
    return class_index[name]


def _condition_shape(config: RunConfig, manifests: list[Manifest]) -> tuple[int, ...] | None:
    """Shape of the clips' condition; None if the prior has no condition.

    Raises:
        UserError: some clips lack the condition or the class that the prior needs.
    """
    model = config.prior.model
    wanted = (["label"] if model.class_conditional else []) + ([model.condition] if model.condition else [])
    shapes: list[list[int]] = []
    for manifest in manifests:
        for name in wanted:
            found = manifest.facts.get("fields", {}).get(name, {"clips": 0, "shapes": []})
            if found["clips"] < manifest.num_stored:
                raise UserError(
                    f"only {found['clips']} of the {manifest.num_stored} clips at {manifest.url} have {name}; "
                    f"{_SOURCES[name]}, or train without (prior.model.{_SWITCHES[name]})"
                )
            shapes += [shape for shape in found["shapes"] if name == model.condition and shape not in shapes]
    if len(shapes) > 1:
        raise UserError(
            f"the {model.condition} of the clips differ in shape: {', '.join(map(str, sorted(shapes)))}; give all "
            "videos the same, and shard and tokenize again"
        )
    return tuple(shapes[0]) if shapes else None


def _check_codes(batch: dict[str, Any], num_codes: int, urls: str) -> None:
    """Checks the range of codes. Without it, the GPU fails with an assertion that names neither clip nor code."""
    codes = batch["codes"]
    bad = ((codes < 0) | (codes >= num_codes)).flatten(1).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        lowest, highest = int(codes[row].min()), int(codes[row].max())
        raise UserError(
            f"clip {batch['key'][row]} at {urls} has codes from {lowest} to {highest}, but the tokenizer "
            f"makes 0 to {num_codes - 1}; remove these tokens and run `clipmill tokenize` again"
        )


def _check_condition(condition: Tensor, keys: list[str], what: str) -> None:
    """Checks that a condition is finite. Pixels and codes are integers, so only a condition can contain NaN."""
    if condition.is_floating_point() and not condition.isfinite().all():
        row = int((~condition.isfinite()).flatten(1).any(1).nonzero()[0])
        raise UserError(
            f"clip {keys[row]} has {what} that are not finite; correct its source and shard and tokenize again"
        )


def _identity(config: RunConfig, tokens: list[Manifest]) -> dict[str, Any]:
    return {
        "prior": identity(config.prior),
        "tokens": identity_of(config, tokens),
        # A resume may accept other tokens, but the weights depend on the tokenizer and on the classes.
        "tokenizer": tokens[0].recipe["tokenizer"],
        "classes": f"{len(classes)}, {fingerprint(classes)[:8]}" if (classes := _classes(config, tokens)) else None,
        "seed": config.seed,
    }


def _classes(config: RunConfig, tokens: list[Manifest]) -> list[str]:
    """The classes that the prior knows, in the order of their numbers."""
    if not config.prior.model.class_conditional:
        return []
    return sorted({name for each in tokens for name in each.facts["classes"]})
