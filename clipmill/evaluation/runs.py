"""Compares runs, for ``clipmill runs``: their progress, their numbers, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from clipmill import storage
from clipmill.errors import UserError
from clipmill.evaluation.results import Evaluation, find_evaluations
from clipmill.models.export import read_latest

__all__ = ["Run", "differences", "find_runs"]

_STAGE_FOLDERS = ("clips", "vqvae", "tokens", "prior", "samples", "evaluation", "report")
"""In the order of a run."""


@dataclass(frozen=True)
class Run:
    """What is known about one run."""

    url: str
    config: dict[str, Any]
    """The config by dotted key, as its latest stage resolved it; URLs below the root begin with ``ROOT``."""
    steps: dict[str, int]
    """Facts of the newest exports, under ``tokenizer`` and ``prior``."""
    evaluations: list[Evaluation]
    """Evaluations, oldest first."""
    num_bytes: int
    """Total size of all its objects."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.url.rpartition("/")[2]


def find_runs(urls: Sequence[str]) -> list[Run]:
    """The runs at these URLs, or one level below them.

    Raises:
        UserError: there is no run at or below a URL.
    """
    roots: list[str] = []
    for url in map(storage.absolute, urls):
        below = [storage.join(url, name) for name in storage.list_folders(url)]
        found = [url] if _is_run(url) else [folder for folder in below if _is_run(folder)]
        if not found:
            raise UserError(f"no run at {url}, nor in a folder of it; name the root of a run, or a folder of runs")
        roots += [root for root in found if root not in roots]
    return [_read_run(root) for root in roots]


def _is_run(url: str) -> bool:
    return bool({"clips", "vqvae", "tokens", "prior", "samples"} & set(storage.list_folders(url)))


def _read_run(url: str) -> Run:
    exports = {"tokenizer": "vqvae", "prior": "prior"}
    latest = {name: read_latest(storage.join(url, folder)) for name, folder in exports.items()}
    return Run(
        url,
        _latest_config(url),
        {name: found[0]["step"] for name, found in latest.items() if found is not None},
        find_evaluations(url),
        sum(entry.bytes for entry in storage.walk(url)),
    )


def _latest_config(url: str) -> dict[str, Any]:
    """The resolved config of the last stage of a run, flat; empty if no stage has written one."""
    for stage in reversed(_STAGE_FOLDERS):
        folder = storage.join(url, stage)
        candidates = [storage.join(folder, name) for name in storage.list_folders(folder)]
        for place in [folder, *candidates]:
            try:
                values = yaml.safe_load(storage.read_bytes(storage.join(place, "config.yaml")))
            except FileNotFoundError:
                continue
            except yaml.YAMLError as error:
                raise UserError(f"{place}/config.yaml is damaged; restore or remove it") from error
            return _flat(values, str(values.get("root", url)))
    return {}


def _flat(values: dict[str, Any], root: str, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, root, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith(root):
            found[prefix + name] = "ROOT" + value.removeprefix(root)
        else:
            found[prefix + name] = value
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys in which the configs differ, each with its value in every run (None if a run has no such key).

    The section ``cluster`` is ignored.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith("cluster."))
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}
