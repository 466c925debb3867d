"""Checkpoints that are whole or not there, and that hold everything.

``checkpoints/step-00001000/<attempt>/``: every rank stages its files on the local disk, one rank a node
uploads them and writes ``node-k.done`` (names, bytes, SHA-256), rank 0 collects these and writes
``COMMITTED``, which lists exactly the files that belong together beside the training state. Only what a
COMMITTED names is ever fetched, so a cut upload, a stale file of another world size or a second writer
cannot become part of a checkpoint.

The random number generators are not in it: every micro-step seeds them from (seed, step, micro-step, rank).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill import storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.lease import Lease
from clipmill.scratch import private_folder
from clipmill.shards.format import file_sha256
from clipmill.training.world import World
from clipmill.training.zero.engine import Engine

__all__ = ["Checkpoint", "Saver", "fetch", "list_checkpoints", "newest", "prune", "staging_folder"]

SCHEMA = 1
NODE_WAIT_SECONDS = 1800.0
"""How long rank 0 waits for the slowest node's upload."""
MOST_FAILED_UPLOADS = 3
"""In a row: a storage that is away for a while costs checkpoints, not the training."""

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
    """The training state beside the tensors: identity, data set fingerprint, world size, ZeRO stage."""


class Saver:
    """Writes checkpoints while the training goes on: ranks stage together, one a node uploads in the background.

    Args:
        world: this process among its peers.
        folder_url: the training folder.
        attempt: unique name of this group of workers, the same on all ranks.
        lease: claim on the training folder, read again before each commit; only rank 0 needs it.
        keep_last: see `prune`, as the next.
        keep_every: see `prune`.
    """

    def __init__(
        self,
        world: World,
        folder_url: str,
        attempt: str,
        lease: Lease | None,
        *,
        keep_last: int,
        keep_every: int | None,
    ) -> None:
        self._world, self._folder_url, self._attempt, self._lease = world, folder_url, attempt, lease
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._num_failed = 0

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        """Stages a checkpoint and starts its upload. Collective; that of the one before has ended when it returns.

        Where that one could not be uploaded the training goes on, with a warning, but for the third time in a row.

        Args:
            engine: what to save.
            step: steps done so far.
            state: JSON facts that a resume compares or restores.

        Raises:
            ClipmillError, OSError: the checkpoint before could not be committed, and this one would not fare better.
        """
        world = self._world
        try:
            self.finish()
        except OSError as error:
            self._num_failed += 1
            if self._num_failed == MOST_FAILED_UPLOADS:
                raise
            if world.rank == 0:
                logger.warning("the checkpoint before step %d is lost: %s; this one is tried instead", step, error)
        else:
            self._num_failed = 0
        staging = staging_folder(self._folder_url, world.node)
        if world.local_rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # of a group that was killed while it staged
            staging.mkdir(parents=True)
        world.barrier()
        engine.save(staging)
        world.barrier()
        if world.local_rank == 0:
            self._thread = threading.Thread(target=self._publish, args=(staging, step, state), name="checkpoint")
            self._thread.start()

    def finish(self) -> None:
        """Waits for the commit of the newest checkpoint. Collective.

        Raises:
            ClipmillError, OSError: it failed, on whichever node; raised on every rank.
        """
        self.join()
        error, self._error = self._error, None
        self._world.raise_first(error)

    def join(self) -> None:
        """Waits for this process's upload alone: for a rank that ends without its peers."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _publish(self, staging: Path, step: int, state: dict[str, Any]) -> None:
        """Uploads this node's files; on rank 0 then commits for all nodes, and prunes."""
        url = storage.join(self._folder_url, "checkpoints", f"step-{step:08d}", self._attempt)
        try:
            _upload(staging, url, self._world.node)
            if self._world.rank == 0:
                _commit(url, step, len(self._world.nodes), self._lease, state)
                self._prune()
        except Exception as error:  # the training learns of it at its next checkpoint
            self._error = error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _prune(self) -> None:
        try:
            prune(self._folder_url, self._keep_last, self._keep_every, self._lease)
        except OSError as error:  # the next time removes these too
            logger.warning("cannot remove old checkpoints of %s: %s", self._folder_url, error)


def staging_folder(folder_url: str, node: int) -> Path:
    """Where the ranks of a node meet: the same path for all of them, another for each user and training folder.

    Args:
        folder_url: the training folder.
        node: number of this node, for those that share their temporary folder.
    """
    name = hashlib.sha256(folder_url.encode()).hexdigest()[:16]
    return private_folder() / f"checkpoint-{name}-{node}"


