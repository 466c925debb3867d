"""Near-duplicates: clips of different videos that show the same, whatever re-encoded, cropped or trimmed them.

Two clips are compared at every shift of time at which half of their frames overlap. Over the overlap two numbers say how
much they differ, from 0 (the same) to about 1 (nothing in common): of the pictures, cell by cell and each clip less its
mean, and of the movement, each cell less its mean over time. Both must be small at one shift: clips of one camera share
their pictures, but not what moves in them.

Candidates are found frame by frame, so that a shift of time costs nothing: frames are projected on their main directions
and hashed (locality-sensitive hashing with random projections and random offsets, M. Datar et al., 2004). Frames that
share a hash make their clips a candidate. Work grows with N log N.

    N: clips   F: frames of a signature   D: 64 cells of a frame   P: pairs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.manifest import Manifest
from clipmill.shards.signatures import Signatures, read_signatures

__all__ = ["Pair", "differences_of", "find_pairs", "write_duplicates"]

LARGEST_DIFFERENCE = 0.12
"""Of two clips that count as the same (`benchmarks/duplicates.py` measures what follows from it)."""
_PICTURE_WEIGHT = 1.0
"""Of the difference of pictures beside that of movement."""
_NOISE = 2.0
"""Grey levels of a cell that coding and resizing change: less contrast, or less movement, says nothing."""
_DIRECTIONS = 16
"""Main directions of frames that are hashed."""
_TABLES = 8
_CELL = 1.0
"""Width of a hash's cells in deviations of a direction."""
_MOST_NEIGHBOURS = 32
"""Clips of one hash that a clip is compared with: scenes that stand still would make every pair a candidate."""
_BLOCK = 2048
_SEED = 0


class Pair(NamedTuple):
    """Two clips that show the same; the first has the lower number."""

    first: int
    second: int
    difference: float


def write_duplicates(urls: Sequence[str], out: str) -> dict[str, Any]:
    """Finds the near-duplicates of a run and writes all but one of each group, for ``data.exclude``.

    Of a group, the first validation clip stays, so that nothing is judged on what was trained on; else the first one.

    Args:
        urls: of the data sets of tokens, such as those of both splits.
        out: URL of the file, see `clipmill.shards.exclusions`.

    Returns:
        ``clips``, ``pairs``, ``groups`` and ``excluded`` as counts, ``file``.

    Raises:
        UserError: there are no tokens, or they have no signatures.
    """
    if not urls:
        raise UserError("near-duplicates are found by the signatures of tokens; run `clipmill tokenize`, name its run")
    judging_first = sorted(urls, key=lambda url: not url.endswith("/val"))
    sets = [read_signatures(Manifest.require(url, "tokens")) for url in judging_first]
    found = Signatures(
        [key for one in sets for key in one.keys],
        np.concatenate([one.grey for one in sets]),
        [shard for one in sets for shard in one.shards],
        np.concatenate([one.rows for one in sets]),
    )
    _, videos = np.unique([key.partition("_")[0] for key in found.keys], return_inverse=True)
    pairs = find_pairs(found.grey, videos)
    kept = _first_of_groups(len(found.keys), pairs)
    nearest: dict[int, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: -pair.difference):
        nearest[pair.first] = nearest[pair.second] = pair
    lines = []
    for number in np.flatnonzero(kept != np.arange(len(kept))).tolist():
        pair = nearest[number]
        like = found.keys[pair.first + pair.second - number]
        place = {"key": found.keys[number], "shard": found.shards[number], "row": int(found.rows[number])}
        about = {"like": like, "difference": round(pair.difference, 4), "kept": found.keys[int(kept[number])]}
        lines.append(json.dumps(place | about))
    storage.publish_bytes(out, "".join(f"{line}\n" for line in lines).encode())
    num_groups = len(np.unique(kept[kept != np.arange(len(kept))]))
    return {"clips": len(kept), "pairs": len(pairs), "groups": num_groups, "excluded": len(lines), "file": out}


def _first_of_groups(num_clips: int, pairs: Sequence[Pair]) -> np.ndarray:
    """The first clip of the group that each clip is in, by way of pairs: int64 [N]."""
    first = np.arange(num_clips)
    ends = np.array([(pair.first, pair.second) for pair in pairs], np.int64).reshape(-1, 2)
    while True:
        lowest = first[ends].min(axis=1)
        before = first.copy()
        for side in (0, 1):
            np.minimum.at(first, ends[:, side], lowest)
        first = first[first]
        if np.array_equal(first, before):
            return first


