"""Settings and inputs of an evaluation, with checks that the inputs belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipmill import storage
from clipmill.config import RunConfig, VQVAEModelConfig, changed_keys, identity
from clipmill.errors import UserError
from clipmill.evaluation.networks import C3D_FRAMES, I3D_FEWEST_FRAMES
from clipmill.evaluation.protocols import most_clips, require_protocol, split_of
from clipmill.evaluation.reader import num_read
from clipmill.evaluation.results import Evaluation
from clipmill.models.export import model_config, require_condition, require_prior, require_vqvae_for
from clipmill.models.torchscript import weights_sha256
from clipmill.models.vqvae import num_frames_of
from clipmill.shards.manifest import Manifest

__all__ = ["Inputs", "real_clips", "refuse_other", "settings_of"]

_WEIGHTS = ("fvd", "is", "lpips")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Settings that determine the metrics: keys of ``evaluate``, with hashes of network files instead of their URLs.

    Raises:
        UserError: a network's file does not exist.
    """
    keys = identity(config.evaluate)
    urls = {name: keys.pop(f"{name}_weights") for name in _WEIGHTS}
    hashes = {name: url and weights_sha256(f"evaluate.{name}_weights", url) for name, url in urls.items()}
    return {**keys, "weights_sha256": hashes}


def real_clips(config: RunConfig) -> Manifest:
    """The real clips to compare with.

    Raises:
        UserError: there are no clips, or they are too few or too short for the configured FVD.
    """
    clips = Manifest.require(config.folder("clips", split_of(config.evaluate)), "clips")
    if not clips.num_samples:
        raise UserError(f"{clips.url} has no clips to evaluate on; add videos or raise data.val_fraction")
    if config.evaluate.fvd_weights is not None:
        num_frames = clips.recipe["clip"]["num_frames"]
        if num_frames < I3D_FEWEST_FRAMES:
            raise UserError(
                f"FVD needs clips of at least {I3D_FEWEST_FRAMES} frames, those at {clips.url} have {num_frames}; "
                "raise data.clip.num_frames, or leave evaluate.fvd_weights out"
            )
        if num_read(clips, most_clips(config.evaluate)) < 2:
            raise UserError(f"FVD needs at least 2 clips of {clips.url}; raise evaluate.max_clips or data.val_fraction")
    return clips


