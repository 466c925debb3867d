"""Makes one unit of samples: draws the codes of its batches, decodes, packs and commits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import Lease
from clipmill.models.export import load_prior
from clipmill.models.prior import Prior
from clipmill.models.provenance import computed_with, make_process_deterministic
from clipmill.models.vqvae import VQVAE
from clipmill.sampling.files import GivenFiles
from clipmill.sampling.fitting import batch_size_for
from clipmill.sampling.given import class_of_clip, condition_of_clips, open_given, prefix_of_clips, require_given
from clipmill.sampling.kept import Kept
from clipmill.sampling.long import Batch, VideoLength, Videos, sample_videos
from clipmill.sampling.settings import CRF, draw_by
from clipmill.sampling.units import Unit
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import commit_unit
from clipmill.shards.dataset import ShardDataset
from clipmill.shards.format import Sample, UnitWriter, code_dtype, json_bytes, npy_bytes
from clipmill.video import encode_mp4

__all__ = ["Job", "make_worker"]

_SHARD_BYTES = 128 * 2**20
"""Not configurable, so that the bytes of a unit depend only on the recipe."""


@dataclass(frozen=True)
class Job:
    """Inputs that all units of a sample set share."""

    config: RunConfig
    lease: Lease
    url: str
    """Folder of the sample set."""
    recipe: dict[str, Any]
    labels: tuple[str | None, ...]
    """Names of the classes that samples rotate through; (None,) for a prior without classes."""
    length: VideoLength
    fps: float
    """Frames per second at which samples play."""


def make_worker(job: Job) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor: loads the prior and its tokenizer, and returns the function that makes one unit."""
    device = make_process_deterministic(job.config.cluster)
    url = storage.join(job.config.folder("prior"), "exports", job.recipe["prior"])
    prior, tokenizer, body, _ = load_prior(url)
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    found = require_given(job.config, body)
    given = None if found is None else open_given(found, body, prior, tokenizer, job.config.sample.prefix_latents)
    batch_size = batch_size_for(job.config.sample, prior, tokenizer, job.length)
    return _Worker(job, prior, tokenizer, body["classes"], given, batch_size)


class _Drawn(NamedTuple):
    """Indices, classes and given clips of the samples of a batch."""

    indices: range
    labels: list[str | None]
    clips: list[dict[str, Any]]
    """Clips that provide prefix and condition; empty if neither is needed."""


class _Worker:
    """Generates, decodes, packs and commits the samples of a unit.

    Args:
        job: the sample set.
        prior: the prior, in eval mode on the device.
        tokenizer: its tokenizer, in eval mode on the device.
        classes: names of the classes that the prior knows.
        given: clips that provide prefixes and conditions; None if neither is needed.
        batch_size: videos drawn at once.
    """

    def __init__(
        self,
        job: Job,
        prior: Prior,
        tokenizer: VQVAE,
        classes: Sequence[str],
        given: ShardDataset | GivenFiles | None,
        batch_size: int,
    ) -> None:
        self.job, self.prior, self.tokenizer, self.classes, self.given = job, prior, tokenizer, classes, given
        self.batch_size, self.kept = batch_size, Kept()

    def __call__(self, unit: Unit) -> dict[str, Any]:
        job, drawn = self.job, []
        batch_size = min(self.batch_size, job.recipe["sample"]["batch_size"])

        def batches() -> Iterator[Batch]:
            for indices in unit.batches(batch_size):
                drawn.append(self._give(indices))
                yield self._batch(drawn[-1])

        def pack(number: int, videos: Videos) -> list[Sample]:
            return list(self._samples(unit, drawn[number], videos))

        with ScratchFolder("sample") as folder:
            writer = UnitWriter(folder, "samples", unit.first, _SHARD_BYTES)
            for samples in sample_videos(batches(), self.tokenizer, job.length, pack):
                for sample in samples:
                    writer.add(sample)
            parts = writer.finish()
            job.lease.check()
            versions = {**computed_with(self.prior.head.weight.device), "batch_size": batch_size}
            record = commit_unit(job.url, unit.first, parts, {"recipe": job.recipe, "versions": versions})
        num_bytes = sum(part["bytes"] for part in record["parts"])
        return {"samples": unit.num_samples, "work": {"clips": unit.num_samples, "bytes": num_bytes}}

    def _give(self, indices: range) -> _Drawn:
        job = self.job
        clips = [] if self.given is None else [self.given[index % len(self.given)] for index in indices]
        labels = [job.labels[index % len(job.labels)] for index in indices]
        if clips and self.classes and job.config.sample.classes is None:
            labels = [class_of_clip(clip, self.classes, label) for clip, label in zip(clips, labels, strict=True)]
        return _Drawn(indices, labels, clips)

    def _batch(self, drawn: _Drawn) -> Batch:
        settings = self.job.config.sample
        numbers = torch.tensor([self.classes.index(label) for label in drawn.labels if label is not None])
        return Batch(
            draw_by(settings, self.prior, drawn.indices, numbers if self.classes else None, self.kept),
            condition=condition_of_clips(drawn.clips, self.prior, self.job.length),
            prefix=prefix_of_clips(drawn.clips, settings.prefix_latents),
        )

    def _samples(self, unit: Unit, drawn: _Drawn, videos: Videos) -> Iterator[Sample]:
        """The samples of a batch that belong to the unit."""
        job, first = self.job, drawn.indices.start
        codes = videos.codes.numpy().astype(code_dtype(self.prior.num_codes))
        for index in range(max(unit.first, first), min(unit.first + unit.num_samples, drawn.indices.stop)):
            row = index - first
            about = _about(job, index, drawn.labels[row], drawn.clips[row]["key"] if drawn.clips else None)
            members = {
                **_pixels(job.config.sample.format, videos.pixels[row].numpy(), job.fps),
                "codes.npy": npy_bytes(codes[row]),
                "json": json_bytes(about),
            }
            yield Sample(f"{index:016x}_000000", members)


def _pixels(kind: str, video: np.ndarray, fps: float) -> dict[str, bytes]:
    """The member that stores the pixels, uint8 [T, H, W, 3]."""
    return {"mp4": encode_mp4(video, fps, CRF)} if kind == "mp4" else {"npy": npy_bytes(video)}


def _about(job: Job, index: int, label: str | None, given_key: str | None) -> dict[str, Any]:
    """The settings of a sample, for its ``json`` member."""
    settings = job.config.sample
    about = {
        "index": index,
        "seed": settings.seed,
        "label": label,
        "fps": job.fps,
        "num_frames": job.length.num_frames,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "guidance": settings.guidance,
        "prior": job.recipe["prior"],
    }
    if given_key is not None:
        about |= {"given": given_key, "prefix_latents": settings.prefix_latents}
    return about
