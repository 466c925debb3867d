"""Decodes more codes than a tokenizer was trained on, in overlapping chunks of time and tiles of a frame.

If the decoder is convolutional along an axis, a pixel depends on a bounded neighbourhood of latents. A piece that
includes this neighbourhood decodes to exactly the pixels of the whole. If every pixel depends on every latent (axial
attention, group norm), pieces have the training length and are cross-faded. Chunks along time are also cross-faded if a
convolutional decoder is not causal: in training, all of its few latent frames were near an end of the clip, so it has
never seen the middle of a long one. Memory does not grow with the number of frames.

B: batch   T, H, W: frames, height, width   L: latents of an axis   t, h, w: latents of a whole clip along each axis
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipmill.models.vqvae import VQVAE, num_frames_of, to_pixels

__all__ = ["Reach", "decode_in_chunks", "decode_to_pixels", "reaches"]

TIME = 0
"""Index of the time axis in (t, h, w), the only one that may be causal."""
CONTEXT_SHARE = 0.5
"""Most latents of context per decoded latent of a convolutional piece; pieces are made long enough for this."""


class Reach(NamedTuple):
    """Number of latents before and after its own latent that a pixel depends on, along one axis."""

    before: int
    after: int


@dataclass(frozen=True)
class Piece:
    """Consecutive latents of an axis, and the pixels to keep of what they decode to.

    Attributes:
        start: first latent.
        stop: one after the last latent.
        first: position of the first kept pixel in the whole.
        skipped: decoded pixels before the first kept one.
        weights: float32 [pixels kept]; the weights of a pixel sum to 1 over all pieces.
    """

    start: int
    stop: int
    first: int
    skipped: int
    weights: Tensor

    @property
    def last(self) -> int:
        """One after the position of the last kept pixel in the whole."""
        return self.first + len(self.weights)

    def keep(self, decoded: Tensor, dim: int) -> Tensor:
        """The kept pixels of decoded [B, 3, T, H, W] along one dimension, weighted."""
        kept = decoded.narrow(dim, self.skipped, len(self.weights))
        shape = [1] * kept.ndim
        shape[dim] = -1
        return kept if bool(self.weights.eq(1).all()) else kept * self.weights.to(kept).view(shape)


def reaches(model: VQVAE) -> list[Reach | None]:
    """The reach along time, height and width; None for an axis on which every pixel depends on every latent.

    It is found by decoding latents of which one is NaN: the pixels that depend on it become NaN.
    """
    decoder = copy.deepcopy(model.decoder).cpu()  # some GPU algorithms spread NaN further
    kernels = [max(m.kernel_size) for m in decoder.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    middle = sum(kernels)  # more than the convolutions can reach
    return [_reach(model, decoder, axis, middle) for axis in range(3)]


@torch.inference_mode()
def _reach(model: VQVAE, decoder: nn.Module, axis: int, middle: int) -> Reach | None:
    shape = [1, model.config.decoder_width, 1, 1, 1]
    shape[2 + axis] = length = 2 * middle + 1
    features = torch.zeros(shape)
    features.select(2 + axis, middle).fill_(torch.nan)
    depends = decoder(features).isnan().movedim(2 + axis, 0).flatten(1).any(1)
    touched = depends.nonzero().flatten()
    if touched[0] == 0 or touched[-1] == len(depends) - 1:
        return None
    ends = [_first_pixel(model, axis, latent + 1) for latent in range(length)]
    nearest, farthest = torch.searchsorted(torch.tensor(ends), touched[[0, -1]], right=True).tolist()
    return Reach(before=farthest - middle, after=middle - nearest)


def _first_pixel(model: VQVAE, axis: int, latent: int) -> int:
    """Position of a latent's first pixel, which is the number of pixels of all latents before it."""
    return num_frames_of(model.config, latent) if axis == TIME else latent * model.config.downsample[axis]


def decode_to_pixels(model: VQVAE, codes: Tensor, trained: Sequence[int]) -> Tensor:
    """The whole video uint8 [B, T, H, W, 3] in host memory; arguments as for `decode_in_chunks`."""
    return torch.cat([to_pixels(frames).cpu() for frames in decode_in_chunks(model, codes, trained)], 1)


