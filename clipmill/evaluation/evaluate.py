"""Stage ``evaluate``: the numbers a run is judged by, measured from what is on disk.

``evaluate.what=vqvae`` judges the newest tokenizer by the clips of the split ``val`` and writes
``evaluation/vqvae.json``. ``all`` does the same for the tokenizer inside the newest prior export, runs that prior over
the tokens of ``val``, looks at the samples, and writes ``evaluation/metrics.json`` as well. Every number stands beside
the identities of all that it was measured on; docs/evaluation.md defines them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation.baselines import CodeTables
from clipmill.evaluation.generation import describe_samples, fvd_of_all, prior_numbers, score_codes
from clipmill.evaluation.networks import C3D_FRAMES, I3D_CHANNELS, Networks, weights_sha256
from clipmill.evaluation.reader import Reader, num_read
from clipmill.evaluation.reconstruction import (
    VQVAE_SCHEMA,
    measure_reconstruction,
    tokenizer_identity,
    val_clips,
)
from clipmill.lease import Lease
from clipmill.models.export import load_prior, load_vqvae, require_condition, require_prior, require_vqvae_for
from clipmill.models.provenance import deterministic_device
from clipmill.progress import bar
from clipmill.shards.dataset import decode_codes
from clipmill.shards.manifest import Manifest

__all__ = ["METRICS_SCHEMA", "clip_recipes", "folder_url", "is_finished", "read_result", "run"]

METRICS_SCHEMA = 3
"""3: of a limited number of clips those of as many videos. 2: the tokenizer by itself, all Frechet distances."""

logger = logging.getLogger(__name__)


def folder_url(config: RunConfig) -> str:
    """The folder of this stage."""
    return config.folder("evaluation")


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips, by the URL of what this stage reads.

    Raises:
        UserError: there are none yet.
    """
    return {clips.url: clips.recipe for clips in [val_clips(config)]}


def is_finished(config: RunConfig) -> bool:
    """Whether the numbers on disk were measured on exactly what is there now.

    Raises:
        UserError: a stage before this one has not run, its data belong to another tokenizer, the tokens come without
            what the prior is to be told, or a network's weights are not there or do not fit the clips.
    """
    if config.evaluate.what == "vqvae":
        clips = val_clips(config)
        _, sha8 = require_vqvae_for(config.tokenizer_url, clips.url, clips.recipe)
        identity = tokenizer_identity(config.evaluate, clips, sha8)
    else:
        identity = _Inputs.load(config).identity(config)
    found = read_result(config)
    return found is not None and found["identity"] == identity


