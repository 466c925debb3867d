"""Finds the members of an untrusted tar by reading its headers.

Formats: ustar, GNU (long names, sizes in base 256) and PAX (POSIX.1-2001). Every number in a header is checked against
the file before use, so that no header can make the reader loop, wait or leave the file. Links, folders, devices and
sparse files are skipped. Python's `tarfile` reads the same formats, but seeks to any offset that a header states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

__all__ = ["DamagedTar", "Member", "index_members", "is_header_of"]

BLOCK_BYTES = 512
_EXTENSION_BYTES = 2**20
"""Longest long name or PAX record that is read. File names are shorter than 64 KiB on all systems."""
_PADDING_BYTES = 2**20
"""Zeros after an end mark that are searched for another tar. tar pads to 10 KiB by default."""
_SIZE_DIGITS = 19
"""Most digits of a size, more than any file system allows."""

_REGULAR = b"0\x007"
_EXTENSIONS = b"LKxg"
"""Long name, long link, PAX records of the next member, PAX records of all that follow."""
_WITHOUT_DATA = b"123456"
"""Links, devices, folders and FIFOs. Some writers state a size for them, but write no data."""


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: name in the tar, with ``/``.
        offset: byte offset of its header, which directly precedes the data.
        bytes: size of the data.
        stated_bytes: size by that header. A PAX record may state another size, which takes precedence.
    """

    name: str
    offset: int
    bytes: int
    stated_bytes: int

    @property
    def data_offset(self) -> int:
        """Where the data begins."""
        return self.offset + BLOCK_BYTES


class DamagedTar(Exception):
    """The members after an offset cannot be found; the message gives the reason in one line.

    Attributes:
        offset: the byte offset.
        name: name of the member that is cut there; empty if unknown.
    """

    def __init__(self, offset: int, cause: str, name: str = "") -> None:
        super().__init__(cause)
        self.offset, self.name = offset, name


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    is_extended: bool
    """Whether further blocks of a sparse file's map follow."""


def index_members(file: BinaryIO, file_bytes: int) -> Iterator[Member]:
    """Yields the regular files of a tar, in order; reads headers only.

    If another tar follows an end mark (``cat a.tar b.tar``), its files are included.

    Raises:
        DamagedTar: a header is damaged, or the tar ends before its last member or without an end mark.
    """
    offset, names = 0, _Names()
    while True:
        header = _read_header(file, offset, file_bytes)
        if header is None:
            following = _after_end_mark(file, offset, file_bytes)
            if following is None:
                return
            offset, names = following, _Names()
            continue
        is_extension = header.kind in _EXTENSIONS
        name = names.name or header.name.decode("utf-8", "replace")
        size = header.size
        if header.kind in _WITHOUT_DATA:
            size = 0
        elif not is_extension and names.size is not None:
            size = names.size
        data = offset + BLOCK_BYTES
        if header.kind == b"S" and header.is_extended:
            data = _skip_sparse_map(file, data, file_bytes)
        if size > file_bytes - data:
            cause = f"the tar ends within {name}: {max(file_bytes - data, 0)} of {size} bytes are there"
            raise DamagedTar(offset, cause, name)
        if is_extension:
            names.read(header.kind, file, data, size)
        else:
            if header.kind in _REGULAR and not names.is_sparse and not name.endswith("/"):
                yield Member(name, offset, size, header.size)
            names.forget()
        offset = data + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def is_header_of(block: bytes, stated_bytes: int) -> bool:
    """Whether a block is still the header of a regular file that states this size."""
    header = _parse_header(block)
    return header is not None and header.kind in _REGULAR and header.size == stated_bytes


