"""Is a data set whole: every shard against its commit record and the manifest, and what belongs to nobody."""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipmill import storage
from clipmill.errors import UserError
from clipmill.scratch import ScratchFolder
from clipmill.shards.format import INDEX_SUFFIX, file_sha256, parse_npy, read_index, read_sample
from clipmill.shards.interop import shard_lists
from clipmill.shards.manifest import Manifest, ShardEntry, committed_shards, committed_units

__all__ = ["VerifyReport", "prune", "verify"]

logger = logging.getLogger(__name__)


@dataclass
class VerifyReport:
    """What `verify` found."""

    problems: list[str] = field(default_factory=list)
    """One line each: object and cause. None: the data set is whole."""
    orphans: list[str] = field(default_factory=list)
    """Names of files that no commit record names: left by killed writers, or being written right now."""
    num_units: int = 0
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0


def verify(url: str, deep: bool) -> VerifyReport:
    """Checks a data set folder: records, manifest, sizes, hashes, indexes, and every sample's place in its tar.

    Args:
        url: the data set's folder, finished or not.
        deep: parse and decode every member of every sample too.

    Raises:
        UserError: a record or the manifest is damaged or of a newer schema.
    """
    units = committed_units(url)
    committed = committed_shards(url, units)
    manifest = _read_manifest(url)
    if not units and manifest is None:
        raise UserError(f"{url} holds no data set; name a folder with commits and tars, such as ROOT/clips/train")
    shards = _named_shards(committed, manifest)
    report = VerifyReport(num_units=len(units), num_shards=len(shards))
    report.orphans = _find_orphans(url, shards)
    report.problems += _check_manifest(url, committed, manifest)
    present = {entry.name: entry.bytes for entry in storage.list_folder(url)}
    for shard in shards:
        report.problems += [f"{shard.name}: {cause}" for cause in _check_shard(url, shard, present, deep)]
        report.num_samples += shard.samples
        report.num_bytes += shard.bytes
    return report


def prune(url: str, orphans: Sequence[str], grace_seconds: float) -> list[str]:
    """Removes orphans that are older than a grace period, and returns their names.

    A file that has found its commit record meanwhile stays, and so does one of unknown age.

    Args:
        url: the data set's folder.
        orphans: from a `VerifyReport`.
        grace_seconds: longer than a writer takes from its first put to its commit record.
    """
    named = _named_shards(committed_shards(url, committed_units(url)), _read_manifest(url))
    still = set(orphans) & set(_find_orphans(url, named))
    oldest = time.time() - grace_seconds
    removed = []
    for entry in storage.walk(url):
        if entry.name in still and entry.modified is not None and entry.modified < oldest:
            storage.remove(storage.join(url, entry.name))
            logger.info("removed %s, which no commit names", storage.join(url, entry.name))
            removed.append(entry.name)
    return removed


def _read_manifest(url: str) -> Manifest | None:
    """The manifest, whatever its kind; None before it is written."""
    try:
        return Manifest.load(url)
    except FileNotFoundError:
        return None


def _named_shards(committed: Sequence[ShardEntry], manifest: Manifest | None) -> list[ShardEntry]:
    """All shards that somebody answers for: a manifest holds its shards even where a commit record was lost."""
    return list(dict.fromkeys([*committed, *(manifest.shards if manifest else ())]))


def _find_orphans(url: str, shards: Sequence[ShardEntry]) -> list[str]:
    named = {shard.name for shard in shards} | {shard.name + INDEX_SUFFIX for shard in shards}
    orphans = []
    for entry in storage.walk(url):
        unfinished = entry.name.rpartition("/")[2].startswith(storage.TEMPORARY_PREFIX)
        if unfinished or (entry.name.endswith((".tar", ".tar" + INDEX_SUFFIX)) and entry.name not in named):
            orphans.append(entry.name)
    return orphans


def _check_manifest(url: str, committed: Sequence[ShardEntry], manifest: Manifest | None) -> list[str]:
    """The manifest against the commit records, which may have got ahead of it, and the lists for other readers."""
    if manifest is None:
        return ["manifest.json: absent; the stage that writes this data set has not finished"]
    known = set(committed)
    problems = [
        f"{shard.name}: no commit record names it as the manifest does"
        for shard in manifest.shards
        if shard not in known
    ]
    for name, content in shard_lists(manifest).items():
        try:
            if storage.read_bytes(storage.join(url, name)) != content:
                problems.append(f"{name}: names other shards than the manifest")
        except FileNotFoundError:
            problems.append(f"{name}: absent")
    return problems


def _check_shard(url: str, shard: ShardEntry, present: dict[str, int], deep: bool) -> list[str]:
    """Causes for which a shard and its index are not what the commit record says."""
    names = [shard.name, shard.name + INDEX_SUFFIX]
    if missing := [f"{name} is missing" for name in names if name not in present]:
        return missing
    if present[shard.name] != shard.bytes:
        return [f"has {present[shard.name]} bytes, committed were {shard.bytes}"]
    with ScratchFolder("verify") as folder:
        path, index_path = (_local_copy(storage.join(url, name), folder) for name in names)
        causes = []
        if file_sha256(path) != shard.sha256:
            causes.append("its sha256 is not the committed one")
        if file_sha256(index_path) != shard.index_sha256:
            causes.append(f"the sha256 of its {INDEX_SUFFIX} is not the committed one")
        return causes or _check_samples(path, index_path, shard.samples, deep)


def _local_copy(url: str, folder: Path) -> Path:
    if storage.is_local(url):
        return storage.local_path(url)
    path = folder / url.rpartition("/")[2]
    storage.fetch(url, path)
    return path


def _check_samples(path: Path, index_path: Path, num_samples: int, deep: bool) -> list[str]:
    """A shard whose hashes are right may still have been written wrong."""
    with path.open("rb") as file:
        shard = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        offsets = read_index(index_path.read_bytes()).tolist()
    except ValueError as error:
        return [str(error)]
    causes = []
    if len(offsets) - 1 != num_samples:
        causes.append(f"its index has {len(offsets) - 1} samples, committed were {num_samples}")
    if shard[offsets[-1] :].tobytes().strip(b"\0"):
        causes.append("it goes on after its last sample")
    for start, end in itertools.pairwise(offsets):
        try:
            key, members = read_sample(shard, start, end)
        except ValueError as error:
            causes.append(str(error))
            continue
        if deep:
            causes += [f"{key}.{member} {cause}" for member, cause in _check_members(members)]
    return causes


def _check_members(members: dict[str, memoryview]) -> list[tuple[str, str]]:
    """The members of a sample that cannot be decoded, each with the cause."""
    from clipmill.video import decode_mjpeg, decode_mp4  # here alone: a check without ``deep`` needs no codecs

    causes = []
    for member, content in members.items():
        try:
            if member == "json":
                json.loads(bytes(content))
            elif member.endswith("npy"):
                parse_npy(content)
            elif member == "mp4":
                decode_mp4(bytes(content))
            elif member == "mkv":
                decode_mjpeg(content)
        except Exception as error:  # decoders raise what they like
            causes.append((member, f"cannot be decoded: {error}"))
    return causes
