"""Stage ``sample``: generates videos with the newest export of the prior, as a data set of kind ``samples``.

Sample i is a function of (export, settings, seed, i) and, if it has a prefix or condition, of clip i of
``sample.given``. `clipmill.sampling.units` defines which samples a unit holds.

A sample has the members ``mp4`` (or ``npy``, uint8 [T, H, W, 3]), ``codes.npy`` [t, h, w] or [t, h, w, M], and ``json``
with its settings. ``preview/`` beside the shards shows some samples (`clipmill.sampling.preview`).
"""

from __future__ import annotations

import logging
from typing import Any

from clipmill.board import BOARD
from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig, SampleConfig, changed_keys, frame_size, identity
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import require_prior
from clipmill.progress import bar
from clipmill.sampling.files import FileList
from clipmill.sampling.fitting import most_at_once
from clipmill.sampling.given import require_given
from clipmill.sampling.long import video_length
from clipmill.sampling.preview import has_preview, publish_preview, remove_preview
from clipmill.sampling.settings import USUAL_FPS, decoder_for
from clipmill.sampling.units import Unit, leading_units, missing_units
from clipmill.sampling.worker import Job, make_worker
from clipmill.shards.commits import ShardEntry, committed_units, read_commit, read_commits
from clipmill.shards.freeze import freeze
from clipmill.shards.manifest import Manifest

__all__ = ["check_settings", "clip_recipes", "folder_url", "is_finished", "new_job", "run"]

logger = logging.getLogger(__name__)

_RECIPE_SCHEMA = 2
"""Raised when equal settings start to give other samples. Version 1 drew by inverting the cumulative distribution."""


def folder_url(config: RunConfig) -> str:
    """The folder of this set of samples."""
    return config.folder("samples", config.sample.name)


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips that the prior's tokenizer was trained on, by the prior's URL.

    Raises:
        UserError: there is no prior yet.
    """
    return {
        config.folder("prior"): body["tokenizer"].get("clip", {}) for body, _ in [require_prior(config.folder("prior"))]
    }


def is_finished(config: RunConfig) -> bool:
    """Whether at least ``sample.num_samples`` samples of the newest prior are frozen and previewed.

    Raises:
        UserError: there is no prior yet, it does not know a class or was not trained for guidance, its condition is
            missing, its videos do not fit the format, or the folder holds other samples.
    """
    body, _ = require_prior(config.folder("prior"))
    check_settings(config.sample, body)
    _refuse_other_recipe(config, _recipe(config, body, require_given(config, body)))
    url = folder_url(config)
    try:
        manifest = Manifest.load(url, "samples")
    except FileNotFoundError:
        return False
    return manifest.num_samples >= config.sample.num_samples and has_preview(url)


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Makes the missing samples, freezes the data set and publishes its preview.

    Returns:
        Counts for the summary.

    Raises:
        UserError: as `is_finished`. Nothing was written.
        StageFailed: a batch failed at every attempt; the others are kept.
    """
    body, _ = require_prior(config.folder("prior"))
    job = new_job(config, lease, body)
    shards = _make_missing(job)
    facts = {
        "classes": sorted({label for label in job.labels if label is not None}),
        "latent_shape": [job.length.num_latents, *body["latent_shape"][1:]],
        "num_codes": body["num_codes"],
        "prior_step": body["step"],
    }
    units = leading_units({unit: _num_samples(entries) for unit, entries in shards.items()})
    lease.check()
    remove_preview(job.url)
    manifest = freeze(job.url, "samples", units, job.recipe, facts, known=shards)
    publish_preview(manifest, job.fps)
    logger.info(
        "sample: %d samples at %s, some of them in %s/preview/grid.mp4; next: `clipmill evaluate`, then `clipmill "
        "report`, with the same config",
        manifest.num_samples,
        job.url,
        job.url,
    )
    return {
        "samples": manifest.num_samples,
        "samples_per_second": manifest.num_samples / BOARD.seconds,
        "classes": len(facts["classes"]),
        "prior": body["sha8"],
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }


