"""WebDataset tars of raw videos, as downloaders write them (img2dataset, video2dataset).

A sample consists of consecutive members with the same key, which is the path up to the first dot of the file name
(``00012.mp4``, ``00012.json``, ``00012.txt``). Its ``txt`` is the text, its ``json`` the metadata. The videos of a
sample (``00012.left.mp4``, ``00012.right.mp4``) form a group. Listing reads headers and small members.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.pipeline.sources.cells import BadCell, as_caption, as_text, metadata_json
from clipmill.pipeline.sources.multivideo import find_files, list_each
from clipmill.pipeline.sources.record import DamagedVideo, SourceVideo, file_identity
from clipmill.pipeline.sources.tar import BLOCK_BYTES, DamagedTar, Member, index_members, is_header_of
from clipmill.video.kinds import VIDEO_SUFFIXES

__all__ = ["SUFFIXES", "extract", "list_videos"]

SUFFIXES = frozenset((".tar",))
_SMALL_BYTES = 2**20
"""A longer ``txt`` or ``json`` is not read, because no caption is that long."""
_COPY_BYTES = 2**23
_TEXT_KEYS = ("caption", "text")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
"""Key and extension of a member's name. Other names, such as hidden files, belong to no sample."""

logger = logging.getLogger(__name__)


def list_videos(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    """Yields the videos of all tars below a folder, or of one tar.

    The unreadable rest of a damaged tar is listed as one video with a fault. ``others`` counts the other files by
    extension.
    """
    base, tars = find_files(storage.absolute(source.url), SUFFIXES, others)
    return list_each(base, tars, partial(_list_tar, source, base))


@dataclass
class _Sample:
    key: str
    videos: list[Member] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)
    fault: str | None = None


def _list_tar(source: SourceConfig, base: str, tar: storage.Entry) -> Iterator[SourceVideo]:
    url = storage.resolve(base, tar.name)
    identity = file_identity(url, tar.bytes, tar.etag)
    with storage.open_to_read(url) as file:
        for sample in _read_samples(file, url, tar.bytes):
            described = _describe(source, sample)
            for video in sample.videos:
                yield replace(
                    described,
                    name=tar.name,
                    bytes=video.bytes,
                    etag=tar.etag,
                    member=_written(video),
                    identity=f"{identity}:{video.offset}",
                    group=described.group or f"{identity}:{sample.key}",
                )


def _written(member: Member) -> str:
    """The member as a text for the plan, which `extract` parses."""
    stated = "" if member.stated_bytes == member.bytes else f"/{member.stated_bytes}"
    return f"{member.name}@{member.offset}{stated}"


def _read_samples(file: BinaryIO, url: str, tar_bytes: int) -> Iterator[_Sample]:
    """Yields the samples with videos. The unreadable rest is a last sample with one video and a fault."""
    sample = _Sample("")
    try:
        for member in index_members(file, tar_bytes):
            found = _NAME.fullmatch(member.name)
            if found is None:
                continue
            key, suffix = found[1], found[2].lower()
            if key != sample.key or suffix in sample.suffixes:  # a repeated name starts another sample
                if sample.videos:
                    yield sample
                sample = _Sample(key)
            sample.suffixes.add(suffix)
            if f".{suffix.rpartition('.')[2]}" in VIDEO_SUFFIXES:
                sample.videos.append(member)
            elif suffix in ("txt", "json"):
                _read_small(file, member, suffix, sample)
    except DamagedTar as damaged:
        found = _NAME.fullmatch(damaged.name)
        if found is not None and found[1] == sample.key and sample.videos:  # the cut member belongs to this sample
            yield replace(sample, fault=str(damaged))
            return
        if sample.videos:
            yield sample
        if damaged.offset == tar_bytes:  # cut between two members: it is not known whether any is missing
            logger.warning("%s: %s", storage.shown(url), damaged)
            return
        num_lost = tar_bytes - damaged.offset
        lost = Member(damaged.name, damaged.offset, num_lost, num_lost)
        yield _Sample(f"@{damaged.offset}", [lost], fault=str(damaged))
        return
    if sample.videos:
        yield sample


def _read_small(file: BinaryIO, member: Member, suffix: str, sample: _Sample) -> None:
    if member.bytes > _SMALL_BYTES:
        sample.fault = f"{member.name} has {member.bytes} bytes, more than a caption or description can have"
        return
    file.seek(member.data_offset)
    sample.members[suffix] = file.read(member.bytes)


def _describe(source: SourceConfig, sample: _Sample) -> SourceVideo:
    """The facts that all videos of a sample share, from its ``txt`` and ``json``."""
    nothing = SourceVideo(name="", bytes=0, etag=None, fault=sample.fault)
    try:
        text = sample.members.get("txt", b"").decode("utf-8-sig").strip() or None
        values = json.loads(sample.members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        return replace(nothing, fault=sample.fault or f"the txt or json of {sample.key} cannot be read: {error}")
    if not isinstance(values, dict):
        return replace(nothing, fault=sample.fault or f"{sample.key}.json is not a JSON object")
    columns = source.columns
    try:
        label, group = (as_text(values.pop(key, None)) if key else None for key in (columns.label, columns.group))
        for key in _TEXT_KEYS if columns.text is None else (columns.text,):
            if text is None and (text := as_caption(values.get(key))) is not None and not isinstance(values[key], list):
                del values[key]
    except BadCell as bad:
        return replace(nothing, fault=sample.fault or f"in {sample.key}.json, a text, label or group {bad}")
    try:
        metadata = metadata_json(values)
    except BadCell as bad:
        return replace(nothing, fault=sample.fault or f"{sample.key}.json {bad}")
    return replace(nothing, label=label, group=group, text=text, metadata=metadata)


def extract(url: str, member: str, num_bytes: int, folder: Path) -> Path:
    """Copies one video out of its tar into a local folder.

    Raises:
        DamagedVideo: the tar has changed since it was listed.
        FileNotFoundError: the tar is missing.
    """
    name, _, place = member.rpartition("@")
    offset, _, stated_bytes = place.partition("/")
    path = folder / f"video{PurePosixPath(name).suffix}"
    with storage.open_to_read(url) as file, path.open("wb") as copy:
        file.seek(int(offset))
        if not is_header_of(file.read(BLOCK_BYTES), int(stated_bytes or num_bytes)):
            raise DamagedVideo("the tar changed since it was planned: no video begins there")
        missing = num_bytes
        while missing:
            block = file.read(min(missing, _COPY_BYTES))
            if not block:
                raise DamagedVideo(f"the tar changed since it was planned: {missing} of {num_bytes} bytes are missing")
            copy.write(block)
            missing -= len(block)
    return path
