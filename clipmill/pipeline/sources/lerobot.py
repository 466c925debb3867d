"""LeRobot data sets, versions 2 and 3 (https://huggingface.co/docs/lerobot/lerobot-dataset-v3): robots' episodes.

``meta/info.json`` states the rate, the features and the templates of file names. Version 2 has one line per episode in
``meta/episodes.jsonl``; each episode has its own parquet file of rows, and an mp4 file per camera. Version 3 has one
row per episode in ``meta/episodes/*/*.parquet``; parquet and mp4 files hold many episodes, and the row gives the place.
A video is one camera of one episode, and all cameras of an episode form a group. Rows of states and actions are
assigned to frames by time.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources.cells import BadCell, as_text, metadata_json
from clipmill.pipeline.sources.record import DamagedVideo, SourceVideo, TimedRows, file_identity

__all__ = ["list_videos", "read_rows"]

_BLOCK_BYTES = 2**20
_DEFAULT_ACTIONS = ("action",)
_NUMBERS = ("float", "int", "uint", "bool")
_SPLITS: dict[str, Literal["train", "val"]] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "val",
}


class _Info(NamedTuple):
    """The contents of ``meta/info.json``, and the parts of it that the config selects."""

    version: int
    chunks_size: int
    data_path: str
    video_path: str
    all_cameras: tuple[str, ...]
    cameras: tuple[str, ...]
    has_actions: bool
    splits: tuple[tuple[range, Literal["train", "val"]], ...]


class _Episode(NamedTuple):
    number: int
    tasks: tuple[str, ...]
    row: Mapping[str, Any]
    """The episode's record in ``meta``."""


def list_videos(source: SourceConfig) -> Iterator[SourceVideo]:
    """Yields the cameras of each episode. Reads ``meta`` and the names of the video files.

    Raises:
        UserError: ``meta`` is missing or damaged, has another version, or lacks features that the config names.
    """
    base = storage.absolute(source.url)
    info = _read_info(source, base)
    found = {f"videos/{entry.name}": entry for entry in storage.walk(storage.join(base, "videos"))}

    @functools.cache  # a file of many episodes
    def identity(name: str) -> str:
        entry = found.get(name)
        return f"missing:{name}" if entry is None else file_identity(storage.join(base, name), entry.bytes, entry.etag)

    episodes = _episodes_v2(base) if info.version == 2 else _episodes_v3(base, info)
    for episode in episodes:
        origin = _place(base, info, episode, f"videos/{info.all_cameras[0]}").name
        data = f"{_place(base, info, episode, 'data').name}#{episode.number}" if info.has_actions else None
        for camera in info.cameras:
            name, start, end, fault = _place(base, info, episode, f"videos/{camera}")
            entry = found.get(name)
            yield SourceVideo(
                name=name,
                bytes=0 if entry is None else entry.bytes,
                etag=None if entry is None else entry.etag,
                actions=data,
                text=episode.tasks[0] if episode.tasks else None,
                split=next((split for indices, split in info.splits if episode.number in indices), None),
                metadata=_metadata(episode, camera),
                identity=identity(name),
                start_seconds=start,
                end_seconds=end,
                group=f"{identity(origin)}:{episode.number}",
                fault=fault,
            )


def _metadata(episode: _Episode, camera: str) -> str | None:
    described: dict[str, Any] = {"episode": episode.number, "camera": camera}
    if len(episode.tasks) > 1:
        described["tasks"] = list(episode.tasks)
    return metadata_json(described)


# ------------------------------------------------------------------------------------------------ meta


