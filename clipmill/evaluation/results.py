"""Evaluations on disk: ``evaluation/NAME/`` below a run, each for one set of settings and inputs.

``metrics.json`` holds every number, the settings, and the identities of all data and models that were measured; it is
written last. ``made.json`` says when, where and with what software. ``gallery.npz`` holds the real clips and the
reconstructions that the pages play.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.models.export import require_vqvae

__all__ = ["METRICS_SCHEMA", "Evaluation", "find_evaluations", "folder_url", "read_evaluation"]

METRICS_SCHEMA = 7
"""6: protocols. 5: the energy of high frequencies. 4: one document per evaluation, with its settings. 3: a limited
number of clips comes from as many videos as possible."""
MADE_SCHEMA = 1


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    url: str
    """Its folder."""
    metrics: dict[str, Any]
    """``metrics.json``: a pure function of its ``settings``, its ``inputs`` and the kind of hardware."""
    made: dict[str, Any]
    """``made.json``."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.url.rpartition("/")[2]

    @property
    def root(self) -> str:
        """URL of its run."""
        return self.url.rsplit("/", 2)[0]

    def publish(self) -> None:
        """Writes both documents; the evaluation is finished once the second is there."""
        storage.publish_document(storage.join(self.url, "made.json"), self.made, MADE_SCHEMA)
        storage.publish_document(storage.join(self.url, "metrics.json"), self.metrics, METRICS_SCHEMA)


def folder_url(config: RunConfig) -> str:
    """Folder of a config's evaluation.

    Raises:
        UserError: the name depends on the tokenizer's step, and there is no tokenizer yet.
    """
    settings = config.evaluate
    if settings.name is not None:
        name = settings.name
    elif settings.what == "vqvae":
        name = f"vqvae-{require_vqvae(config.tokenizer_url)[0]['step']}"
    else:
        name = config.sample.name
    return config.folder("evaluation", name)


def read_evaluation(url: str) -> Evaluation | None:
    """The evaluation in a folder. None if the folder holds no evaluation, or one of an older clipmill.

    Raises:
        UserError: it is damaged, or was written by a newer clipmill.
    """
    try:
        metrics = storage.read_document(storage.join(url, "metrics.json"), METRICS_SCHEMA)
        if metrics.pop("schema") != METRICS_SCHEMA:
            return None
        made = storage.read_document(storage.join(url, "made.json"), MADE_SCHEMA)
    except FileNotFoundError:
        return None
    return Evaluation(url, metrics, {name: value for name, value in made.items() if name != "schema"})


def find_evaluations(root: str) -> list[Evaluation]:
    """All finished evaluations of a run, the oldest first."""
    parent = storage.join(root, "evaluation")
    found = [read_evaluation(storage.join(parent, name)) for name in storage.list_folders(parent) if name[0] != "_"]
    return sorted((one for one in found if one is not None), key=lambda one: (one.made["at"], one.name))