@dataclass(frozen=True)
class Inputs:
    """The data and models to measure. Without a prior (``what=vqvae``), all but clips and tokenizer are None."""

    clips: Manifest
    """Real ones."""
    tokenizer_url: str
    """Its export, or that of the prior that contains it."""
    tokenizer: dict[str, Any]
    """Body of its export."""
    prior: dict[str, Any] | None = None
    """Body of its export."""
    train_tokens: Manifest | None = None
    val_tokens: Manifest | None = None
    samples: Manifest | None = None

    @classmethod
    def load(cls, config: RunConfig) -> Inputs:
        """Reads manifests and export records only.

        Raises:
            UserError: something is missing, or does not belong to the rest; the message says what to run.
        """
        clips = real_clips(config)
        if config.evaluate.what == "all":
            inputs = _load_all(config, clips)
        else:
            tokenizer, _ = require_vqvae_for(config.tokenizer_url, clips.url, clips.recipe)
            inputs = cls(clips, config.tokenizer_url, tokenizer)
        require_protocol(config.evaluate, inputs, inputs.given_frames)
        return inputs

    @property
    def classes(self) -> list[str]:
        """Classes of which clips are shown."""
        return (self.prior and self.prior["classes"]) or self.clips.facts["classes"]

    @property
    def given_frames(self) -> int:
        """Number of given first frames of each sample: those of given latents, or those the prior is conditioned on."""
        if self.prior is None or self.samples is None:
            return 0
        tokenizer = model_config(self.tokenizer, VQVAEModelConfig)
        behind = num_frames_of(tokenizer, self.samples.recipe["sample"].get("prefix_latents", 0))
        shown = self.prior["condition_shape"][0] if self.prior["model"].get("condition") == "frames" else 0
        return max(behind, shown)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of all data and models that determine the numbers."""
        found = {"clips": self.clips.fingerprint, "tokenizer": self.tokenizer["sha8"]}
        if self.prior is not None:
            found["prior"] = self.prior["sha8"]
        sets = {"train_tokens": self.train_tokens, "val_tokens": self.val_tokens, "samples": self.samples}
        return found | {name: manifest.fingerprint for name, manifest in sets.items() if manifest is not None}


def _load_all(config: RunConfig, clips: Manifest) -> Inputs:
    train_tokens = Manifest.require(config.folder("tokens", "train"), "tokens")
    val_tokens = Manifest.require(config.folder("tokens", "val"), "tokens")
    prior, prior_sha8 = require_prior(config.folder("prior"))
    samples = Manifest.require(config.folder("samples", config.sample.name), "samples")
    tokenizer = prior["tokenizer"]
    for tokens in (train_tokens, val_tokens):
        if tokens.recipe["tokenizer"] != tokenizer["sha8"]:
            raise UserError(
                f"the prior {prior_sha8} was trained on tokens of {tokenizer['sha8']}, those at {tokens.url} "
                f"are of {tokens.recipe['tokenizer']}; run `clipmill train-prior` on them in another root, or "
                "restore the tokens"
            )
    tokens = val_tokens if split_of(config.evaluate) == "val" else train_tokens
    if tokens.facts["clips"] != clips.fingerprint:
        raise UserError(f"the tokens at {tokens.url} are of other clips than {clips.url}; run `clipmill tokenize`")
    advice = "remove these tokens and tokenize again as for the prior's training"
    require_condition(prior, val_tokens.url, val_tokens.num_samples, val_tokens.facts, advice)
    _require_samples(config, clips, samples, prior_sha8)
    url = storage.join(config.folder("prior"), "exports", prior_sha8)
    return Inputs(clips, url, tokenizer, prior, train_tokens, val_tokens, samples)


def _require_samples(config: RunConfig, clips: Manifest, samples: Manifest, prior_sha8: str) -> None:
    """Refuses samples that cannot be compared with these clips."""
    if samples.recipe["prior"] != prior_sha8:
        raise UserError(
            f"the samples at {samples.url} were made by prior {samples.recipe['prior']}, the newest is {prior_sha8}; "
            "run `clipmill sample` with another sample.name"
        )
    made, clip_frames = samples.recipe["sample"].get("num_frames"), clips.recipe["clip"]["num_frames"]
    if made not in (None, clip_frames):
        raise UserError(
            f"the samples at {samples.url} have {made} frames, the clips {clip_frames}; name samples of as many "
            "frames by sample.name"
        )
    if config.evaluate.is_weights is not None and clip_frames != C3D_FRAMES:
        raise UserError(
            f"the Inception Score is one of clips of {C3D_FRAMES} frames, those at {clips.url} have {clip_frames}; "
            "leave evaluate.is_weights out"
        )
    if config.evaluate.fvd_weights is not None and num_read(samples, most_clips(config.evaluate)) < 2:
        raise UserError(f"FVD needs at least 2 samples, {samples.url} has fewer; raise sample.num_samples")


def refuse_other(found: Evaluation, settings: dict[str, Any], fingerprints: dict[str, str]) -> None:
    """Refuses a folder that holds an evaluation with other settings or inputs; an evaluation is never overwritten.

    Raises:
        UserError: the message names what differs.
    """
    changes = changed_keys(found.metrics["settings"], settings, "evaluate.")
    changes += changed_keys(_short(found.metrics["inputs"]), _short(fingerprints))
    if changes:
        raise UserError(
            f"{found.url} holds another evaluation: {', '.join(changes)}; choose another evaluate.name, or remove the "
            "folder"
        )


def _short(fingerprints: dict[str, str]) -> dict[str, str]:
    return {name: value[:8] for name, value in fingerprints.items()}
