"""The rows of a listing in scratch files, and the splits that the source gives to some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import storage
from clipmill.errors import UserError
from clipmill.pipeline.plan import SOURCE_COLUMNS
from clipmill.pipeline.planning.listing import HASH_COLUMNS, NO_SPLIT
from clipmill.pipeline.planning.moved import file_column
from clipmill.pipeline.planning.spool import Spool
from clipmill.shards.manifest import SPLITS

__all__ = ["GivenSplits", "ListedVideos"]

_SPLIT_BIT = np.uint64(1)


@dataclass(frozen=True)
class GivenSplits:
    """The origins to which the source gives a split, in 8 bytes per origin.

    Attributes:
        keys: uint64[n], sorted hashes of origins; the last bit is replaced by the split (index in `SPLITS`).
    """

    keys: np.ndarray

    def apply(self, origins: np.ndarray, is_val: np.ndarray) -> np.ndarray:
        """bool[n]: ``is_val``, replaced by the given split for origins that have one."""
        if not len(self.keys):
            return is_val
        places = np.searchsorted(self.keys, origins & ~_SPLIT_BIT).clip(max=len(self.keys) - 1)
        keys = self.keys[places]
        return np.where((keys ^ origins) <= 1, (keys & _SPLIT_BIT).astype(bool), is_val)


class ListedVideos:
    """Collects the videos of a listing, and returns them in the order of the plan, range by range."""

    def __init__(self, folder: Path) -> None:
        """Keeps rows in ``folder``."""
        self._rows = Spool(folder, "place")
        self._given = [np.empty(0, np.uint64)]

    def add(self, table: pa.Table) -> None:
        """Adds rows of `LISTED_COLUMNS` and `HASH_COLUMNS`."""
        given = table["given"].to_numpy()
        if (given != NO_SPLIT).any():
            origins = table["origin"].to_numpy()[given != NO_SPLIT]
            self._given.append(np.unique(origins & ~_SPLIT_BIT | given[given != NO_SPLIT].astype(np.uint64)))
        files = file_column(table)
        self._rows.add(table.select([*SOURCE_COLUMNS, "given", *HASH_COLUMNS]).append_column("file", files))

    def ranges(self) -> Iterator[pa.Table]:
        """Yields tables of source columns, ``file``, ``given`` and `HASH_COLUMNS`, with ascending places.

        Rows of equal place are in the same table; rows of equal identity keep the order of the listing.
        """
        return self._rows.ranges()

    def given_splits(self) -> GivenSplits:
        """The splits that the source gives to origins.

        Raises:
            UserError: the source gives videos of one origin different splits.
        """
        keys = np.unique(np.concatenate(self._given))
        in_two = keys[1:][(keys[1:] ^ keys[:-1]) == 1]
        if len(in_two):
            raise self._conflict(int(in_two[0]), len(in_two))
        return GivenSplits(keys)

    def _conflict(self, key: int, num_origins: int) -> UserError:
        urls: dict[int, str] = {}
        for table in self.ranges():
            rows = table.filter(pa.array((table["origin"].to_numpy() ^ np.uint64(key)) <= 1))
            rows = rows.filter(pc.not_equal(rows["given"], NO_SPLIT))
            for url, given in zip(rows["url"].to_pylist(), rows["given"].to_pylist(), strict=True):
                urls.setdefault(given, url)
        (first_split, first), (second_split, second) = sorted(urls.items())
        return UserError(
            f"{storage.shown(first)} and {storage.shown(second)} belong to one group, but the source puts the first "
            f"into {SPLITS[first_split]} and the second into {SPLITS[second_split]} ({num_origins} such groups); "
            "give each group one split"
        )
