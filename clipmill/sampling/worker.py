"""Makes one unit of samples: draws the codes of a batch, decodes, packs and commits them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.lease import Lease
from clipmill.models.export import load_prior
from clipmill.models.prior import Prior
from clipmill.models.provenance import computed_with, deterministic_device
from clipmill.models.vqvae import VQVAE
from clipmill.sampling.files import GivenFiles
from clipmill.sampling.given import class_of_clip, condition_of_clips, open_given, prefix_of_clips, require_given
from clipmill.sampling.long import VideoLength, sample_videos
from clipmill.sampling.settings import CRF, draw_by
from clipmill.sampling.units import Unit
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import commit_unit
from clipmill.shards.dataset import ShardDataset
from clipmill.shards.format import Sample, UnitWriter, code_dtype, json_bytes, npy_bytes
from clipmill.video import encode_mp4

__all__ = ["Job", "make_worker"]

_SHARD_BYTES = 128 * 2**20
"""A constant: the bytes of a unit depend on the recipe only."""


@dataclass(frozen=True)
class Job:
    """What all units of a sample set share."""

    config: RunConfig
    lease: Lease
    url: str
    """Folder of the sample set."""
    recipe: dict[str, Any]
    labels: tuple[str | None, ...]
    """Names of the classes that samples take in turn; (None,) for a prior without classes."""
    length: VideoLength
    fps: float
    """Frames per second at which samples play."""


def make_worker(job: Job) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor: loads the prior and its tokenizer, and returns the function that makes one batch."""
    device = deterministic_device(job.config.cluster)
    url = storage.join(job.config.folder("prior"), "exports", job.recipe["prior"])
    prior, tokenizer, body, _ = load_prior(url)
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    found = require_given(job.config, body)
    given = None if found is None else open_given(found, body, prior, tokenizer, job.config.sample.prefix_latents)
    return functools.partial(_make_batch, job, prior, tokenizer, body["classes"], given)


def _make_batch(
    job: Job,
    prior: Prior,
    tokenizer: VQVAE,
    classes: Sequence[str],
    given: ShardDataset | GivenFiles | None,
    unit: Unit,
) -> dict[str, Any]:
    """Generates, decodes, packs and commits the samples of one unit."""
    settings = job.config.sample
    indices = unit.batch(settings.batch_size)
    clips = [] if given is None else [given[index % len(given)] for index in indices]
    names = [job.labels[index % len(job.labels)] for index in indices]
    if clips and classes and settings.classes is None:
        names = [class_of_clip(clip, classes, name) for clip, name in zip(clips, names, strict=True)]
    class_numbers = torch.tensor([classes.index(name) for name in names if name is not None])
    draw = draw_by(settings, prior, indices, class_numbers if classes else None)
    codes, pixels = sample_videos(
        draw,
        tokenizer,
        job.length,
        condition=condition_of_clips(clips, prior, job.length),
        prefix=prefix_of_clips(clips, settings.prefix_latents),
    )
    video = pixels.numpy()
    narrow_codes = codes.cpu().numpy().astype(code_dtype(prior.num_codes))
    with ScratchFolder("sample") as folder:
        writer = UnitWriter(folder, "samples", unit.first, _SHARD_BYTES)
        for index in range(unit.first, unit.first + unit.num_samples):
            row = index - indices.start
            about = _about(job, index, names[row], clips[row]["key"] if clips else None)
            members = {
                **_pixels(settings.format, video[row], job.fps),
                "codes.npy": npy_bytes(narrow_codes[row]),
                "json": json_bytes(about),
            }
            writer.add(Sample(f"{index:016x}_000000", members))
        parts = writer.finish()
        job.lease.check()
        commit_unit(job.url, unit.first, parts, {"recipe": job.recipe, "versions": computed_with(codes.device)})
    return {"samples": unit.num_samples}


def _pixels(kind: str, video: np.ndarray, fps: float) -> dict[str, bytes]:
    """The member that holds uint8 [T, H, W, 3]."""
    return {"mp4": encode_mp4(video, fps, CRF)} if kind == "mp4" else {"npy": npy_bytes(video)}


def _about(job: Job, index: int, label: str | None, given_key: str | None) -> dict[str, Any]:
    """What made a sample."""
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
