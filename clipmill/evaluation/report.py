"""Stage ``report``: one page, ``report/index.html``, that shows a run.

Every number comes from a file; a result that does not exist yet is shown as missing. The page shows one evaluation. If
a number was measured on something that is no longer the newest, the page says so beside it.
"""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import yaml

import clipmill
from clipmill import storage
from clipmill.config import RunConfig, fingerprint
from clipmill.errors import UserError
from clipmill.evaluation.charts import Chart, code_usage_chart, fvd_chart, loss_chart
from clipmill.evaluation.exhibits import class_groups, extreme_films, nearest_film, read_samples, wall_films
from clipmill.evaluation.film import Film
from clipmill.evaluation.gallery import MAX_CLIPS
from clipmill.evaluation.pages import MEDIA_FOLDER, PlacedFilm, place_films, render
from clipmill.evaluation.previews import preview_names, read_previews
from clipmill.evaluation.results import Evaluation, find_evaluations
from clipmill.evaluation.skipped import skipped_of
from clipmill.evaluation.staleness import staleness
from clipmill.evaluation.table import (
    circumstances,
    fvd_rows,
    headlines,
    origin,
    prior_rows,
    sample_rows,
    tokenizer_rows,
)
from clipmill.lease import Lease
from clipmill.metrics import read_metrics
from clipmill.models.export import read_latest
from clipmill.shards.manifest import SPLITS, Kind, Manifest

__all__ = ["folder_url", "is_finished", "run"]

REPORT_SCHEMA = 1
SUMMARY_SCHEMA = 1


def folder_url(config: RunConfig) -> str:
    """The folder of this stage."""
    return config.folder("report")


def is_finished(config: RunConfig) -> bool:
    """Whether the page on disk was made from the current files.

    Raises:
        UserError: there is nothing to report on yet.
    """
    if not storage.exists(config.folder("clips", "train", "manifest.json")):
        raise UserError(f"nothing to report on at {config.root}; run `clipmill shard` with this config first")
    try:
        document = storage.read_document(config.folder("report", "report.json"), REPORT_SCHEMA)
    except FileNotFoundError:
        return False
    return document["inputs"] == _inputs(config) and storage.exists(config.folder("report", "index.html"))


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Writes the page and the films beside it.

    Returns:
        The page's size, for the summary.
    """
    inputs = _inputs(config)
    page, files = _render(config)
    lease.check()
    for path, content in files.items():
        storage.publish_bytes(config.folder("report", path), content)
    storage.publish_bytes(config.folder("report", "index.html"), page)
    for entry in storage.list_folder(config.folder("report", MEDIA_FOLDER)):  # films of an earlier page
        if f"{MEDIA_FOLDER}/{entry.name}" not in files:
            storage.remove(config.folder("report", MEDIA_FOLDER, entry.name))
    storage.publish_document(config.folder("report", "report.json"), {"inputs": inputs}, REPORT_SCHEMA)
    return {"page": config.folder("report", "index.html"), "bytes": len(page), "films_beside": len(files)}


# ------------------------------------------------------------------------------------------- what is read


def _judged(config: RunConfig) -> Evaluation | None:
    """The evaluation to show: the one that the config names, or else the newest one of a tokenizer."""
    evaluations = find_evaluations(config.root)
    wanted = config.folder("evaluation", config.evaluate.name or config.sample.name)
    named = [one for one in evaluations if one.url == wanted]
    of_tokenizers = [one for one in evaluations if one.metrics["settings"]["what"] == "vqvae"]
    candidates = named or of_tokenizers
    return candidates[-1] if candidates else None


def _stage_folders(config: RunConfig, judged: Evaluation | None) -> dict[str, str]:
    """Folder of each stage's summary, in the order of a run."""
    return {
        "shard": config.folder("clips"),
        "train-vqvae": config.folder("vqvae"),
        "tokenize": config.folder("tokens"),
        "train-prior": config.folder("prior"),
        "sample": config.folder("samples", config.sample.name),
        "evaluate": judged.url if judged else config.folder("evaluation", config.sample.name),
    }


