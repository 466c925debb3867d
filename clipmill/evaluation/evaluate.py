"""Stage ``evaluate``: the numbers a run is judged by, measured from what is on disk.

It runs the newest prior export, and the tokenizer inside it, over the split ``val``, and looks at the samples. Every
number goes into ``evaluation/metrics.json`` beside the identities of all that it was measured on; the clips that the
report shows go into ``evaluation/gallery.npz``.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation.baselines import CodeTables, baseline_scores
from clipmill.evaluation.gallery import Gallery, clips_per_class
from clipmill.evaluation.scores import CodeUsage, ReconstructionScores, VideoStatistics
from clipmill.lease import Lease
from clipmill.models.conditioning import condition_of
from clipmill.models.export import load_prior, read_latest
from clipmill.models.prior import Prior
from clipmill.models.provenance import deterministic_device
from clipmill.models.vqvae import VQVAE, to_input, to_pixels
from clipmill.progress import bar
from clipmill.shards.dataset import Decode, ShardDataset, decode_clip, decode_codes, eval_batches
from clipmill.shards.manifest import Kind, Manifest

__all__ = ["METRICS_SCHEMA", "folder_url", "is_finished", "run"]

METRICS_SCHEMA = 1


def folder_url(config: RunConfig) -> str:
    """The folder of this stage."""
    return config.folder("evaluation")


def is_finished(config: RunConfig) -> bool:
    """Whether the metrics on disk were measured on exactly what is there now.

    Raises:
        UserError: a stage before this one has not run, or its data belong to another tokenizer.
    """
    inputs = _Inputs.load(config)
    try:
        metrics = storage.read_document(storage.join(folder_url(config), "metrics.json"), METRICS_SCHEMA)
    except FileNotFoundError:
        return False
    return metrics["identity"] == inputs.identity(config)


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Measures everything and publishes it.

    Returns:
        The most important numbers, for the summary.

    Raises:
        UserError: as `is_finished`. Nothing was written.
    """
    inputs = _Inputs.load(config)
    device = deterministic_device(config.cluster)  # as the tokens were made, so that they come out again
    prior, tokenizer, body, _ = load_prior(storage.join(config.folder("prior"), "exports", inputs.prior_sha8))
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    manifests = (inputs.clips, inputs.train_tokens, inputs.val_tokens, inputs.samples)
    total = sum(min(manifest.num_samples, config.evaluate.max_clips) for manifest in manifests)
    began = time.monotonic()
    with bar("evaluate", total=total, unit="clips") as progress, torch.inference_mode():
        reader = _Reader(config, progress)
        reconstruction, real, gallery = _reconstruct(reader, inputs, tokenizer, body["classes"], device)
        val_tables, usage, nats = _score_codes(reader, inputs, prior, body["classes"], device)
        tables = CodeTables(body["num_codes"])
        for batch in reader.read(inputs.train_tokens, decode_codes):
            tables.update(batch["codes"])
        samples = _describe_samples(reader, inputs, real, usage)
    metrics = {
        "identity": inputs.identity(config),
        "reconstruction": reconstruction.result(),
        "codebook": {**usage.result(), "sorted_counts": np.sort(usage.counts)[::-1].tolist()},
        "prior": _prior_numbers(nats, usage, inputs, tables, val_tables),
        "samples": samples,
        "steps": {"tokenizer": body["tokenizer"]["step"], "prior": body["step"]},
    }
    lease.check()
    gallery.save(storage.join(folder_url(config), "gallery.npz"))
    storage.publish_document(storage.join(folder_url(config), "metrics.json"), metrics, METRICS_SCHEMA)
    return {
        "clips": metrics["reconstruction"]["num_clips"],
        "samples": samples["count"],
        "clips_per_second": total / (time.monotonic() - began),
        "nmse": metrics["reconstruction"]["nmse"],
        "psnr_db": metrics["reconstruction"]["psnr_db"],
        "codes_used_share": metrics["codebook"]["used_share"],
        "val_nats_per_token": metrics["prior"]["val_nats_per_token"],
        "unigram_nats": metrics["prior"]["unigram_nats"],
        "temporal_bigram_nats": metrics["prior"]["temporal_bigram_nats"],
        "ratio_to_unigram": metrics["prior"]["ratio_to_unigram"],
    }


