"""Reads arrays of numbers from ``.npy`` and ``.npz`` files, with checked bounds and without unpickling.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from clipmill.pipeline.sources.record import DamagedVideo

__all__ = ["ArrayHeader", "copy_member", "open_array", "read_header", "read_npz_headers"]

_LONGEST_HEADER_BYTES = 2**16
_COPY_BYTES = 2**22


class ArrayHeader(NamedTuple):
    """The header of an ``.npy`` file.

    Attributes:
        offset: byte at which the numbers begin.
        dtype: data type; never an object type.
        shape: shape; sizes are not negative.
        is_fortran: whether the first axis varies fastest.
    """

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, file_bytes: int) -> ArrayHeader:
    """Reads the header at the start of an ``.npy`` file.

    Raises:
        DamagedVideo: the file is not an ``.npy`` file, holds Python objects, or is shorter than its header states.
    """
    start = io.BytesIO(file.read(_LONGEST_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(start)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(start)
    except KeyError as error:
        raise DamagedVideo("a .npy file of a version that holds no plain numbers") from error
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError) as error:
        raise DamagedVideo("not an .npy file, or its header is damaged") from error
    if dtype.hasobject:
        raise DamagedVideo("an array of Python objects, which are never unpickled; save numbers")
    header = ArrayHeader(start.tell(), dtype, shape, is_fortran)
    if min(shape, default=0) < 0 or header.offset + header.num_bytes > file_bytes:
        raise DamagedVideo(
            f"its header says {dtype} {list(shape)}, {header.num_bytes} bytes; {file_bytes - header.offset} are there"
        )
    return header


def open_array(path: Path) -> np.ndarray:
    """The array of a local ``.npy`` file, mapped into memory.

    Raises:
        DamagedVideo: see `read_header`.
    """
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size)
    if not header.num_bytes:
        return np.zeros(header.shape, header.dtype)  # an empty file cannot be mapped
    order = "F" if header.is_fortran else "C"
    return np.memmap(path, header.dtype, "r", header.offset, header.shape, order)  # type: ignore[call-overload]


def read_npz_headers(file: BinaryIO) -> dict[str, ArrayHeader]:
    """The headers of the arrays of an ``.npz`` file, by name. Members that are not arrays are skipped.

    Raises:
        DamagedVideo: the file is not an ``.npz`` file, or one of its arrays is damaged.
    """
    headers = {}
    with _as_damaged_video(), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                with archive.open(info) as member:
                    headers[info.filename.removesuffix(".npy")] = read_header(member, info.file_size)  # type: ignore[arg-type]
    return headers


def copy_member(file: BinaryIO, name: str, path: Path) -> None:
    """Copies one array of an ``.npz`` file into an ``.npy`` file.

    Raises:
        DamagedVideo: the array is damaged or missing, or unpacks to more than the disk can hold.
    """
    with (
        _as_damaged_video(),
        zipfile.ZipFile(file) as archive,
        archive.open(f"{name}.npy") as member,
        path.open("wb") as copy,
    ):
        num_bytes, free_bytes = archive.getinfo(f"{name}.npy").file_size, shutil.disk_usage(path.parent).free
        if num_bytes > free_bytes:  # a few megabytes may unpack to gigabytes
            raise DamagedVideo(f"{name} unpacks to {num_bytes} bytes, {free_bytes} are free")
        while block := member.read(_COPY_BYTES):
            copy.write(block)


@contextmanager
def _as_damaged_video() -> Iterator[None]:
    """Turns zipfile's errors about damage into `DamagedVideo`. OSErrors come from the disk or the network and pass."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DamagedVideo(f"not an .npz file, or it is damaged: {error}") from error
