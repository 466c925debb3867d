"""Prefixes and conditions of samples, from the clips of a token data set or from files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill import storage
from clipmill.config import PriorModelConfig, RunConfig
from clipmill.errors import UserError
from clipmill.models.export import model_config, require_condition
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE
from clipmill.sampling.files import FileList, GivenFiles, list_files
from clipmill.sampling.long import VideoLength, video_length
from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest

__all__ = ["class_of_clip", "condition_of_clips", "open_given", "prefix_of_clips", "require_given"]


def require_given(config: RunConfig, body: dict[str, Any]) -> Manifest | FileList | None:
    """The token data set or the files that provide prefixes and conditions; None if neither is needed.

    Args:
        config: config of the run.
        body: body of the prior's export.

    Raises:
        UserError: the source is missing, belongs to another tokenizer, or lacks the prior's condition; the prefix is
            as long as the video; or the prior was not trained for guidance, or has settings unknown to this clipmill.
    """
    settings, model = config.sample, model_config(body, PriorModelConfig)
    if settings.guidance != 1 and not (model.label_dropout or model.condition_dropout):
        raise UserError(
            f"sample.guidance={settings.guidance} needs a prior trained with prior.model.label_dropout or "
            "condition_dropout above 0; set sample.guidance=1, or train such a prior"
        )
    if not settings.prefix_latents and model.condition is None:
        return None
    length = video_length(body, settings.num_frames, settings.overlap_latents)
    most = min(length.window_latents, length.num_latents - 1)
    if settings.prefix_latents > most:
        raise UserError(
            f"sample.prefix_latents={settings.prefix_latents} is too large: the video has {length.num_latents} latent "
            f"frames, at least one must be generated, and a clip has {length.window_latents}; set it to at most {most}"
        )
    url = settings.given if settings.given_is_place else config.folder("tokens", settings.given)
    if settings.given_is_place and not storage.exists(storage.join(url, "manifest.json")):
        return list_files(url, model.condition, settings.prefix_latents)
    with suppress(FileNotFoundError):
        manifest = _tokens(url, body)
        if length.slides and model.condition == "actions":
            raise UserError(
                f"sample.num_frames={length.num_frames} needs actions for all of these frames, but clips of "
                f"sample.given {url} have actions for {length.window_frames}; set sample.given to files of actions, or "
                "remove sample.num_frames"
            )
        return manifest
    raise UserError(
        f"no tokens at {url} to take conditions or first latents from; set sample.given to other tokens, or to a "
        "video, a picture, or a folder or table of them"
    )


def _tokens(url: str, body: dict[str, Any]) -> Manifest:
    """A token data set.

    Raises:
        FileNotFoundError: there is none.
        UserError: it does not fit the prior.
    """
    manifest = Manifest.load(url, "tokens")
    if manifest.recipe["tokenizer"] != body["tokenizer"]["sha8"]:
        raise UserError(
            f"sample.given {url} holds tokens of tokenizer {manifest.recipe['tokenizer']}, but the prior's is "
            f"{body['tokenizer']['sha8']}; use tokens that the prior's tokenizer made"
        )
    if manifest.num_samples == 0:
        raise UserError(f"sample.given {url} is empty; name tokens of at least one clip")
    require_condition(body, url, manifest.num_samples, manifest.facts, "set sample.given to others")
    return manifest


def open_given(
    found: Manifest | FileList, body: dict[str, Any], prior: Prior, tokenizer: VQVAE, prefix_latents: int
) -> ShardDataset | GivenFiles:
    """Opens the result of `require_given` as a data set of clips.

    Args:
        found: a token data set or files.
        body: body of the prior's export.
        prior: the prior of this export.
        tokenizer: the prior's tokenizer, on the device that encodes.
        prefix_latents: number of latent frames in the prefix.
    """
    if isinstance(found, Manifest):
        return ShardDataset(found, decode_codes)
    return GivenFiles(found, body, tokenizer, prior.config, prefix_latents)


def prefix_of_clips(clips: Sequence[dict[str, Any]], prefix_latents: int) -> Tensor | None:
    """First latent frames of clips, int64 [B, n, h, w] or [B, n, h, w, M]; None if n is 0."""
    if not prefix_latents:
        return None
    return torch.from_numpy(np.stack([clip["codes"][:prefix_latents] for clip in clips], dtype=np.int64))


def condition_of_clips(clips: Sequence[dict[str, Any]], prior: Prior, length: VideoLength) -> Tensor | None:
    """The condition of clips, in the shape that `sample_videos` takes; None for a prior without a condition.

    Raises:
        UserError: the actions of a clip end before its video.
    """
    if prior.condition is None:
        return None
    kind, rows = str(prior.config.condition), prior.condition.shape[0]
    if kind == "actions" and length.slides:
        rows = length.num_frames
    for clip in clips:
        if len(clip[kind]) < rows:
            raise UserError(
                f"{clip['key']} has {kind} for {len(clip[kind])} frames, but a sample has {rows}; give {kind} for "
                "every frame, or lower sample.num_frames"
            )
    return torch.from_numpy(np.stack([clip[kind][:rows] for clip in clips]))


def class_of_clip(clip: dict[str, Any], classes: Sequence[str], otherwise: str | None) -> str | None:
    """The class of a clip; ``otherwise`` for a file without a class.

    Raises:
        UserError: the prior does not know the class.
    """
    if "label" not in clip:
        return otherwise
    if clip["label"] not in classes:
        raise UserError(
            f"clip {clip['key']} of sample.given has class {clip['label']}, but the prior knows {', '.join(classes)}; "
            "set sample.classes"
        )
    return clip["label"]