# ---------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Inputs:
    """What is measured, found to belong together."""

    clips: Manifest
    train_tokens: Manifest
    val_tokens: Manifest
    samples: Manifest
    prior_sha8: str

    @classmethod
    def load(cls, config: RunConfig) -> _Inputs:
        """Reads manifests and export records only."""
        clips = _manifest(config.folder("clips", "val"), "clips", "shard")
        if not clips.num_samples:
            raise UserError(f"{clips.url} has no clips to evaluate on; add videos or raise data.val_fraction")
        train_tokens = _manifest(config.folder("tokens", "train"), "tokens", "tokenize")
        val_tokens = _manifest(config.folder("tokens", "val"), "tokens", "tokenize")
        latest = read_latest(config.folder("prior"))
        if latest is None:
            raise UserError(f"no prior at {config.folder('prior')}; run `clipmill train-prior` with this config first")
        body, prior_sha8 = latest
        samples = _manifest(config.folder("samples", config.sample.name), "samples", "sample")
        tokenizer_sha8 = body["tokenizer"]["sha8"]
        for tokens in (train_tokens, val_tokens):
            if tokens.recipe["tokenizer"] != tokenizer_sha8:
                raise UserError(
                    f"the prior {prior_sha8} was trained on tokens of {tokenizer_sha8}, those at {tokens.url} "
                    f"are of {tokens.recipe['tokenizer']}; run `clipmill train-prior` on them in another root, or "
                    "restore the tokens"
                )
        if val_tokens.facts["clips"] != clips.fingerprint:
            raise UserError(
                f"the tokens at {val_tokens.url} are of other clips than {clips.url}; run `clipmill tokenize`"
            )
        if samples.recipe["prior"] != prior_sha8:
            raise UserError(
                f"the samples at {samples.url} were made by prior {samples.recipe['prior']}, the newest is "
                f"{prior_sha8}; run `clipmill sample` with another sample.name"
            )
        return cls(clips, train_tokens, val_tokens, samples, prior_sha8)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """All that the metrics are a function of."""
        return {
            "tokenizer": self.val_tokens.recipe["tokenizer"],
            "prior": self.prior_sha8,
            "clips_val": self.clips.fingerprint,
            "tokens_train": self.train_tokens.fingerprint,
            "tokens_val": self.val_tokens.fingerprint,
            "samples": self.samples.fingerprint,
            "max_clips": config.evaluate.max_clips,
        }


def _manifest(url: str, kind: Kind, made_by: str) -> Manifest:
    try:
        return Manifest.load(url, kind)
    except FileNotFoundError as error:
        raise UserError(f"no {kind} at {url}; run `clipmill {made_by}` with this config first") from error


class _Reader:
    """Reads data sets in batches of numpy arrays, without padding, and moves the progress bar."""

    def __init__(self, config: RunConfig, progress: bar) -> None:
        self._config = config
        self._progress = progress
        self._done = 0

    def read(self, manifest: Manifest, decode: Decode) -> Iterator[dict[str, Any]]:
        """The first ``evaluate.max_clips`` samples, in order."""
        settings = self._config.evaluate
        for batch in eval_batches(
            ShardDataset(manifest, decode),
            batch_size=settings.batch_size,
            rank=0,
            world_size=1,
            max_samples=settings.max_clips,
        ):
            rows = np.flatnonzero(batch["weight"].numpy() > 0)
            yield {
                name: values.numpy()[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
                for name, values in batch.items()
            }
            self._done += len(rows)
            self._progress.update(self._done)


# ------------------------------------------------------------------------------------------- measuring


def _reconstruct(
    reader: _Reader, inputs: _Inputs, tokenizer: VQVAE, classes: list[str], device: torch.device
) -> tuple[ReconstructionScores, VideoStatistics, Gallery]:
    """Sends the validation clips through the tokenizer; scores what comes back as the uint8 pixels that people see."""
    scores, statistics = ReconstructionScores(), VideoStatistics()
    wanted = clips_per_class(classes or inputs.clips.facts["classes"])
    shown: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str | None]] = []
    for batch in reader.read(inputs.clips, decode_clip):
        video = batch["video"]
        codes = tokenizer.encode(to_input(torch.from_numpy(video).to(device)))
        reconstruction = to_pixels(tokenizer.decode(codes)).cpu().numpy()
        scores.update(video, reconstruction)
        statistics.update(video)
        for real, copy, label in zip(video, reconstruction, batch["label"], strict=True):
            label = label if label in wanted else None
            if wanted.get(label, 0) > 0:
                wanted[label] -= 1
                shown.append((real, copy, label))
    real_clips, copies, labels = zip(*shown, strict=True) if shown else ((video[:0],), (video[:0],), ())
    gallery = Gallery(np.array(real_clips), np.array(copies), labels)
    return scores, statistics, gallery


