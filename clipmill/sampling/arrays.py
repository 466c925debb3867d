"""Reads actions and text embeddings from ``.npy`` files."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from clipmill import storage
from clipmill.errors import UserError

__all__ = ["check_array", "read_array"]


def read_array(url: str) -> np.ndarray:
    """Reads a ``.npy`` file of numbers as float32 of any shape.

    Raises:
        UserError: the file is missing, or is not an array of real numbers.
    """
    try:
        array = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
            raise ValueError("no array of real numbers")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {storage.shown(url)}; correct its name") from error
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{storage.shown(url)} is no .npy file of real numbers ({error}); write it again") from error
    return array.astype(np.float32)


def check_array(array: np.ndarray, wanted: Sequence[int], name: str, condition: str) -> np.ndarray:
    """Checks that an array fits the prior as the condition of one clip, and returns it. Actions may have more rows.

    Args:
        array: float32 [T, A] or [S, E].
        wanted: the prior's ``condition_shape``.
        name: name of the file, for messages.
        condition: ``actions`` or ``text``.

    Raises:
        UserError: the array has another shape, or numbers that are not finite.
    """
    fits = array.ndim == len(wanted) and list(array.shape[1:]) == list(wanted[1:])
    if not fits or (len(array) < wanted[0] if condition == "actions" else len(array) != wanted[0]):
        raise UserError(f"{name} has the shape {list(array.shape)}, the prior takes {condition} of {list(wanted)}")
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds numbers that are not finite; write it again")
    return array