def find_pairs(grey: np.ndarray, videos: np.ndarray) -> list[Pair]:
    """Near-duplicates among clips of different videos.

    Args:
        grey: signatures uint8 [N, F, 8, 8], see `clipmill.shards.signatures`.
        videos: number of each clip's video, int64 [N].
    """
    pairs = _candidates(grey)
    pairs = pairs[videos[pairs[:, 0]] != videos[pairs[:, 1]]]
    differences = np.concatenate(
        [differences_of(grey, pairs[start : start + _BLOCK]) for start in range(0, len(pairs), _BLOCK)]
        or [np.zeros(0, np.float32)]
    )
    found = np.flatnonzero(differences <= LARGEST_DIFFERENCE)
    return [Pair(*pairs[index].tolist(), float(differences[index])) for index in found]


def differences_of(grey: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """How much the clips of each pair int64 [P, 2] differ at the best shift of time: float32 [P]."""
    first, second = (grey[pairs[:, side]].reshape(len(pairs), grey.shape[1], -1).astype(np.float32) for side in (0, 1))
    best = np.full(len(pairs), np.inf, np.float32)
    num_frames = grey.shape[1]
    for shift in range(-(num_frames // 2), num_frames // 2 + 1):
        ours = first[:, max(0, shift) : num_frames + min(0, shift)]
        theirs = second[:, max(0, -shift) : num_frames - max(0, shift)]
        pictures = _difference(ours - ours.mean((1, 2), keepdims=True), theirs - theirs.mean((1, 2), keepdims=True))
        movement = _difference(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True))
        best = np.minimum(best, np.maximum(_PICTURE_WEIGHT * pictures, movement))
    return best


def _difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Squared difference over squared contrast, [P], of values [P, F, D] with a mean of zero."""
    contrast = np.square(ours).mean((1, 2)) + np.square(theirs).mean((1, 2))
    return np.square(ours - theirs).mean((1, 2)) / (contrast + 2 * _NOISE**2)


def _candidates(grey: np.ndarray) -> np.ndarray:
    """Pairs of clips of which some frames share a hash: int64 [P, 2], the lower number first, each once."""
    num_clips, num_frames = grey.shape[:2]
    if num_clips < 2:
        return np.zeros((0, 2), np.int64)
    features = _directions(grey)
    random = np.random.default_rng(_SEED)
    # Enough cells that clips spread over them, as few as that allows: each one may part a clip from its copy.
    num_hashes = max(4, round(np.log2(num_clips) / 2) + 1)
    found = []
    for _ in range(_TABLES):
        directions = random.normal(size=(features.shape[1], num_hashes))
        directions /= np.linalg.norm(directions, axis=0)
        cells = np.floor(features @ (directions / _CELL) + random.random(num_hashes)).astype(np.int64)
        hashes = cells @ random.integers(1, 2**62, num_hashes)  # modulo 2**64
        clips = np.unique(np.stack([hashes, np.repeat(np.arange(num_clips), num_frames)], axis=1), axis=0)
        for distance in range(1, _MOST_NEIGHBOURS + 1):
            same = clips[distance:, 0] == clips[:-distance, 0]
            if not same.any():
                break
            found.append(clips[:-distance, 1][same] * num_clips + clips[distance:, 1][same])
    codes = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    return np.stack(np.divmod(codes, num_clips), axis=1)


def _directions(grey: np.ndarray) -> np.ndarray:
    """Frames along their main directions, in deviations: float32 [N * F, directions]."""
    frames = grey.reshape(-1, grey.shape[2] * grey.shape[3])
    sample = frames[:: -(-len(frames) // 100_000)].astype(np.float32)
    sample -= sample.mean(axis=1, keepdims=True)
    variances, directions = np.linalg.eigh(np.cov(sample, rowvar=False))
    scaled = directions[:, -_DIRECTIONS:] / np.sqrt(variances[-_DIRECTIONS:].clip(min=0) + _NOISE**2)
    centred = frames.astype(np.float32) - frames.mean(axis=1, keepdims=True, dtype=np.float32)
    return (centred - sample.mean(axis=0)) @ scaled.astype(np.float32)
