"""Stage ``train-prior``: token shards -> ``prior/exports``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipmill.config import RunConfig, TrainingConfig, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.conditioning import condition_of
from clipmill.models.export import load_vqvae, read_latest, save_export
from clipmill.models.prior import Prior
from clipmill.shards.dataset import decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.training.engine import join_world
from clipmill.training.inputs import finished_step, open_dataset, require_manifest
from clipmill.training.loop import Job, fit
from clipmill.training.telemetry import Report, summarise

__all__ = ["folder_url", "is_finished", "summary", "train"]

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


def is_finished(config: RunConfig) -> bool:
    """Whether an export of ``steps`` steps or more is there.

    Raises:
        UserError: there are no tokens yet, they are another tokenizer's or come without what the prior is to be told,
            or the folder holds another model.
    """
    tokens = _tokens(config)
    _condition_shape(config, [tokens, require_manifest(config, "tokens", "val")])
    training = config.prior.training
    return finished_step(folder_url(config), _identity(config, tokens), training) >= training.steps


def train(config: RunConfig, lease: Lease | None, report: Report) -> None:
    """Trains and exports, as one rank of whatever process group this process is in. Collective."""
    training = config.prior.training
    world = join_world()
    tokens = _tokens(config)
    tokenizer, tokenizer_body, _ = load_vqvae(config.tokenizer_url)
    classes = tokens.facts["classes"] if config.prior.model.class_conditional else []
    val = require_manifest(config, "tokens", "val")
    condition_shape = _condition_shape(config, [tokens, val])
    _require_rows(training, world.size)

    def build() -> Prior:
        shape, num_codes = tuple(tokens.recipe["latent_shape"]), tokens.recipe["num_codes"]
        codebook = tokenizer.quantizer.codebook
        return Prior(config.prior.model, shape, num_codes, codebook, len(classes), condition_shape)

    torch.manual_seed(config.seed)  # of the initial weights
    objective = PriorObjective(build())
    class_index = {name: index for index, name in enumerate(classes)}

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        _check_codes(batch, tokens)
        prepared = {"codes": batch["codes"], "weight": batch["weight"]}
        if condition_shape is not None:
            prepared["condition"] = condition_of(batch, config.prior.model)
        if classes:
            prepared["label"] = torch.tensor([_index_of(name, class_index) for name in batch["label"]])
        return prepared

    def export(weights: dict[str, Tensor], step: int) -> None:
        prior = build()
        prior.load_state_dict(weights)
        body = {
            "kind": "prior",
            "model": identity(config.prior.model),
            "latent_shape": tokens.recipe["latent_shape"],
            "num_codes": tokens.recipe["num_codes"],
            "num_classes": len(classes),
            "classes": classes,
            "condition_shape": condition_shape,
            "tokenizer": tokenizer_body,
            "identity": _identity(config, tokens),
            "step": step,
        }
        save_export(folder_url(config), prior, body, tokenizer=tokenizer)

    job = Job(
        folder_url=folder_url(config),
        objective=objective,
        prepare=prepare,
        train=open_dataset(tokens, decode_codes, training),
        val=open_dataset(val, decode_codes, training),
        config=training,
        seed=config.seed,
        identity=_identity(config, tokens),
        batch_statistics=False,
        export=export,
    )
    fit(job, world, lease, report)


def summary(config: RunConfig) -> dict[str, Any]:
    """The run's result in numbers."""
    return summarise(folder_url(config))


class PriorObjective(nn.Module):
    """The prior's loss as the loop wants it (see `clipmill.training.engine.Engine`)."""

    def __init__(self, model: Prior) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch: ``codes`` int64 [B, t, h, w] or [B, t, h, w, M], ``label`` int64 [B] if class-conditional,
        ``condition`` if it has another (see `clipmill.models.conditioning`), ``weight`` float32 [B].

        The loss is the mean cross-entropy in nats per token.
        """
        per_clip = self.model.loss(batch["codes"], batch.get("label"), batch.get("condition"))
        weight = batch["weight"]
        return (per_clip * weight).sum() / weight.sum().clamp(min=1), {}


def _tokens(config: RunConfig) -> Manifest:
    """The training tokens, if they are the configured tokenizer's."""
    tokens = require_manifest(config, "tokens", "train")
    latest = read_latest(config.tokenizer_url)
    if latest is None:
        raise UserError(f"no tokenizer at {config.tokenizer_url}; run `clipmill train-vqvae` with this config first")
    _, sha8 = latest
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
    return tokens


def _index_of(name: str | None, class_index: dict[str, int]) -> int:
    if name is None:
        raise UserError("a training clip has no class; label every video, or set prior.model.class_conditional=false")
    return class_index[name]


def _condition_shape(config: RunConfig, manifests: list[Manifest]) -> tuple[int, ...] | None:
    """Shape of the condition that every clip comes with; none if the prior takes none.

    Raises:
        UserError: some clips come without the condition or the class that the prior is to be told.
    """
    model = config.prior.model
    wanted = (["label"] if model.class_conditional else []) + ([model.condition] if model.condition else [])
    shapes: list[list[int]] = []
    for manifest in manifests:
        for name in wanted:
            found = manifest.facts.get("fields", {}).get(name, {"clips": 0, "shapes": []})
            if found["clips"] < manifest.num_samples:
                raise UserError(
                    f"only {found['clips']} of the {manifest.num_samples} clips at {manifest.url} have {name}; "
                    f"{_SOURCES[name]}, or train without (prior.model.{_SWITCHES[name]})"
                )
            shapes += [shape for shape in found["shapes"] if name == model.condition and shape not in shapes]
    if len(shapes) > 1:
        raise UserError(
            f"the {model.condition} of the clips differ in shape: {', '.join(map(str, sorted(shapes)))}; give all "
            "videos the same, and shard and tokenize again"
        )
    return tuple(shapes[0]) if shapes else None


def _require_rows(training: TrainingConfig, world_size: int) -> None:
    if training.global_batch < world_size:
        raise UserError(
            f"prior.training.global_batch={training.global_batch} leaves some of the {world_size} ranks without a "
            f"clip; make it {world_size} or more, or train on fewer ranks"
        )


def _check_codes(batch: dict[str, Any], tokens: Manifest) -> None:
    """Out of range, a code would be an assertion on a GPU that says neither where nor which."""
    codes, num_codes = batch["codes"], tokens.recipe["num_codes"]
    bad = ((codes < 0) | (codes >= num_codes)).flatten(1).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        lowest, highest = int(codes[row].min()), int(codes[row].max())
        raise UserError(
            f"clip {batch['key'][row]} at {tokens.url} has codes from {lowest} to {highest}, but the tokenizer "
            f"makes 0 to {num_codes - 1}; remove these tokens and run `clipmill tokenize` again"
        )


def _identity(config: RunConfig, tokens: Manifest) -> dict[str, Any]:
    return {
        "prior": identity(config.prior),
        "tokens": tokens.fingerprint,
        "tokenizer": tokens.recipe["tokenizer"],  # other tokens may be accepted, but never another one's
        "seed": config.seed,
    }
