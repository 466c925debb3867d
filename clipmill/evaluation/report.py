"""Stage ``report``: one page, ``report/index.html``, that shows a run and needs nothing but itself.

It only reads files: a result that does not exist yet is shown as missing, and every number comes from a file.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from numpy.typing import NDArray

import clipmill
from clipmill import storage
from clipmill.config import RunConfig, fingerprint
from clipmill.errors import UserError
from clipmill.evaluation.charts import code_usage_chart, loss_chart, nats_chart
from clipmill.evaluation.film import FRAMES_PER_SECOND, Film
from clipmill.evaluation.gallery import Gallery, clips_per_class
from clipmill.evaluation.results import Evaluation, find_evaluations
from clipmill.evaluation.table import circumstances, fvd_rows, pixels, short, tokenizer_rows
from clipmill.lease import Lease
from clipmill.metrics import read_metrics
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import SPLITS, Kind, Manifest

__all__ = ["folder_url", "is_finished", "run"]

REPORT_SCHEMA = 1
SUMMARY_SCHEMA = 1

_MAX_SAMPLES_SEARCHED = 1024
"""Samples that are read to find enough of each class."""


def folder_url(config: RunConfig) -> str:
    """The folder of this stage."""
    return config.folder("report")


def is_finished(config: RunConfig) -> bool:
    """Whether the page on disk was made from the present files.

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
    """Writes the page.

    Returns:
        Its size, for the summary.
    """
    inputs = _inputs(config)
    page = _render(config).encode()
    lease.check()
    storage.publish_bytes(config.folder("report", "index.html"), page)
    storage.publish_document(config.folder("report", "report.json"), {"inputs": inputs}, REPORT_SCHEMA)
    return {"page": config.folder("report", "index.html"), "bytes": len(page)}


# ------------------------------------------------------------------------------------------- what is read


def _stage_folders(config: RunConfig) -> dict[str, str]:
    """Folder of each stage's summary, in the order of a run."""
    return {
        "shard": config.folder("clips"),
        "train-vqvae": config.folder("vqvae"),
        "tokenize": config.folder("tokens"),
        "train-prior": config.folder("prior"),
        "sample": config.folder("samples", config.sample.name),
        **({"evaluate": judged.url} if (judged := _judged(config)) else {}),
    }


def _judged(config: RunConfig) -> Evaluation | None:
    """The evaluation to show: the one that the config names, else the newest one of a tokenizer."""
    evaluations = find_evaluations(config.root)
    wanted = config.folder("evaluation", config.evaluate.name or config.sample.name)
    named = [one for one in evaluations if one.url == wanted]
    of_tokenizers = [one for one in evaluations if one.metrics["settings"]["what"] == "vqvae"]
    candidates = named or of_tokenizers
    return candidates[-1] if candidates else None


def _inputs(config: RunConfig) -> str:
    """Hash of all files that the page is made from."""
    documents = [storage.join(url, "summary.json") for url in _stage_folders(config).values()]
    documents += [config.folder("clips", split, "manifest.json") for split in SPLITS]
    documents += [config.folder("samples", config.sample.name, "manifest.json")]
    if judged := _judged(config):
        documents += [storage.join(judged.url, name) for name in ("vqvae.png", "metrics.json", "made.json")]
    read = {url.removeprefix(config.root): _digest(url) for url in documents}
    logs = {
        stage: [(entry.name, entry.bytes) for entry in storage.list_folder(config.folder(stage, "metrics"))]
        for stage in ("vqvae", "prior")
    }
    return fingerprint({"documents": read, "logs": logs, "config": _config_text(config), "of": clipmill.__version__})


def _picture(judged: Evaluation | None) -> str | None:
    """The worst and best clips as a data URI."""
    if judged is None:
        return None
    data = storage.read_bytes(storage.join(judged.url, "vqvae.png"))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


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


