"""Which numbers of an evaluation are stale, because newer models, samples or data exist."""

from __future__ import annotations

from typing import Any

from clipmill.config import RunConfig
from clipmill.evaluation.results import Evaluation
from clipmill.models.export import read_latest
from clipmill.shards.manifest import Manifest

__all__ = ["staleness"]


def staleness(config: RunConfig, evaluation: Evaluation) -> dict[str, str]:
    """What has changed since an evaluation, by the affected section of ``metrics.json``.

    Args:
        config: of the run.
        evaluation: of the run.

    Returns:
        One sentence for each stale section: ``reconstruction``, ``prior``, ``samples``.
    """
    inputs, metrics = evaluation.metrics["inputs"], evaluation.metrics
    found: dict[str, list[str]] = {"reconstruction": [], "prior": [], "samples": []}

    def compare(now: str | None, then: str | None, change: str, *sections: str) -> None:
        if then is not None and now is not None and now != then:
            for section in sections:
                found[section].append(change)

    clips, clips_text = _manifest(config.folder("clips", metrics["clips"]["split"]))
    compare(clips, inputs["clips"], f"the clips have changed since ({clips_text})", "reconstruction", "samples")
    tokenizer, step = _export(config.tokenizer_url)
    before = metrics["steps"]
    change = f"a tokenizer of step {step} is newer than this one of step {before['tokenizer']}"
    compare(tokenizer, inputs["tokenizer"], change, "reconstruction")
    if "prior" in inputs:
        prior, step = _export(config.folder("prior"))
        change = f"a prior of step {step} is newer than this one of step {before['prior']}"
        compare(prior, inputs["prior"], change, "prior", "samples")
        tokens, text = _manifest(config.folder("tokens", "val"))
        compare(tokens, inputs["val_tokens"], f"the tokens have changed since ({text})", "prior")
        samples, text = _manifest(config.folder("samples", evaluation.made["samples"]))
        change = f"there are other samples now ({text}, these numbers are of {metrics['samples']['count']})"
        compare(samples, inputs["samples"], change, "samples")
    return {section: "; ".join(changes) for section, changes in found.items() if changes}


def _manifest(url: str) -> tuple[str | None, str]:
    """Fingerprint of a data set, and its size in words; None if there is no data set."""
    try:
        manifest = Manifest.load(url)
    except FileNotFoundError:
        return None, ""
    return manifest.fingerprint, f"{manifest.num_samples} {manifest.kind}"


def _export(url: str) -> tuple[str | None, Any]:
    """Hash and step of the newest export; None if there is no export."""
    found = read_latest(url)
    return (None, None) if found is None else (found[1], found[0]["step"])
