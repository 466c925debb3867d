"""Stage ``evaluate``: computes the metrics of a run from its data and models on disk.

``evaluate.what=vqvae`` measures the newest tokenizer on real clips. ``all`` measures the tokenizer inside the newest
prior export, the prior on the tokens of ``val``, and the samples. An evaluation is one folder, ``evaluation/NAME/``
(`clipmill.evaluation.results`), and is never overwritten by another. The work is split into index ranges
(`clipmill.evaluation.parts`), which workers measure (`clipmill.evaluation.worker`). Their results are merged in order.
docs/evaluation.md defines every number.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill import storage
from clipmill.board import BOARD
from clipmill.cluster.connection import is_embedded
from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig
from clipmill.evaluation.baselines import CodeTables
from clipmill.evaluation.film import USUAL_FPS
from clipmill.evaluation.gallery import Gallery, pick_clips
from clipmill.evaluation.generation import fvd_of_all, prior_section, sample_section
from clipmill.evaluation.inputs import Inputs, real_clips, refuse_other, settings_of
from clipmill.evaluation.made import provenance
from clipmill.evaluation.nearest import nearest_section
from clipmill.evaluation.networks import I3D_CHANNELS
from clipmill.evaluation.parts import Arrays, Measure, Unit
from clipmill.evaluation.protocols import most_clips, protocol_section
from clipmill.evaluation.reader import num_read
from clipmill.evaluation.reconstruction import extreme_clips, reconstruction_sections
from clipmill.evaluation.results import Evaluation, folder_url, read_evaluation
from clipmill.evaluation.worker import Job, decode_cpus, make_worker, torch_settings_kept
from clipmill.lease import Lease
from clipmill.progress import bar
from clipmill.shards.manifest import Manifest

__all__ = ["clip_recipes", "folder_url", "is_finished", "run"]

CLIPS_PER_UNIT = 64
"""Clips of pixels per batch. Not configurable, because the last digits of results depend on it."""
TOKENS_PER_UNIT = 1024
"""Clips of codes per batch."""
FEW_CLIPS = 256
"""Up to this number, clips of pixels are measured in this process: starting Ray and its workers would take longer."""

logger = logging.getLogger(__name__)


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips, by the URL of what this stage reads.

    Raises:
        UserError: there are no clips yet.
    """
    return {clips.url: clips.recipe for clips in [real_clips(config)]}


def is_finished(config: RunConfig) -> bool:
    """Whether an evaluation with the same settings and inputs is on disk.

    Raises:
        UserError: an earlier stage has not run, its data belong to another tokenizer, the tokens lack the prior's
            condition, a network's file is missing or does not fit the clips, or the folder holds another evaluation.
    """
    inputs, settings = Inputs.load(config), settings_of(config)
    return _is_on_disk(config, inputs, settings)


