"""BAIR robot pushing (Ebert et al., arXiv 1710.05268): TFRecord files in ``train`` and ``test`` folders.

A record is a video of two cameras: ``{i}/image_main/encoded`` and ``{i}/image_aux1/encoded`` (raw uint8 [64, 64, 3]),
``{i}/action`` (4 floats) and ``{i}/endeffector_pos`` (3 floats) for each frame i.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.pipeline.sources.folder import walk_files
from clipmill.pipeline.sources.multivideo import list_each
from clipmill.pipeline.sources.record import ArrayVideo, DamagedVideo, SourceVideo, file_identity
from clipmill.pipeline.sources.tfrecord import index_records, read_features, read_record

__all__ = ["list_videos", "read_array"]

_SUFFIXES = frozenset((".tfrecords", ".tfrecord"))
_FRAME_SHAPE = (64, 64, 3)


def list_videos(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    """Yields the records of all files: ``train`` stays train, ``test`` becomes val. Reads record headers only.

    ``others`` counts the other files by extension.
    """
    base = storage.absolute(source.url)
    files = (entry for _, entry in walk_files(base, _SUFFIXES, others))
    return list_each(base, files, partial(_list_file, source, base))


def _list_file(source: SourceConfig, base: str, entry: storage.Entry) -> Iterator[SourceVideo]:
    cameras = ("image_main", "image_aux1") if source.camera == "both" else (source.camera,)
    url = storage.resolve(base, entry.name)
    identity = file_identity(url, entry.bytes, entry.etag)
    with storage.open_to_read(url) as file:
        for number, (offset, num_bytes) in enumerate(index_records(file, entry.bytes)):
            for camera in cameras:
                yield SourceVideo(
                    name=entry.name,
                    bytes=num_bytes,
                    etag=entry.etag,
                    split=_split(PurePosixPath(entry.name)),
                    member=f"{number}@{offset}/{camera}",
                    identity=f"{identity}:{offset}:{camera}",
                    group=f"{identity}:{offset}",  # two views of one scene
                )


def _split(path: PurePosixPath) -> Literal["train", "val"] | None:
    """The split by the innermost folder named train or test; None without one."""
    for name in reversed(path.parts[:-1]):
        if name in ("train", "test"):
            return "train" if name == "train" else "val"
    return None


def read_array(url: str, member: str, num_bytes: int) -> ArrayVideo:
    """Reads one record: the frames of a camera; actions and end effector concatenated, float32 [num_frames, 7].

    Raises:
        DamagedVideo: the record is damaged or has another content.
        FileNotFoundError: the file is missing.
    """
    place, camera = member.split("/")
    with storage.open_to_read(url) as file:
        features = read_features(read_record(file, int(place.split("@")[1]), num_bytes))
    suffix = f"/{camera}/encoded"
    num_frames = sum(bool(re.fullmatch(r"\d+" + suffix, name)) for name in features)
    if not num_frames:
        raise DamagedVideo(f"the record has no frame of {camera}")
    frames = np.stack([_frame(features, f"{index}{suffix}") for index in range(num_frames)])
    names = [name for name in ("action", "endeffector_pos") if f"0/{name}" in features]
    if not names:
        return ArrayVideo(frames, None)
    try:
        rows = [
            [x for name in names for x in _feature(features, f"{i}/{name}").float_list.value] for i in range(num_frames)
        ]
        return ArrayVideo(frames, np.array(rows, np.float32))
    except ValueError as error:
        raise DamagedVideo("the rows of actions differ in length") from error


def _frame(features: Mapping[str, Any], name: str) -> np.ndarray:
    values = _feature(features, name).bytes_list.value
    if len(values) != 1 or len(values[0]) != np.prod(_FRAME_SHAPE):
        raise DamagedVideo(f"{name} is not a raw frame of {' x '.join(map(str, _FRAME_SHAPE))} bytes")
    return np.frombuffer(values[0], np.uint8).reshape(_FRAME_SHAPE)


def _feature(features: Mapping[str, Any], name: str) -> Any:
    if name not in features:  # a protobuf map would create an empty one
        raise DamagedVideo(f"the record has no {name}")
    return features[name]
