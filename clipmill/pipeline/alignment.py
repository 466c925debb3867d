"""Measures the difference of two clips after undoing a crop: a scale and an offset are fitted to their signatures.

The fit follows Lucas and Kanade (1981): a few rounds of least squares on the derivatives of grey values by scale and
offset, first at half resolution, where offsets are small, then at full resolution.

    P: pairs   F: frames   G: cells of a side
"""

from __future__ import annotations

import numpy as np

__all__ = ["difference", "differences_when_aligned"]

_ROUNDS = (2, 1, 1)
"""Number of cells that are averaged along each side, for each round."""
_LARGEST = 0.07
"""Largest offset and change of scale, relative to the picture's side: a crop of 5 %, and a margin for other shapes."""
_USUAL = 0.04
"""Expected standard deviation of offsets and scales. It regularises the fit of pictures with little detail."""
_NOISE = 4.0
"""Changes by coding and resizing, in grey levels of a cell; contrast or movement below this is ignored."""


def difference(ours: np.ndarray, theirs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The larger of two differences. Each is 0 for equal clips, and about 1 for clips with nothing in common.

    The first compares pictures: each clip minus its mean. The second compares movement: each cell minus its mean over
    time. Clips of one camera have similar pictures, but different movement.

    Args:
        ours: float32 [P, F, G, G].
        theirs: of the same shape.
        weight: float32 [P, 1, G, G], weights of the cells.

    Returns:
        float32 [P].
    """
    num_frames, cells = ours.shape[1], weight.sum((1, 2, 3), keepdims=True)

    def relative(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        unlike, contrast = ((np.square(each) * weight).sum((1, 2, 3)) for each in (first - second, first))
        contrast = contrast + (np.square(second) * weight).sum((1, 2, 3))
        return unlike / (contrast + 2 * _NOISE**2 * num_frames * cells[:, 0, 0, 0])

    def less_mean(clips: np.ndarray) -> np.ndarray:
        return clips - (clips * weight).sum((1, 2, 3), keepdims=True) / (num_frames * cells)

    pictures = relative(less_mean(ours), less_mean(theirs))
    movement = relative(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True))
    return np.maximum(pictures, movement)


def differences_when_aligned(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`difference` of clips [P, F, G, G], after the second ones are moved and scaled to fit the first: float32 [P].

    Cells outside one of the two clips are ignored.
    """
    ours, theirs = _smooth(ours), _smooth(theirs)
    fit = np.zeros((len(ours), 3), np.float32)  # offset across, offset down, change of scale
    for joined in _ROUNDS:
        fit += _correction(_joined(ours, joined), _joined(theirs, joined), fit)
        fit = fit.clip(-_LARGEST, _LARGEST)
    return difference(ours, *_moved(theirs, fit))


def _smooth(clips: np.ndarray) -> np.ndarray:
    """Smooths with weights 1, 2, 1 along both sides, so that moving a picture by parts of a cell keeps its detail."""
    for axis in (2, 3):
        padded = np.pad(clips, [(1, 1) if each == axis else (0, 0) for each in range(4)], mode="edge")
        before, here, after = (
            np.take(padded, range(start, start + clips.shape[axis]), axis=axis) for start in (0, 1, 2)
        )
        clips = (before + 2 * here + after) / 4
    return clips


def _joined(clips: np.ndarray, number: int) -> np.ndarray:
    num_clips, num_frames, side, _ = clips.shape
    return clips.reshape(num_clips, num_frames, side // number, number, side // number, number).mean((3, 5))


def _moved(clips: np.ndarray, fit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clips moved and scaled, and a mask of the cells that they then cover: float32 [P, 1, G, G]."""
    across, is_across = _interpolation(fit[:, 0], fit[:, 2], clips.shape[3])
    down, is_down = _interpolation(fit[:, 1], fit[:, 2], clips.shape[2])
    moved = down[:, None] @ clips @ across[:, None].transpose(0, 1, 3, 2)
    return moved, is_down[:, None, :, None] * is_across[:, None, None, :]


def _interpolation(offset: np.ndarray, scale: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation along one side, float32 [P, G, G], and which cells are inside, float32 [P, G]."""
    centres = (np.arange(side) + 0.5) / side
    places = centres + offset[:, None] + scale[:, None] * (centres - 0.5)
    is_inside = (places >= 0) & (places <= 1)
    below = np.floor(places * side - 0.5).clip(0, side - 2).astype(np.int64)
    share = (places * side - 0.5 - below).clip(0, 1)
    matrix = np.zeros((len(offset), side, side), np.float32)
    pair, cell = np.arange(len(offset))[:, None], np.arange(side)[None]
    matrix[pair, cell, below], matrix[pair, cell, below + 1] = 1 - share, share
    return matrix, is_inside.astype(np.float32)


def _correction(ours: np.ndarray, theirs: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """The least-squares correction of the fit, [P, 3]."""
    num_clips, num_frames, side, _ = ours.shape
    moved, weight = _moved(theirs, fit)
    rest = (ours - moved) * weight
    rest = (rest - rest.sum((1, 2, 3), keepdims=True) / (num_frames * weight.sum((1, 2, 3), keepdims=True))) * weight
    down, across = (slope * side * weight for slope in np.gradient((ours + moved) / 2, axis=(2, 3)))
    centres = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
    outward = across * centres[None, :] + down * centres[:, None]
    slopes = np.stack([across, down, outward], axis=1).reshape(num_clips, 3, -1)
    normal = slopes @ slopes.transpose(0, 2, 1)
    normal[:, range(3), range(3)] += num_frames * side**2 * (_NOISE / _USUAL) ** 2
    right = slopes @ rest.reshape(num_clips, -1, 1)
    return np.linalg.solve(normal, right)[..., 0].astype(np.float32)
