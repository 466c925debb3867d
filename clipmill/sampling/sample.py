"""Stage ``sample``: the newest export of the prior makes videos, into a data set of kind ``samples``.

Sample i is a function of (export, settings, seed, i). A unit is one batch of ``sample.batch_size`` consecutive
indices, and every batch is whole: the last one holds the surplus samples that fill it. So a unit does not depend on
``sample.num_samples``; raising that adds units, and those on disk stay as they are.

A sample is stored as it was made: ``npy`` uint8 [T, H, W, 3], ``codes.npy`` [t, h, w], and ``json`` with what made it.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmill import storage
from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig, SampleConfig, changed_keys, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import load_prior, read_latest
from clipmill.models.prior import Prior
from clipmill.models.provenance import computed_with, deterministic_device
from clipmill.models.vqvae import VQVAE, to_pixels
from clipmill.progress import bar
from clipmill.sampling.generate import generate
from clipmill.shards.format import Sample, UnitWriter, json_bytes, npy_bytes
from clipmill.shards.manifest import Manifest, commit_unit, committed_units, freeze, read_commit

__all__ = ["folder_url", "is_finished", "run"]

_PRECISION = "float32"
_SHARD_BYTES = 128 * 2**20
"""A constant: the bytes of a unit depend on the recipe only."""


def folder_url(config: RunConfig) -> str:
    """The folder of this set of samples."""
    return config.folder("samples", config.sample.name)


def is_finished(config: RunConfig) -> bool:
    """Whether at least ``sample.num_samples`` samples of the newest prior are frozen.

    Raises:
        UserError: there is no prior yet, it does not know a class, or the folder holds other samples.
    """
    body, sha8 = _prior(config)
    _labels_in_turn(config.sample, body)
    _refuse_other_recipe(config, _recipe(config, sha8))
    try:
        manifest = Manifest.load(folder_url(config), "samples")
    except FileNotFoundError:
        return False
    return manifest.num_samples >= config.sample.num_samples


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Makes the missing batches and freezes the data set.

    Returns:
        Counts for the summary.

    Raises:
        UserError: as `is_finished`. Nothing was written.
        StageFailed: a batch failed at every attempt; the others are kept.
    """
    body, sha8 = _prior(config)
    recipe = _recipe(config, sha8)
    _refuse_other_recipe(config, recipe)
    labels = _labels_in_turn(config.sample, body)
    url = folder_url(config)
    batch_size = config.sample.batch_size
    num_units = math.ceil(config.sample.num_samples / batch_size)
    committed = set(committed_units(url))
    missing = [unit for unit in range(num_units) if unit not in committed]
    began = time.monotonic()
    with bar("sample", total=num_units * batch_size, unit="videos") as progress:
        done = num_units - len(missing)
        progress.update(done * batch_size)

        def on_result(unit: int, facts: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            progress.update(done * batch_size)

        if missing:
            fan_out(make_worker, (config, lease, sha8), missing, config=config.cluster, on_result=on_result)
    committed.update(missing)
    while num_units in committed:  # of an earlier, larger num_samples: nothing that was made is dropped
        num_units += 1
    facts = {
        "classes": sorted({label for label in labels if label is not None}),
        "latent_shape": body["latent_shape"],
        "num_codes": body["num_codes"],
        "prior_step": body["step"],
    }
    manifest = freeze(url, "samples", range(num_units), recipe, facts)
    return {
        "samples": manifest.num_samples,
        "samples_per_second": len(missing) * batch_size / (time.monotonic() - began),
        "classes": len(facts["classes"]),
        "prior": sha8,
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }


def _prior(config: RunConfig) -> tuple[dict[str, Any], str]:
    """Body and sha8 of the prior's newest export."""
    latest = read_latest(config.folder("prior"))
    if latest is None:
        raise UserError(f"no prior at {config.folder('prior')}; run `clipmill train-prior` with this config first")
    return latest


def _recipe(config: RunConfig, prior_sha8: str) -> dict[str, Any]:
    """Everything that sample i depends on beside i. The name is only a place: a copy elsewhere is the same data."""
    settings = {key: value for key, value in identity(config.sample).items() if key != "name"}
    return {"sample": settings, "prior": prior_sha8, "precision": _PRECISION}


def _refuse_other_recipe(config: RunConfig, recipe: dict[str, Any]) -> None:
    url = folder_url(config)
    committed = committed_units(url)
    if not committed:
        return
    changes = changed_keys(read_commit(url, committed[0])["recipe"], recipe)
    if changes:
        raise UserError(
            f"{url} holds samples made with other settings: {', '.join(changes)}; choose another sample.name, or "
            "remove the folder"
        )


def _labels_in_turn(config: SampleConfig, body: dict[str, Any]) -> list[str | None]:
    """Names of the classes that samples take in turn; [None] for a prior without classes."""
    known = body["classes"]
    if not known:
        if config.classes:
            raise UserError("sample.classes is set, but the prior was trained without classes; remove sample.classes")
        return [None]
    wanted = known if config.classes is None else config.classes
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise UserError(
            f"sample.classes {', '.join(unknown) or 'is empty'}: the prior knows {', '.join(known)}; choose among them"
        )
    return list(wanted)


# ------------------------------------------------------------------------------------------ the worker


def make_worker(config: RunConfig, lease: Lease, prior_sha8: str) -> Callable[[int], dict[str, Any]]:
    """Runs once in each actor: loads the prior and its tokenizer, and returns the function that makes one batch."""
    device = deterministic_device(config.cluster)
    prior, tokenizer, body, _ = load_prior(storage.join(config.folder("prior"), "exports", prior_sha8))
    recipe, labels = _recipe(config, prior_sha8), _labels_in_turn(config.sample, body)
    return functools.partial(
        _make_batch, config, lease, prior.to(device), tokenizer.to(device), body["classes"], recipe, labels
    )


def _make_batch(
    config: RunConfig,
    lease: Lease,
    prior: Prior,
    tokenizer: VQVAE,
    classes: list[str],
    recipe: dict[str, Any],
    labels: list[str | None],
    unit: int,
) -> dict[str, Any]:
    """Generates, decodes, packs and commits the samples of one unit."""
    settings = config.sample
    indices = range(unit * settings.batch_size, (unit + 1) * settings.batch_size)
    names = [labels[index % len(labels)] for index in indices]
    class_numbers = torch.tensor([classes.index(name) for name in names if name is not None])
    with torch.inference_mode():
        codes = generate(
            prior,
            seed=settings.seed,
            indices=list(indices),
            labels=class_numbers if classes else None,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        video = to_pixels(tokenizer.decode(codes)).cpu().numpy()
    narrow_codes = codes.cpu().numpy().astype(np.min_scalar_type(prior.num_codes - 1))
    with tempfile.TemporaryDirectory(prefix="clipmill-sample-") as folder:
        writer = UnitWriter(Path(folder), "samples", unit, _SHARD_BYTES)
        for index, name, clip, clip_codes in zip(indices, names, video, narrow_codes, strict=True):
            about = {
                "index": index,
                "seed": settings.seed,
                "label": name,
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "top_p": settings.top_p,
                "prior": recipe["prior"],
            }
            members = {"npy": npy_bytes(clip), "codes.npy": npy_bytes(clip_codes), "json": json_bytes(about)}
            writer.add(Sample(f"{index:016x}_000000", members))
        parts = writer.finish()
        lease.check()
        commit_unit(folder_url(config), unit, parts, {"recipe": recipe, "versions": computed_with(codes.device)})
    return {"samples": len(indices)}
