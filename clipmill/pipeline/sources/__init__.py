"""Sources of raw videos: one streaming listing per source type, in a stable order, without opening videos.

``docs/sources.md`` shows each type. Some sources list files with one video each. Others have files with many videos;
the plan then records the place of each video: as raw frames (`read_array`), as a file in a tar (`extract`), or as a
span of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import arrays, bair, folder, lerobot, table, tgif, ucf101, webdataset
from clipmill.pipeline.sources.isolated import list_isolated, read_isolated
from clipmill.pipeline.sources.multivideo import KeptFiles
from clipmill.pipeline.sources.record import ArrayVideo, SourceVideo, TimedRows
from clipmill.video import Limits

__all__ = [
    "base_url",
    "check_source",
    "describe_files",
    "extract",
    "is_file",
    "is_gone",
    "is_refused_alone",
    "list_videos",
    "read_array",
    "read_rows",
]

_LISTINGS: dict[str, Callable[[SourceConfig], Iterator[SourceVideo]]] = {
    "lerobot": lerobot.list_videos,
    "hdf5": list_isolated,
}
_WALKS: dict[str, Callable[[SourceConfig, Counter[str]], Iterator[SourceVideo]]] = {
    "webdataset": webdataset.list_videos,
    "arrays": arrays.list_videos,
    "bair": bair.list_videos,
    "ucf101": ucf101.list_videos,
    "tgif": tgif.list_videos,
}
"""Source types that search a folder, and count its other files."""

_FILES = {"table": "the list of videos (.csv, .tsv, .parquet or .jsonl)", "hdf5": "the HDF5 file"}
"""Source types whose URL is a file, with a description of the file."""

_FILES_OR_FOLDERS = {"webdataset": webdataset.SUFFIXES, "arrays": arrays.SUFFIXES}
"""Source types whose URL is a folder or, with one of these extensions, a file."""

_ENDINGS_NAMED = 10
_FILES_LOOKED_THROUGH = 1000
_FILES_ASKED_FOR = 16


def list_videos(
    source: SourceConfig, others: Counter[str] | None = None, after: str | None = None
) -> Iterator[SourceVideo]:
    """Lists the videos of a source.

    Args:
        source: the source to list.
        others: counts the files of a folder that are not videos, by extension (``.txt``).
        after: the ``mark`` of a video of an earlier listing, after which this one continues; None lists all.

    Raises:
        UserError: the source does not exist, cannot be read, does not match its type, or holds no video.
    """
    url = _existing_source(source)
    num_videos = 0
    others = Counter() if others is None else others
    try:
        for video in _listing(source, others, after):
            num_videos += 1
            yield video
    except PermissionError as error:
        raise UserError(
            f"data.source.url {storage.shown(url)} cannot be listed ({error}); check its permissions"
        ) from error
    if not num_videos and after is None:
        found = f"; it holds {describe_files(others)}" if others else ""
        raise UserError(
            f"data.source.url {storage.shown(url)} holds no video{_wanted(source)}{found}; name another {_kind(source)}"
        )


def _listing(source: SourceConfig, others: Counter[str], after: str | None) -> Iterator[SourceVideo]:
    if source.type == "folder":
        return folder.list_videos(source, others, after)
    if source.type == "table":
        return table.list_videos(source, after)
    assert after is None, f"a listing of type {source.type} has no marks"
    walk = _WALKS.get(source.type)
    return _LISTINGS[source.type](source) if walk is None else walk(source, others)


def describe_files(others: Mapping[str, int]) -> str:
    """Files by extension, the most frequent first: ``12 .txt, 3 .json, 1 without an extension``."""
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count:,} {suffix or 'without an extension'}" for suffix, count in ordered[:_ENDINGS_NAMED]]
    if rest := sum(count for _, count in ordered[_ENDINGS_NAMED:]):
        texts.append(f"{rest:,} with other extensions")
    return ", ".join(texts)


def _wanted(source: SourceConfig) -> str:
    wanted = {
        "webdataset": " (in files ending in tar)",
        "arrays": " (in files ending in npy or npz)",
        "bair": " (files ending in tfrecords)",
        "tgif": " (files ending in gif)",
    }
    return wanted.get(source.type, "")


def _kind(source: SourceConfig) -> str:
    if is_file(source):
        return "file"
    return "folder that holds train and test" if source.type == "bair" else "folder"


def check_source(source: SourceConfig) -> None:
    """Raises the `UserError` of `list_videos`, as far as the first entries of a local source show it."""
    if storage.is_local(_existing_source(source)):
        for _ in list_videos(source):
            if source.type != "ucf101":  # ucf101 is small, and missing files show only at the end of its listing
                return


def is_file(source: SourceConfig) -> bool:
    """Whether the source's URL names a file rather than a folder."""
    suffixes = _FILES_OR_FOLDERS.get(source.type, frozenset())
    return (
        source.type in _FILES
        or PurePosixPath(storage.split(storage.absolute(source.url))[1]).suffix.lower() in suffixes
    )


