"""Shards: plain WebDataset tars whose bytes depend on their samples only, with an index for random access.

A shard is a USTAR archive as webdataset's own writer makes it: times and owners zero, mode 0444, the members of a
sample side by side and sorted by name (``KEY.actions.npy``, ``KEY.json``, ``KEY.mp4``). Its index ``NAME.tar.idx``
holds the ``<u8`` offset of each sample, and last the end of the last one. With the index, a reader takes any sample
from a memory map without reading the rest of the archive.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = [
    "INDEX_SUFFIX",
    "Part",
    "Sample",
    "UnitWriter",
    "check_sample",
    "code_dtype",
    "file_sha256",
    "json_bytes",
    "npy_bytes",
    "parse_npy",
    "read_index",
    "read_sample",
]

INDEX_SUFFIX = ".idx"
BLOCK_BYTES = 512
NPY_PREFIX_BYTES = 10
"""Bytes of magic, version and header length."""
MAX_NAME_LENGTH = 100
"""Length of the USTAR name field. Longer names would need the prefix field, which `read_sample` does not read."""
MAX_MEMBER_BYTES = 8**11 - 1
"""Largest size that eleven octal digits can express."""
# webdataset splits a member's name at its first dot, and its writer skips members that begin with "_".
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MEMBER = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")

_HEADER = struct.Struct("100s24x11s21xc100x5s250x")
"""Fields of a USTAR header: name, size in octal digits, kind, magic."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Sample:
    """One clip, or its codes: members that share a key."""

    key: str
    """``{video id, 16 hex}_{clip ordinal:06d}``: letters, digits, ``_`` and ``-``."""
    members: dict[str, bytes]
    """Content by extension: ``mp4``, ``json``, ``actions.npy``."""


@dataclass(frozen=True)
class Part:
    """A finished shard on the local disk, with its index in the same folder."""

    name: str
    bytes: int
    sha256: str
    samples: int
    path: Path

    @property
    def index_path(self) -> Path:
        """Path of the index file."""
        return self.path.with_name(self.name + INDEX_SUFFIX)


# -------------------------------------------------------------------------------------------- writing


class UnitWriter:
    """Packs the samples of one unit, in the order they are added, into shards (the unit's parts) of about
    ``shard_bytes``.

    The last of several parts has at least half of ``shard_bytes``: a smaller rest is appended to the part before it.

    Args:
        folder: local, empty folder. It also holds unfinished parts, so the caller removes it as a whole.
        prefix: kind of the samples: ``clips``, ``tokens`` or ``samples``.
        unit: number of the unit in the plan.
        shard_bytes: a part is closed once it reaches this size.
    """

    def __init__(self, folder: Path, prefix: str, unit: int, shard_bytes: int) -> None:
        self._folder, self._prefix, self._unit, self._shard_bytes = folder, prefix, unit, shard_bytes
        self._parts: list[Part] = []
        self._keys: set[str] = set()
        self._full: _OpenPart | None = None
        self._open: _OpenPart | None = None

    def add(self, sample: Sample) -> None:
        """Appends a sample.

        Raises:
            ValueError: the key was added before, or a name or size does not fit the format.
        """
        check_sample(sample)
        if sample.key in self._keys:
            raise ValueError(f"two samples of unit {self._unit} have the key {sample.key}")
        self._keys.add(sample.key)
        if self._open is None:
            self._open = _OpenPart(self._folder / f"unfinished-{len(self._keys)}.tar")
        self._open.add(sample)
        if self._full is not None and 2 * self._open.num_bytes >= self._shard_bytes:
            self._close_part(self._full)
            self._full = None
        if self._open.num_bytes >= self._shard_bytes:
            self._full, self._open = self._open, None

    @property
    def closed(self) -> tuple[Part, ...]:
        """The parts that are finished so far; they do not change any more."""
        return tuple(self._parts)

    def finish(self) -> list[Part]:
        """Closes the last part. Returns all parts of the unit; an empty list if it has no samples."""
        if self._full is not None and self._open is not None:
            self._full.append(self._open)
        if last := self._full or self._open:
            self._close_part(last)
        self._full = self._open = None
        return self._parts

    def _close_part(self, part: _OpenPart) -> None:
        path, index = part.path, part.close()
        sha256 = file_sha256(path)
        name = f"{self._prefix}-{self._unit:06d}-{len(self._parts):02d}-{sha256[:8]}.tar"
        path = path.rename(self._folder / name)
        finished = Part(name, path.stat().st_size, sha256, len(index) - 1, path)
        finished.index_path.write_bytes(index.tobytes())
        self._parts.append(finished)


class _OpenPart:
    """An unfinished tar, and the offsets of its samples."""

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter  # imported here: it takes seconds and imports torch, which only writers need

        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._tar = TarWriter(self._file, encoder=False, user="", group="", mode=0o444, mtime=0)
        self._offsets = [0]

    @property
    def num_bytes(self) -> int:
        return self._offsets[-1]

    def add(self, sample: Sample) -> None:
        self._tar.write({"__key__": sample.key, **sample.members})
        self._offsets.append(self._tar.tarstream.offset)  # the file's own position lags behind, because tarfile buffers

    def append(self, other: _OpenPart) -> None:
        """Appends the samples of another part, and removes that part."""
        end, tar = self.num_bytes, self._tar.tarstream
        other.close()
        with other.path.open("rb") as file:
            while tar.offset < end + other.num_bytes:  # the rest is the archive's end mark
                data = file.read(min(2**20, end + other.num_bytes - tar.offset))
                tar.fileobj.write(data)
                tar.offset += len(data)
        self._offsets += [end + offset for offset in other._offsets[1:]]
        other.path.unlink()

    def close(self) -> np.ndarray:
        """Completes the archive. Returns the offsets, ``<u8`` [samples + 1]."""
        self._tar.close()
        self._file.close()
        return np.array(self._offsets, "<u8")


