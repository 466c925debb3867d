"""Verifies a data set: compares every shard with its commit record and the manifest, and finds orphans.

Shards are read completely, from a bucket through a local copy, and several at once, because hashing is bound by disk
and network.
"""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from clipmill import storage
from clipmill.errors import DamagedDocument, UserError
from clipmill.progress import bar
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import ShardEntry, committed_units, read_parts, unit_of
from clipmill.shards.format import INDEX_SUFFIX, file_sha256, parse_npy, read_index, read_sample
from clipmill.shards.interop import shard_lists
from clipmill.shards.manifest import Manifest

__all__ = ["VerifyReport", "find_orphans", "named_shards", "verify"]

SHARDS_AT_ONCE = 8
RECORDS_AT_ONCE = 16
"""Commit records read at once; a bucket answers each request after about 20 ms."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class VerifyReport:
    """The result of `verify`."""

    problems: list[str] = field(default_factory=list)
    """One line per problem: object and cause. Empty if the data set is complete and undamaged."""
    damaged_units: set[int] = field(default_factory=set)
    """Units with a missing or damaged shard, index or commit record."""
    has_damaged_lists: bool = False
    """Whether the manifest of a finished data set, or a shard list, is damaged or missing."""
    orphans: list[str] = field(default_factory=list)
    """Files that no commit record names: left by killed writers, or being written right now."""
    num_units: int = 0
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0

    @property
    def needs_repair(self) -> bool:
        """Whether there is damage that `clipmill.stages.repair` can repair."""
        return bool(self.damaged_units) or self.has_damaged_lists


def verify(url: str, deep: bool) -> VerifyReport:
    """Checks a data set folder: records, manifest, sizes, hashes, indexes, and the position of every sample in its tar.

    Args:
        url: the data set's folder, finished or not.
        deep: also parse and decode every member of every sample.

    Raises:
        UserError: there is no data set, or its manifest has a newer schema.
    """
    units = committed_units(url)
    report = VerifyReport(num_units=len(units))
    manifest = None
    try:
        manifest = Manifest.load(url)
    except FileNotFoundError:
        report.problems.append("manifest.json: absent; the stage that writes this data set has not finished")
        if not units:
            raise UserError(
                f"{url} holds no data set; name a folder with commits and tars, such as ROOT/clips/train"
            ) from None
    except DamagedDocument as error:
        report.problems.append(str(error))
        report.has_damaged_lists = True
    committed = _committed_shards(url, units, report)
    shards = list(dict.fromkeys([*committed, *(manifest.shards if manifest else ())]))
    report.num_shards = len(shards)
    # If a record cannot be read, it is not known which objects belong to its unit, so they are not orphans.
    report.orphans = [name for name in find_orphans(url, shards) if unit_of(name) not in report.damaged_units]
    if manifest is not None:
        _check_manifest(url, committed, manifest, report)
    present = {entry.name: entry.bytes for entry in storage.list_folder(url)}
    with bar("verify", total=len(shards), unit="shards") as progress:
        check = partial(_check_shard, url, present=present, deep=deep)
        for number, (shard, causes) in enumerate(_in_threads(check, shards, SHARDS_AT_ONCE), start=1):
            report.problems += [f"{shard.name}: {cause}" for cause in causes]
            if causes and (unit := unit_of(shard.name)) is not None:
                report.damaged_units.add(unit)
            report.num_samples += shard.samples
            report.num_bytes += shard.bytes
            progress.update(number, problems=len(report.problems))
    return report


def _in_threads(work: Callable[[T], R], items: Sequence[T], at_once: int) -> Iterator[tuple[T, R]]:
    """Yields each item with its result, in order, at most one batch ahead of the consumer."""
    with ThreadPoolExecutor(at_once) as pool:
        for first in range(0, len(items), 16 * at_once):
            batch = items[first : first + 16 * at_once]
            yield from zip(batch, pool.map(work, batch), strict=True)


def named_shards(url: str) -> list[ShardEntry]:
    """All shards that a commit record or the manifest names; the manifest names its shards even if a record was lost.

    Raises:
        UserError: a record or the manifest is damaged or has a newer schema.
    """
    report, units, manifest = VerifyReport(), committed_units(url), _read_manifest(url)
    committed = _committed_shards(url, units, report)
    if report.problems:
        raise UserError(f"{url}: {report.problems[0]}; run `clipmill verify --repair` first")
    return list(dict.fromkeys([*committed, *(manifest.shards if manifest else ())]))


def find_orphans(url: str, shards: Sequence[ShardEntry]) -> list[str]:
    """Files of a data set folder that belong to none of ``shards``."""
    named = {shard.name for shard in shards} | {shard.name + INDEX_SUFFIX for shard in shards}
    orphans = []
    for entry in storage.walk(url):
        unfinished = entry.name.rpartition("/")[2].startswith(storage.TEMPORARY_PREFIX)
        if unfinished or (entry.name.endswith((".tar", ".tar" + INDEX_SUFFIX)) and entry.name not in named):
            orphans.append(entry.name)
    return orphans


def _read_manifest(url: str) -> Manifest | None:
    """The manifest of any kind; None before it is written."""
    try:
        return Manifest.load(url)
    except FileNotFoundError:
        return None


def _committed_shards(url: str, units: Sequence[int], report: VerifyReport) -> list[ShardEntry]:
    """The shards that commit records name. Unreadable records are added to the report."""

    def read(unit: int) -> tuple[ShardEntry, ...] | str:
        try:
            return read_parts(url, unit)
        except UserError as error:
            return str(error)

    shards: list[ShardEntry] = []
    for unit, found in _in_threads(read, units, RECORDS_AT_ONCE):
        if isinstance(found, str):
            report.problems.append(found)
            report.damaged_units.add(unit)
        else:
            shards += found
    return shards


def _check_manifest(url: str, committed: Sequence[ShardEntry], manifest: Manifest, report: VerifyReport) -> None:
    """Compares the manifest with the commit records (there may be newer ones) and with the shard lists."""
    known = set(committed)
    for shard in manifest.shards:
        unit = unit_of(shard.name)
        if shard not in known and unit not in report.damaged_units:
            report.problems.append(f"{shard.name}: no commit record names it as the manifest does")
            if unit is not None:
                report.damaged_units.add(unit)
    for name, content in shard_lists(manifest).items():
        try:
            if storage.read_bytes(storage.join(url, name)) == content:
                continue
            report.problems.append(f"{name}: names other shards than the manifest")
        except FileNotFoundError:
            report.problems.append(f"{name}: absent")
        report.has_damaged_lists = True


def _check_shard(url: str, shard: ShardEntry, *, present: dict[str, int], deep: bool) -> list[str]:
    """The differences of a shard and its index from the commit record, one line each."""
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
    """Checks the samples of a shard: even with the right hash it may have been written wrongly."""
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
        causes.append("it has data after its last sample")
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
    """(member, cause) for each member of a sample that cannot be decoded."""
    from clipmill.video import decode_mjpeg, decode_mp4  # imported here: a check without ``deep`` needs no codecs

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
        except Exception as error:  # decoders may raise anything
            causes.append((member, f"cannot be decoded: {error}"))
    return causes
