"""Stage ``train-prior``: token shards -> ``prior/exports``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipmill.config import RunConfig, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import load_vqvae, read_latest, save_export
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.shards.dataset import decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.training.engine import join_world
from clipmill.training.inputs import finished_step, open_dataset, require_manifest
from clipmill.training.loop import Job, fit
from clipmill.training.telemetry import Report, summarise

__all__ = ["folder_url", "is_finished", "summary", "train"]


def folder_url(config: RunConfig) -> str:
    """The training folder of this stage."""
    return config.folder("prior")


def is_finished(config: RunConfig) -> bool:
    """Whether an export of ``steps`` steps or more is there.

    Raises:
        UserError: there are no tokens yet, they are another tokenizer's, or the folder holds another model.
    """
    tokens = _tokens(config)
    return finished_step(folder_url(config), _identity(config, tokens)) >= config.prior.training.steps


def train(config: RunConfig, lease: Lease | None, report: Report) -> None:
    """Trains and exports, as one rank of whatever process group this process is in. Collective."""
    training = config.prior.training
    world = join_world()
    tokens = _tokens(config)
    tokenizer, tokenizer_body, _ = load_vqvae(config.tokenizer_url)
    classes = tokens.facts["classes"] if config.prior.model.class_conditional else []
    torch.manual_seed(config.seed)  # of the initial weights
    objective = PriorObjective(_build(config, tokens, tokenizer, classes))
    class_index = {name: index for index, name in enumerate(classes)}

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        prepared = {"codes": batch["codes"], "weight": batch["weight"]}
        if classes:
            prepared["label"] = torch.tensor([_index_of(name, class_index) for name in batch["label"]])
        return prepared

    def export(weights: dict[str, Tensor], step: int) -> None:
        prior = _build(config, tokens, tokenizer, classes)
        prior.load_state_dict(weights)
        body = {
            "kind": "prior",
            "model": identity(config.prior.model),
            "latent_shape": tokens.recipe["latent_shape"],
            "num_codes": tokens.recipe["num_codes"],
            "num_classes": len(classes),
            "classes": classes,
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
        val=open_dataset(require_manifest(config, "tokens", "val"), decode_codes, training),
        config=training,
        seed=config.seed,
        identity=_identity(config, tokens),
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
        """Batch: ``codes`` int64 [B, t, h, w], ``label`` int64 [B] if class-conditional, ``weight`` float32 [B].

        The loss is the mean cross-entropy in nats per token.
        """
        per_clip = self.model.loss(batch["codes"], batch.get("label"))
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


def _build(config: RunConfig, tokens: Manifest, tokenizer: VQVAE, classes: list[str]) -> Prior:
    latent_shape = tuple(tokens.recipe["latent_shape"])
    return Prior(
        config.prior.model, latent_shape, tokens.recipe["num_codes"], tokenizer.quantizer.codebook, len(classes)
    )


def _identity(config: RunConfig, tokens: Manifest) -> dict[str, Any]:
    return {"prior": identity(config.prior), "tokens": tokens.fingerprint, "seed": config.seed}
