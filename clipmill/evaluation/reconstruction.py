"""What a tokenizer makes of the validation clips: ``evaluation/vqvae.json``, and the pictures that go with it.

It needs the clips and a tokenizer, nothing else: it can run right after ``train-vqvae``. Definitions of the numbers:
docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clipmill import storage
from clipmill.config import EvaluateConfig, RunConfig
from clipmill.errors import UserError
from clipmill.evaluation.distances import FeatureStatistics, frechet_distance
from clipmill.evaluation.extremes import Extremes
from clipmill.evaluation.gallery import Gallery, GalleryPicker
from clipmill.evaluation.networks import I3D_FEWEST_FRAMES, Networks, weights_sha256
from clipmill.evaluation.reader import Reader, num_read
from clipmill.evaluation.scores import CodeUsage, ReconstructionScores, VideoStatistics
from clipmill.models.vqvae import VQVAE, to_input, to_pixels
from clipmill.shards.dataset import decode_clip
from clipmill.shards.manifest import Manifest

__all__ = [
    "VQVAE_SCHEMA",
    "Reconstruction",
    "measure_reconstruction",
    "tokenizer_identity",
    "val_clips",
]

VQVAE_SCHEMA = 2
"""2: of a limited number of clips those of as many videos."""


def val_clips(config: RunConfig) -> Manifest:
    """The clips to judge by.

    Raises:
        UserError: there are none, or they are too few or too short for the FVD that is asked for.
    """
    clips = Manifest.require(config.folder("clips", "val"), "clips")
    if not clips.num_samples:
        raise UserError(f"{clips.url} has no clips to evaluate on; add videos or raise data.val_fraction")
    if config.evaluate.fvd_weights is not None:
        num_frames = clips.recipe["clip"]["num_frames"]
        if num_frames < I3D_FEWEST_FRAMES:
            raise UserError(
                f"FVD needs clips of at least {I3D_FEWEST_FRAMES} frames, those at {clips.url} have {num_frames}; "
                "raise data.clip.num_frames, or leave evaluate.fvd_weights out"
            )
        if num_read(clips, config.evaluate.max_clips) < 2:
            raise UserError(f"FVD needs at least 2 clips of {clips.url}; raise evaluate.max_clips or data.val_fraction")
    return clips


def tokenizer_identity(settings: EvaluateConfig, clips: Manifest, tokenizer_sha8: str) -> dict[str, Any]:
    """All that ``vqvae.json`` is a function of."""
    weights = {"fvd": settings.fvd_weights, "lpips": settings.lpips_weights}
    return {
        "tokenizer": tokenizer_sha8,
        "clips_val": clips.fingerprint,
        "max_clips": settings.max_clips,
        "weights_sha256": {
            name: None if url is None else weights_sha256(f"{name}_weights", url) for name, url in weights.items()
        },
    }


@dataclass(frozen=True)
class Reconstruction:
    """What one pass of the validation clips through the tokenizer found."""

    numbers: dict[str, Any]
    """Sections of ``vqvae.json``: ``clips``, ``reconstruction``, ``codebook``, ``fvd``, ``extremes``."""
    statistics: VideoStatistics
    """Of the real clips."""
    features: dict[str, FeatureStatistics] | None
    """I3D's, of the sets ``real`` and ``reconstruction``; none without its weights."""
    gallery: Gallery
    picture: bytes
    """PNG: the worst and the best clips."""

    def publish(self, folder_url: str, identity: dict[str, Any], step: int) -> None:
        """Writes the pictures, then ``vqvae.json``.

        Args:
            folder_url: of the stage.
            identity: of `tokenizer_identity`.
            step: of the tokenizer.
        """
        self.gallery.save(storage.join(folder_url, "gallery.npz"))
        storage.publish_bytes(storage.join(folder_url, "vqvae.png"), self.picture)
        document = {"identity": identity, **self.numbers, "steps": {"tokenizer": step}}
        storage.publish_document(storage.join(folder_url, "vqvae.json"), document, VQVAE_SCHEMA)


def measure_reconstruction(
    reader: Reader,
    networks: Networks,
    clips: Manifest,
    most: int | None,
    tokenizer: VQVAE,
    classes: list[str],
    device: torch.device,
) -> Reconstruction:
    """Sends the validation clips through the tokenizer; scores what comes back as the uint8 pixels that people see.

    Args:
        reader: of the stage.
        networks: to measure with.
        clips: real ones.
        most: clips to read; none: all.
        tokenizer: on the device, in eval mode.
        classes: to show clips of.
        device: of the tokenizer.

    Raises:
        UserError: a network is not what its key says.
    """
    scores, statistics, extremes = ReconstructionScores(), VideoStatistics(), Extremes()
    usage = CodeUsage(tokenizer.config.num_codes, tokenizer.config.num_codebooks)
    features: dict[str, FeatureStatistics] = {}
    picker = GalleryPicker(classes)
    rates: set[float] = set()
    for batch in reader.read(clips, decode_clip, most):
        real = batch["video"]
        codes = tokenizer.encode(to_input(torch.from_numpy(real).to(device)))
        copies = to_pixels(tokenizer.decode(codes)).cpu().numpy()
        usage.update(codes.cpu().numpy())
        statistics.update(real)
        lpips = None if networks.lpips is None else networks.lpips.distances(real, copies)
        mse = scores.update(real, copies, lpips)
        extremes.update(batch["key"], real, copies, mse)
        picker.add(real, copies, batch["label"])
        rates.update(meta["fps"] for meta in batch["meta"] if "fps" in meta)
        if networks.i3d is not None:
            for name, videos in (("real", real), ("reconstruction", copies)):
                found = FeatureStatistics.of(networks.i3d.features(videos))
                features[name] = features[name] + found if name in features else found
    recipe = clips.recipe["clip"]
    numbers = {
        "clips": {
            "split": "val",
            "num_clips": scores.num_clips,
            "num_clips_in_split": clips.num_samples,
            "num_frames": recipe["num_frames"],
            "resolution": recipe["resolution"],
            "fps_lowest": min(rates, default=None),
            "fps_highest": max(rates, default=None),
            "fit": recipe.get("fit"),
        },
        "reconstruction": scores.result(),
        "codebook": usage.result(),
        "fvd": _rfvd(features) if features else None,
        "extremes": extremes.result(),
    }
    return Reconstruction(numbers, statistics, features or None, picker.gallery(), extremes.picture())


def _rfvd(features: dict[str, FeatureStatistics]) -> dict[str, Any]:
    """The rFVD and the number of clips behind it."""
    real, copies = features["real"], features["reconstruction"]
    return {"rfvd": frechet_distance(real, copies), "num_real": real.num, "is_singular": real.is_singular}
