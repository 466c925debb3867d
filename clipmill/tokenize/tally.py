"""Totals over the committed token units of a split, stored so that a resume need not read every commit record.

A unit's commit record counts every code, which takes 33 to 97 KB (packed) at 65,536 codes. The driver therefore stores
the sums of 1,000 units at a time in segments, ``tokens/train/tally/000001.json``, each created once. A resume lists the
commit records, reads the segments, and reads only the records that no segment covers. Freezing reads no records.

A segment that contains a unit without a commit record is invalid: it is removed, and its records are read again.
"""

from __future__ import annotations

import base64
import logging
import re
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from clipmill import storage
from clipmill.errors import DamagedDocument
from clipmill.models.quantizers import codebook_metrics
from clipmill.shards.commits import ShardEntry

__all__ = ["SEGMENT_UNITS", "Tally", "pack_counts", "unpack_counts"]

SCHEMA = 1
SEGMENT_UNITS = 1000
FOLDER = "tally"
UNIT_FACTS = ("unit", "parts", "clips", "num_clips", "fields", "versions", "tokenizer", "precision", "condition_frames")
"""Fields of a commit record that a segment stores."""
_SEGMENT = re.compile(r"(\d{6,9})\.json")

logger = logging.getLogger(__name__)


def pack_counts(counts: np.ndarray) -> str:
    """Packs counts, int64 [M * K], as text for a JSON document. Grouping bytes of equal significance halves the
    size.
    """
    planes = counts.astype("<i8").view(np.uint8).reshape(-1, 8).T
    return base64.b64encode(zlib.compress(planes.tobytes())).decode()


def unpack_counts(text: str) -> np.ndarray:
    """Unpacks counts that `pack_counts` has packed.

    Raises:
        ValueError: the text is not packed counts.
    """
    try:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), np.uint8).reshape(8, -1)
    except (zlib.error, TypeError, ValueError) as error:
        raise ValueError(f"packed counts are damaged: {error}") from error
    return np.ascontiguousarray(planes.T).view("<i8").reshape(-1).astype(np.int64)


class Tally:
    """Totals over the finished units of a split.

    Attributes:
        num_clips: number of encoded clips.
        code_counts: int64 [M * K], how often each of the K codes of each of the M codebooks occurs.
        versions: versions of the software that encoded them, without duplicates.
        fields: for each member besides codes (actions, frames, text), the number of clips with it, and its shapes.
        parts: the shards of each unit, by the unit's number.
        num_unpublished: number of units that no segment contains yet.
    """

    def __init__(self, url: str, num_codes: int, num_codebooks: int) -> None:
        self.num_clips = self.num_unpublished = 0
        self.num_codebooks = num_codebooks
        self.code_counts = np.zeros(num_codebooks * num_codes, np.int64)
        self.versions: list[dict[str, Any]] = []
        self.fields: dict[str, dict[str, Any]] = {}
        self.parts: dict[int, tuple[ShardEntry, ...]] = {}
        self._url = storage.join(url, FOLDER)
        self._num_segments = 0
        self._begin_segment()

    def _begin_segment(self) -> None:
        self._segment_units: list[dict[str, Any]] = []
        self._segment_counts = np.zeros_like(self.code_counts)
        self.num_unpublished = 0

    def add(self, record: dict[str, Any]) -> None:
        """Adds one unit's commit record."""
        packed = record["code_counts"]
        # Old records store counts as a list, and have no precision because it was always float32.
        counts = np.array(packed, np.int64) if isinstance(packed, list) else unpack_counts(packed)
        facts = {name: record.get(name, "float32") if name == "precision" else record[name] for name in UNIT_FACTS}
        self._add_unit(facts)
        self.code_counts += counts
        self._segment_units.append(facts)
        self._segment_counts += counts
        self.num_unpublished += 1

    def _add_unit(self, facts: dict[str, Any]) -> None:
        self.num_clips += facts["num_clips"]
        self.parts[facts["unit"]] = tuple(map(ShardEntry.parse, facts["parts"]))
        if facts["versions"] not in self.versions:
            self.versions.append(facts["versions"])
        for name, found in facts["fields"].items():
            known = self.fields.setdefault(name, {"clips": 0, "shapes": []})
            known["clips"] += found["clips"]
            known["shapes"] = sorted([*known["shapes"], *(s for s in found["shapes"] if s not in known["shapes"])])

    def publish(self) -> None:
        """Stores the units that no segment contains yet in a new segment. The caller holds the lease."""
        if not self._segment_units:
            return
        body = {"units": self._segment_units, "code_counts": pack_counts(self._segment_counts)}
        number = self._num_segments + 1
        while not storage.create_document(storage.join(self._url, f"{number:06d}.json"), body, SCHEMA):
            number += 1  # a run that lost its lease has created this one
        self._num_segments = number
        self._begin_segment()

    def read_segments(self, committed: Collection[int]) -> list[dict[str, Any]]:
        """Adds the segments of earlier runs; returns the facts of their units. The caller holds the lease.

        Args:
            committed: numbers of the units that have commit records.
        """
        units: list[dict[str, Any]] = []
        for entry in storage.list_folder(self._url):
            if (name := _SEGMENT.fullmatch(entry.name)) is None:
                continue
            self._num_segments = max(self._num_segments, int(name[1]))
            url = storage.join(self._url, entry.name)
            found = self._read_segment(url)
            if found is None or not all(facts["unit"] in committed for facts in found[0]):
                logger.warning("%s does not match the commit records; removed it, reading the records again", url)
                storage.remove(url)
            elif not any(facts["unit"] in self.parts for facts in found[0]):
                for facts in found[0]:
                    self._add_unit(facts)
                self.code_counts += found[1]
                units += found[0]
        return units

    def _read_segment(self, url: str) -> tuple[list[dict[str, Any]], np.ndarray] | None:
        """The units of a segment and their counts; None if it is damaged."""
        try:
            document = storage.read_document(url, SCHEMA)
            counts = unpack_counts(document["code_counts"])
            for facts in document["units"]:
                tuple(map(ShardEntry.parse, facts["parts"]))
            if counts.shape != self.code_counts.shape or any(
                facts.keys() != set(UNIT_FACTS) for facts in document["units"]
            ):
                return None
        except (DamagedDocument, KeyError, TypeError, ValueError, AttributeError):
            return None
        return document["units"], counts

    @property
    def perplexity(self) -> float:
        """See `codebook_metrics`."""
        counts = torch.from_numpy(self.code_counts).double()
        return codebook_metrics(counts, self.num_codebooks)["codebook_perplexity"].item()