def _make_missing(job: Job) -> dict[int, tuple[ShardEntry, ...]]:
    """Generates missing samples; returns the shards of all committed units."""
    settings = job.config.sample
    shards = _committed_shards(job.url, {})
    with bar("sample", total=settings.num_samples, unit="videos") as progress:
        # One pass suffices, unless a run that lost the lease commits a shorter unit of the same number meanwhile.
        while missing := missing_units(
            settings.num_samples,
            job.recipe["sample"]["batch_size"],
            {unit: _num_samples(entries) for unit, entries in shards.items()},
        ):
            done = settings.num_samples - sum(unit.num_samples for unit in missing)
            progress.update(done)

            def on_result(unit: Unit, facts: dict[str, Any]) -> None:
                nonlocal done
                done += facts["samples"]
                progress.update(done)

            fan_out(make_worker, (job,), missing, config=job.config.cluster, on_result=on_result)
            shards = _committed_shards(job.url, shards)
    return shards


def _committed_shards(url: str, known: dict[int, tuple[ShardEntry, ...]]) -> dict[int, tuple[ShardEntry, ...]]:
    """The shards of each committed unit; records of known units are not read again."""
    unknown = [unit for unit in committed_units(url) if unit not in known]
    records = read_commits(url, unknown)
    return known | {record["unit"]: tuple(map(ShardEntry.parse, record["parts"])) for record in records}


def _num_samples(entries: tuple[ShardEntry, ...]) -> int:
    return sum(entry.samples for entry in entries)


def new_job(config: RunConfig, lease: Lease, body: dict[str, Any]) -> Job:
    """The inputs for the workers of this sample set.

    Args:
        config: config of the run.
        lease: lease on the folder.
        body: body of the prior's export.

    Raises:
        UserError: as `is_finished`.
    """
    labels = check_settings(config.sample, body)
    recipe = _recipe(config, body, require_given(config, body))
    _refuse_other_recipe(config, recipe)
    length = video_length(body, config.sample.num_frames, config.sample.overlap_latents)
    fps = body["tokenizer"]["clip"]["clip"].get("fps") or USUAL_FPS
    return Job(config, lease, folder_url(config), recipe, tuple(labels), length, fps)


def check_settings(settings: SampleConfig, body: dict[str, Any]) -> list[str | None]:
    """Checks that settings fit a prior. Returns the classes through which samples rotate; None stands for no class.

    Args:
        settings: the section ``sample``.
        body: body of the prior's export.

    Raises:
        UserError: the prior does not know a class, or the format cannot store videos of this size.
    """
    height, width = frame_size(body["tokenizer"]["clip"]["clip"]["resolution"])
    if settings.format == "mp4" and (height % 2 or width % 2):
        raise UserError(
            f"samples of {height} x {width} pixels cannot be sample.format=mp4 (h264 stores colour at half the "
            "resolution, so both axes must be even); set sample.format=npy"
        )
    return _labels_in_turn(settings, body)


def _recipe(config: RunConfig, body: dict[str, Any], given: Manifest | FileList | None) -> dict[str, Any]:
    """Everything besides i that determines sample i. Names are not part of it: a copy elsewhere is the same data."""
    settings = {key: value for key, value in identity(config.sample).items() if key not in ("name", "given")}
    length = video_length(body, config.sample.num_frames, config.sample.overlap_latents)
    use_gpu = config.cluster.use_gpu
    batch_size = most_at_once(config.sample, use_gpu)
    settings |= {
        "num_frames": length.num_frames,
        "overlap_latents": length.overlap_latents,
        "batch_size": batch_size,
        "decoder": decoder_for(config.sample.decoder, batch_size, "cuda" if use_gpu else "cpu"),
    }
    recipe = {"schema": _RECIPE_SCHEMA, "sample": settings, "prior": body["sha8"]}
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
    """Names of the classes through which samples rotate; [None] for a prior without classes."""
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
