"""Writes checkpoints while the training continues.

Every rank stages its files on the local disk. One rank per node then uploads them in the background and writes
``node-k.done`` (names, bytes, SHA-256); rank 0 collects these and writes ``COMMITTED`` (see `checkpoint`). A checkpoint
that cannot be staged or uploaded is removed at once and the training continues, unless that happens three times in a
row.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipmill import storage
from clipmill.errors import ClipmillError, DiskUnusable, StorageUnavailable, UserError
from clipmill.lease import Lease
from clipmill.scratch import private_folder
from clipmill.shards.format import file_sha256
from clipmill.training import checkpoint
from clipmill.training.checkpoint import SCHEMA
from clipmill.training.world import World
from clipmill.training.zero.engine import Engine

__all__ = ["Saver", "staging_folder"]

NODE_WAIT_SECONDS = 1800.0
"""How long rank 0 waits for the slowest node's upload."""
MOST_FAILED_IN_A_ROW = 3
"""A short outage of the storage costs checkpoints, but does not end the training."""

logger = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints of one attempt. Making one is collective.

    Args:
        world: this rank and its peers.
        folder_url: the training folder; uncommitted files of earlier attempts in it are removed.
        attempt: unique name of this group of workers, the same on all ranks.
        lease: claim on the training folder, read again before each commit; only rank 0 needs it.
        facts: JSON facts for every checkpoint, which a resume compares.
        keep_last: see `checkpoint.prune`.
        keep_every: see `checkpoint.prune`.
        on_progress: called on every rank when its own part of the work is done, before it waits for the others.
    """

    def __init__(
        self,
        world: World,
        folder_url: str,
        attempt: str,
        lease: Lease | None,
        facts: dict[str, Any],
        *,
        keep_last: int,
        keep_every: int | None,
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._facts, self._on_progress = facts, on_progress
        self._world, self._folder_url, self._attempt, self._lease = world, folder_url, attempt, lease
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._url: str | None = None
        self._num_failed = 0
        world.from_rank_zero(lambda: checkpoint.remove_leftovers(folder_url, attempt, lease))

    def save(self, engine: Engine, step: int, state: dict[str, Any], *, is_last: bool) -> bool:
        """Stages a checkpoint and starts its upload, after the previous upload has ended. Collective.

        If the checkpoint cannot be staged, or the previous one could not be uploaded, the training continues with a
        warning. The third failure in a row ends it.

        Args:
            engine: the engine to save.
            step: steps done so far.
            state: JSON facts of this step, which a resume restores.
            is_last: the training ends after this checkpoint: wait until it is committed, and raise any error.

        Returns:
            Whether it was staged; its upload may still fail.

        Raises:
            ClipmillError, OSError: too many checkpoints in a row were lost, or this disk can never hold one.
        """
        try:
            self.finish()
        except OSError as error:
            self._lose(error)
        try:
            staging = self._stage(engine)
        except OSError as error:
            if is_last:
                raise
            self._lose(error)
            return False
        self._url = checkpoint.attempt_url(self._folder_url, step, self._attempt)
        if self._world.local_rank == 0:
            arguments = (staging, self._url, step, self._facts | state)
            self._thread = threading.Thread(target=self._publish, args=arguments, name="checkpoint")
            self._thread.start()
        if is_last:
            self.finish()
        return True

    def finish(self) -> None:
        """Waits for the commit of the newest checkpoint. Collective.

        Raises:
            ClipmillError, OSError: it failed, on whichever node; raised on every rank.
        """
        self.join()
        self._on_progress()
        error, self._error = self._error, None
        url, self._url = self._url, None
        try:
            self._world.raise_first(error)
        except Exception:
            if self._world.rank == 0 and url is not None:
                _remove_failed(url)  # again: slower nodes may have uploaded files after rank 0 removed the checkpoint
            raise
        if url is not None:
            self._num_failed = 0

    def join(self) -> None:
        """Waits for this process's upload only; for a rank that ends without its peers."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _lose(self, error: OSError) -> None:
        self._num_failed += 1
        if self._num_failed >= MOST_FAILED_IN_A_ROW:
            raise error
        if self._world.rank == 0:
            logger.warning("a checkpoint is lost: %s; the training goes on to the next one", error)

    def _stage(self, engine: Engine) -> Path:
        """Writes the files of all ranks of this node into its staging folder. Collective.

        Raises:
            DiskUnusable: raised on every rank if any node's disk fails; the staged files are removed.
            UserError: a node's disk is too small even if it were empty.
        """
        world = self._world
        staging = staging_folder(self._folder_url, world.node)
        shares = [0.0] * len(world.nodes)
        shares[world.node] = engine.checkpoint_bytes()
        num_bytes = int(world.sum(shares)[world.node])
        world.raise_first(_make_room(staging, num_bytes) if world.local_rank == 0 else None)
        error = None
        try:
            engine.save(staging, self._on_progress)
        except Exception as problem:
            error = _explained(problem, None, num_bytes, staging)
        try:
            world.raise_first(error)
        except Exception:
            if world.local_rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging

    def _publish(self, staging: Path, url: str, step: int, state: dict[str, Any]) -> None:
        """Uploads this node's files; on rank 0 then commits for all nodes, and prunes."""
        is_first = self._world.rank == 0
        num_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        try:
            _upload(staging, url, self._world.node)
            if is_first:
                _commit(url, step, len(self._world.nodes), self._lease, state)
        except Exception as error:  # reported at the next checkpoint
            self._error = _explained(error, self._folder_url, num_bytes)
            if is_first:
                _remove_failed(url)
        else:
            if is_first:
                self._prune()
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _prune(self) -> None:
        try:
            checkpoint.prune(self._folder_url, self._keep_last, self._keep_every, self._lease)
        except (OSError, ClipmillError) as error:  # pruned next time; a lost lease is noticed at the next commit
            logger.warning("cannot remove old checkpoints of %s: %s", self._folder_url, error)