def _existing_source(source: SourceConfig) -> str:
    is_one = is_file(source)
    what = _FILES.get(source.type, "the file that holds the videos" if is_one else "the folder that holds the videos")
    if not source.url:
        raise UserError(f"data.source.url is empty; set it to {what}" + ("" if is_one else " (or a bucket prefix)"))
    url = storage.absolute(source.url)
    if storage.is_local(url):
        path = storage.local_path(url)
        if not (path.is_file() if is_one else path.is_dir()):
            found = "a folder, not a file" if path.is_dir() else "a file, not a folder"
            raise UserError(
                f"data.source.url {url} {f'is {found}' if path.exists() else 'does not exist'}; name {what}"
            )
    return url


def base_url(source: SourceConfig) -> str:
    """The folder that the names of a source's files refer to."""
    url = storage.absolute(source.url)
    return storage.split(url)[0] if is_file(source) else url


def is_gone(source: SourceConfig) -> bool:
    """Whether the source's folder is empty or missing, as for an unmounted disk. Its videos are then not excluded.

    A missing bucket needs no check, because every request to it reports that.
    """
    url = storage.absolute(source.url)
    if not storage.is_local(url):
        return False
    if is_file(source):
        return not storage.exists(url)
    return next(storage.walk(url), None) is None


def is_refused_alone(source: SourceConfig, url: str) -> bool:
    """Whether other files of the source can be read although storage refuses this one.

    Raises:
        UserError: the source cannot even be listed.
    """
    return any(map(_is_readable, (other for other in _some_files(source) if other != url)))


def _is_readable(url: str) -> bool:
    try:
        storage.read_start(url, 1)
    except (storage.Refused, storage.Unreadable, FileNotFoundError):
        return False
    return True


def _some_files(source: SourceConfig) -> list[str]:
    """A few video files, spread over the first files of the source; empty if the source is a single file."""
    base = base_url(source)
    if source.type == "table":
        names = table.first_names(source, _FILES_LOOKED_THROUGH)
    elif is_file(source):
        return []
    else:
        names = [entry.name for entry in islice(storage.walk(base), _FILES_LOOKED_THROUGH)]
    return [storage.resolve(base, name) for name in names[:: -(-len(names) // _FILES_ASKED_FOR) or 1]]


def read_array(
    source: SourceConfig, url: str, member: str, num_bytes: int, kept: KeptFiles, limits: Limits
) -> ArrayVideo:
    """Reads the raw frames of one video from a file with several.

    Args:
        source: the source of the video.
        url: URL of the file.
        member: ``member`` of the listed video.
        num_bytes: ``bytes`` of the listed video.
        kept: local copies of files that can only be read whole.
        limits: limits of the child process that reads HDF5 and TFRecord files.

    Raises:
        DamagedVideo: this part of the file is damaged, or has changed since the listing.
        FileNotFoundError: the file is missing.
        DecoderLost: the environment ended the child.
    """
    if source.type == "arrays":
        return arrays.read_array(source, url, member, num_bytes, kept)
    return read_isolated(source, url, member, num_bytes, limits)


def extract(source: SourceConfig, url: str, member: str, num_bytes: int, folder: Path) -> Path | None:
    """Extracts a video file from an archive. Returns None if this source has no archives.

    Args:
        source: the source of the video.
        url: URL of the archive.
        member: ``member`` of the listed video.
        num_bytes: ``bytes`` of the listed video.
        folder: local folder for the copy.

    Raises:
        DamagedVideo: the archive has changed since the listing.
        FileNotFoundError: the file is missing.
    """
    return webdataset.extract(url, member, num_bytes, folder) if source.type == "webdataset" else None


def read_rows(source: SourceConfig, actions: str) -> TimedRows | None:
    """Reads the rows of actions of a video from a shared file. Returns None if this source has one file per video.

    Args:
        source: the source of the video.
        actions: ``actions`` of the listed video.

    Raises:
        DamagedVideo: the file is damaged, or lacks these rows.
        FileNotFoundError: the file is missing.
    """
    return lerobot.read_rows(source, actions) if source.type == "lerobot" else None