def read_result(config: RunConfig, what: Literal["all", "vqvae"] | None = None) -> dict[str, Any] | None:
    """What an evaluation has left on disk; none: nothing yet, or only what an older clipmill measured otherwise.

    Args:
        config: of the run.
        what: of which kind; none: that of ``evaluate.what``.

    Raises:
        UserError: it is damaged, or was written by a newer clipmill.
    """
    is_of_tokenizer = (what or config.evaluate.what) == "vqvae"
    name, schema = ("vqvae.json", VQVAE_SCHEMA) if is_of_tokenizer else ("metrics.json", METRICS_SCHEMA)
    try:
        result = storage.read_document(storage.join(folder_url(config), name), schema)
    except FileNotFoundError:
        return None
    return result if result["schema"] == schema else None


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Measures everything that ``evaluate.what`` asks for and publishes it.

    Returns:
        The most important numbers, for the summary.

    Raises:
        UserError: as `is_finished`, or a network is not what its key says. No number was written.
    """
    return _judge_tokenizer(config, lease) if config.evaluate.what == "vqvae" else _judge_all(config, lease)


def _judge_tokenizer(config: RunConfig, lease: Lease) -> dict[str, Any]:
    clips = val_clips(config)
    require_vqvae_for(config.tokenizer_url, clips.url, clips.recipe)
    tokenizer, body, sha8 = load_vqvae(config.tokenizer_url)
    device = deterministic_device(config.cluster)  # as tokens are made, so that the same codes come out
    networks, most = Networks.load(config.evaluate, device), config.evaluate.max_clips
    total = num_read(clips, most)
    began = time.monotonic()
    with bar("evaluate", total=total, unit="clips") as progress, torch.inference_mode():
        reader = Reader(config.evaluate.batch_size, progress)
        classes = clips.facts["classes"]
        found = measure_reconstruction(reader, networks, clips, most, tokenizer.to(device), classes, device)
    lease.check()
    found.publish(folder_url(config), tokenizer_identity(config.evaluate, clips, sha8), body["step"])
    _warn_of_few_clips(found.numbers["fvd"])
    return {"what": "vqvae", "clips_per_second": total / (time.monotonic() - began), **_headlines(found.numbers)}


def _judge_all(config: RunConfig, lease: Lease) -> dict[str, Any]:
    inputs = _Inputs.load(config)
    device = deterministic_device(config.cluster)
    networks, most = Networks.load(config.evaluate, device), config.evaluate.max_clips
    prior, tokenizer, body, _ = load_prior(storage.join(config.folder("prior"), "exports", inputs.prior_sha8))
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    most_for_tables = config.evaluate.max_train_clips
    total = sum(num_read(manifest, most) for manifest in (inputs.clips, inputs.val_tokens, inputs.samples))
    total += num_read(inputs.train_tokens, most_for_tables)
    began = time.monotonic()
    with bar("evaluate", total=total, unit="clips") as progress, torch.inference_mode():
        reader = Reader(config.evaluate.batch_size, progress)
        classes = body["classes"] or inputs.clips.facts["classes"]
        found = measure_reconstruction(reader, networks, inputs.clips, most, tokenizer, classes, device)
        val_tables, nats = score_codes(reader, inputs.val_tokens, most, prior, body["classes"], device)
        tables = CodeTables(val_tables.num_codes, val_tables.num_codebooks)
        for batch in reader.read(inputs.train_tokens, decode_codes, most_for_tables):
            tables.update(batch["codes"])
        samples, features = describe_samples(
            reader, networks, inputs.samples, most, found.statistics, val_tables.unigram
        )
    metrics = {
        "identity": inputs.identity(config),
        **found.numbers,
        "fvd": fvd_of_all(found, features),
        "prior": prior_numbers(nats, inputs.clips.recipe["clip"], tables, val_tables),
        "samples": samples,
        "steps": {"tokenizer": body["tokenizer"]["step"], "prior": body["step"]},
    }
    lease.check()
    identity = tokenizer_identity(config.evaluate, inputs.clips, body["tokenizer"]["sha8"])
    found.publish(folder_url(config), identity, body["tokenizer"]["step"])
    storage.publish_document(storage.join(folder_url(config), "metrics.json"), metrics, METRICS_SCHEMA)
    _warn_of_few_clips(metrics["fvd"])
    return {
        "what": "all",
        "samples": samples["count"],
        "clips_per_second": total / (time.monotonic() - began),
        **_headlines(metrics),
        "val_nats_per_token": metrics["prior"]["val_nats_per_token"],
        "unigram_nats": metrics["prior"]["unigram_nats"],
        "temporal_bigram_nats": metrics["prior"]["temporal_bigram_nats"],
        "ratio_to_unigram": metrics["prior"]["ratio_to_unigram"],
    }


def _headlines(numbers: dict[str, Any]) -> dict[str, Any]:
    """Of the summary: what both kinds of evaluation have."""
    return {
        "clips": numbers["clips"]["num_clips"],
        "nmse": numbers["reconstruction"]["nmse"],
        "psnr_db": numbers["reconstruction"]["psnr_db"],
        "codes_used_share": numbers["codebook"]["used_share"],
        **{name: value for name, value in (numbers["fvd"] or {}).items() if name in ("rfvd", "fvd", "fvd_star")},
    }


def _warn_of_few_clips(fvd: dict[str, Any] | None) -> None:
    if fvd is not None and fvd["is_singular"]:
        logger.warning(
            "FVD: no more clips than its %d channels (%s), so the covariance is singular; compare only with numbers of "
            "as many clips",
            I3D_CHANNELS,
            ", ".join(
                f"{name.removeprefix('num_')} {fvd[name]}" for name in ("num_real", "num_samples") if name in fvd
            ),
        )


# ---------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Inputs:
    """What ``all`` measures, found to belong together."""

    clips: Manifest
    train_tokens: Manifest
    val_tokens: Manifest
    samples: Manifest
    prior_sha8: str

    @classmethod
    def load(cls, config: RunConfig) -> _Inputs:
        """Reads manifests and export records only."""
        clips = val_clips(config)
        train_tokens = Manifest.require(config.folder("tokens", "train"), "tokens")
        val_tokens = Manifest.require(config.folder("tokens", "val"), "tokens")
        body, prior_sha8 = require_prior(config.folder("prior"))
        samples = Manifest.require(config.folder("samples", config.sample.name), "samples")
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
        advice = "remove these tokens and tokenize again as for the prior's training"
        require_condition(body, val_tokens.url, val_tokens.num_samples, val_tokens.facts, advice)
        if samples.recipe["prior"] != prior_sha8:
            raise UserError(
                f"the samples at {samples.url} were made by prior {samples.recipe['prior']}, the newest is "
                f"{prior_sha8}; run `clipmill sample` with another sample.name"
            )
        made, clip_frames = samples.recipe["sample"].get("num_frames"), clips.recipe["clip"]["num_frames"]
        if made not in (None, clip_frames):
            raise UserError(
                f"the samples at {samples.url} have {made} frames, the clips {clip_frames}; name samples of as many "
                "frames by sample.name"
            )
        if config.evaluate.is_weights is not None and clips.recipe["clip"]["num_frames"] != C3D_FRAMES:
            raise UserError(
                f"the Inception Score is one of clips of {C3D_FRAMES} frames, those at {clips.url} have "
                f"{clips.recipe['clip']['num_frames']}; leave evaluate.is_weights out"
            )
        if config.evaluate.fvd_weights is not None and num_read(samples, config.evaluate.max_clips) < 2:
            raise UserError(f"FVD needs at least 2 samples, {samples.url} has fewer; raise sample.num_samples")
        return cls(clips, train_tokens, val_tokens, samples, prior_sha8)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """All that the metrics are a function of."""
        settings = config.evaluate
        tokenizer = tokenizer_identity(settings, self.clips, self.val_tokens.recipe["tokenizer"])
        is_sha256 = None if settings.is_weights is None else weights_sha256("is_weights", settings.is_weights)
        return {
            **tokenizer,
            "prior": self.prior_sha8,
            "tokens_train": self.train_tokens.fingerprint,
            "tokens_val": self.val_tokens.fingerprint,
            "samples": self.samples.fingerprint,
            "max_train_clips": settings.max_train_clips,
            "weights_sha256": tokenizer["weights_sha256"] | {"is": is_sha256},
        }
