"""``clipmill compare``: shows several evaluations on one self-contained page.

The page shows metrics side by side with their differences, curves in common charts, and samples from the same noise
below each other. Evaluations with different settings or different clips are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from clipmill import storage
from clipmill.config import changed_keys
from clipmill.errors import UserError
from clipmill.evaluation.charts import Chart, code_usage_chart, fvd_chart, loss_chart
from clipmill.evaluation.exhibits import COLUMNS, SampledClip, read_samples
from clipmill.evaluation.film import Film, Row
from clipmill.evaluation.pages import place_films, render
from clipmill.evaluation.results import Evaluation, find_evaluations, read_evaluation
from clipmill.evaluation.table import circumstances, origin, short
from clipmill.metrics import read_metrics
from clipmill.shards.manifest import Manifest

__all__ = ["compare", "find_evaluation"]

MAX_SAMPLES = 24
"""Number of samples to show of each evaluation."""


class Number(NamedTuple):
    """A metric of ``metrics.json`` that the page compares."""

    name: str
    path: str
    """Dotted."""
    best: str
    """What is best: ``low``, ``high``, ``one`` (closest to 1, as a ratio) or ``none``."""


NUMBERS = (
    Number("NMSE of reconstructions", "reconstruction.nmse", "low"),
    Number("PSNR, dB", "reconstruction.psnr_db", "high"),
    Number("PSNR, mean over clips, dB", "reconstruction.per_clip.psnr_db.mean", "high"),
    Number("SSIM", "reconstruction.ssim", "high"),
    Number("LPIPS", "reconstruction.lpips", "low"),
    Number("share of codes in use", "codebook.used_share", "none"),
    Number("perplexity of the codes", "codebook.perplexity", "none"),
    Number("nats per token of the prior", "prior.val_nats_per_token", "low"),
    Number("of the unigram table's nats", "prior.ratio_to_unigram", "low"),
    Number("motion energy, of the real clips'", "samples.appearance.ratio.motion_energy", "one"),
    Number("flicker energy, of the real clips'", "samples.appearance.ratio.flicker_energy", "one"),
    Number("object size variation, of the real clips'", "samples.appearance.ratio.object_variation", "one"),
    Number("contrast, of the real clips'", "samples.appearance.ratio.pixel_variance", "one"),
    Number("colour distance", "samples.appearance.colour_distance", "low"),
    Number("stand-in distance", "samples.appearance.stand_in_distance", "low"),
    Number("distance to the nearest training clip, of validation clips'", "samples.nearest.median", "one"),
    Number("difference of code histograms", "samples.code_total_variation", "low"),
    Number("rFVD", "fvd.rfvd", "low"),
    Number("FVD", "fvd.fvd", "low"),
    Number("FVD*", "fvd.fvd_star", "low"),
    Number("Inception Score", "samples.inception_score.mean", "high"),
    Number("samples", "samples.count", "none"),
)


def find_evaluation(url: str) -> Evaluation:
    """The evaluation at a URL: an evaluation's folder, or a run with exactly one evaluation.

    Raises:
        UserError: there is no evaluation, or the run has several.
    """
    url = storage.absolute(url)
    found = read_evaluation(url)
    if found is not None:
        return found
    below = find_evaluations(url)
    if not below:
        raise UserError(f"no evaluation at {url}; name a folder such as runs/demo/evaluation/default")
    if len(below) > 1:
        names = ", ".join(one.name for one in below)
        raise UserError(f"{url} has several evaluations ({names}); name one, such as {below[-1].url}")
    return below[0]


def compare(evaluations: Sequence[Evaluation]) -> bytes:
    """A page that puts evaluations side by side, the first as the reference.

    Raises:
        UserError: they are not comparable; the message says why.
    """
    for other in evaluations[1:]:
        _require_comparable(evaluations[0], other)
    names = _names(evaluations)
    films = _films(evaluations, names)
    placed, _ = place_films(films, inline_bytes=float("inf"))
    return render(
        "compare.html.j2",
        title=" · ".join(names),
        names=names,
        evaluations=evaluations,
        origins=[origin(one) for one in evaluations],
        circumstances=circumstances(evaluations[0].metrics),
        same_noise=_has_same_noise(evaluations),
        recipes=_recipes(evaluations),
        rows=[row for number in NUMBERS if (row := _row(number, evaluations)) is not None],
        films=placed,
        charts=[chart for chart in _charts(evaluations, names) if chart.data],
    )


def _require_comparable(first: Evaluation, other: Evaluation) -> None:
    """Refuses evaluations with other settings or clips, because their metrics differ for reasons besides the models."""
    reasons = changed_keys(first.metrics["settings"], other.metrics["settings"], "evaluate.")
    for key in ("split", "num_frames", "resolution", "num_clips"):
        then, now = first.metrics["clips"][key], other.metrics["clips"][key]
        if then != now:
            reasons.append(f"clips.{key} ({then!r} -> {now!r})")
    clips = [one.metrics["inputs"]["clips"][:8] for one in (first, other)]
    if clips[0] != clips[1]:
        reasons.append(f"other clips ({clips[0]} -> {clips[1]})")
    if reasons:
        raise UserError(
            f"{first.url} and {other.url} do not compare: {', '.join(reasons)}; evaluate both with the same settings "
            "on the same clips"
        )


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The shortest distinct names: the evaluations' own names, or with their runs, or their URLs."""
    for names in (
        [one.name for one in evaluations],
        [f"{one.root.rpartition('/')[2]}/{one.name}" for one in evaluations],
    ):
        if len(set(names)) == len(names):
            return names
    return [one.url for one in evaluations]


