"""Stage ``sample``: the newest export of the prior makes videos, into a data set of kind ``samples``.

Sample i is a function of (export, settings, seed, i), and of clip i of the data set that gives conditions and first
latents, where the prior or the settings want those. A unit is one batch of ``sample.batch_size`` consecutive
indices, and every batch is whole: the last one holds the surplus samples that fill it. So a unit does not depend on
``sample.num_samples``; raising that adds units, and those on disk stay as they are.

A sample is stored as it was made: ``npy`` uint8 [T, H, W, 3], ``codes.npy`` [t, h, w] or [t, h, w, M], and ``json``
with what made it.
"""

from __future__ import annotations

import math
import time
from typing import Any

from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig, SampleConfig, changed_keys, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import require_prior
from clipmill.progress import bar
from clipmill.sampling.given import require_given
from clipmill.sampling.worker import Job, make_worker
from clipmill.shards.commits import committed_units, read_commit
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest

__all__ = ["clip_recipes", "folder_url", "is_finished", "new_job", "run"]

_RECIPE_SCHEMA = 2
"""Raised when the same settings begin to give other samples. 1 inverted the cumulative distribution."""


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
    _labels_in_turn(config.sample, body)
    _refuse_other_recipe(config, _recipe(config, sha8, require_given(config, body)))
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
    job = new_job(config, lease)
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
            fan_out(make_worker, (job,), missing, config=config.cluster, on_result=on_result)
    committed.update(missing)
    while num_units in committed:  # of an earlier, larger num_samples: nothing that was made is dropped
        num_units += 1
    facts = {
        "classes": sorted({label for label in job.labels if label is not None}),
        "latent_shape": body["latent_shape"],
        "num_codes": body["num_codes"],
        "prior_step": body["step"],
    }
    lease.check()
    manifest = freeze(url, "samples", range(num_units), job.recipe, facts)
    return {
        "samples": manifest.num_samples,
        "samples_per_second": len(missing) * batch_size / (time.monotonic() - began),
        "classes": len(facts["classes"]),
        "prior": sha8,
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }


def new_job(config: RunConfig, lease: Lease) -> Job:
    """What the workers of this set of samples get.

    Raises:
        UserError: as `is_finished`.
    """
    body, sha8 = require_prior(config.folder("prior"))
    recipe = _recipe(config, sha8, require_given(config, body))
    _refuse_other_recipe(config, recipe)
    return Job(config, lease, folder_url(config), recipe, tuple(_labels_in_turn(config.sample, body)))


def _recipe(config: RunConfig, prior_sha8: str, given: Manifest | None) -> dict[str, Any]:
    """Everything that sample i depends on beside i. Names are only places: a copy elsewhere is the same data."""
    settings = {key: value for key, value in identity(config.sample).items() if key not in ("name", "given")}
    recipe = {"schema": _RECIPE_SCHEMA, "sample": settings, "prior": prior_sha8}
    return recipe if given is None else recipe | {"given": given.fingerprint}


def _refuse_other_recipe(config: RunConfig, recipe: dict[str, Any]) -> None:
    url = folder_url(config)
    committed = committed_units(url)
    if not committed:
        return
    recorded = read_commit(url, committed[0])["recipe"]
    if recorded.get("schema", 1) != _RECIPE_SCHEMA:
        raise UserError(
            f"the samples at {url} have recipe schema {recorded.get('schema', 1)}, this clipmill makes schema "
            f"{_RECIPE_SCHEMA}, whose noise is another; choose another sample.name, or remove the folder"
        )
    changes = changed_keys(recorded, recipe)
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