def _render(config: RunConfig) -> str:
    judged = _judged(config)
    vqvae = judged.metrics if judged else None
    metrics = vqvae if vqvae and "prior" in vqvae else None
    manifests = {split: _manifest(config.folder("clips", split), "clips") for split in SPLITS}
    samples = _manifest(config.folder("samples", config.sample.name), "samples")
    environment = Environment(
        loader=PackageLoader("clipmill.evaluation", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "pixels": pixels}
    return environment.get_template("report.html.j2").render(
        title=config.root.rstrip("/").rpartition("/")[2],
        clip=config.data.clip,
        train=manifests["train"],
        val=manifests["val"],
        films=_films(judged, manifests["train"], samples),
        evaluation=judged.name if judged else None,
        frames_per_second=FRAMES_PER_SECOND,
        samples=samples,
        vqvae=vqvae,
        metrics=metrics,
        circumstances=circumstances(vqvae) if vqvae else None,
        tokenizer_rows=tokenizer_rows(vqvae) if vqvae else [],
        fvd_rows=fvd_rows(vqvae) if vqvae else [],
        extremes=_picture(judged),
        charts=_charts(config, vqvae, metrics),
        stages=_stages(config),
        numbers=_flat({name: part for name, part in (vqvae or {}).items() if name not in ("settings", "inputs")}),
        identity=_flat({**vqvae["settings"], **vqvae["inputs"]}) if vqvae else [],
        config_text=_config_text(config),
        version=clipmill.__version__,
    )


def _charts(config: RunConfig, vqvae: dict[str, Any] | None, metrics: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Title, caption and drawing of each chart; None where its stage has not run."""
    tokenizer, prior = read_metrics(config.folder("vqvae")), read_metrics(config.folder("prior"))
    numbers = metrics["prior"] if metrics else {}
    tables = {
        "unigram": "unigram_nats",
        "temporal bigram": "temporal_bigram_nats",
        "raster bigram": "raster_bigram_nats",
    }
    nats = {name: numbers[key] for name, key in {"prior": "val_nats_per_token", **tables}.items()} if metrics else {}
    marks = {f"{name} table": nats[name] for name in ("unigram", "temporal bigram") if name in nats}
    return [
        _chart(
            "Tokenizer loss",
            "MSE over the variance of the data, plus the commitment.",
            "train-vqvae",
            loss_chart("Tokenizer loss over steps", tokenizer, "loss", {}) if tokenizer else None,
        ),
        _chart(
            "Prior loss",
            "Cross-entropy of the codes, beside what tables of the training codes reach.",
            "train-prior",
            loss_chart("Prior loss over steps", prior, "nats per token", marks) if prior else None,
        ),
        _chart(
            "Codebook",
            "Use of the codes over the validation clips.",
            "evaluate",
            code_usage_chart("Codes by frequency", vqvae["codebook"]["sorted_counts"]) if vqvae else None,
        ),
        _chart(
            "Prior against tables",
            "On the validation codes; the smoothing of the tables is picked in their favour. Shorter is better.",
            "evaluate",
            nats_chart("Nats per token of the prior and of tables", nats) if metrics else None,
        ),
    ]


def _chart(title: str, caption: str, stage: str, drawing: Markup | None) -> dict[str, Any]:
    return {"title": title, "caption": caption, "stage": stage, "drawing": drawing}


def _stages(config: RunConfig) -> list[dict[str, Any]]:
    """A row for each stage: seconds, throughput and the other facts of its summary."""
    rows = []
    for name, url in _stage_folders(config).items():
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


# ------------------------------------------------------------------------------------------------ the clips


def _films(judged: Evaluation | None, train: Manifest | None, samples: Manifest | None) -> list[Film]:
    """A film for each class, with the rows real, reconstruction and sample."""
    gallery = Gallery.load(storage.join(judged.url, "gallery.npz")) if judged else None
    wanted = clips_per_class(train.facts["classes"] if train else [])
    made = _sampled_clips(samples, wanted) if samples else {}
    labels: list[str | None] = list(wanted)
    if None not in wanted and None in made:  # an unconditional prior on clips with classes
        labels.append(None)
    films = []
    for label in labels:
        rows = [row for row, other in enumerate(gallery.labels) if other == label] if gallery else []
        clips = {
            "real": [gallery.real[row] for row in rows] if gallery else [],
            "reconstruction": [gallery.reconstruction[row] for row in rows] if gallery else [],
            "sample": made.get(label, []),
        }
        films.append(Film.of(label, clips))
    return films


def _sampled_clips(samples: Manifest, wanted: dict[str | None, int]) -> dict[str | None, list[NDArray[np.uint8]]]:
    """The first samples of each class."""
    missing = dict(wanted)
    missing.setdefault(None, max(wanted.values()))  # an unconditional prior may be trained on clips with classes
    dataset = ShardDataset(samples, decode_clip)
    found: dict[str | None, list[NDArray[np.uint8]]] = {}
    for index in range(min(len(dataset), _MAX_SAMPLES_SEARCHED)):
        if not missing[None] or not any(missing[label] for label in wanted):
            break
        sample = dataset[index]
        if missing.get(sample["label"], 0):
            missing[sample["label"]] -= 1
            found.setdefault(sample["label"], []).append(np.array(sample["video"]))
    return found
