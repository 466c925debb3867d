"""Checks and converts arrays that users pass in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill.errors import UserError

__all__ = ["as_codes", "as_videos", "described"]

Array = np.ndarray | Tensor


def described(array: Any) -> str:
    """Describes the dtype and shape of an array, for error messages."""
    if isinstance(array, np.ndarray | Tensor):
        return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"
    return f"a {type(array).__name__}"


def as_videos(video: Array, name: str = "video") -> tuple[Tensor, bool]:
    """Converts to uint8 [B, T, H, W, 3] on the CPU; also returns whether the input was one video without the axis B.

    Raises:
        UserError: the array has another dtype or shape.
    """
    if not isinstance(video, np.ndarray | Tensor) or video.ndim not in (4, 5) or video.shape[-1] != 3:
        raise UserError(f"{name} must be uint8 [T, H, W, 3] or [B, T, H, W, 3], not {described(video)}")
    tensor = torch.from_numpy(np.ascontiguousarray(video)) if isinstance(video, np.ndarray) else video.detach().cpu()
    if tensor.dtype != torch.uint8:
        raise UserError(
            f"{name} must be uint8, not {described(video)}; scale pixels to 0 .. 255, round them, and convert"
        )
    if not all(tensor.shape):
        raise UserError(f"{name} is empty: {described(video)}")
    return (tensor[None], True) if tensor.ndim == 4 else (tensor, False)


def as_codes(codes: Array, frame_shape: tuple[int, ...], num_codes: int) -> tuple[Tensor, bool]:
    """Converts to int64 [B, t, h, w] or [B, t, h, w, M] on the CPU; also returns whether the input lacked the axis B.

    Args:
        codes: integers.
        frame_shape: (h, w) or (h, w, M) of the tokenizer; h and w of the codes may differ from it.
        num_codes: K; codes are 0 .. K - 1.

    Raises:
        UserError: the codes have another dtype or shape, or are out of range.
    """
    num_axes = 1 + len(frame_shape)
    shape = "[t, h, w]" if num_axes == 3 else f"[t, h, w, {frame_shape[2]}]"
    if not isinstance(codes, np.ndarray | Tensor):
        raise UserError(f"codes must be integers {shape}, not {described(codes)}")
    if isinstance(codes, np.ndarray) and codes.dtype.kind not in "iu":
        raise UserError(f"codes must be integers {shape}, not {described(codes)}")
    tensor = torch.from_numpy(codes.astype(np.int64)) if isinstance(codes, np.ndarray) else codes
    if tensor.is_floating_point() or tensor.ndim not in (num_axes, num_axes + 1):
        raise UserError(f"codes must be integers {shape}, or several with a first axis B, not {described(codes)}")
    tensor = tensor.detach().cpu().long()
    batch = tensor[None] if tensor.ndim == num_axes else tensor
    if list(batch.shape[4:]) != list(frame_shape[2:]) or not all(batch.shape):
        raise UserError(f"codes must be {shape}, not {described(codes)}")
    if int(batch.min()) < 0 or int(batch.max()) >= num_codes:
        raise UserError(f"codes must be from 0 to {num_codes - 1}, not {int(batch.min())} to {int(batch.max())}")
    return batch, tensor.ndim == num_axes