class _Names:
    """The facts about a member in the extension headers before it."""

    def __init__(self) -> None:
        self._defaults: dict[str, bytes] = {}
        self._records: dict[str, bytes] = {}

    def read(self, kind: bytes, file: BinaryIO, offset: int, size: int) -> None:
        """Reads the data of an extension header.

        Raises:
            DamagedTar: the data is too long, or not a list of records.
        """
        if size > _EXTENSION_BYTES:
            raise DamagedTar(offset, f"the extended header at byte {offset} has {size} bytes")
        file.seek(offset)
        data = file.read(size)
        if kind == b"L":
            self._records["path"] = data.partition(b"\0")[0]
        elif kind != b"K":
            found = _pax_records(data)
            if found is None or not found.get("size", b"0").isdigit() or len(found.get("size", b"")) > _SIZE_DIGITS:
                raise DamagedTar(offset, f"the extended header at byte {offset} is damaged")
            (self._records if kind == b"x" else self._defaults).update(found)

    def forget(self) -> None:
        """Forgets the facts that apply to one member only."""
        self._records.clear()

    def _value(self, key: str) -> bytes | None:
        return self._records.get(key, self._defaults.get(key))

    @property
    def name(self) -> str | None:
        value = self._value("path")
        return value.decode("utf-8", "replace") if value else None

    @property
    def size(self) -> int | None:
        value = self._value("size")
        return None if value is None else int(value)

    @property
    def is_sparse(self) -> bool:
        return any(key.startswith("GNU.sparse.") for key in self._records)


def _pax_records(data: bytes) -> dict[str, bytes] | None:
    """Values by keyword, from lines ``LENGTH KEYWORD=VALUE``; None if a length is wrong."""
    records = {}
    while data.strip(b"\0"):
        digits, space, _ = data[:10].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(data):
            return None
        line, data = data[: int(digits)], data[int(digits) :]
        keyword, equals, value = line[len(digits) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        records[keyword.decode("utf-8", "replace")] = value[:-1]
    return records


def _read_header(file: BinaryIO, offset: int, file_bytes: int) -> _Header | None:
    """The header at an offset; None at the end mark."""
    if offset >= file_bytes:
        raise DamagedTar(file_bytes, "the tar has no end mark: it was cut, or its writer was killed")
    file.seek(offset)
    block = file.read(BLOCK_BYTES)
    if len(block) == BLOCK_BYTES and not block.strip(b"\0"):
        return None
    if offset and len(block) < BLOCK_BYTES:
        raise DamagedTar(offset, f"the tar ends within the header at byte {offset}")
    header = _parse_header(block)
    if header is None:
        problem = "is not a tar, or is compressed" if not offset else f"is damaged at byte {offset}"
        raise DamagedTar(offset, f"the file {problem}; what follows cannot be read")
    return header


def _after_end_mark(file: BinaryIO, offset: int, file_bytes: int) -> int | None:
    """Offset of another tar after an end mark at ``offset``; None if only padding follows."""
    end = min(file_bytes, offset + _PADDING_BYTES)
    while offset + BLOCK_BYTES <= end:
        file.seek(offset)
        block = file.read(BLOCK_BYTES)
        if block.strip(b"\0"):
            return offset if _parse_header(block) is not None else None
        offset += BLOCK_BYTES
    return None


def _parse_header(block: bytes) -> _Header | None:
    """Parses a header; None if the checksum differs or a number is invalid."""
    if len(block) < BLOCK_BYTES:
        return None
    stated = _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in rest)  # some old writers sum signed bytes
    size = _number(block[124:136])
    if stated not in (sum(rest), signed) or size is None:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(name, size, block[156:157], block[482] == 1)


def _number(field: bytes) -> int | None:
    """An unsigned number in octal digits, or for larger ones in base 256; None if it is invalid."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.replace(b"\0", b" ").strip()
    if digits.strip(b"01234567") or len(digits) > 12:
        return None
    return int(digits, 8) if digits else 0


def _skip_sparse_map(file: BinaryIO, offset: int, file_bytes: int) -> int:
    """The end of the blocks that continue an old GNU sparse file's map."""
    while offset + BLOCK_BYTES <= file_bytes:
        file.seek(offset)
        block = file.read(BLOCK_BYTES)
        offset += BLOCK_BYTES
        if len(block) < BLOCK_BYTES or block[504] != 1:
            break
    return offset