def _read_info(source: SourceConfig, base: str) -> _Info:
    url = storage.join(base, "meta", "info.json")
    try:
        info = json.loads(storage.read_bytes(url))
        version = str(info["codebase_version"])
        features = {name: str(feature["dtype"]) for name, feature in info["features"].items()}
        depth_maps = {name for name, feature in info["features"].items() if _is_depth_map(feature)}
        paths = [info[key] or "" for key in ("data_path", "video_path")]
        chunks_size = int(info.get("chunks_size", 1000))
        splits = _read_splits(info.get("splits") or {})
    except FileNotFoundError as error:
        raise UserError(
            f"{url} does not exist; set data.source.url to the folder of a LeRobot data set, which holds meta, data "
            "and videos"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{url} is damaged or not of a LeRobot data set ({error!r}); restore it") from error
    if not version.startswith(("v2.", "v3.")):
        raise UserError(f"{url} has version {version}; convert the data set to v3.0 with lerobot's own tools")
    for path in paths:
        if path.startswith("/") or ".." in path.split("/") or "://" in path:
            raise UserError(f"{url} names files outside the data set ({path}); correct it")
    videos = [name for name, dtype in features.items() if dtype == "video"]
    if not videos:
        pictures = ", ".join(name for name, dtype in features.items() if dtype == "image")
        kept = f" (it keeps {pictures} as single images: convert them to videos with lerobot's own tools)"
        raise UserError(f"the LeRobot data set {base} has no videos{kept if pictures else ''}; name another folder")
    _check_names("cameras", source.cameras, videos)
    numbers = [name for name, dtype in features.items() if dtype.startswith(_NUMBERS)]
    _check_names("actions", source.actions or (), numbers)
    return _Info(
        version=int(version[1]),
        chunks_size=max(chunks_size, 1),
        data_path=paths[0],
        video_path=paths[1],
        all_cameras=tuple(videos),
        cameras=source.cameras or tuple(name for name in videos if name not in depth_maps),
        has_actions=bool(_columns(source, numbers)),
        splits=splits,
    )


def _read_splits(splits: Mapping[str, str]) -> tuple[tuple[range, Literal["train", "val"]], ...]:
    """The episodes of each split (``{"train": "0:90", "test": "90:100"}``); empty for fewer than two splits."""
    if len(splits) < 2:
        return ()
    return tuple(
        (range(*map(int, bounds.split(":"))), _SPLITS[name]) for name, bounds in splits.items() if name in _SPLITS
    )


def _is_depth_map(feature: Mapping[str, Any]) -> bool:
    info = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _check_names(key: str, names: tuple[str, ...], present: list[str]) -> None:
    for name in names:
        if name not in present:
            raise UserError(f"data.source.{key}: the data set has no {name!r} (it has {', '.join(present) or 'none'})")


def _columns(source: SourceConfig, present: list[str]) -> list[str]:
    """The columns that hold actions."""
    if source.actions is None:
        return [name for name in _DEFAULT_ACTIONS if name in present]
    return list(source.actions)


def _episodes_v2(base: str) -> Iterator[_Episode]:
    url = storage.join(base, "meta", "episodes.jsonl")
    try:
        lines = storage.read_bytes(url).splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{url} does not exist; restore it") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _episode(json.loads(line))
            except (BadCell, ValueError, TypeError, KeyError) as error:
                raise UserError(f"{url}, line {number}: not an episode ({error!r}); restore it") from error


def _episodes_v3(base: str, info: _Info) -> Iterator[_Episode]:
    folder = storage.join(base, "meta", "episodes")
    places = [f"videos/{camera}/{column}" for camera in info.all_cameras for column in _INDICES + _BOUNDS]
    wanted = ["episode_index", "tasks", *(f"data/{column}" for column in _INDICES), *places]
    for entry in storage.walk(folder):
        if not entry.name.endswith(".parquet"):
            continue
        url = storage.join(folder, entry.name)
        try:
            with storage.open_to_read(url, _BLOCK_BYTES) as file:
                table = pq.ParquetFile(file)
                columns = [name for name in wanted if name in table.schema_arrow.names]  # not 100 of statistics
                for batch in table.iter_batches(columns=columns):
                    yield from map(_episode, batch.to_pylist())
        except (BadCell, pa.ArrowException, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{url} holds no episodes ({_line(error)}); restore it") from error


def _episode(row: Mapping[str, Any]) -> _Episode:
    tasks = row.get("tasks") or ()
    texts = (as_text(task) for task in ([tasks] if isinstance(tasks, str) else tasks))
    return _Episode(int(row["episode_index"]), tuple(text for text in texts if text is not None), row)


class _Place(NamedTuple):
    """A file of an episode, and the episode's span in it; or a fault if these are unknown."""

    name: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    fault: str | None = None


_INDICES = ("chunk_index", "file_index")
_BOUNDS = ("from_timestamp", "to_timestamp")


def _place(base: str, info: _Info, episode: _Episode, feature: str) -> _Place:
    """The place of an episode's rows (``data``) or frames (``videos/CAMERA``)."""
    camera = feature.removeprefix("videos/")
    template = info.data_path if feature == "data" else info.video_path
    if info.version == 2:
        chunk = episode.number // info.chunks_size
        return _Place(_fill(base, template, video_key=camera, episode_chunk=chunk, episode_index=episode.number))
    columns = _INDICES if feature == "data" else _INDICES + _BOUNDS
    values: list[Any] = [episode.row.get(f"{feature}/{column}") for column in columns]
    if any(value is None or math.isnan(value) for value in values):  # pandas writes NaN for missing values
        return _Place(
            f"{feature}/episode_{episode.number:06d}", fault=f"meta/episodes does not say where its {feature} is"
        )
    name = _fill(base, template, video_key=camera, chunk_index=int(values[0]), file_index=int(values[1]))
    return _Place(name) if feature == "data" else _Place(name, float(values[2]), float(values[3]))


def _fill(base: str, template: str, **values: Any) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"meta/info.json of {base} has a template that cannot be filled: {template}") from error


# ------------------------------------------------------------------------------------------------ rows


def read_rows(source: SourceConfig, actions: str) -> TimedRows:
    """Reads the rows of actions of one episode.

    Args:
        source: gives the columns.
        actions: ``actions`` of the listed video: the parquet file, ``#``, and the episode.

    Raises:
        DamagedVideo: the file is damaged, or lacks these rows.
        FileNotFoundError: the file is missing.
    """
    name, _, number = actions.rpartition("#")
    episode = int(number)
    with storage.open_to_read(storage.join(storage.absolute(source.url), name), _BLOCK_BYTES) as file:
        try:
            table = pq.ParquetFile(file)
            names = _columns(source, table.schema_arrow.names)
            columns = ["episode_index", "timestamp", *names]
            if missing := [name for name in columns if name not in table.schema_arrow.names]:
                raise DamagedVideo(f"the rows of actions have no column {missing[0]}")
            groups = [number for number in range(table.num_row_groups) if _may_hold(table, number, episode)]
            rows = table.read_row_groups(groups, columns).filter(pc.field("episode_index") == episode)
            if not rows.num_rows:
                raise DamagedVideo(f"there are no rows of actions of episode {episode}")
            parts = [np.array(rows[name].to_pylist(), np.float32).reshape(rows.num_rows, -1) for name in names]
            seconds = np.array(rows["timestamp"].to_pylist(), np.float64)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise DamagedVideo(f"the rows of actions cannot be read: {_line(error)}") from error
    values = np.concatenate(parts, axis=1)
    if not (np.isfinite(values).all() and np.isfinite(seconds).all()):  # missing values became NaN
        raise DamagedVideo(f"the rows of actions of episode {episode} lack a value, or hold one that is not finite")
    return TimedRows(values, seconds)


def _may_hold(table: pq.ParquetFile, group: int, episode: int) -> bool:
    """Whether a row group may hold rows of an episode by its statistics; lerobot writes one group per episode."""
    described = table.metadata.row_group(group)
    columns = (described.column(number) for number in range(described.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == "episode_index")
    return statistics is None or not statistics.has_min_max or statistics.min <= episode <= statistics.max


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
