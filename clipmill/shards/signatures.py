"""Signatures of clips, by which near-duplicates are found. They are small enough to store for every clip.

A signature is the mean grey of 16 x 16 cells of each frame: 4 KiB for 16 frames. Stage ``tokenize`` computes it from
the pixels that it decodes anyway, and stores those of a unit in ``signatures/000012.npz`` beside its shards. Only the
search for duplicates needs these files.
"""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.commits import read_commits
from clipmill.shards.manifest import Manifest

__all__ = ["CELLS", "Signatures", "publish_signatures", "read_signatures", "signature_of"]

CELLS = 16
"""Number of cells along height and along width."""
MOST_FRAMES = 32
"""Maximum number of frames in a signature. Of a longer clip, every second frame is taken, or every third, and so on."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""
FOLDER = "signatures"


class Signatures(NamedTuple):
    """The signatures of a data set, and the places of its clips."""

    keys: list[str]
    grey: np.ndarray
    """uint8 [N, F, 16, 16]."""
    shards: list[str]
    """For each clip, the name of a shard of clips of its unit; see `clipmill.shards.exclusions`."""
    rows: np.ndarray
    """int64 [N]: row of each clip in its unit."""


def signature_of(video: np.ndarray) -> np.ndarray:
    """The signature uint8 [F, 16, 16] of a clip uint8 [T, H, W, 3]."""
    grey = video[:: -(-len(video) // MOST_FRAMES)] @ _LUMA
    down, across = (_cells(length) for length in video.shape[1:3])
    return (down @ grey @ across.T).round().astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _cells(length: int) -> np.ndarray:
    """float32 [16, length]: the share of each cell that each pixel covers; rows sum to 1."""
    edges = np.linspace(0, length, CELLS + 1)
    starts = np.arange(length)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    covered = overlap.clip(min=0)
    return (covered / covered.sum(axis=1, keepdims=True)).astype(np.float32)


def publish_signatures(url: str, unit: int, keys: Sequence[str], signatures: Sequence[np.ndarray]) -> None:
    """Stores the signatures of a unit's clips, in their order, in the folder of its data set."""
    if keys:
        file = io.BytesIO()
        np.savez_compressed(file, keys=np.array(keys, np.str_), grey=np.stack(signatures))
        storage.publish_bytes(_url_of(url, unit), file.getvalue())


def _url_of(url: str, unit: int) -> str:
    return storage.join(url, FOLDER, f"{unit:06d}.npz")


def read_signatures(tokens: Manifest) -> Signatures:
    """The signatures of all clips of a data set of tokens.

    Raises:
        UserError: the signatures of a unit are missing or damaged.
    """
    keys: list[str] = []
    grey: list[np.ndarray] = []
    shards: list[str] = []
    rows: list[np.ndarray] = []
    counts = {unit: sum(shard.samples for shard in found) for unit, found in tokens.units().items()}
    for record in read_commits(tokens.url, [unit for unit, count in counts.items() if count]):
        found, count = _read_unit(_url_of(tokens.url, record["unit"])), counts[record["unit"]]
        if len(found["keys"]) != count or found["grey"].shape[2:] != (CELLS, CELLS):
            raise UserError(f"{_url_of(tokens.url, record['unit'])} is of other clips; tokenize again in another root")
        keys += found["keys"].tolist()
        grey.append(found["grey"])
        shards += count * record["clips"][:1]
        rows.append(np.arange(count))
    if not keys:
        return Signatures([], np.zeros((0, 1, CELLS, CELLS), np.uint8), [], np.zeros(0, np.int64))
    return Signatures(keys, np.concatenate(grey), shards, np.concatenate(rows))


def _read_unit(url: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("keys", "grey")}
    except FileNotFoundError:
        raise UserError(
            f"{url} is missing: tokens of an older clipmill have no signatures; tokenize again in another root"
        ) from None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{url} is damaged; remove the tokens and run `clipmill tokenize` again") from error