def check_sample(sample: Sample) -> None:
    """Raises ValueError if a name or a size does not fit the format."""
    if not _KEY.fullmatch(sample.key):
        raise ValueError(f"sample key {sample.key!r} must be letters, digits, '_' and '-'")
    if not sample.members:
        raise ValueError(f"sample {sample.key} has no members")
    for member, content in sample.members.items():
        if not _MEMBER.fullmatch(member):
            raise ValueError(f"member name {member!r} of {sample.key} must be like 'mp4' or 'actions.npy'")
        if len(sample.key) + 1 + len(member) > MAX_NAME_LENGTH:
            raise ValueError(f"name {sample.key}.{member} is longer than the {MAX_NAME_LENGTH} characters of USTAR")
        if len(content) > MAX_MEMBER_BYTES:
            raise ValueError(f"{sample.key}.{member} has {len(content)} bytes, USTAR holds {MAX_MEMBER_BYTES}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------- reading


def read_index(buffer: Buffer) -> np.ndarray:
    """Parses an index file.

    Returns:
        uint64 [samples + 1], strictly increasing from 0; a view of ``buffer``.

    Raises:
        ValueError: the buffer does not hold such offsets.
    """
    if len(buffer) == 0 or len(buffer) % 8:
        raise ValueError(f"an index of {len(buffer)} bytes is cut short")
    offsets = np.frombuffer(buffer, "<u8")
    if offsets[0] != 0 or np.any(offsets[1:] <= offsets[:-1]) or np.any(offsets % BLOCK_BYTES):
        raise ValueError("the index does not hold increasing offsets of tar members")
    return offsets


def read_sample(shard: memoryview, start: int, end: int) -> tuple[str, dict[str, memoryview]]:
    """Reads the sample between two offsets of a shard.

    Python's tarfile module takes longer to read a sample than most samples take to decode, so this function reads the
    headers itself: 512 bytes with the name in the first 100, the size in octal digits at 124 and the kind at 156, then
    the content, padded to a multiple of 512.

    Args:
        shard: uint8 view of the whole archive, for example of a memory map.
        start: offset of the sample.
        end: offset of the next sample.

    Returns:
        The key, and the contents by extension as views of ``shard``; nothing is copied.

    Raises:
        ValueError: there is no complete sample between the offsets.
    """
    if not 0 <= start < end <= len(shard):
        raise ValueError(f"no sample from {start} to {end} in {len(shard)} bytes")
    key = ""
    members: dict[str, memoryview] = {}
    offset = start
    while offset < end:
        if end - offset < BLOCK_BYTES:
            raise ValueError(f"no USTAR file header at offset {offset}")
        name, size, kind, magic = _HEADER.unpack_from(shard, offset)
        if magic != b"ustar" or kind != b"0":
            raise ValueError(f"no USTAR file header at offset {offset}")
        member_key, _, member = name.rstrip(b"\0").decode("ascii").partition(".")
        if members and member_key != key:
            raise ValueError(f"sample {key} at offset {start} runs into {member_key}")
        key = member_key
        offset += BLOCK_BYTES
        if not size.rstrip(b"\0 ").isdigit():  # int() would accept a sign
            raise ValueError(f"no size in the header at offset {offset - BLOCK_BYTES}")
        num_bytes = int(size.rstrip(b"\0 "), 8)
        members[member] = shard[offset : offset + num_bytes]
        offset += -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
    if offset != end:
        raise ValueError(f"sample {key} at offset {start} ends at {offset}, not at {end}")
    return key, members


# ------------------------------------------------------------------------------------ member contents


def json_bytes(document: Any) -> bytes:
    """A JSON document in canonical form: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def code_dtype(num_codes: int) -> np.dtype:
    """Data type of stored codes: the narrowest unsigned little-endian type that holds 0 to num_codes - 1."""
    return np.min_scalar_type(num_codes - 1).newbyteorder("<")


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as an npy file: format version 1.0, C order, little-endian."""
    file = io.BytesIO()
    little_endian = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    np.lib.format.write_array(file, little_endian, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def parse_npy(buffer: Buffer) -> np.ndarray:
    """The array in an npy file, as a read-only view. Nothing is copied or unpickled.

    Raises:
        ValueError: the buffer is not a complete npy file of plain numbers.
    """
    view = memoryview(buffer).toreadonly()
    if len(view) < NPY_PREFIX_BYTES:
        raise ValueError("not an npy file of format version 1.0")
    start = NPY_PREFIX_BYTES + view[8] + 256 * view[9]
    dtype, shape, order, num_bytes = _parse_npy_header(view[:start].tobytes())
    if len(view) - start != num_bytes:
        raise ValueError(f"npy file of {list(shape)} {dtype} holds {len(view) - start} bytes of data")
    return np.ndarray(shape, dtype, view, start, order=order)


@functools.lru_cache(maxsize=256)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], Any, int]:
    """Data type, shape, memory order and bytes of data. Cached: the arrays of a data set share a few headers."""
    if header[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not an npy file of format version 1.0")
    try:
        fields = ast.literal_eval(header[NPY_PREFIX_BYTES:].decode("latin1"))
        dtype, shape, fortran = np.dtype(str(fields["descr"])), fields["shape"], fields["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise ValueError(f"unreadable npy header {header[:100]!r}") from error
    if dtype.kind not in "biufc" or not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f"npy file of {dtype} {shape} does not hold plain numbers")
    return dtype, shape, "F" if fortran else "C", math.prod(shape) * dtype.itemsize