def _score_codes(
    reader: _Reader, inputs: _Inputs, prior: Prior, classes: list[str], device: torch.device
) -> tuple[CodeTables, CodeUsage, float]:
    """Tables and usage of the validation codes, and the prior's mean cross-entropy on them in nats per token."""
    tables, usage = CodeTables(prior.num_codes), CodeUsage(prior.num_codes)
    sum_nats = 0.0
    for batch in reader.read(inputs.val_tokens, decode_codes):
        codes = batch["codes"]
        tables.update(codes)
        usage.update(codes)
        label = None
        if classes:
            label = torch.tensor([_class_index(name, classes) for name in batch["label"]], device=device)
        condition = condition_of(batch, prior.config)
        if condition is not None:
            condition = torch.from_numpy(condition).to(device)
        per_clip = prior.loss(torch.from_numpy(codes).to(device), label, condition)
        sum_nats += per_clip.double().sum().item()
    return tables, usage, sum_nats / usage.num_clips


def _class_index(name: str | None, classes: list[str]) -> int:
    """Number of a class, as the prior knows it."""
    if name not in classes:
        raise UserError(
            f"a validation clip has the class {name}, which the prior does not know (it knows {', '.join(classes)}); "
            "label all videos and train the prior again, or set prior.model.class_conditional=false"
        )
    return classes.index(name)


def _prior_numbers(
    nats: float, usage: CodeUsage, inputs: _Inputs, train: CodeTables, val: CodeTables
) -> dict[str, Any]:
    """The prior beside the tables it has to beat.

    ``bits_per_token`` is what the paper calls bits per dim (its dimensions are latents); ``bits_per_dim`` here spreads
    the same bits over the numbers of a clip, T * H * W * 3.
    """
    tokens_per_clip = usage.result()["tokens_per_clip"]
    clip = inputs.clips.recipe["clip"]
    bits_per_clip = nats / math.log(2) * tokens_per_clip
    baselines = baseline_scores(train, val)
    return {
        "num_clips": usage.num_clips,
        "num_clips_in_split": inputs.val_tokens.num_samples,
        "num_clips_behind_tables": train.num_clips,
        "val_nats_per_token": nats,
        "bits_per_token": nats / math.log(2),
        "bits_per_clip": bits_per_clip,
        "bits_per_dim": bits_per_clip / (clip["num_frames"] * clip["resolution"] ** 2 * 3),
        **baselines,
        "ratio_to_unigram": _ratio(nats, baselines["unigram_nats"]),
        "ratio_to_temporal_bigram": _ratio(nats, baselines["temporal_bigram_nats"]),
    }


def _decode_sample(members: dict[str, memoryview]) -> dict[str, Any]:
    return {**decode_clip(members), **decode_codes(members)}


def _describe_samples(reader: _Reader, inputs: _Inputs, real: VideoStatistics, val_usage: CodeUsage) -> dict[str, Any]:
    """What the samples look like beside the real clips."""
    statistics, usage = VideoStatistics(), CodeUsage(len(val_usage.counts))
    per_class: Counter[str] = Counter()
    for batch in reader.read(inputs.samples, _decode_sample):
        statistics.update(batch["video"])
        usage.update(batch["codes"])
        per_class.update(label for label in batch["label"] if label is not None)
    made, target = statistics.result(), real.result()
    return {
        "count": statistics.num_clips,
        "per_class": dict(sorted(per_class.items())),
        "statistics": made,
        "val_statistics": target,
        "ratio_to_val": {name: _ratio(made[name], target[name]) for name in made if name != "num_clips"},
        # Total variation between the histograms of codes: 0 the same, 1 no code in common.
        "code_total_variation": float(np.abs(usage.shares() - val_usage.shares()).sum() / 2),
    }


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None
