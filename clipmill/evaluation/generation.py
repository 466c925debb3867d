"""A prior in numbers: its cross-entropy on the validation codes, and its samples beside the real clips."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.config import frame_size
from clipmill.errors import UserError
from clipmill.evaluation.baselines import CodeTables, baseline_scores
from clipmill.evaluation.distances import FeatureStatistics, frechet_distance, inception_score
from clipmill.evaluation.networks import Networks
from clipmill.evaluation.reader import Reader
from clipmill.evaluation.reconstruction import Reconstruction
from clipmill.evaluation.scores import CodeUsage, VideoStatistics
from clipmill.models.conditioning import condition_of
from clipmill.models.prior import Prior
from clipmill.shards.dataset import decode_clip, decode_codes
from clipmill.shards.manifest import Manifest

__all__ = ["describe_samples", "fvd_of_all", "prior_numbers", "score_codes"]


def score_codes(
    reader: Reader,
    val_tokens: Manifest,
    most: int | None,
    prior: Prior,
    classes: list[str],
    device: torch.device,
) -> tuple[CodeTables, float]:
    """Tables of the validation codes, and the prior's mean cross-entropy on them in nats per token.

    Args:
        reader: of the stage.
        val_tokens: codes of the prior's tokenizer.
        most: clips to read; None reads all.
        prior: on the device, in eval mode.
        classes: that the prior knows; empty for a prior without classes.
        device: of the prior.

    Raises:
        UserError: a clip has a class that the prior does not know.
    """
    tables = CodeTables(prior.num_codes, prior.input.num_codebooks)
    sum_nats = 0.0
    for batch in reader.read(val_tokens, decode_codes, most):
        codes = batch["codes"]
        tables.update(codes)
        label = None
        if classes:
            label = torch.tensor([_class_index(name, classes) for name in batch["label"]], device=device)
        condition = condition_of(batch, prior.config)
        if condition is not None:
            condition = torch.from_numpy(condition).to(device)
        per_clip = prior.loss(torch.from_numpy(codes).to(device), label, condition)
        sum_nats += per_clip.double().sum().item()
    return tables, sum_nats / tables.num_clips


def _class_index(name: str | None, classes: list[str]) -> int:
    """Number of a class, as the prior knows it."""
    if name not in classes:
        raise UserError(
            f"a validation clip has the class {name}, which the prior does not know (it knows {', '.join(classes)}); "
            "label all videos and train the prior again, or set prior.model.class_conditional=false"
        )
    return classes.index(name)


def prior_numbers(nats: float, clip: dict[str, Any], train: CodeTables, val: CodeTables) -> dict[str, Any]:
    """The prior beside the tables it has to beat, as plain JSON values.

    ``bits_per_token`` is what the paper calls bits per dim (its dimensions are latents); ``bits_per_dim`` here spreads
    the same bits over the numbers of a clip, T * H * W * 3.
    """
    tokens_per_clip = val.num_tokens / val.num_clips
    bits_per_clip = nats / math.log(2) * tokens_per_clip
    baselines = baseline_scores(train, val)
    return {
        "num_clips": val.num_clips,
        "num_clips_behind_tables": train.num_clips,
        "val_nats_per_token": nats,
        "bits_per_token": nats / math.log(2),
        "bits_per_clip": bits_per_clip,
        "bits_per_dim": bits_per_clip / math.prod((clip["num_frames"], *frame_size(clip["resolution"]), 3)),
        **baselines,
        "ratio_to_unigram": _ratio(nats, baselines["unigram_nats"]),
        "ratio_to_temporal_bigram": _ratio(nats, baselines["temporal_bigram_nats"]),
    }


def _decode_sample(members: dict[str, memoryview]) -> dict[str, Any]:
    return {**decode_clip(members), **decode_codes(members)}


def describe_samples(
    reader: Reader,
    networks: Networks,
    samples: Manifest,
    most: int | None,
    real: VideoStatistics,
    val_counts: NDArray[np.int64],
) -> tuple[dict[str, Any], FeatureStatistics | None]:
    """Statistics of the samples beside those of the real clips, and their I3D features if there are weights.

    Args:
        reader: of the stage.
        networks: to measure with.
        samples: with their codes.
        most: samples to read; None reads all.
        real: of the real clips.
        val_counts: [M, K], occurrences of each of the K codes of M codebooks in the real clips.

    Raises:
        UserError: a network is not what its key says.
    """
    num_codebooks, num_codes = val_counts.shape
    statistics, usage = VideoStatistics(), CodeUsage(num_codes, num_codebooks)
    features: FeatureStatistics | None = None
    probabilities: list[NDArray[np.float64]] = []
    per_class: Counter[str] = Counter()
    for batch in reader.read(samples, _decode_sample, most):
        statistics.update(batch["video"])
        usage.update(batch["codes"])
        per_class.update(label for label in batch["label"] if label is not None)
        if networks.i3d is not None:
            seen = FeatureStatistics.of(networks.i3d.features(batch["video"]))
            features = seen if features is None else features + seen
        if networks.c3d is not None:
            probabilities.append(networks.c3d.probabilities(batch["video"]))
    made, target = statistics.result(), real.result()
    shares = [counts / counts.sum() for counts in (usage.counts, val_counts)]
    described = {
        "count": statistics.num_clips,
        "per_class": dict(sorted(per_class.items())),
        "given_latent_frames": samples.recipe["sample"].get("prefix_latents", 0),
        "statistics": made,
        "val_statistics": target,
        "ratio_to_val": {name: _ratio(made[name], target[name]) for name in made if name != "num_clips"},
        # Total variation between the histograms of codes: 0 the same, 1 no code in common.
        "code_total_variation": float(np.abs(shares[0] - shares[1]).sum() / 2),
        "inception_score": inception_score(np.concatenate(probabilities)) if probabilities else None,
    }
    return described, features


def fvd_of_all(found: Reconstruction, samples: FeatureStatistics | None) -> dict[str, Any] | None:
    """All three: rFVD (real, reconstructions), FVD (real, samples), FVD* (reconstructions, samples).

    FVD* takes the tokenizer's own losses out of the prior's score (arXiv 2104.10157, section 5).
    """
    if found.features is None or samples is None:
        return None
    real, copies = found.features["real"], found.features["reconstruction"]
    return {
        **found.numbers["fvd"],
        "fvd": frechet_distance(real, samples),
        "fvd_star": frechet_distance(copies, samples),
        "num_samples": samples.num,
        "is_singular": real.is_singular or samples.is_singular,
    }


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None
