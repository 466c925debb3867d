"""The stages by name: how each one runs, in which order, whether it is finished, and where training runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, ModuleType, TracebackType
from typing import Any, Literal

import yaml

from clipmill import storage
from clipmill.board import BOARD
from clipmill.cluster import launch
from clipmill.cluster.connection import WORKER_ENVIRONMENT
from clipmill.config import RunConfig, with_places, with_recorded_clips
from clipmill.errors import Interrupted, UserError
from clipmill.extras import installed_versions
from clipmill.lease import Lease, hold
from clipmill.preflight import check_later_stages
from clipmill.progress import bar
from clipmill.status import publishing

__all__ = ["STAGES", "Stage", "export_model", "find_datasets", "repair", "run_all", "run_stage", "way_back"]

SUMMARY_SCHEMA = 1
STOPPED = "stopped; run the same command to go on"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage, and what its module must provide.

    Every module has ``folder_url(config)`` and ``is_finished(config)``, which raises `UserError` if an input of the
    stage is missing.

    A stage that fans out has ``run(config, lease) -> summary``. A training stage instead has
    ``train(config, lease, report, studio)``, which every rank calls, and ``summary(config)``,
    ``export(config, step, dtype) -> sha8``, ``is_usable(config, num_workers)`` and ``committed_steps(config)``.

    A stage whose input derives from clips has ``clip_recipes(config)``: the recipes of these clips by the input's URL.
    """

    module_name: str
    is_training: bool = False
    reads_clips: bool = True

    @property
    def module(self) -> ModuleType:
        """The stage's module, imported on first use: a GPU machine that only trains has neither Ray nor decoders."""
        return importlib.import_module(self.module_name)


STAGES = {
    "shard": Stage("clipmill.pipeline.shard", reads_clips=False),
    "train-vqvae": Stage("clipmill.training.vqvae", is_training=True),
    "tokenize": Stage("clipmill.tokenize.tokenize"),
    "train-prior": Stage("clipmill.training.prior", is_training=True),
    "sample": Stage("clipmill.sampling.sample"),
    "evaluate": Stage("clipmill.evaluation.evaluate"),
    "report": Stage("clipmill.evaluation.report", reads_clips=False),
}
"""All stages, in the order of a run."""


def run_all(config: RunConfig) -> dict[str, dict[str, Any] | None]:
    """Runs every stage on one Ray; returns the summaries by stage, None for stages that were already finished."""
    with launch.connect(config.cluster):
        return {name: run_stage(name, config) for name in STAGES}


def run_stage(name: str, config: RunConfig, more: str | None = None) -> dict[str, Any] | None:
    """Runs one stage until it is finished.

    Args:
        name: name of the stage.
        config: config of the run.
        more: kind of generation to add to the stage's plan first, see ``plan_more`` of its module; None adds nothing.

    Returns:
        The summary; None if the stage was already finished.

    Raises:
        UserError: an input or setting of the stage is missing or wrong, or later stages could not work with the clips
            that `shard` would make; nothing has been written.
        Interrupted: the stage was stopped; finished work is kept, and the next run continues from there.
        StageFailed: the stage failed for another reason.
    """
    os.environ.update(WORKER_ENVIRONMENT)  # before a stage imports torch: some stages run in this process
    storage.set_places(config.storage)
    config = _with_absolute_urls(config)
    with storage.disk_errors_explained(config.root):
        return _run_stage(name, config, more)


def _run_stage(name: str, config: RunConfig, more: str | None) -> dict[str, Any] | None:
    stage = STAGES[name]
    config = _with_recorded_clips(stage, config)
    if stage.module.is_finished(config) and more is None:
        logger.info("%s: nothing to do, %s is complete", name, stage.module.folder_url(config))
        return None
    if name == "shard":
        check_later_stages(config)
    if stage.is_training and os.environ.get("RANK", "0") != "0":  # torchrun: rank 0 has the lease, writes the summary
        with _LocalReport(name, quiet=True) as report:
            stage.module.train(config, None, report, _studio(config))
        return None
    with hold(stage.module.folder_url(config), name) as lease, publishing(lease, name, run=config.root):
        if more is not None and not stage.module.plan_more(config, lease, more):
            logger.info("%s: nothing to do, %s is complete", name, stage.module.folder_url(config))
            return None
        _publish_config(config, stage.module.folder_url(config))
        facts = _train(name, config, lease) if stage.is_training else stage.module.run(config, lease)
        summary = {
            "stage": name,
            **facts,
            "seconds": round(BOARD.seconds, 3),
            "versions": installed_versions(),
        }
        lease.check()
        storage.publish_document(storage.join(stage.module.folder_url(config), "summary.json"), summary, SUMMARY_SCHEMA)
    return summary


