"""Moving MNIST from any digits: two digits bounce in a square (Srivastava et al., arXiv 1502.04681, section 4.1).

The file has the published layout of ``mnist_test_seq.npy``, uint8 [T, N, 64, 64]: frames first, then videos. Video i is
a function of (seed, i) and the digits, so a longer file begins with the videos of a shorter one.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
from pathlib import Path

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.progress import bar
from clipmill.scratch import ScratchFolder

__all__ = ["NUM_FRAMES", "SIZE", "draw_video", "generate", "read_digits"]

SIZE = 64
NUM_FRAMES = 20
NUM_DIGITS = 2
_PIXELS_PER_FRAME = 3.6
"""Speed of a digit: a tenth of the distance that a digit of 28 pixels can move between two walls."""
_BATCH_VIDEOS = 256
_IDX_MAGIC = b"\0\0\x08\x03"  # bytes, three axes
_LARGEST_BYTES = 2**31


def generate(digits: np.ndarray, url: str, *, num_videos: int = 10_000, seed: int = 0) -> None:
    """Writes a file of videos.

    Args:
        digits: uint8 [N, h, w], white on black.
        url: URL of the ``.npy`` file; an existing file is replaced.
        num_videos: number of videos in the file.
        seed: seed of the choice of digits, their places and their directions.

    Raises:
        UserError: the URL does not end in ``.npy``. Nothing was written.
    """
    if not url.endswith(".npy"):
        raise UserError(f"{url} must end in .npy, because that is the file's format; name another file")
    with ScratchFolder("moving-mnist") as folder:
        path = folder / "videos.npy"
        shape = (NUM_FRAMES, num_videos, SIZE, SIZE)
        videos = np.lib.format.open_memmap(path, "w+", np.uint8, shape)  # the file may be larger than memory
        with bar("moving-mnist", total=num_videos, unit="videos") as progress:
            for first in range(0, num_videos, _BATCH_VIDEOS):
                batch = range(first, min(first + _BATCH_VIDEOS, num_videos))
                videos[:, batch.start : batch.stop] = np.stack([draw_video(digits, seed, i) for i in batch], axis=1)
                progress.update(batch.stop)
        videos.flush()
        storage.publish_file(path, storage.absolute(url))


def draw_video(digits: np.ndarray, seed: int, index: int) -> np.ndarray:
    """Video ``index`` of a file: uint8 [NUM_FRAMES, SIZE, SIZE]; where digits overlap, the brighter pixel shows."""
    random = np.random.default_rng([seed, index])
    room = np.array((SIZE - digits.shape[1], SIZE - digits.shape[2]))
    frames = np.zeros((NUM_FRAMES, SIZE, SIZE), np.uint8)
    for digit in digits[random.integers(len(digits), size=NUM_DIGITS)]:
        angle = random.uniform(0, 2 * math.pi)
        velocity = _PIXELS_PER_FRAME * np.array((math.sin(angle), math.cos(angle)))
        travelled = random.uniform(0, room) + np.arange(NUM_FRAMES)[:, None] * velocity
        # Bouncing between two walls is a straight path folded at each wall.
        places = np.maximum(room - np.abs(travelled % (2 * np.maximum(room, 1)) - room), 0)
        for frame, (top, left) in zip(frames, places.round().astype(int), strict=True):
            window = frame[top : top + digits.shape[1], left : left + digits.shape[2]]
            np.maximum(window, digit, out=window)
    return frames


def read_digits(path: Path) -> np.ndarray:
    """Reads digits, uint8 [N, h, w], from MNIST's format (``train-images-idx3-ubyte``, also ``.gz``), .npy or .npz.

    From an ``.npz`` file it reads the array ``x_train``, as in Keras' MNIST file, or the only array of that shape.

    Raises:
        UserError: the file is missing, does not hold digits, or its digits are larger than the videos.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(_LARGEST_BYTES)
        digits = _parse_digits(data)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name a file of digits") from error
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} holds no digits ({error}); name MNIST's train-images-idx3-ubyte, or an .npy or .npz file of uint8 "
            "[N, height, width]"
        ) from error
    if not len(digits) or not 0 < max(digits.shape[1:]) <= SIZE:
        raise UserError(
            f"{path} holds digits of shape {list(digits.shape)}; name a file with digits of at most {SIZE} x {SIZE}"
        )
    return digits


def _parse_digits(data: bytes) -> np.ndarray:
    if data.startswith(_IDX_MAGIC):
        sizes = np.frombuffer(data, ">u4", 3, len(_IDX_MAGIC)).tolist()
        return np.frombuffer(data, np.uint8, offset=16).reshape(sizes)
    found = np.load(io.BytesIO(data), allow_pickle=False)
    arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    digits = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim == 3}
    if len(digits) != 1 and "x_train" not in digits:
        raise ValueError(f"{len(digits)} arrays of uint8 with three axes")
    return digits.get("x_train", next(iter(digits.values())))