@torch.inference_mode()
def decode_in_chunks(model: VQVAE, codes: Tensor, trained: Sequence[int]) -> Iterator[Tensor]:
    """Decodes codes of any length and size, piece by piece along time.

    Codes of at most the trained shape form one piece, decoded as by `VQVAE.decode`.

    Args:
        model: tokenizer in eval mode.
        codes: int64 [B, t, h, w] or [B, t, h, w, M].
        trained: t, h, w of the clips that the tokenizer was trained on.

    Yields:
        The next frames, float [B, 3, n, H, W], on the model's device.
    """
    lengths = list(zip(codes.shape[1:4], trained[:3], strict=True))
    bounds = reaches(model) if any(length > known for length, known in lengths) else [None] * 3
    chunks, rows, columns = (
        _pieces(model, axis, *both, bound) for axis, (both, bound) in enumerate(zip(lengths, bounds, strict=True))
    )
    held = None  # frames that the next chunk is added to
    for chunk, after in zip(chunks, [*chunks[1:], None], strict=True):
        frames = _decode_tiles(model, codes[:, chunk.start : chunk.stop], rows, columns)
        frames = chunk.keep(frames, 2)
        if held is not None:
            frames[:, :, : held.shape[2]] += held
        num_done = frames.shape[2] if after is None else after.first - chunk.first
        yield frames[:, :, :num_done]
        held = frames[:, :, num_done:]


def _decode_tiles(model: VQVAE, codes: Tensor, rows: list[Piece], columns: list[Piece]) -> Tensor:
    """All frames of one chunk, float [B, 3, T, H, W]."""
    if len(rows) == len(columns) == 1:
        return model.decode(codes)
    whole = None
    for row, column in product(rows, columns):
        tile = model.decode(codes[:, :, row.start : row.stop, column.start : column.stop])
        tile = column.keep(row.keep(tile, 3), 4)
        if whole is None:
            whole = tile.new_zeros(*tile.shape[:3], rows[-1].last, columns[-1].last)
        whole.narrow(3, row.first, tile.shape[3]).narrow(4, column.first, tile.shape[4]).add_(tile)
    assert whole is not None
    return whole


def _pieces(model: VQVAE, axis: int, length: int, trained: int, reach: Reach | None) -> list[Piece]:
    """The pieces of an axis with ``length`` latents."""
    if length <= trained:
        return [Piece(0, length, 0, 0, torch.ones(_first_pixel(model, axis, length)))]
    if reach is None or (axis == TIME and not model.config.causal):
        return _faded(model, axis, length, trained)
    return _with_context(model, axis, length, trained, reach)


def _with_context(model: VQVAE, axis: int, length: int, trained: int, reach: Reach) -> list[Piece]:
    """Pieces that include all latents on which their pixels depend."""
    step = max(trained, int(sum(reach) / CONTEXT_SHARE))
    pieces = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        start = max(0, begin - reach.before)
        first, last = _first_pixel(model, axis, begin), _first_pixel(model, axis, end)
        skipped = first - start * model.config.downsample[axis]
        pieces.append(Piece(start, min(length, end + reach.after), first, skipped, torch.ones(last - first)))
    return pieces


def _faded(model: VQVAE, axis: int, length: int, trained: int) -> list[Piece]:
    """Cross-faded pieces of the trained length, which overlap by half; the last one ends at the axis' end."""
    factor = model.config.downsample[axis]
    step = trained - trained // 2
    starts = [*range(0, length - trained, step), length - trained]
    # A causal chunk decodes its first latent to one frame only: the last of the frames that the latent represents.
    firsts = [start * factor for start in starts]
    lasts = [_first_pixel(model, axis, start + trained) for start in starts]
    # At most two pieces may share a pixel, but the last piece can overlap its last two predecessors.
    begins = [0, *(max(first, last) for first, last in zip(firsts[1:], [0, *lasts[:-2]], strict=True))]
    pieces = []
    for number, (start, first, begin, last) in enumerate(zip(starts, firsts, begins, lasts, strict=True)):
        weights = torch.ones(last - begin)
        if number:
            shared = lasts[number - 1] - begin
            weights[:shared] = _ramp(shared)
        if number + 1 < len(starts):
            shared = last - begins[number + 1]
            weights[len(weights) - shared :] = 1 - _ramp(shared)
        pieces.append(Piece(start, start + trained, begin, begin - first, weights))
    return pieces


def _ramp(num_pixels: int) -> Tensor:
    """Weights of the later piece over the shared pixels: a raised cosine, flat at both ends."""
    places = (torch.arange(num_pixels) + 0.5) / num_pixels
    return (places * (math.pi / 2)).sin().square()
