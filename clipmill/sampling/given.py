"""What a sample is given: conditions and first latents, of the clips of a token data set or of files."""

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
from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.manifest import Manifest

__all__ = ["class_of_clip", "condition_of_clips", "open_given", "prefix_of_clips", "require_given"]


def require_given(config: RunConfig, body: dict[str, Any]) -> Manifest | FileList | None:
    """The token data set or the files that give conditions and first latents; None if neither is wanted.

    Args:
        config: of the run.
        body: of the prior's export.

    Raises:
        UserError: it is not there, another tokenizer's, or lacks the prior's condition; the first latents leave
            nothing to make; the prior was not trained for guidance, or has settings that this clipmill does not know.
    """
    settings, model = config.sample, model_config(body, PriorModelConfig)
    if settings.guidance != 1 and not model.label_dropout:
        raise UserError(
            f"sample.guidance={settings.guidance} needs a prior trained with prior.model.label_dropout above 0; set "
            "sample.guidance=1, or train such a prior"
        )
    if not settings.prefix_latents and model.condition is None:
        return None
    num_frames = body["latent_shape"][0]
    if settings.prefix_latents >= num_frames:
        raise UserError(
            f"sample.prefix_latents={settings.prefix_latents}: of {num_frames} latent frames one must be left"
        )
    url = settings.given if settings.given_is_place else config.folder("tokens", settings.given)
    if settings.given_is_place and not storage.exists(storage.join(url, "manifest.json")):
        return list_files(url, model.condition, settings.prefix_latents)
    with suppress(FileNotFoundError):
        return _tokens(url, body)
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
            f"sample.given {url} holds tokens of tokenizer {manifest.recipe['tokenizer']}, the prior's is "
            f"{body['tokenizer']['sha8']}; name tokens that the prior's tokenizer made"
        )
    if manifest.num_samples == 0:
        raise UserError(f"sample.given {url} is empty; name tokens of at least one clip")
    require_condition(body, url, manifest.num_samples, manifest.facts, "set sample.given to others")
    return manifest


def open_given(
    found: Manifest | FileList, body: dict[str, Any], prior: Prior, tokenizer: VQVAE, prefix_latents: int
) -> ShardDataset | GivenFiles:
    """The clips of what `require_given` found, by index.

    Args:
        found: tokens or files.
        body: of the prior's export.
        prior: loaded from it.
        tokenizer: its own, on the device that encodes.
        prefix_latents: first latent frames that are given.
    """
    if isinstance(found, Manifest):
        return ShardDataset(found, decode_codes)
    return GivenFiles(found, body, tokenizer, prior.config, prefix_latents)


def prefix_of_clips(clips: Sequence[dict[str, Any]], prefix_latents: int) -> Tensor | None:
    """First latent frames of clips, int64 [B, n, h, w] or [B, n, h, w, M]; None if n is 0."""
    if not prefix_latents:
        return None
    return torch.from_numpy(np.stack([clip["codes"][:prefix_latents] for clip in clips], dtype=np.int64))


def condition_of_clips(clips: Sequence[dict[str, Any]], prior: Prior) -> Tensor | None:
    """The condition of clips, in the shape that `clipmill.models.conditioning` gives; None for a prior without."""
    if prior.condition is None:
        return None
    kind, length = str(prior.config.condition), prior.condition.shape[0]
    return torch.from_numpy(np.stack([clip[kind][:length] for clip in clips]))


def class_of_clip(clip: dict[str, Any], classes: Sequence[str], otherwise: str | None) -> str | None:
    """The class of a clip; ``otherwise`` for a given file that has none.

    Raises:
        UserError: the prior does not know it.
    """
    if "label" not in clip:
        return otherwise
    if clip["label"] not in classes:
        raise UserError(
            f"clip {clip['key']} of sample.given has the class {clip['label']}, the prior knows {', '.join(classes)}; "
            "set sample.classes"
        )
    return clip["label"]
