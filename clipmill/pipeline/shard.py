"""Stage ``shard``: the units of the plan become clip shards under ``clips/train`` and ``clips/val``.

The steps: plan (`plan.py`), fan the units out to workers (`unit.py`), sum up what they commit, and freeze both splits.
Units that an earlier run committed are only counted, so running the stage again recovers from any kill. Bad videos are
listed in ``quarantine.jsonl``; if too many fail, the stage stops.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

from clipmill import storage
from clipmill.board import BOARD
from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig, identity
from clipmill.errors import DamagedDocument, StageFailed
from clipmill.lease import Lease
from clipmill.pipeline.budget import Allowance, allowed_failures
from clipmill.pipeline.plan import GenerationKind, Plan, Unit, load_plan, read_generations
from clipmill.pipeline.planning import extend_plan, make_plan, retry_videos
from clipmill.pipeline.restore import Lost, LostUnit, find_lost, lost_units
from clipmill.pipeline.sources import check_source
from clipmill.pipeline.tally import SEGMENT_UNITS, SplitCounts, Tally, publish_tally, read_tally
from clipmill.pipeline.unit import make_worker
from clipmill.progress import bar
from clipmill.shards.commits import committed_units
from clipmill.shards.freeze import freeze
from clipmill.shards.interop import publish_energon
from clipmill.shards.manifest import SPLITS, Manifest
from clipmill.video import decord_version

__all__ = ["folder_url", "is_finished", "plan_more", "run"]

logger = logging.getLogger(__name__)


def run(config: RunConfig, lease: Lease, damaged: Mapping[str, Collection[int]] | None = None) -> dict[str, Any]:
    """Shards the source of ``config.data`` and freezes both splits; restores units whose objects are lost.

    Args:
        config: config of the run.
        lease: lease on the stage's folder.
        damaged: committed units that `clipmill verify` found damaged, by split; None: no such list. Units that lack an
            object are found in any case.

    Returns:
        Counts for the summary.

    Raises:
        UserError: the source is missing or empty, or ``clips`` was planned with other settings. Nothing was written.
        StageFailed: too many videos failed, no video gave a clip, a unit failed at every attempt, or one cannot be
            restored.
    """
    try:
        plan = load_plan(config)
    except FileNotFoundError:
        plan = make_plan(config, lease)
    damaged = damaged or {}
    tally = read_tally(config, plan, damaged)
    lost = find_lost(config, plan, tally, damaged)
    try:
        _shard_units(config, lease, plan, tally, lost)
    finally:  # the list is most needed after a failure
        if lease.is_newest():  # a run that took over has a newer list
            publish_tally(config, tally)
            if tally.exclusions or len(plan.generations) > 1:  # a retry may have emptied it
                storage.publish_bytes(config.folder("clips", "quarantine.jsonl"), tally.quarantine())
    lease.check()
    return {**_freeze(config, plan, tally), "clips_per_second": tally.total("num_clips") / BOARD.seconds}


def folder_url(config: RunConfig) -> str:
    """The folder that this stage writes to."""
    return config.folder("clips")


def is_finished(config: RunConfig) -> bool:
    """Whether both splits are frozen at the newest generation of the plan, and a listing shows all of their objects.

    Raises:
        UserError: there is no plan and the source is missing or empty; or the plan was made with other settings; or the
            decoder is not installed.
    """
    if _is_frozen(config):
        return True
    if config.data.decoder == "decord":
        decord_version()
    return False


def _is_frozen(config: RunConfig) -> bool:
    """Whether both splits are frozen at the newest generation of the plan."""
    num_generations = len(read_generations(config))
    if not num_generations:
        check_source(config.data.source)
        return False
    try:
        manifests = [Manifest.load(config.folder("clips", split), "clips") for split in SPLITS]
    except FileNotFoundError:
        return False
    except DamagedDocument as error:
        logger.warning("%s: it is rebuilt from the commit records", error)
        return False
    if not all(manifest.facts["num_generations"] == num_generations for manifest in manifests):
        return False
    return not any(_has_lost(manifest) for manifest in manifests)


def _has_lost(manifest: Manifest) -> bool:
    """Whether a record or an object of a frozen split is missing."""
    units = manifest.units()
    lost = lost_units(manifest.url, units) | (units.keys() - set(committed_units(manifest.url)))
    if lost:
        logger.warning("%s lacks objects of %d units: they are rebuilt", manifest.url, len(lost))
    return bool(lost)


def plan_more(config: RunConfig, lease: Lease, kind: GenerationKind) -> bool:
    """Adds a generation to the plan: new videos of the source, or the videos in quarantine.

    If the newest generation is of this kind and unfinished, none is added, so that the same command continues after any
    kill. Older units and their shards stay unchanged.

    Returns:
        Whether there is anything to do now.

    Raises:
        UserError: the source is missing, empty or unreadable; nothing has been written then.
        StageFailed: another run owns the folder, or has planned meanwhile.
    """
    try:
        plan = load_plan(config)
    except FileNotFoundError:
        return True
    newest = len(plan.generations) - 1
    if newest and plan.generations[newest]["kind"] == kind and not is_finished(config):
        logger.info("generation %d is not finished yet: continuing it", newest)
        return True
    if kind == "listed":
        added, nothing = extend_plan(config, lease, plan), "the source holds no video that is not planned yet"
    else:
        ids = {exclusion["id"] for exclusion in read_tally(config, plan).exclusions}
        added, nothing = retry_videos(config, lease, plan, ids), "no video is in quarantine"
    if not added:
        logger.info("%s", nothing)
    return added or not is_finished(config)


# ------------------------------------------------------------------------------------------ the driver


class _Pending(Sequence[Unit]):
    """The pending units. Their videos are read from the plan when a worker is ready for them."""

    def __init__(self, plan: Plan, names: list[tuple[str, int]], lost: Lost) -> None:
        self._plan, self._names, self._lost = plan, names, lost

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return _Pending(self._plan, self._names[index], self._lost)
        unit = self._plan.unit(*self._names[index])
        if self._names[index] not in self._lost:
            return unit
        return LostUnit(unit.split, unit.number, unit.videos, *self._lost[self._names[index]])


class _Recorder:
    """Records what the workers return: counts, quarantined videos and restored units, within the failure budget."""

    def __init__(self, config: RunConfig, lease: Lease, tally: Tally, num_accepted: int, progress: bar) -> None:
        self._config, self._lease, self._tally = config, lease, tally
        self._num_accepted, self._progress = num_accepted, progress
        self.unrestored: list[str] = []
        """One line per unit that could not be restored: unit and cause."""

    def show(self) -> None:
        """Shows the counts so far."""
        tally = self._tally
        self._progress.update(
            tally.total("num_videos"), clips=tally.total("num_clips"), failed=tally.total("num_excluded")
        )

    def __call__(self, unit: Unit, result: dict[str, Any]) -> None:
        """Records the result of one unit (see `clipmill.pipeline.unit`)."""
        if "cause" in result:
            self.unrestored.append(f"unit {unit!r}: {result['cause']}")
            logger.warning("cannot restore unit %r: %s", unit, result["cause"])
            return
        for exclusion in result["exclusions"]:
            logger.warning("excluded %s: %s", exclusion["url"], exclusion["cause"])
            BOARD.count("quarantine", exclusion["cause"])
        if "counts" not in result:
            raise _over_budget(self._config, result["exclusions"], result["tried"])
        if isinstance(unit, LostUnit):
            logger.info("restored unit %r", unit)
        if unit.number not in self._tally.parts[unit.split]:
            self._tally.add(result)
        if len(self._tally.unpublished) >= SEGMENT_UNITS:
            self._lease.check()
            publish_tally(self._config, self._tally)
        self.show()
        _check_budget(self._config, self._tally, self._num_accepted)


def _shard_units(config: RunConfig, lease: Lease, plan: Plan, tally: Tally, lost: Lost) -> None:
    """Processes the units that are not committed yet, within the failure budget, and restores the lost ones."""
    names = [
        (split, number)
        for split in SPLITS
        for number in range(plan.num_units(split))
        if number not in tally.parts[split] or (split, number) in lost
    ]
    num_accepted = _accepted_failures(config, plan)
    _check_budget(config, tally, num_accepted)
    with bar("shard", total=plan.num_videos, unit="videos") as progress:
        recorder = _Recorder(config, lease, tally, num_accepted, progress)
        recorder.show()
        for exclusion in tally.exclusions:  # those of earlier attempts
            BOARD.count("quarantine", exclusion["cause"])
        if names:
            arguments = (config, lease, _allowance(config, plan, tally, num_accepted))
            cluster = config.cluster.model_copy(update={"use_gpu": False})  # decoding does not use GPUs
            fan_out(make_worker, arguments, _Pending(plan, names, lost), config=cluster, on_result=recorder)
    if unrestored := recorder.unrestored:
        raise StageFailed(
            f"{len(unrestored)} of {len(lost)} damaged units of {folder_url(config)} cannot be restored: "
            f"{unrestored[0]}. Restore their objects from a copy, or undo what changed and run the same command again"
        )


def _allowance(config: RunConfig, plan: Plan, tally: Tally, num_accepted: int) -> Allowance:
    """The failures that a worker accepts in one unit."""
    is_new = len(plan.generations) == 1 and tally.total("num_videos") == tally.total("num_excluded")
    return Allowance(max(allowed_failures(config.data, plan.num_videos), num_accepted), is_new)


def _accepted_failures(config: RunConfig, plan: Plan) -> int:
    """Failed videos of the data set when it was last frozen; they were accepted by the budget of that time.

    Trying them again cannot add failures, so these never exceed the budget.
    """
    if len(plan.generations) == 1:
        return 0
    try:
        manifests = [Manifest.load(config.folder("clips", split), "clips") for split in SPLITS]
    except FileNotFoundError:
        return 0
    return sum(manifest.facts["exclusions"] for manifest in manifests)


def _check_budget(config: RunConfig, tally: Tally, num_accepted: int) -> None:
    failed, finished = tally.total("num_excluded"), tally.total("num_videos")
    if failed > max(allowed_failures(config.data, finished), num_accepted):
        raise _over_budget(config, tally.exclusions, finished)


def _over_budget(config: RunConfig, exclusions: list[dict[str, Any]], num_finished: int) -> StageFailed:
    (cause, times), *_ = Counter(exclusion["cause"] for exclusion in exclusions).most_common(1)
    example = next(exclusion["url"] for exclusion in exclusions if exclusion["cause"] == cause)
    return StageFailed(
        f"{len(exclusions)} of the first {num_finished} videos failed, most often ({times}): {cause} (as {example}). "
        "Fix the cause, then run `clipmill shard --retry-quarantined`, which tries them again and keeps all clips; or "
        "allow more with data.max_failed_videos or data.max_failed_share"
    )


def _freeze(config: RunConfig, plan: Plan, tally: Tally) -> dict[str, Any]:
    """Freezes both splits. Returns the summary of the stage."""
    _check_splits(config, tally)
    recipe = {"clip": identity(config.data.clip), "format": config.data.format, "quality": config.data.quality}
    splits: dict[str, dict[str, int]] = {}
    manifests: dict[str, Manifest] = {}
    for split, counts in tally.splits.items():
        manifests[split] = freeze(
            config.folder("clips", split),
            "clips",
            range(plan.num_units(split)),
            recipe,
            _facts(plan, tally, split),
            known=tally.parts[split],
        )
        splits[split] = _summary_of(manifests[split], counts)
    publish_energon(folder_url(config), manifests)
    totals = {name: sum(numbers[name] for numbers in splits.values()) for name in splits["train"]}
    return {
        **totals,
        "duplicates": plan.num_duplicates,
        "other_files": plan.other_files,
        "classes": len(tally.labels),
        "psnr": _psnr(tally.total("squared_error"), tally.total("num_measured_values")),
        "measured_clips": tally.total("num_measured_clips"),
        "splits": splits,
    }


def _check_splits(config: RunConfig, tally: Tally) -> None:
    """Raises `StageFailed` if train has no clip; warns if val has none."""
    if not tally.splits["train"].num_clips:
        counts = tally.splits["train"]
        raise StageFailed(
            f"the split train has no clip: of {counts.num_videos} videos {counts.num_short} are shorter than "
            f"{config.data.clip.span} frames and {counts.num_excluded} failed (see quarantine.jsonl in "
            f"{folder_url(config)}); {counts.num_static} static and {counts.num_black} black clips were rejected; "
            f"{counts.num_filtered} videos violate a bound such as data.clip.min_seconds. "
            "Shorten data.clip.num_frames or lower data.val_fraction, with another root"
        )
    if not tally.splits["val"].num_clips:
        logger.warning("the split val has no clip: add videos or raise data.val_fraction (with another root)")


def _facts(plan: Plan, tally: Tally, split: str) -> dict[str, Any]:
    """The facts of a split's manifest."""
    counts = tally.splits[split]
    pixel_mean, pixel_variance = counts.pixel_moments()
    return {
        "classes": sorted(tally.labels),
        "pixel_mean": pixel_mean,
        "pixel_variance": pixel_variance,
        "num_generations": len(plan.generations),
        "num_units": plan.num_units(split),
        "num_videos": counts.num_videos,
        "num_short": counts.num_short,
        "psnr": _psnr(counts.squared_error, counts.num_measured_values),
        "num_measured_clips": counts.num_measured_clips,
        "num_static_clips": counts.num_static,
        "num_black_clips": counts.num_black,
        "num_truncated": counts.num_truncated,
        "num_filtered": counts.num_filtered,
        "num_damaged_frames": counts.num_damaged_frames,
        "num_joins": counts.num_joins,
        "num_with_actions": counts.num_with_actions,
        "num_duplicates": plan.num_duplicates,
        "exclusions": counts.num_excluded,
        "versions": [json.loads(versions) for versions in sorted(tally.versions)],
    }


def _summary_of(manifest: Manifest, counts: SplitCounts) -> dict[str, int]:
    """The counts of a split in the summary of the stage."""
    return {
        "videos": counts.num_videos,
        "clips": manifest.num_samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "short": counts.num_short,
        "static_clips": counts.num_static,
        "black_clips": counts.num_black,
        "truncated": counts.num_truncated,
        "filtered": counts.num_filtered,
        "damaged_frames": counts.num_damaged_frames,
        "joins": counts.num_joins,
        "with_actions": counts.num_with_actions,
        "failed": counts.num_excluded,
    }


def _psnr(squared_error: int, num_values: int) -> float | None:
    """Peak signal-to-noise ratio in dB, from the mean squared error over all values of the measured clips.

    None if no clip was measured, or the encoding is lossless.
    """
    return 10 * math.log10(255**2 * num_values / squared_error) if squared_error else None
