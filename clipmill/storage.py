r"""The only door to storage: local folders and buckets through one small set of whole-object operations.

A URL is a local path (``runs/demo``) or an fsspec URL (``s3://bucket/runs/bair``). Objects appear whole or
not at all: a local file is written beside its target, synced, renamed, and its folder synced; a bucket
object is one put of a finished local file. Nothing is ever streamed into its final name, because fsspec
publishes a partial object when an exception leaves ``with fs.open(url, "wb")``.

A file name on a disk is bytes, and not always UTF-8, which all our formats are. Each byte that is not appears in a URL
as ``\x`` and two hex digits (``caf\xe9.mp4``); a backslash that could be mistaken for such a start appears as
``\x5c``. `local_path` turns a URL back into the name on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from clipmill import bucket
from clipmill.bucket import ServerLost, Unreadable
from clipmill.errors import UserError

__all__ = [
    "Entry",
    "ServerLost",
    "Unreadable",
    "absolute",
    "create_bytes",
    "create_document",
    "escape",
    "exists",
    "fetch",
    "is_local",
    "join",
    "list_folder",
    "list_folders",
    "local_path",
    "open_to_read",
    "publish_bytes",
    "publish_document",
    "publish_file",
    "read_bytes",
    "read_document",
    "read_start",
    "remove",
    "remove_tree",
    "resolve",
    "stat",
    "walk",
]

WEB_STAT_SECONDS = 15.0
"""A list may name thousands of web servers, some of them dead."""

TEMPORARY_PREFIX = ".tmp-"
"""Start of the names of unfinished local files; a killed writer leaves one behind, ``verify`` names it."""


@dataclass(frozen=True)
class Entry:
    """One object of a listing."""

    name: str
    """Name in its folder, or path relative to the walked folder, with ``/``."""
    bytes: int
    etag: str | None
    """The bucket's own content tag; none on a local disk."""
    modified: float | None
    """Seconds since the epoch."""


# ----------------------------------------------------------------------------------------------- URLs


def is_local(url: str) -> bool:
    """Whether the URL names a place on this machine's file system."""
    return urlsplit(url).scheme in ("", "file")


def local_path(url: str) -> Path:
    """The path of a local URL, as it is on the disk."""
    if not is_local(url):
        raise ValueError(f"{url} is not local")
    return Path(_unescape(_file_url_path(url)))


def absolute(url: str) -> str:
    """The URL without trailing slash, local ones as absolute paths (workers start in other folders)."""
    if is_local(url):
        return escape(os.path.abspath(os.path.expanduser(_file_url_path(url))))
    return url.rstrip("/")


def _file_url_path(url: str) -> str:
    """The path of a ``file://`` URL, in which ``%20`` is a space (RFC 8089); another local URL is its path."""
    if not url.startswith("file://"):
        return url
    return unquote(url.removeprefix("file://").removeprefix("localhost"), errors="surrogateescape")


_ESCAPE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
"""Of a byte that is not UTF-8, or of a backslash, in a name."""


def _escape_name(name: str) -> str:
    """A name from the disk as a part of a URL."""
    return escape(_ESCAPE.sub(r"\\x5cx\1", name))


def _unescape(name: str) -> str:
    """The name on the disk."""
    return _ESCAPE.sub(lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), name)


def escape(name: str) -> str:
    """A name in which surrogates stand for bytes that are not UTF-8, as Python keeps them, as a part of a URL."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)


def join(url: str, *names: str) -> str:
    """Appends path segments."""
    return "/".join([url.rstrip("/"), *names])


def resolve(url: str, name: str) -> str:
    """A name relative to a folder's URL; an absolute path or URL as it is."""
    return absolute(name) if "://" in name or name.startswith("/") else join(url, name)


# ---------------------------------------------------------------------------------------------- reads