def _upload(staging: Path, url: str, node: int) -> None:
    try:
        files = _publish_files(staging, url)
    except Exception as error:
        logger.error("cannot upload this node's part of %s: %s", url, error)
        with contextlib.suppress(OSError):  # rank 0 need not wait for this node
            storage.publish_document(storage.join(url, f"node-{node}.failed"), {"cause": str(error)}, SCHEMA)
        raise
    storage.publish_document(storage.join(url, f"node-{node}.done"), {"files": files}, SCHEMA)


def _publish_files(staging: Path, url: str) -> list[dict[str, Any]]:
    files = []
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        name = path.relative_to(staging).as_posix()
        storage.publish_file(path, storage.join(url, name))
        files.append({"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    return files


def _commit(url: str, step: int, num_nodes: int, lease: Lease | None, state: dict[str, Any]) -> None:
    files: list[dict[str, Any]] = []
    deadline = time.monotonic() + NODE_WAIT_SECONDS
    for node in range(num_nodes):
        node_url = storage.join(url, f"node-{node}.done")
        while not storage.exists(node_url):
            failed_url = storage.join(url, f"node-{node}.failed")
            if storage.exists(failed_url):
                cause = storage.read_document(failed_url, SCHEMA)["cause"]
                raise StorageUnavailable(f"node {node} could not upload its part of {url}: {cause}")
            if time.monotonic() > deadline:
                raise StorageUnavailable(
                    f"node {node} has not uploaded its part of {url} within {NODE_WAIT_SECONDS:.0f} s"
                )
            time.sleep(0.5)
        files += storage.read_document(node_url, SCHEMA)["files"]
    if lease is not None:
        lease.check()
    storage.publish_document(storage.join(url, "COMMITTED"), {"step": step, "files": files, "state": state}, SCHEMA)


def list_checkpoints(folder_url: str) -> list[Checkpoint]:
    """The committed checkpoints of a training folder, oldest first; of one step the newest attempt last."""
    return [found for step_name in _step_names(folder_url) for found in _of_step(folder_url, step_name)]


def newest(folder_url: str) -> Checkpoint | None:
    """The checkpoint to resume from, if there is one."""
    for step_name in reversed(_step_names(folder_url)):  # a record lists all files of all ranks: read no more than one
        if found := _of_step(folder_url, step_name):
            return found[-1]
    return None


def _step_names(folder_url: str) -> list[str]:
    return sorted(storage.list_folders(storage.join(folder_url, "checkpoints")))


def _of_step(folder_url: str, step_name: str) -> list[Checkpoint]:
    found = []
    step_url = storage.join(folder_url, "checkpoints", step_name)
    for attempt in sorted(storage.list_folders(step_url)):
        url = storage.join(step_url, attempt)
        try:
            document = storage.read_document(storage.join(url, "COMMITTED"), SCHEMA)
        except FileNotFoundError:  # its writers were killed, or still are at it
            continue
        found.append(Checkpoint(url, document["step"], tuple(document["files"]), document["state"]))
    return found


def fetch(checkpoint: Checkpoint, folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Brings committed files into a local folder, each verified, and no others.

    Args:
        checkpoint: which.
        folder: the local folder.
        is_wanted: by name; all are without.

    Raises:
        UserError: a file is missing or is not the one that was committed.
    """
    for file in filter(lambda file: is_wanted(file["name"]), checkpoint.files):
        if not _FILE_NAME.fullmatch(file["name"]):
            raise _damaged(checkpoint, repr(file["name"]), "is no name of a file in it")
        path = folder / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.fetch(storage.join(checkpoint.url, file["name"]), path)
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
        keep_last: so many of the newest stay.
        keep_every: those of every so many steps stay too.
        lease: claim on the training folder.
    """
    if lease is not None:
        lease.check()
    found = list_checkpoints(folder_url)
    if not found:
        return
    milestones = [one for one in found if keep_every and one.step % keep_every == 0]
    kept_urls = {one.url for one in [*found[-keep_last:], *milestones]}
    checkpoints_url = storage.join(folder_url, "checkpoints")
    for step_name in storage.list_folders(checkpoints_url):
        if int(step_name.removeprefix("step-")) > found[-1].step:
            continue
        for attempt in storage.list_folders(storage.join(checkpoints_url, step_name)):
            url = storage.join(checkpoints_url, step_name, attempt)
            if url not in kept_urls:
                storage.remove(storage.join(url, "COMMITTED"))  # first: half a checkpoint must not look whole
                storage.remove_tree(url)
        step_url = storage.join(checkpoints_url, step_name)
        if not storage.list_folders(step_url):
            storage.remove_tree(step_url)