def export_model(name: str, config: RunConfig, step: int | None, dtype: Literal["float32", "bfloat16"]) -> str:
    """Exports a committed checkpoint of a training stage; returns the export's URL.

    Args:
        name: name of the stage.
        config: config of the run.
        step: step of the checkpoint; None exports the newest.
        dtype: dtype of the exported weights.

    Raises:
        UserError: there is no such checkpoint, or it was trained with other settings.
    """
    storage.set_places(config.storage)
    config = _with_absolute_urls(config)
    with storage.disk_errors_explained(config.root):
        config = _with_recorded_clips(STAGES[name], config)
        module = STAGES[name].module
        return storage.join(module.folder_url(config), "exports", module.export(config, step, dtype))


def find_datasets(url: str) -> list[str]:
    """URLs of the data sets at or below a URL: of one data set, of one kind with its splits, or of a whole run.

    Raises:
        UserError: there is no data set.
    """
    url = storage.absolute(url)
    if "commits" in storage.list_folders(url):
        return [url]
    kinds = [kind for kind in ("clips", "tokens", "samples") if kind in storage.list_folders(url)]
    parents = [storage.join(url, kind) for kind in kinds] or [url]
    children = [storage.join(parent, name) for parent in parents for name in storage.list_folders(parent)]
    found = [child for child in children if "commits" in storage.list_folders(child)]
    if not found:
        raise UserError(f"no data set at or below {url}; name the root of a run, or a folder such as ROOT/clips/train")
    return found


def repair(url: str, damaged: dict[str, set[int]], config: RunConfig | None = None) -> None:
    """Restores damaged units of clips from the raw videos, byte for byte.

    Args:
        url: the URL that was verified: the root of a run, its ``clips``, or one of their splits.
        damaged: numbers of the damaged units, by URL of their data set.
        config: config of the run that made the clips; None reads ``config.yaml`` from their folder.

    Raises:
        UserError: the data set does not belong to the config's run, or to no run; or it does not hold clips, and the
            message names the stage that makes it. Damaged clips are restored before this error.
        StageFailed: the videos now yield other bytes for a unit; the message says why. The other units are restored.
    """
    by_root: dict[str, dict[str, set[int]]] = {}
    for dataset_url, units in damaged.items():
        root, kind, split = dataset_url.rsplit("/", 2)
        if kind == "clips":
            by_root.setdefault(root, {})[split] = units
    for root, units_by_split in by_root.items():
        found = _recorded_config(root) if config is None else _with_absolute_urls(config)
        if found.root != root:
            raise UserError(f"{url} does not belong to the run {found.root}; give its own config with --config")
        storage.set_places(found.storage)
        module = STAGES["shard"].module
        with hold(module.folder_url(found), "verify --repair") as lease:
            module.run(found, lease, units_by_split)
    for dataset_url in damaged:
        if dataset_url.rsplit("/", 2)[1] != "clips":
            raise UserError(f"{dataset_url} cannot be repaired from raw videos; {way_back(dataset_url)}")


def way_back(dataset_url: str) -> str:
    """Says how to restore a damaged data set."""
    kind = dataset_url.rsplit("/", 2)[1]
    if kind == "clips":
        return "run `clipmill verify --repair`, or `clipmill shard` with the run's config"
    stage = {"tokens": "`clipmill tokenize`", "samples": "`clipmill sample`"}.get(kind, "its stage")
    return f"remove it and run {stage} again"


def _recorded_config(root: str) -> RunConfig:
    """The config with which the clips of a run were made, with the root where they are now."""
    url = storage.join(root, "clips", "config.yaml")
    try:
        values = yaml.safe_load(storage.read_bytes(url))
        return RunConfig.model_validate({**values, "root": root})
    except FileNotFoundError:
        raise UserError(f"{url} is missing; name the config of the run with --config") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:  # pydantic's are ValueErrors
        raise UserError(f"{url} is damaged; name the config of the run with --config") from error


def _with_absolute_urls(config: RunConfig) -> RunConfig:
    """Makes all paths absolute: workers start in other folders than this process."""
    is_embedded = launch.is_embedded(config.cluster)

    def absolute(key: str, path: str) -> str:
        if not is_embedded and storage.is_local(path) and not os.path.isabs(path):
            raise UserError(
                f"{key} {path} is relative, but the work runs on a Ray cluster; give an absolute path that all "
                "nodes share, or a bucket URL"
            )
        return storage.absolute(path)

    return with_places(config, absolute)


