"""Checks settings of later stages before `shard` spends time on clips that these stages would refuse.

Only sections that the config sets are checked: a run that only makes clips leaves the others at their defaults, which
its clips need not fit. Settings that depend on the videos, such as their classes, are checked against the plan in
`clipmill.pipeline.planning.conditions`.
"""

from __future__ import annotations

import importlib.util
import operator

from clipmill.config import RunConfig, frame_size
from clipmill.errors import UserError

__all__ = ["check_later_stages"]


def check_later_stages(config: RunConfig) -> None:
    """Checks the settings of tokenizer, prior and samples against the clip settings of a config.

    Raises:
        UserError: a stage would refuse these settings, or a model cannot be built with them.
    """
    if config.data.mix:  # the training stages may read clips of other shapes
        return
    if "prior" in config.model_fields_set:
        _check_condition(config)
        _check_guidance(config)
    if "vqvae" in config.model_fields_set:
        _check_crop(config)
    if importlib.util.find_spec("torch") is not None:  # a machine that only shards may lack it
        _build_models(config)


def _check_condition(config: RunConfig) -> None:
    condition, num_given = config.prior.model.condition, config.tokenize.condition_frames
    num_frames = config.data.clip.num_frames
    if condition == "text" and config.tokenize.text_embeddings is None:
        raise UserError("prior.model.condition=text needs tokenize.text_embeddings; set it to a folder of embeddings")
    if condition == "frames" and not 0 < num_given <= num_frames:
        raise UserError(
            f"prior.model.condition=frames needs tokenize.condition_frames from 1 to the {num_frames} frames of a "
            f"clip, not {num_given}; set it"
        )


def _check_guidance(config: RunConfig) -> None:
    model, guidance = config.prior.model, config.sample.guidance
    if guidance != 1 and not (model.label_dropout or model.condition_dropout):
        raise UserError(
            f"sample.guidance={guidance:g} needs prior.model.label_dropout or condition_dropout above 0; set one of "
            "them, or sample.guidance=1"
        )


def _check_crop(config: RunConfig) -> None:
    crop, size = config.vqvae.training.random_crop, config.data.clip.size
    if crop is not None and any(map(operator.gt, frame_size(crop), size)):
        raise UserError(
            f"vqvae.training.random_crop={crop} is larger than the clips of {size[0]} x {size[1]} pixels; lower it, or "
            "raise data.clip.resolution"
        )


def _build_models(config: RunConfig) -> None:
    """Builds the models on the meta device, without weights: their constructors check that the sizes fit each other."""
    import torch

    from clipmill.models.vqvae import VQVAE, codes_shape
    from clipmill.training.estimate import build_prior

    if not {"vqvae", "prior"} & config.model_fields_set:
        return
    clip, tokenizer = config.data.clip, config.vqvae.model
    shape = codes_shape(tokenizer, clip.num_frames, clip.size)
    with torch.device("meta"):
        VQVAE(tokenizer, pixel_variance=1.0)
        if "prior" in config.model_fields_set:
            build_prior(config, config.prior.model, shape)
