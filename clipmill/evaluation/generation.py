"""Metrics of a prior: its cross-entropy on the validation codes, and its samples compared with real clips."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.config import frame_size
from clipmill.errors import UserError
from clipmill.evaluation.appearance import appearance_of, compare_appearance, total_variation
from clipmill.evaluation.baselines import CodeTables, baseline_scores
from clipmill.evaluation.distances import FeatureStatistics, frechet_distance, inception_score
from clipmill.evaluation.manifold import fvd_by_count, fvd_over_seeds, kernel_distance, manifold_scores
from clipmill.evaluation.networks import Networks
from clipmill.evaluation.parts import Arrays
from clipmill.evaluation.scores import count_codes
from clipmill.models.conditioning import condition_of
from clipmill.models.prior import Prior
from clipmill.shards.dataset import decode_clip, decode_codes

__all__ = [
    "decode_sample",
    "fvd_of_all",
    "prior_section",
    "sample_arrays",
    "sample_section",
    "token_nats",
]


def token_nats(batch: dict[str, Any], prior: Prior, classes: list[str], device: torch.device) -> NDArray[np.float64]:
    """The prior's mean cross-entropy on the codes of each clip, in nats per token: float64 [B].

    Args:
        batch: a batch of tokens.
        prior: on the device, in eval mode.
        classes: of the prior; empty if it has none.
        device: of the prior.

    Raises:
        UserError: a clip has a class that the prior does not know.
    """
    label = None
    if classes:
        label = torch.tensor([_class_index(name, classes) for name in batch["label"]], device=device)
    condition = condition_of(batch, prior.config)
    if condition is not None:
        condition = torch.from_numpy(condition).to(device)
    codes = torch.from_numpy(batch["codes"].astype(np.int64)).to(device)
    return prior.loss(codes, label, condition).double().cpu().numpy()


def _class_index(name: str | None, classes: list[str]) -> int:
    """Index of a class in the prior."""
    if name not in classes:
        raise UserError(
            f"a validation clip has the class {name}, which the prior does not know (it knows {', '.join(classes)}); "
            "label all videos and train the prior again, or set prior.model.class_conditional=false"
        )
    return classes.index(name)


def prior_section(
    nats: NDArray[np.float64], clip: dict[str, Any], train: CodeTables, val: CodeTables
) -> dict[str, Any]:
    """Metrics of the prior and of the baseline tables, as plain JSON values.

    ``bits_per_token`` is what the paper calls bits per dim (its dimensions are latents). ``bits_per_dim`` divides the
    same bits by the values of a clip, T * H * W * 3.

    Args:
        nats: from `token_nats`, for all validation clips.
        clip: recipe of the clips.
        train: tables of the training codes.
        val: tables of the validation codes.
    """
    tokens_per_clip = val.num_tokens / val.num_clips
    mean_nats = math.fsum(nats) / len(nats)
    bits_per_clip = mean_nats / math.log(2) * tokens_per_clip
    baselines = baseline_scores(train, val)
    return {
        "num_clips": val.num_clips,
        "num_clips_behind_tables": train.num_clips,
        "val_nats_per_token": mean_nats,
        "bits_per_token": mean_nats / math.log(2),
        "bits_per_clip": bits_per_clip,
        "bits_per_dim": bits_per_clip / math.prod((clip["num_frames"], *frame_size(clip["resolution"]), 3)),
        **baselines,
        "ratio_to_unigram": _ratio(mean_nats, baselines["unigram_nats"]),
        "ratio_to_temporal_bigram": _ratio(mean_nats, baselines["temporal_bigram_nats"]),
    }


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None


def decode_sample(members: dict[str, memoryview]) -> dict[str, Any]:
    """A generated sample: the fields of a clip, and its codes."""
    return {**decode_codes(members), **decode_clip(members)}


def sample_arrays(
    batch: dict[str, Any], video: Tensor, networks: Networks, num_codes: int, num_codebooks: int
) -> tuple[Arrays, Arrays]:
    """Measures a batch of generated samples.

    Args:
        batch: a batch of samples.
        video: their pixels, uint8 [B, T, H, W, 3], on the device to measure on.
        networks: the networks that users bring.
        num_codes: K.
        num_codebooks: M.

    Returns:
        Arrays with one row per clip, and arrays to sum over batches.
    """
    rows = {
        **appearance_of(video),
        "key": np.array(batch["key"], np.str_),
        "label": np.array([label or "" for label in batch["label"]], np.str_),
        "fps": np.array([meta.get("fps", np.nan) for meta in batch["meta"]], np.float64),
    }
    if networks.i3d is not None:
        rows["features"] = networks.i3d.features(batch["video"])
    if networks.c3d is not None:
        rows["probabilities"] = networks.c3d.probabilities(batch["video"])
    return rows, {"code_counts": count_codes(batch["codes"], num_codes, num_codebooks)}


def sample_section(
    given_frames: int,
    made: Arrays,
    counts: NDArray[np.int64],
    real: Arrays,
    val_counts: NDArray[np.int64],
) -> dict[str, Any]:
    """Section ``samples`` of ``metrics.json``.

    Args:
        given_frames: number of given first frames of each sample.
        made: from `sample_arrays`, for all samples.
        counts: int64 [M, K], counts of their codes.
        real: from `clipmill.evaluation.reconstruction.real_arrays`, for all real clips.
        val_counts: int64 [M, K], counts of the real clips' codes.
    """
    return {
        "count": len(made["key"]),
        "per_class": dict(sorted(Counter(label for label in made["label"].tolist() if label).items())),
        "given_frames": given_frames,
        "appearance": compare_appearance(real, made),
        "code_total_variation": total_variation(counts, val_counts),
        "inception_score": inception_score(made["probabilities"]) if "probabilities" in made else None,
    }


def fvd_of_all(
    rfvd: dict[str, Any] | None, real: Arrays, copies: Arrays, made: Arrays, num_seeds: int
) -> dict[str, Any] | None:
    """All three distances: rFVD (real, reconstructions), FVD (real, samples), FVD* (reconstructions, samples).

    FVD* excludes the tokenizer's losses from the prior's score (arXiv 2104.10157, section 5).

    Args:
        rfvd: section ``fvd`` without samples.
        real: arrays of the real clips, with their features.
        copies: the same for their reconstructions.
        made: the same for the samples.
        num_seeds: see `fvd_over_seeds`.
    """
    if rfvd is None:
        return None
    originals, copied, sampled = (FeatureStatistics.of(found["features"]) for found in (real, copies, made))
    return {
        **rfvd,
        "fvd": frechet_distance(originals, sampled),
        "fvd_star": frechet_distance(copied, sampled),
        "num_samples": sampled.num,
        "is_singular": originals.is_singular or sampled.is_singular,
        "kvd": kernel_distance(real["features"], made["features"]),
        "manifold": manifold_scores(real["features"], made["features"]),
        "over_seeds": fvd_over_seeds(real["features"], made["features"], num_seeds),
        "by_count": fvd_by_count(real["features"], made["features"]),
    }
