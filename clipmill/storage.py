"""The only door to storage: local folders and buckets through one small set of whole-object operations.

A URL is a local path (``runs/demo``) or an fsspec URL (``s3://bucket/runs/bair``). Objects appear whole or
not at all: a local file is written beside its target, synced, renamed, and its folder synced; a bucket
object is one put of a finished local file. Nothing is ever streamed into its final name, because fsspec
publishes a partial object when an exception leaves ``with fs.open(url, "wb")``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from clipmill import bucket
from clipmill.errors import UserError

__all__ = [
    "Entry",
    "absolute",
    "create_bytes",
    "create_document",
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
    "remove",
    "remove_tree",
    "resolve",
    "stat",
    "walk",
]

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
    """The path of a local URL."""
    if not is_local(url):
        raise ValueError(f"{url} is not local")
    return Path(url.removeprefix("file://"))


def absolute(url: str) -> str:
    """The URL without trailing slash, local ones as absolute paths (workers start in other folders)."""
    if is_local(url):
        return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
    return url.rstrip("/")


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
    """
    name = url.rsplit("/", 1)[-1]
    if is_local(url):
        path = local_path(url)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        status = path.stat()
        return Entry(name, status.st_size, None, status.st_mtime)
    info = bucket.call(url, lambda filesystem, path: filesystem.info(path))
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
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
    entries = [(_entry(info, folder), info["type"] == "directory") for info in infos]
    return sorted((item for item in entries if item[0].name), key=lambda item: item[0].name)


def _local_children(folder: Path) -> list[tuple[Entry, bool]]:
    """Regular files and folders; a FIFO, socket, or dangling or circular link has no content to read."""
    children = []
    try:
        with os.scandir(folder) as found:
            for item in found:
                if item.is_symlink() and not os.path.exists(item.path):
                    continue
                if item.is_dir():
                    children.append((Entry(item.name, 0, None, None), True))
                elif item.is_file():
                    stat = item.stat()
                    children.append((Entry(item.name, stat.st_size, None, stat.st_mtime), False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(children, key=lambda child: child[0].name)


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
            yield from _local_walk(folder / child.name, name + "/", (*above, here))
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