# ------------------------------------------------------------------------------------------------ numbers and settings


def _row(number: Number, evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """A row of the table; None if no evaluation has the number."""
    values = [_value(one.metrics, number.path) for one in evaluations]
    if all(value is None for value in values):
        return None
    first = values[0]
    cells = [{"text": short(value), "change": "", "mark": ""} for value in values]
    for cell, value in zip(cells[1:], values[1:], strict=True):
        if first is None or value is None or value == first:
            continue
        relative = f" ({100 * (value / first - 1):+.1f} %)" if first else ""
        cell |= {"change": f"{value - first:+.4g}{relative}", "mark": _mark(number.best, first, value)}
    return {"name": number.name, "cells": cells, "differs": any(value != first for value in values)}


def _value(metrics: dict[str, Any], path: str) -> float | None:
    found: Any = metrics
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _mark(best: str, first: float, value: float) -> str:
    """Whether a number got better or worse; "" if neither."""
    if best == "none":
        return ""
    if best == "one":
        distances = [abs(one - 1) if one < 1 else abs(1 - 1 / one) for one in (first, value)]
        return "better" if distances[1] < distances[0] else "worse"
    return "better" if (value < first) == (best == "low") else "worse"


def _samples(evaluation: Evaluation) -> Manifest | None:
    """The samples that an evaluation measured; None if it had none, or if they no longer exist."""
    name = evaluation.made["samples"]
    if name is None:
        return None
    try:
        manifest = Manifest.load(storage.join(evaluation.root, "samples", name), "samples")
    except FileNotFoundError:
        return None
    return manifest if manifest.fingerprint == evaluation.metrics["inputs"]["samples"] else None


def _recipes(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The settings of samples and models that differ between evaluations: each key with one value per evaluation."""
    found: list[dict[str, Any]] = []
    for one in evaluations:
        manifest = _samples(one)
        recipe = {f"sample.{key}": value for key, value in manifest.recipe["sample"].items()} if manifest else {}
        steps = {f"step of the {name}": step for name, step in one.metrics["steps"].items()}
        models = {name: one.metrics["inputs"].get(name) for name in ("tokenizer", "prior")}
        found.append({**recipe, **steps, **models})
    keys = dict.fromkeys(key for recipe in found for key in recipe)
    rows = [{"name": key, "values": [recipe.get(key) for recipe in found]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


# ------------------------------------------------------------------------------------------------- clips and curves


def _has_same_noise(evaluations: Sequence[Evaluation]) -> bool:
    """Whether sample i of each comes from the same noise: seed and shape of the codes are equal."""
    manifests = [_samples(one) for one in evaluations]
    kinds = {
        (manifest.recipe["sample"]["seed"], str(manifest.facts["latent_shape"]), manifest.facts["num_codes"])
        for manifest in manifests
        if manifest is not None
    }
    return len(kinds) == 1 and None not in manifests


def _films(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Film]:
    """Samples 0, 1, 2, ... of every evaluation below each other."""
    found = [read_samples(manifest, MAX_SAMPLES) if (manifest := _samples(one)) else [] for one in evaluations]
    films = []
    for start in range(0, max(map(len, found)), COLUMNS):
        rows = []
        for one, name, samples in zip(evaluations, names, found, strict=True):
            part: Sequence[SampledClip] = samples[start : start + COLUMNS]
            titles = [f"{clip.name}, {clip.label}" if clip.label else clip.name for clip in part]
            given = one.metrics["samples"]["given_frames"] if part else 0
            rows.append(Row(name, [clip.video for clip in part], [clip.fps for clip in part], titles, given))
        film = Film.of(f"samples {start} to {start + max(len(row.clips) for row in rows) - 1}", rows)
        if film is not None:
            films.append(film)
    return films


def _charts(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Chart]:
    """Curves of all evaluations in shared charts; evaluations of one run share its training curves."""
    by_name = dict(zip(names, evaluations, strict=True))
    roots = dict.fromkeys(one.root for one in evaluations)
    owners = {root: tuple(name for name, one in by_name.items() if one.root == root) for root in roots}
    losses = {
        stage: {owners[root]: read_metrics(storage.join(root, stage)) for root in roots} for stage in ("vqvae", "prior")
    }
    fits = {
        name: one.metrics["fvd"]["by_count"] for name, one in by_name.items() if _value(one.metrics, "fvd.by_count")
    }
    return [
        loss_chart("Tokenizer loss", "While the tokenizers were trained.", "loss", losses["vqvae"], {}),
        loss_chart("Prior loss", "While the priors were trained.", "nats per token", losses["prior"], {}),
        code_usage_chart({name: one.metrics["codebook"]["sorted_counts"] for name, one in by_name.items()}),
        fvd_chart(fits),
    ]