def staging_folder(folder_url: str, node: int) -> Path:
    """The folder in which the ranks of a node stage files: one path per user, training folder and node.

    Args:
        folder_url: the training folder.
        node: number of this node; nodes may share their temporary folder.
    """
    name = hashlib.sha256(folder_url.encode()).hexdigest()[:16]
    return private_folder() / f"checkpoint-{name}-{node}"


def _make_room(staging: Path, num_bytes: int) -> Exception | None:
    """Empties the staging folder; returns an error if a checkpoint cannot be staged there."""
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a group that was killed while it staged
        staging.mkdir(parents=True)
        disk = shutil.disk_usage(staging)
    except OSError as error:
        return _explained(error, None, num_bytes, staging)
    needed = f"a checkpoint needs {num_bytes / 1e6:,.1f} MB there until it is uploaded"
    if disk.total < num_bytes:
        return UserError(
            f"the disk of {staging} has {disk.total / 1e6:,.1f} MB in all, and {needed}; set TMPDIR to a folder on a "
            "larger disk"
        )
    if disk.free < num_bytes:
        return DiskUnusable(
            f"the disk of {staging} has {disk.free / 1e6:,.1f} MB free, and {needed}; free some, or set TMPDIR to "
            "another folder"
        )
    return None


def _explained(error: Exception, root: str | None, num_bytes: int, staging: Path | None = None) -> Exception:
    """The error, replaced by a one-line error if a disk is the cause.

    Args:
        error: of staging or of an upload.
        root: URL that was uploaded to.
        num_bytes: of this node's files.
        staging: folder that they were staged in.
    """
    if staging is not None and not isinstance(error, OSError) and shutil.disk_usage(staging).free < num_bytes:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging))  # torch raises RuntimeErrors
    line = storage.unusable(error, root) if isinstance(error, OSError) else None
    if line is None:
        return error
    explained = DiskUnusable(f"{line}; a checkpoint needs {num_bytes / 1e6:,.1f} MB")
    explained.__cause__ = error
    return explained


def _upload(staging: Path, url: str, node: int) -> None:
    uploaded: list[str] = []
    try:
        files = []
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            name = path.relative_to(staging).as_posix()
            uploaded.append(storage.join(url, name))
            storage.publish_file(path, uploaded[-1])
            files.append({"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
        storage.publish_document(storage.join(url, f"node-{node}.done"), {"files": files}, SCHEMA)
    except Exception as error:
        logger.warning("cannot upload this node's part of %s: %s", url, error)
        with contextlib.suppress(OSError):
            for file_url in uploaded:
                storage.remove(file_url)
        with contextlib.suppress(OSError):  # tells rank 0 not to wait for this node
            storage.publish_document(storage.join(url, f"node-{node}.failed"), {"cause": str(error)}, SCHEMA)
        raise


def _remove_failed(url: str) -> None:
    try:
        checkpoint.remove(url)
    except (OSError, ClipmillError) as error:  # the next attempt removes the files
        logger.warning("cannot remove %s, which was not uploaded whole: %s", url, error)


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
