"""Checkpoints: committed atomically, and complete.

``checkpoints/step-00001000/<attempt>/`` holds the files that `clipmill.training.saver` uploaded, and ``COMMITTED``.
COMMITTED holds the training state and lists exactly the files that belong together. Only these files are ever read, so
a partial upload, a stale file of another world size or a second writer cannot become part of a checkpoint. Folders with
other names belong to the user: they are neither resumed from nor removed.

Random number generators need no state: every micro-step seeds them from (seed, step, micro-step, rank).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill import storage
from clipmill.errors import DamagedDocument, UserError
from clipmill.lease import Lease
from clipmill.metrics import ATTEMPT
from clipmill.shards.format import file_sha256

__all__ = [
    "SCHEMA",
    "Checkpoint",
    "attempt_url",
    "fetch",
    "list_checkpoints",
    "newest",
    "newest_step",
    "prune",
    "remove",
    "remove_leftovers",
]

SCHEMA = 1

_STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
_FILE_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
"""No path in a record leaves the folder of its checkpoint."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    url: str
    """Folder of the attempt that wrote it."""
    step: int
    files: tuple[dict[str, Any], ...]
    """``{"name", "bytes", "sha256"}`` of each file, names relative to ``url``."""
    state: dict[str, Any]
    """The training state besides the tensors: identity, data set fingerprint, world size, ZeRO stage."""

    @property
    def is_good(self) -> bool:
        """Whether its probe loss is finite; older versions of clipmill also saved weights that are not finite."""
        loss = self.state.get("probe_loss")
        return loss is None or math.isfinite(loss)


def attempt_url(folder_url: str, step: int, attempt: str) -> str:
    """Where an attempt writes its checkpoint of a step."""
    return storage.join(folder_url, "checkpoints", f"step-{step:08d}", attempt)


def list_checkpoints(folder_url: str) -> list[Checkpoint]:
    """The good checkpoints of a training folder, oldest first; within a step, the newest attempt comes last.

    Raises:
        UserError: a COMMITTED is damaged.
    """
    return [found for step in _steps(folder_url) for found in _of_step(folder_url, step)]


def newest(folder_url: str) -> Checkpoint | None:
    """The good checkpoint to resume from, if there is one.

    Raises:
        UserError: the COMMITTED of a newer one is damaged.
    """
    for step in reversed(_steps(folder_url)):  # records are large (all files of all ranks): read only one
        if found := _of_step(folder_url, step):
            return found[-1]
    return None


def newest_step(folder_url: str) -> int:
    """Number of steps of the newest checkpoint; 0 before the first checkpoint."""
    found = newest(folder_url)
    return 0 if found is None else found.step


def _steps(folder_url: str) -> list[int]:
    """Steps that have a folder, in order."""
    names = storage.list_folders(storage.join(folder_url, "checkpoints"))
    return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))


def _attempt_urls(folder_url: str, step: int) -> list[str]:
    """Folders of the attempts at a step, the oldest first."""
    step_url = storage.join(folder_url, "checkpoints", f"step-{step:08d}")
    names = [name for name in storage.list_folders(step_url) if ATTEMPT.fullmatch(name)]
    return [storage.join(step_url, name) for name in sorted(names)]


def _of_step(folder_url: str, step: int) -> list[Checkpoint]:
    found = [_read(url) for url in _attempt_urls(folder_url, step)]
    # A record that names another step is a copy under a wrong name.
    return [one for one in found if one is not None and one.step == step and one.is_good]


def _read(url: str) -> Checkpoint | None:
    """The checkpoint of an attempt's folder; None if its writers were killed or are still at work."""
    record_url = storage.join(url, "COMMITTED")
    try:
        document = storage.read_document(record_url, SCHEMA)
        return Checkpoint(url, document["step"], tuple(document["files"]), document["state"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise DamagedDocument(
            f"{record_url} is damaged or was not written by clipmill; restore or remove it"
        ) from error


def fetch(checkpoint: Checkpoint, folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copies exactly the committed files into a local folder and verifies each. Files on a local disk become links.

    Args:
        checkpoint: the checkpoint.
        folder: the local folder; its files must only be read.
        is_wanted: chooses files by name; all by default.

    Raises:
        UserError: a file is missing or is not the one that was committed.
    """
    for file in filter(lambda file: is_wanted(file["name"]), checkpoint.files):
        if not _FILE_NAME.fullmatch(file["name"]):
            raise _damaged(checkpoint, repr(file["name"]), "is no name of a file in it")
        path, url = folder / file["name"], storage.join(checkpoint.url, file["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if storage.is_local(url):
                path.symlink_to(storage.local_path(url).resolve(strict=True))
            else:
                storage.fetch(url, path)
        except FileNotFoundError as error:
            raise _damaged(checkpoint, file["name"], "is missing") from error
        if path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
            raise _damaged(checkpoint, file["name"], "has another content than was committed")


def _damaged(checkpoint: Checkpoint, name: str, what: str) -> UserError:
    return UserError(
        f"{name} of checkpoint {checkpoint.url} {what}; remove {checkpoint.url}/COMMITTED to resume from an earlier one"
    )


def prune(folder_url: str, keep_last: int, keep_every: int | None, lease: Lease | None) -> None:
    """Removes checkpoints that need not be kept, and the uncommitted leftovers of steps before the newest.

    Args:
        folder_url: the training folder.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep those at multiples of this number of steps; None keeps no others.
        lease: claim on the training folder.
    """
    if lease is not None:
        lease.check()
    try:
        found = list_checkpoints(folder_url)
    except DamagedDocument as error:  # only a resume needs the user to decide; this run can continue
        logger.warning("no checkpoint is removed: %s", error)
        return
    if not found:
        return
    milestones = [one for one in found if keep_every and one.step % keep_every == 0]
    kept_urls = {one.url for one in [*found[-keep_last:], *milestones]}
    for step in _steps(folder_url):
        if step <= found[-1].step:
            for url in _attempt_urls(folder_url, step):
                if url not in kept_urls and _names_step(url, step):
                    remove(url)


def _names_step(url: str, step: int) -> bool:
    """Whether an attempt's folder belongs to this step. A copy under the name of another step belongs to the user."""
    found = _read(url)
    return found is None or found.step == step


def remove_leftovers(folder_url: str, attempt: str, lease: Lease | None) -> None:
    """Removes files that earlier attempts uploaded but did not commit: they were killed, or lost the lease.

    Args:
        folder_url: the training folder.
        attempt: name of this attempt.
        lease: claim on the training folder.
    """
    if lease is not None:
        lease.check()
    for step in _steps(folder_url):
        for url in _attempt_urls(folder_url, step):
            if url.rpartition("/")[2] < attempt and not storage.exists(storage.join(url, "COMMITTED")):
                remove(url)


def remove(url: str) -> None:
    """Removes a checkpoint, and the folder of its step if nothing else is in it."""
    storage.remove(storage.join(url, "COMMITTED"))  # first: half a checkpoint must not look whole
    storage.remove_tree(url)
    step_url = url.rpartition("/")[0]
    if not storage.list_folders(step_url) and not storage.list_folder(step_url):
        storage.remove_tree(step_url)