def exists(url: str) -> bool:
    """Whether an object or folder is there."""
    if is_local(url):
        return local_path(url).exists()
    return bucket.call(url, lambda filesystem, path: filesystem.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_local(url):
        return local_path(url).read_bytes()
    # With more than one reader s3fs asks for the size first: documents are small, one request is enough.
    return bucket.call(url, lambda filesystem, path: filesystem.cat_file(path, max_concurrency=1))


def read_start(url: str, num_bytes: int) -> bytes:
    """The first bytes of the object, all if it has fewer.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_local(url):
        with local_path(url).open("rb") as file:
            return file.read(num_bytes)
    return bucket.call(url, lambda filesystem, path: filesystem.cat_file(path, start=0, end=num_bytes))


def open_to_read(url: str, block_bytes: int = 2**16) -> BinaryIO:
    """The object as a file that can be read and sought; from a bucket in requests of at least ``block_bytes``.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_local(url):
        return local_path(url).open("rb")
    return bucket.open_to_read(url, block_bytes)


def stat(url: str) -> Entry:
    """One object, as a listing of its folder would show it.

    Raises:
        FileNotFoundError: there is none, or it is a folder, FIFO or socket.
        Unreadable: a web server refuses it, does not answer, or does not say how large it is.
    """
    name = url.rsplit("/", 1)[-1]
    if is_local(url):
        path = local_path(url)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        status = path.stat()
        return Entry(name, status.st_size, None, status.st_mtime)
    longest_seconds = WEB_STAT_SECONDS if bucket.is_web(url) else math.inf
    info = bucket.call(url, lambda filesystem, path: filesystem.info(path), longest_seconds=longest_seconds)
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    if info.get("size") is None:  # it may have no end
        raise Unreadable(f"{url}: the server does not say how large the file is")
    return replace(_entry(info, ""), name=name)


def fetch(url: str, path: Path) -> None:
    """Copies the whole object into a local file."""
    if is_local(url):
        shutil.copyfile(local_path(url), path)
    else:
        bucket.call(url, lambda filesystem, remote: filesystem.get_file(remote, str(path)))


def list_folder(url: str) -> list[Entry]:
    """The objects directly inside a folder, by name; none when the folder is absent."""
    return [entry for entry, is_folder in _children(url) if not is_folder]


def list_folders(url: str) -> list[str]:
    """The names of the folders directly inside a folder, sorted; none when it is absent."""
    return [entry.name for entry, is_folder in _children(url) if is_folder]


def _children(url: str) -> list[tuple[Entry, bool]]:
    if is_local(url):
        return _local_children(local_path(url))
    try:
        folder, infos = bucket.call(url, lambda filesystem, path: (path, filesystem.ls(path, detail=True)))
    except FileNotFoundError:
        return []
    entries = [(_entry(info, folder), info["type"] == "directory") for info in infos if not _is_marker(info)]
    return sorted((item for item in entries if item[0].name), key=lambda item: item[0].name)


def _local_children(folder: Path) -> list[tuple[Entry, bool]]:
    """Regular files and folders; a FIFO, socket, or dangling or circular link has no content to read."""
    children = []
    try:
        with os.scandir(folder) as found:
            for item in found:
                if item.is_symlink() and not os.path.exists(item.path):
                    continue
                name = _escape_name(item.name)
                if item.is_dir():
                    children.append((Entry(name, 0, None, None), True))
                elif item.is_file():
                    stat = item.stat()
                    children.append((Entry(name, stat.st_size, None, stat.st_mtime), False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(children, key=lambda child: child[0].name)


def _is_marker(info: dict[str, Any]) -> bool:
    """Whether an object stands for a folder, as consoles (``clips/``) and Hadoop (``clips_$folder$``) create them."""
    return info["type"] == "file" and (info["name"].endswith("/") or info["name"].endswith("_$folder$"))


def _entry(info: dict[str, Any], folder: str) -> Entry:
    name = info["name"].removeprefix(folder).strip("/")
    etag = info.get("ETag") or info.get("etag")
    modified = info.get("LastModified")
    return Entry(
        name,
        info.get("size") or 0,
        etag.strip('"') if etag else None,
        modified.timestamp() if isinstance(modified, datetime) else None,
    )


def walk(url: str) -> Iterator[Entry]:
    """All objects below a folder, with relative names, sorted within each folder."""
    if is_local(url):
        yield from _local_walk(local_path(url), "")
        return
    folder, found = bucket.call(url, lambda filesystem, path: (path, filesystem.find(path, detail=True)))
    for name in sorted(found):
        if not _is_marker(found[name]):
            yield _entry(found[name], folder)


def _local_walk(folder: Path, prefix: str, above: tuple[os.stat_result, ...] = ()) -> Iterator[Entry]:
    children = _local_children(folder)
    if not children:
        return
    here = folder.stat()
    if any(os.path.samestat(here, ancestor) for ancestor in above):
        return  # a link back up: its files have been listed where they are
    for child, is_folder in children:
        name = prefix + child.name
        if is_folder:
            yield from _local_walk(folder / _unescape(child.name), name + "/", (*above, here))
        else:
            yield Entry(name, child.bytes, None, child.modified)


# --------------------------------------------------------------------------------------------- writes


def publish_bytes(url: str, data: bytes) -> None:
    """Writes a whole object, replacing one that is there."""
    if is_local(url):
        _publish_local(local_path(url), lambda file: file.write(data))
    else:
        bucket.call(url, lambda filesystem, path: filesystem.pipe_file(path, data))


def publish_file(path: Path, url: str) -> None:
    """Copies a finished local file to a URL, replacing what is there."""
    if is_local(url):
        with path.open("rb") as original:
            _publish_local(local_path(url), lambda file: shutil.copyfileobj(original, file, 2**20))
    else:
        bucket.call(url, lambda filesystem, remote: filesystem.put_file(str(path), remote))


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a whole object only if there is none: of several writers exactly one gets True."""
    if is_local(url):
        target = local_path(url)
        try:
            with _temporary_beside(target, lambda file: file.write(data)) as temporary:
                os.link(temporary, target)  # unlike rename it fails on an existing name; the content is already whole
        except FileExistsError:
            return False
        _sync_folder(target.parent)
        return True
    return bucket.create(url, data)


def _publish_local(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    with _temporary_beside(target, write) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def _temporary_beside(target: Path, write: Callable[[BinaryIO], Any]) -> Iterator[str]:
    """A finished and synced file in the target's folder; gone at the end unless it was renamed, also on a full disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide published data from other users
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(url: str) -> None:
    """Removes an object; none there is fine."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        bucket.call(url, lambda filesystem, path: filesystem.rm_file(path))


def remove_tree(url: str) -> None:
    """Removes everything below a folder; none there is fine."""
    if is_local(url):
        shutil.rmtree(local_path(url), ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        bucket.call(url, lambda filesystem, path: filesystem.rm(path, recursive=True))


# ------------------------------------------------------------------------------------- JSON documents


def _document_bytes(body: dict[str, Any], schema: int) -> bytes:
    return (json.dumps({"schema": schema, **body}, sort_keys=True, indent=1) + "\n").encode()


def publish_document(url: str, body: dict[str, Any], schema: int) -> None:
    """Writes a JSON document (sorted keys) with its schema version."""
    publish_bytes(url, _document_bytes(body, schema))


def create_document(url: str, body: dict[str, Any], schema: int) -> bool:
    """Like `publish_document`, only if there is none: returns whether ours was written."""
    return create_bytes(url, _document_bytes(body, schema))


def read_document(url: str, newest_schema: int) -> dict[str, Any]:
    """Reads a JSON document.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no document of ours, or of a schema newer than ``newest_schema``.
    """
    try:
        document = json.loads(read_bytes(url))
        schema = document["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{url} is damaged or was not written by clipmill; restore or remove it") from error
    if schema > newest_schema:
        raise UserError(
            f"{url} has schema {schema}, this clipmill reads up to {newest_schema}; upgrade clipmill to read it"
        )
    return document