def _inputs(config: RunConfig) -> str:
    """Hash of all files that the page is made from."""
    judged = _judged(config)
    documents = [storage.join(url, "summary.json") for url in _stage_folders(config, judged).values()]
    documents += [config.folder("clips", split, "manifest.json") for split in SPLITS]
    documents += [config.folder("clips", "quarantine.jsonl"), config.folder("tokens", "val", "manifest.json")]
    documents += [config.folder("samples", config.sample.name, "manifest.json")]
    for evaluation in find_evaluations(config.root):
        documents += [storage.join(evaluation.url, name) for name in ("metrics.json", "made.json")]
    read = {url.removeprefix(config.root): _digest(url) for url in documents}
    logs = {
        stage: [(entry.name, entry.bytes) for entry in storage.list_folder(config.folder(stage, "metrics"))]
        for stage in ("vqvae", "prior")
    }
    previews = {stage: preview_names(config.folder(stage)) for stage in ("vqvae", "prior")}
    exports = [read_latest(url) for url in (config.tokenizer_url, config.folder("prior"))]
    return fingerprint(
        {
            "documents": read,
            "logs": logs,
            "previews": previews,
            "exports": [found and found[1] for found in exports],
            "config": _config_text(config),
            "of": clipmill.__version__,
        }
    )


def _digest(url: str) -> str | None:
    try:
        return hashlib.sha256(storage.read_bytes(url)).hexdigest()
    except FileNotFoundError:
        return None


def _document(url: str, schema: int) -> dict[str, Any] | None:
    try:
        return storage.read_document(url, schema)
    except FileNotFoundError:
        return None


def _manifest(url: str, kind: Kind) -> Manifest | None:
    try:
        return Manifest.load(url, kind)
    except FileNotFoundError:
        return None