def _is_on_disk(config: RunConfig, inputs: Inputs, settings: dict[str, Any]) -> bool:
    found = read_evaluation(folder_url(config))
    if found is not None:
        refuse_other(found, settings, inputs.fingerprints())
    return found is not None


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Measures what is missing, merges all parts and publishes the evaluation.

    Returns:
        The most important numbers, for the summary.

    Raises:
        UserError: as `is_finished`, or a network is of the wrong kind. No number was written.
        Interrupted: stopped; finished parts are kept, and a new run continues.
        StageFailed: a unit failed on every attempt; the others are kept.
    """
    inputs, settings = Inputs.load(config), settings_of(config)
    _is_on_disk(config, inputs, settings)  # another run may have finished one since `is_finished` looked
    with torch_settings_kept():
        job = Job(config, inputs, _measures(config, inputs, settings))
        hardware = _measure(job, _missing(job))
        found = _Found.read(job)
        job = _with_shown(job, found)
        hardware |= _measure(
            job, [unit for name in _SHOWN if name in job.measures for unit in job.measures[name].missing()]
        )
        torch.set_num_threads(config.cluster.fanout_cpus)  # so that the remaining work gives the same bits anywhere
        protocol = protocol_section(config.evaluate, settings["weights_sha256"])
        metrics = {
            "settings": settings,
            "protocol": protocol,
            "inputs": inputs.fingerprints(),
            **_numbers(config, inputs, found),
        }
    samples = config.sample.name if config.evaluate.what == "all" else None
    made = provenance(hardware, BOARD.seconds, storage.shown(config.root), samples)
    lease.check()
    evaluation = Evaluation(folder_url(config), metrics, made)
    _publish_galleries(evaluation, job, found)
    evaluation.publish()
    _warn_of_few_clips(metrics["fvd"])
    # This includes parts that other evaluations measured; they do not record which attempt made them.
    num_clips = sum(measure.num_clips for name, measure in job.measures.items() if name in ("real", "samples"))
    clips_per_second = num_clips / BOARD.seconds
    return {"what": config.evaluate.what, **_headlines(metrics), "clips_per_second": clips_per_second}


# ---------------------------------------------------------------------------------------------- what is measured


def _measures(config: RunConfig, inputs: Inputs, settings: dict[str, Any]) -> dict[str, Measure]:
    """The measurements, each with all inputs that determine its parts."""
    weights, most = settings["weights_sha256"], most_clips(config.evaluate)
    computed = {
        "torch": torch.__version__,
        "device": "cuda" if config.cluster.use_gpu else "cpu",
        "threads": config.cluster.fanout_cpus,
        "batch_size": config.evaluate.batch_size,
    }

    def measure(name: str, manifest: Manifest, most: int | None, clips_per_unit: int, **depends_on: Any) -> Measure:
        data = {"data": manifest.fingerprint, "num_videos": manifest.facts.get("num_videos")}
        depends_on = {**computed, **data, **depends_on}
        return Measure.of(config.root, name, num_read(manifest, most), clips_per_unit, depends_on)

    clips, tokenizer = inputs.clips, inputs.tokenizer["sha8"]
    measures = {
        "real": measure("real", clips, most, CLIPS_PER_UNIT, fvd=weights["fvd"]),
        "tokenizer": measure(
            "tokenizer", clips, most, CLIPS_PER_UNIT, tokenizer=tokenizer, fvd=weights["fvd"], lpips=weights["lpips"]
        ),
    }
    if inputs.prior is not None:
        assert inputs.val_tokens is not None
        assert inputs.train_tokens is not None
        assert inputs.samples is not None
        most_train = config.evaluate.max_train_clips
        measures |= {
            "val": measure("val", inputs.val_tokens, most, TOKENS_PER_UNIT, prior=inputs.prior["sha8"]),
            "train": measure("train", inputs.train_tokens, most_train, TOKENS_PER_UNIT, tokenizer=tokenizer),
            "samples": measure(
                "samples",
                inputs.samples,
                most,
                CLIPS_PER_UNIT,
                tokenizer=tokenizer,
                fvd=weights["fvd"],
                inception=weights["is"],
            ),
        }
    return measures


def _missing(job: Job) -> list[Unit]:
    """The units to measure. Real clips and their reconstructions are one unit, so that its clips are read once."""
    units = {name: measure.missing() for name, measure in job.measures.items()}
    copied = {unit.first for unit in units["tokenizer"]}
    units["real"] = [unit for unit in units["real"] if unit.first not in copied]
    return [unit for found in units.values() for unit in found]


def _measure(job: Job, units: Sequence[Unit]) -> set[str]:
    """Measures units, on workers if there are many; returns the hardware they were measured on."""
    done, hardware = 0, set()
    with bar("evaluate", total=len(units), unit="parts") as progress:

        def on_result(unit: Unit, facts: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            hardware.add(facts["hardware"])
            progress.update(done)

        if _num_clips(units) <= FEW_CLIPS and is_embedded(job.config.cluster):
            work = make_worker(job)
            for unit in units:
                on_result(unit, work(unit))
        else:
            beside = decode_cpus(job.config)
            fan_out(make_worker, (job,), units, config=job.config.cluster, on_result=on_result, beside_cpus=beside)
    return hardware


def _num_clips(units: Sequence[Unit]) -> int:
    """Number of real clips and samples in these units. Clips of codes do not count, because they cost little."""
    return sum(unit.num_clips for unit in units if unit.measure not in ("val", "train"))


def _with_shown(job: Job, found: _Found) -> Job:
    """The job with the clips that pages show: those of the gallery, the worst and the best, and possible copies."""
    picked = pick_clips(found.real["key"].tolist(), found.real["label"].tolist(), job.inputs.classes)
    shown = sorted({*picked, *(clip for clips in extreme_clips(found.real, found.copies) for clip in clips)})
    nearest = [tuple(pair["numbers"]) for pair in found.nearest["pairs"]] if found.nearest else []

    def measure(name: str, clips: Sequence[Any], *of: str) -> Measure:
        depends_on = {"of": [job.measures[one].url.rpartition("/")[2] for one in of], "clips": clips}
        return Measure.of(job.config.root, name, len(clips), len(clips), depends_on)

    measures = {**job.measures, "shown": measure("shown", shown, "tokenizer")}
    if nearest:
        measures["nearest"] = measure("nearest", nearest, "samples", "train")
    return dataclasses.replace(job, measures=measures, shown=tuple(shown), nearest=tuple(nearest))


# ---------------------------------------------------------------------------------------------- what was found


@dataclass(frozen=True)
class _Found:
    """The parts of all measurements, merged in order; arrays have one row per clip."""

    real: Arrays
    copies: Arrays
    code_counts: NDArray[np.int64]
    """[M, K]: counts of the real clips' codes."""
    val: Arrays | None = None
    """Of the validation codes. This field and all below are None if only a tokenizer is evaluated."""
    train: Arrays | None = None
    val_tables: CodeTables | None = None
    train_tables: CodeTables | None = None
    samples: Arrays | None = None
    sample_code_counts: NDArray[np.int64] | None = None

    @classmethod
    def read(cls, job: Job) -> _Found:
        measures = job.measures
        real, _, _ = measures["real"].merged()
        copies, sums, _ = measures["tokenizer"].merged()
        code_counts = sums["code_counts"]
        if job.inputs.prior is None:
            return cls(real, copies, code_counts)
        num_codebooks, num_codes = code_counts.shape
        val, _, val_tables = measures["val"].merged()
        train, _, train_tables = measures["train"].merged()
        samples, sample_sums, _ = measures["samples"].merged()
        return cls(
            real,
            copies,
            code_counts,
            val,
            train,
            CodeTables.merged(val_tables, num_codes, num_codebooks),
            CodeTables.merged(train_tables, num_codes, num_codebooks),
            samples,
            sample_sums["code_counts"],
        )

    @functools.cached_property
    def nearest(self) -> dict[str, Any] | None:
        """Of `nearest_section`."""
        if self.samples is None or self.val is None or self.train is None:
            return None
        return nearest_section(self.samples, self.val, self.train)


