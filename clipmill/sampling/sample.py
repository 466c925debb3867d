"""Stage ``sample``: the newest export of the prior makes videos, into a data set of kind ``samples``.

Sample i is a function of (export, settings, seed, i), and of clip i of the data set that gives conditions and first
latents, where the prior or the settings want those. A unit is one batch of ``sample.batch_size`` consecutive
indices, and every batch is whole: the last one holds the surplus samples that fill it. So a unit does not depend on
``sample.num_samples``; raising that adds units, and those on disk stay as they are.

A sample is stored as it was made: ``npy`` uint8 [T, H, W, 3], ``codes.npy`` [t, h, w] or [t, h, w, M], and ``json``
with what made it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clipmill import storage
from clipmill.cluster.fanout import fan_out
from clipmill.config import PriorModelConfig, RunConfig, SampleConfig, changed_keys, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import load_prior, model_config, require_condition, require_prior
from clipmill.models.prior import Prior
from clipmill.models.provenance import computed_with, deterministic_device
from clipmill.models.vqvae import VQVAE, to_pixels
from clipmill.progress import bar
from clipmill.sampling.generate import generate
from clipmill.scratch import ScratchFolder
from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.format import Sample, UnitWriter, code_dtype, json_bytes, npy_bytes
from clipmill.shards.manifest import Manifest, commit_unit, committed_units, freeze, read_commit

__all__ = ["clip_recipes", "folder_url", "is_finished", "run"]

_PRECISION = "float32"
_SHARD_BYTES = 128 * 2**20
"""A constant: the bytes of a unit depend on the recipe only."""


def folder_url(config: RunConfig) -> str:
    """The folder of this set of samples."""
    return config.folder("samples", config.sample.name)


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips behind the prior's tokenizer, by the URL of what this stage reads.

    Raises:
        UserError: there is no prior yet.
    """
    return {
        config.folder("prior"): body["tokenizer"].get("clip", {}) for body, _ in [require_prior(config.folder("prior"))]
    }


def is_finished(config: RunConfig) -> bool:
    """Whether at least ``sample.num_samples`` samples of the newest prior are frozen.

    Raises:
        UserError: there is no prior yet, it does not know a class or was not trained for guidance, what it is to be
            told is missing, or the folder holds other samples.
    """
    body, sha8 = require_prior(config.folder("prior"))
    given = _given(config, body)
    _labels_in_turn(config.sample, body)
    _refuse_other_recipe(config, _recipe(config, sha8, given))
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
    body, sha8 = require_prior(config.folder("prior"))
    recipe = _recipe(config, sha8, _given(config, body))
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
    lease.check()
    manifest = freeze(url, "samples", range(num_units), recipe, facts)
    return {
        "samples": manifest.num_samples,
        "samples_per_second": len(missing) * batch_size / (time.monotonic() - began),
        "classes": len(facts["classes"]),
        "prior": sha8,
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }


def _recipe(config: RunConfig, prior_sha8: str, given: Manifest | None) -> dict[str, Any]:
    """Everything that sample i depends on beside i. Names are only places: a copy elsewhere is the same data."""
    settings = {key: value for key, value in identity(config.sample).items() if key not in ("name", "given")}
    recipe = {"sample": settings, "prior": prior_sha8, "precision": _PRECISION}
    return recipe if given is None else recipe | {"given": given.fingerprint}


def _given(config: RunConfig, body: dict[str, Any]) -> Manifest | None:
    """The token data set whose clips give conditions and first latents; none where neither is wanted.

    Raises:
        UserError: it is not there, another tokenizer's, or comes without what the prior is to be told; more first
            latents are given than leave something to make; the prior was not trained for guidance, or has settings
            that this clipmill does not know.
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
    url = settings.given if "/" in settings.given else config.folder("tokens", settings.given)
    try:
        manifest = Manifest.load(url, "tokens")
    except FileNotFoundError:
        raise UserError(f"no tokens at {url} to take conditions or first latents from; set sample.given") from None
    if manifest.recipe["tokenizer"] != body["tokenizer"]["sha8"]:
        raise UserError(
            f"sample.given {url} holds tokens of tokenizer {manifest.recipe['tokenizer']}, the prior's is "
            f"{body['tokenizer']['sha8']}; name tokens that the prior's tokenizer made"
        )
    if manifest.num_samples == 0:
        raise UserError(f"sample.given {url} is empty; name tokens of at least one clip")
    require_condition(body, url, manifest.num_samples, manifest.facts, "set sample.given to others")
    return manifest


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
    manifest = _given(config, body)
    recipe, labels = _recipe(config, prior_sha8, manifest), _labels_in_turn(config.sample, body)
    given = None if manifest is None else ShardDataset(manifest, decode_codes)
    return functools.partial(
        _make_batch, config, lease, prior.to(device), tokenizer.to(device), body["classes"], recipe, labels, given
    )


def _make_batch(
    config: RunConfig,
    lease: Lease,
    prior: Prior,
    tokenizer: VQVAE,
    classes: list[str],
    recipe: dict[str, Any],
    labels: list[str | None],
    given: ShardDataset | None,
    unit: int,
) -> dict[str, Any]:
    """Generates, decodes, packs and commits the samples of one unit."""
    settings = config.sample
    indices = range(unit * settings.batch_size, (unit + 1) * settings.batch_size)
    clips = [] if given is None else [given[index % len(given)] for index in indices]
    names = [labels[index % len(labels)] for index in indices]
    if clips and classes and settings.classes is None:
        names = [_known_class(clip, classes) for clip in clips]
    class_numbers = torch.tensor([classes.index(name) for name in names if name is not None])
    prefix = condition = None
    if settings.prefix_latents:
        first = [clip["codes"][: settings.prefix_latents] for clip in clips]
        prefix = torch.from_numpy(np.stack(first, dtype=np.int64))
    if prior.config.condition is not None:
        condition = torch.from_numpy(np.stack([clip[prior.config.condition] for clip in clips]))
    with torch.inference_mode():
        codes = generate(
            prior,
            seed=settings.seed,
            indices=list(indices),
            labels=class_numbers if classes else None,
            condition=condition,
            prefix=prefix,
            guidance=settings.guidance,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        video = to_pixels(tokenizer.decode(codes)).cpu().numpy()
    narrow_codes = codes.cpu().numpy().astype(code_dtype(prior.num_codes))
    with ScratchFolder("sample") as folder:
        writer = UnitWriter(folder, "samples", unit, _SHARD_BYTES)
        for index, name, clip, clip_codes in zip(indices, names, video, narrow_codes, strict=True):
            about = {
                "index": index,
                "seed": settings.seed,
                "label": name,
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "top_p": settings.top_p,
                "guidance": settings.guidance,
                "prior": recipe["prior"],
            }
            if given is not None:
                about |= {"given": clips[index - indices[0]]["key"], "prefix_latents": settings.prefix_latents}
            members = {"npy": npy_bytes(clip), "codes.npy": npy_bytes(clip_codes), "json": json_bytes(about)}
            writer.add(Sample(f"{index:016x}_000000", members))
        parts = writer.finish()
        lease.check()
        commit_unit(folder_url(config), unit, parts, {"recipe": recipe, "versions": computed_with(codes.device)})
    return {"samples": len(indices)}


def _known_class(clip: dict[str, Any], classes: list[str]) -> str:
    if clip["label"] not in classes:
        raise UserError(
            f"clip {clip['key']} of sample.given has the class {clip['label']}, the prior knows {', '.join(classes)}; "
            "set sample.classes"
        )
    return clip["label"]
