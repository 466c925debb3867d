"""Parts of an evaluation: the results of one measurement on one index range, as arrays in an ``npz`` file.

    evaluation/_parts/MEASURE-KEY/00000064.npz

The key is a hash of everything that determines the part, so no part is measured twice. A killed evaluation continues
where it stopped, and another evaluation of the same clips with the same networks reuses the parts. The folder may be
removed at any time.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill import storage
from clipmill.config import fingerprint
from clipmill.errors import UserError

__all__ = ["Arrays", "Measure", "Part", "Unit"]

Arrays = dict[str, NDArray[Any]]

PARTS_SCHEMA = 3
"""Increase this when a change of the code makes other parts of the same inputs."""


@dataclass(frozen=True)
class Unit:
    """An index range of one measurement."""

    measure: str
    first: int
    stop: int

    @property
    def num_clips(self) -> int:
        """Clips in the range."""
        return self.stop - self.first


class Part:
    """The results on an index range; batches are added in order.

    Attributes:
        rows: arrays with one row per clip.
        sums: arrays that are summed over clips.
        tables: arrays that are not merged here; the code that made them merges them.
    """

    def __init__(self) -> None:
        self.rows: Arrays = {}
        self.sums: Arrays = {}
        self.tables: Arrays = {}
        self._batches: list[Arrays] = []

    def add(self, rows: Arrays, sums: Arrays | None = None) -> None:
        """Adds a batch."""
        self._batches.append(rows)
        for name, values in (sums or {}).items():
            self.sums[name] = self.sums[name] + values if name in self.sums else values

    def content(self) -> bytes:
        """An ``npz`` file."""
        names = self._batches[0] if self._batches else {}
        self.rows = {name: np.concatenate([rows[name] for rows in self._batches]) for name in names}
        arrays = {
            f"{kind}.{name}": values
            for kind, found in (("rows", self.rows), ("sums", self.sums), ("tables", self.tables))
            for name, values in found.items()
        }
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy types allow_pickle among the arrays
        return file.getvalue()

    @classmethod
    def parse(cls, content: bytes) -> Part:
        """Parses the result of `content`."""
        part = cls()
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            for full_name, values in arrays.items():
                kind, _, name = full_name.partition(".")
                getattr(part, kind)[name] = values
        return part


@dataclass(frozen=True)
class Measure:
    """One measurement, over the first ``num_clips`` clips that are read from a data set."""

    name: str
    num_clips: int
    clips_per_unit: int
    url: str
    """Folder of its parts."""

    @classmethod
    def of(cls, root: str, name: str, num_clips: int, clips_per_unit: int, depends_on: Mapping[str, Any]) -> Measure:
        """A measurement whose parts are determined by ``depends_on`` (plain JSON values) and by their ranges."""
        identity = {"schema": PARTS_SCHEMA, "clips": num_clips, "unit": clips_per_unit, **depends_on}
        key = fingerprint({"measure": name, **identity})[:16]
        return cls(name, num_clips, clips_per_unit, storage.join(root, "evaluation", "_parts", f"{name}-{key}"))

    def units(self) -> list[Unit]:
        """All index ranges, in order."""
        firsts = range(0, self.num_clips, self.clips_per_unit)
        return [Unit(self.name, first, min(first + self.clips_per_unit, self.num_clips)) for first in firsts]

    def missing(self) -> list[Unit]:
        """The ranges that have no part yet; costs one listing."""
        found = {entry.name for entry in storage.list_folder(self.url)}
        return [unit for unit in self.units() if _part_name(unit) not in found]

    def has(self, unit: Unit) -> bool:
        """Whether the part of a range exists."""
        return storage.exists(self._part_url(unit))

    def publish(self, unit: Unit, part: Part) -> None:
        """Writes a part. Two workers that measure one range write the same bytes."""
        storage.publish_bytes(self._part_url(unit), part.content())

    def merged(self) -> tuple[Arrays, Arrays, list[Arrays]]:
        """All parts in the order of their ranges: rows concatenated, sums added, tables unchanged.

        Raises:
            UserError: a part is damaged.
        """
        parts = [self._read(unit) for unit in self.units()]
        names = parts[0].rows if parts else {}
        rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in names}
        totals = parts[0].sums if parts else {}
        sums = {name: np.sum([part.sums[name] for part in parts], axis=0) for name in totals}
        return rows, sums, [part.tables for part in parts]

    def _read(self, unit: Unit) -> Part:
        content = storage.read_bytes(self._part_url(unit))
        try:
            return Part.parse(content)
        except (ValueError, KeyError, EOFError, OSError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            url = self._part_url(unit)
            raise UserError(f"{url} is damaged; remove it and run `clipmill evaluate` again") from error

    def _part_url(self, unit: Unit) -> str:
        return storage.join(self.url, _part_name(unit))


def _part_name(unit: Unit) -> str:
    return f"{unit.first:08d}.npz"