def _numbers(config: RunConfig, inputs: Inputs, found: _Found) -> dict[str, Any]:
    """All sections of ``metrics.json`` except ``settings`` and ``inputs``."""
    sections = reconstruction_sections(inputs.clips, found.real, found.copies, found.code_counts)
    sections["steps"] = {"tokenizer": inputs.tokenizer["step"]}
    if inputs.prior is None:
        return sections
    assert inputs.samples is not None
    assert found.val is not None
    assert found.val_tables is not None
    assert found.train_tables is not None
    assert found.samples is not None
    assert found.sample_code_counts is not None
    return {
        **sections,
        "steps": {**sections["steps"], "prior": inputs.prior["step"]},
        "fvd": fvd_of_all(sections["fvd"], found.real, found.copies, found.samples, config.evaluate.fvd_seeds),
        "prior": prior_section(found.val["nats"], inputs.clips.recipe["clip"], found.train_tables, found.val_tables),
        "samples": {
            **sample_section(
                inputs.given_frames, found.samples, found.sample_code_counts, found.real, found.val_tables.unigram
            ),
            "nearest": found.nearest,
        },
    }


_SHOWN = ("shown", "nearest")
"""The measurements of clips that people look at, chosen by what the others found."""


def _publish_galleries(evaluation: Evaluation, job: Job, found: _Found) -> None:
    _gallery(job.measures["shown"], found.real, job.shown).save(storage.join(evaluation.url, "gallery.npz"))
    if job.nearest:
        assert found.samples is not None
        gallery = _gallery(job.measures["nearest"], found.samples, [number for number, _ in job.nearest])
        gallery.save(storage.join(evaluation.url, "nearest.npz"))


def _gallery(measure: Measure, found: Arrays, numbers: Sequence[int]) -> Gallery:
    """What was measured of some clips, with the facts about them in ``found``."""
    clips, _, _ = measure.merged()
    keys, labels, rates = (found[name][list(numbers)].tolist() for name in ("key", "label", "fps"))
    rates = tuple(USUAL_FPS if math.isnan(rate) else rate for rate in rates)
    return Gallery(clips, tuple(label or None for label in labels), tuple(keys), rates)


def _headlines(metrics: dict[str, Any]) -> dict[str, Any]:
    """For the summary: the most important numbers."""
    fvd, prior, samples = metrics["fvd"], metrics.get("prior"), metrics.get("samples")
    return {
        "clips": metrics["clips"]["num_clips"],
        "nmse": metrics["reconstruction"]["nmse"],
        "psnr_db": metrics["reconstruction"]["psnr_db"],
        "codes_used_share": metrics["codebook"]["used_share"],
        **{name: fvd[name] for name in ("rfvd", "fvd", "fvd_star") if fvd and name in fvd},
        **({"samples": samples["count"]} if samples else {}),
        **({name: prior[name] for name in _PRIOR_HEADLINES} if prior else {}),
    }


_PRIOR_HEADLINES = ("val_nats_per_token", "unigram_nats", "temporal_bigram_nats", "ratio_to_unigram")


def _warn_of_few_clips(fvd: dict[str, Any] | None) -> None:
    if fvd is not None and fvd["is_singular"]:
        counts = [f"{name.removeprefix('num_')} {fvd[name]}" for name in ("num_real", "num_samples") if name in fvd]
        logger.warning(
            "FVD: no more clips than its %d channels (%s), so the covariance is singular; only comparable at equal "
            "clip counts",
            I3D_CHANNELS,
            ", ".join(counts),
        )