def _config_text(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# ----------------------------------------------------------------------------------------------- the page


def _render(config: RunConfig) -> tuple[bytes, dict[str, bytes]]:
    """The page, and the files beside it by path."""
    judged = _judged(config)
    metrics = judged.metrics if judged else None
    found = {split: _manifest(config.folder("clips", split), "clips") for split in SPLITS}
    manifests = {split: manifest for split, manifest in found.items() if manifest is not None}
    stale = staleness(config, judged) if judged else {}
    exhibits, files = _exhibits(config, judged, manifests)
    page = render(
        "report.html.j2",
        title=config.root.rstrip("/").rpartition("/")[2],
        clip=config.data.clip,
        train=manifests.get("train"),
        val=manifests.get("val"),
        evaluation=judged,
        origin=origin(judged) if judged else "",
        stale=stale,
        figures=headlines(metrics) if metrics else [],
        circumstances=circumstances(metrics) if metrics else "",
        tables=_tables(metrics) if metrics else [],
        charts=_charts(config, metrics),
        nats=_nats(metrics) if metrics else {},
        stages=_stages(config, judged),
        skipped=skipped_of(config.folder("clips"), manifests),
        evaluations=find_evaluations(config.root),
        numbers=_flat({name: part for name, part in (metrics or {}).items() if name not in ("settings", "inputs")}),
        identity=_flat({**metrics["settings"], **metrics["inputs"]}) if metrics else [],
        config_text=_config_text(config),
        previews={
            "Validation clips above their reconstructions": read_previews(config.folder("vqvae")),
            "Samples from the same noise each time": read_previews(config.folder("prior")),
        },
        **exhibits,
    )
    return page, files


def _exhibits(
    config: RunConfig, judged: Evaluation | None, manifests: dict[str, Manifest]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """All films (by class, worst and best clips, all samples), and the files to put beside the page."""
    samples = _manifest(config.folder("samples", config.sample.name), "samples")
    classes = manifests["train"].facts["classes"] if "train" in manifests else []
    num_given = judged.metrics["samples"]["given_frames"] if judged and "samples" in judged.metrics else 0
    clips = read_samples(samples) if samples else []
    groups = class_groups(judged, classes, clips, num_given)
    extremes = extreme_films(judged) if judged else []
    nearest = nearest_film(judged) if judged else None
    num_shown = min(len(clips), MAX_CLIPS)
    wall = list(wall_films(clips, num_given)) if len(clips) > num_shown else []
    films: list[Film] = [
        *chain.from_iterable(group.films for group in groups),
        *extremes,
        *filter(None, [nearest]),
        *wall,
    ]
    placed, files = place_films(films)
    taken = iter(placed)

    def next_films(number: int) -> list[PlacedFilm]:
        return [next(taken) for _ in range(number)]

    return {
        "groups": [(group, next_films(len(group.films))) for group in groups],
        "extremes": next_films(len(extremes)),
        "nearest": next_films(1) if nearest else [],
        "wall": next_films(len(wall)),
        "num_classes": len(classes),
        "num_wall": len(clips),
        "num_samples": samples.num_samples if samples else 0,
    }, files


def _tables(metrics: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Title, section of ``metrics.json`` and rows of each table."""
    tables = [("Reconstructions and codes", "reconstruction", tokenizer_rows(metrics))]
    if "samples" in metrics:
        tables.append(("Prior", "prior", prior_rows(metrics)))
        tables.append(("Samples beside real clips", "samples", sample_rows(metrics)))
    section = "samples" if "samples" in metrics else "reconstruction"
    return [*tables, ("Distances of sets of videos", section, fvd_rows(metrics))]


def _charts(config: RunConfig, metrics: dict[str, Any] | None) -> list[Chart]:
    prior = (metrics or {}).get("prior", {})
    marks = {"unigram table": "unigram_nats", "temporal bigram table": "temporal_bigram_nats"}
    charts = [
        loss_chart(
            "Tokenizer loss",
            "MSE over the variance of the data, plus the commitment.",
            "loss",
            {(): read_metrics(config.folder("vqvae"))},
            {},
            "train-vqvae",
        ),
        loss_chart(
            "Prior loss",
            "Cross-entropy of the codes, compared with that of tables counted on the training codes.",
            "nats per token",
            {(): read_metrics(config.folder("prior"))},
            {name: prior[key] for name, key in marks.items() if key in prior},
            "train-prior",
        ),
        code_usage_chart({"": metrics["codebook"]["sorted_counts"]} if metrics else {}),
    ]
    by_count = ((metrics or {}).get("fvd") or {}).get("by_count")
    return [*charts, fvd_chart({"": by_count})] if by_count else charts


def _nats(metrics: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Nats per token of the prior and of tables, each with its share of the longest bar in percent."""
    prior = metrics.get("prior")
    if prior is None:
        return {}
    keys = {
        "prior": "val_nats_per_token",
        "temporal bigram": "temporal_bigram_nats",
        "raster bigram": "raster_bigram_nats",
        "unigram": "unigram_nats",
    }
    longest = max(prior[key] for key in keys.values())
    return {name: (prior[key], 75 * prior[key] / longest) for name, key in keys.items()}


def _stages(config: RunConfig, judged: Evaluation | None) -> list[dict[str, Any]]:
    """A row for each stage: seconds, throughput and the other facts of its summary."""
    rows = []
    for name, url in _stage_folders(config, judged).items():
        summary = _document(storage.join(url, "summary.json"), SUMMARY_SCHEMA)
        facts: dict[str, Any] = {
            key: value
            for key, value in (summary or {}).items()
            if key not in ("stage", "schema", "seconds") and isinstance(value, int | float | str)
        }
        rates = {key.removesuffix("_per_second"): facts.pop(key) for key in list(facts) if key.endswith("_per_second")}
        rows.append({"name": name, "summary": summary, "facts": facts, "rates": rates})
    return rows


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The numbers of a document by dotted name; lists (histograms) are charts, not rows."""
    rows: list[tuple[str, Any]] = []
    for name, value in document.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            rows.append((prefix + name, value))
    return rows
