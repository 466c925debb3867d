"""Finds near-duplicates: clips of different videos with the same content, even if re-encoded, cropped or trimmed.

Candidates are found frame by frame, so a shift in time does not matter. Frames are projected on their principal
directions and hashed (locality-sensitive hashing with random projections and offsets, M. Datar et al., 2004). Two clips
are a candidate if some of their frames share a hash; the work grows with N log N. Candidates are compared in two steps.
First they are compared coarsely, at each shift in time at which half of their frames overlap. At the best shifts,
`clipmill.pipeline.alignment` then undoes a crop and measures the remaining difference.

    N: clips   F: frames of a signature   P: pairs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.pipeline.alignment import difference, differences_when_aligned
from clipmill.shards.manifest import Manifest
from clipmill.shards.signatures import CELLS, Signatures, read_signatures

__all__ = ["LARGEST_DIFFERENCE", "Pair", "find_pairs", "write_duplicates"]

LARGEST_DIFFERENCE = 0.035
"""Maximum difference of two clips that count as the same (`benchmarks/duplicates.py` measures its effect)."""
_COARSE_CELLS = 8
_LARGEST_COARSE_DIFFERENCE = 0.5
"""Maximum coarse difference of a candidate: a crop of 5 %, before it is undone, stays below this."""
_SHIFTS_ALIGNED = 2
_NOISE = 4.0
"""Changes by coding and resizing, in grey levels of a direction; a contrast below this is ignored."""
_DIRECTIONS = 16
"""Number of principal directions of frames that are hashed."""
_TABLES = 8
_HASH_WIDTH = 1.0
"""Width of a hash's steps, in standard deviations of a direction."""
_MOST_NEIGHBOURS = 32
"""Maximum number of clips with one hash to compare a clip with; otherwise all pairs of still scenes were candidates."""
_BLOCK = 1024
_SEED = 0


class Pair(NamedTuple):
    """Two clips with the same content; the first has the lower number."""

    first: int
    second: int
    difference: float


def write_duplicates(urls: Sequence[str], out: str) -> dict[str, Any]:
    """Finds the near-duplicates of a run and writes all but one of each group, for ``data.exclude``.

    Each group keeps its first validation clip, so that validation clips are not trained on; or else its first clip.

    Args:
        urls: URLs of data sets of tokens, such as both splits.
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
    """For each clip, the first clip of its group (clips that are connected by pairs): int64 [N]."""
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
        grey: signatures uint8 [N, F, 16, 16], see `clipmill.shards.signatures`.
        videos: number of each clip's video, int64 [N].
    """
    num_clips, num_frames = grey.shape[:2]
    halves = (num_clips, num_frames, _COARSE_CELLS, CELLS // _COARSE_CELLS, _COARSE_CELLS, CELLS // _COARSE_CELLS)
    coarse = np.empty((num_clips, num_frames, _COARSE_CELLS, _COARSE_CELLS), np.float32)
    for start in range(0, num_clips, _BLOCK):
        block = grey[start : start + _BLOCK]
        coarse[start : start + _BLOCK] = block.reshape(len(block), *halves[1:]).mean((3, 5), dtype=np.float32)
    pairs = _candidates(coarse)
    pairs = pairs[videos[pairs[:, 0]] != videos[pairs[:, 1]]]
    found: list[Pair] = []
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        best = _differences(grey, coarse, block)
        for index in np.flatnonzero(best <= LARGEST_DIFFERENCE).tolist():
            found.append(Pair(int(block[index, 0]), int(block[index, 1]), float(best[index])))
    return found


def _differences(grey: np.ndarray, coarse: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The difference of the clips of each pair int64 [P, 2], at the best shift in time and aligned: float32 [P]."""
    most = grey.shape[1] // 2
    shifts = range(-most, most + 1)
    rough = np.stack([_rough_differences(coarse, pairs, shift) for shift in shifts])
    best = np.full(len(pairs), np.inf, np.float32)
    is_near = rough.min(axis=0) <= _LARGEST_COARSE_DIFFERENCE
    ranks = np.argsort(np.argsort(rough, axis=0), axis=0)
    for index, shift in enumerate(shifts):
        chosen = np.flatnonzero(is_near & (ranks[index] < _SHIFTS_ALIGNED))
        if len(chosen):
            ours, theirs = _overlap(grey, pairs[chosen], shift)
            best[chosen] = np.minimum(best[chosen], differences_when_aligned(ours, theirs))
    return best


def _overlap(grey: np.ndarray, pairs: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """The overlapping frames of both clips of each pair, if the second begins ``shift`` frames after the first."""
    num_frames = grey.shape[1]
    ours, theirs = slice(max(0, shift), num_frames + min(0, shift)), slice(max(0, -shift), num_frames - max(0, shift))
    return grey[pairs[:, 0], ours].astype(np.float32), grey[pairs[:, 1], theirs].astype(np.float32)


def _rough_differences(coarse: np.ndarray, pairs: np.ndarray, shift: int) -> np.ndarray:
    ours, theirs = _overlap(coarse, pairs, shift)
    everything = np.ones((len(pairs), 1, *coarse.shape[2:]), np.float32)
    return difference(ours, theirs, everything)


def _candidates(coarse: np.ndarray) -> np.ndarray:
    """Distinct pairs of clips that have frames with the same hash: int64 [P, 2], the lower number first."""
    num_clips, num_frames = coarse.shape[:2]
    if num_clips < 2:
        return np.zeros((0, 2), np.int64)
    features = _directions(coarse)
    random = np.random.default_rng(_SEED)
    # Enough steps that clips spread over them, as few as that allows: each one may part a clip from its copy.
    num_hashes = max(2, round(np.log2(num_clips) / 2) - 1)
    found = []
    for _ in range(_TABLES):
        directions = random.normal(size=(features.shape[1], num_hashes))
        directions /= np.linalg.norm(directions, axis=0)
        steps = np.floor(features @ (directions / _HASH_WIDTH) + random.random(num_hashes)).astype(np.int64)
        hashes = steps @ random.integers(1, 2**62, num_hashes)  # modulo 2**64
        clips = np.unique(np.stack([hashes, np.repeat(np.arange(num_clips), num_frames)], axis=1), axis=0)
        # Clips with one hash are in random order; otherwise the neighbours in a large group would be of one video.
        clips = clips[np.lexsort((random.random(len(clips)), clips[:, 0]))]
        for distance in range(1, _MOST_NEIGHBOURS + 1):
            ours, theirs = clips[:-distance], clips[distance:]
            both = np.sort(np.stack([ours[:, 1], theirs[:, 1]], axis=1)[ours[:, 0] == theirs[:, 0]], axis=1)
            found.append(both[:, 0] * num_clips + both[:, 1])
    codes = np.unique(np.concatenate(found))
    return np.stack(np.divmod(codes, num_clips), axis=1)


def _directions(coarse: np.ndarray) -> np.ndarray:
    """Frames projected on their principal directions, in standard deviations: float32 [N * F, directions]."""
    frames = coarse.reshape(-1, _COARSE_CELLS**2)
    frames = frames - frames.mean(axis=1, keepdims=True)
    sample = frames[:: -(-len(frames) // 100_000)]
    variances, directions = np.linalg.eigh(np.cov(sample, rowvar=False))
    scaled = directions[:, -_DIRECTIONS:] / np.sqrt(variances[-_DIRECTIONS:].clip(min=0) + _NOISE**2)
    return (frames - sample.mean(axis=0)) @ scaled.astype(np.float32)