def _with_recorded_clips(stage: Stage, config: RunConfig) -> RunConfig:
    """Takes clip settings from the stage's input, see `clipmill.config.with_recorded_clips`."""
    return with_recorded_clips(config, stage.module.clip_recipes(config)) if stage.reads_clips else config


def _publish_config(config: RunConfig, folder_url: str) -> None:
    text = yaml.safe_dump(_without_credentials(config.model_dump(mode="json")), sort_keys=False)
    storage.publish_bytes(storage.join(folder_url, "config.yaml"), text.encode())


def _without_credentials(value: Any) -> Any:
    """A configuration in which URLs have no credentials."""
    if isinstance(value, dict):
        return {key: _without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    return storage.shown(value) if isinstance(value, str) else value


# --------------------------------------------------------------------------------- placement of training


def _train(name: str, config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Trains under torchrun if it started this process, else on Ray's workers, else in this process."""
    stage = STAGES[name]
    with_ray = config.cluster.training_launcher == "ray" and importlib.util.find_spec("ray") is not None
    if "RANK" in os.environ or not with_ray:
        with _LocalReport(name) as report:
            stage.module.train(config, lease, report, _studio(config))
    else:
        with launch.connect(config.cluster), bar(name, total=None, unit="steps") as progress:
            launch.run_workers(
                _train_in_worker,
                (name, config, lease),
                config=config.cluster,
                name=name,
                on_progress=lambda facts: _show(progress, facts),
                is_usable=lambda num_workers: stage.module.is_usable(config, num_workers),
                count_progress=lambda: stage.module.committed_steps(config),
            )
    return stage.module.summary(config)


def _train_in_worker(payload: tuple[str, RunConfig, Lease], report: Any) -> None:
    """Runs in each worker process that Ray Train started."""
    name, config, lease = payload
    rank = int(os.environ["RANK"])
    if rank == 0:
        logging.getLogger("clipmill").setLevel(logging.INFO)
        logging.getLogger("clipmill").addHandler(_ToDriver(report))
        logging.getLogger("clipmill").propagate = False  # Ray would send each line to the driver a second time
    with storage.disk_errors_explained(config.root):
        STAGES[name].module.train(config, lease if rank == 0 else None, report, _studio(config))


def _studio(config: RunConfig) -> Any:
    """Draws and encodes what a training displays. It is imported on first use, like the stages."""
    return importlib.import_module("clipmill.studio").studio_of(config)


class _ToDriver(logging.Handler):
    """Sends the log of a rank to the driver, which prints and publishes it."""

    def __init__(self, report: Any) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.log(record.levelno, self.format(record))


def _show(progress: bar, facts: dict[str, Any]) -> None:
    for level, text in facts.get("log", ()):
        logger.log(level, "%s", text)
    if "step" not in facts:
        return
    others = {key: value for key, value in facts.items() if key not in ("step", "total")}
    progress.update(facts["step"], total=facts["total"], **others)


class _LocalReport:
    """The report of a training process outside Ray: it shows a bar, and turns signals into stop requests.

    Outside `hold_stops` a signal keeps its previous meaning: the command line ends at once with status 75.
    """

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.stop_requested = self._holds = False
        self._bar = None if quiet else bar(title, total=None, unit="steps")
        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)

    def __enter__(self) -> _LocalReport:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._bar is not None:
            self._bar.__exit__(kind, error, traceback)
        if self.stop_requested and not self._holds and isinstance(error, Exception | None):
            raise Interrupted(STOPPED) from error  # for example a collective failed because peers ended before us

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, self.stop_requested = not self.stop_requested, True
        if not is_first and number == signal.SIGINT:  # a second Ctrl-C ends the process at once
            sys.exit(130)
        before = self._before.get(number)
        if is_first and not self._holds and callable(before):
            before(number, frame)

    @contextlib.contextmanager
    def hold_stops(self) -> Iterator[None]:
        """Inside this context a signal only sets ``stop_requested``; see `clipmill.training.telemetry.Report`."""
        if self.stop_requested:  # interrupted code may have swallowed the exception
            raise Interrupted(STOPPED)
        self._holds = True
        yield
        self._holds = False
        if self.stop_requested:
            raise Interrupted(STOPPED)

    def update(self, facts: dict[str, Any]) -> None:
        """Moves the bar."""
        if self._bar is not None:
            _show(self._bar, facts)
