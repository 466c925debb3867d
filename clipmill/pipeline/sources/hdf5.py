"""VideoGPT's HDF5 layout: all frames of a split in one array, and the index of each video's first frame.

``{train,test}_data`` uint8 [frames, H, W, 3], ``{train,test}_idx`` int [videos], and optionally
``{train,test}_actions`` [frames, action_dim].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import h5py
import numpy as np

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources.record import ArrayVideo, DamagedVideo, SourceVideo, file_identity

__all__ = ["list_videos", "read_array"]

_BLOCK_BYTES = 2**20


def list_videos(source: SourceConfig) -> Iterator[SourceVideo]:
    """Yields the videos of both parts: ``train`` stays train, ``test`` becomes val. A single part is split by hash.

    Raises:
        UserError: the file is not an HDF5 file of this layout.
    """
    url = storage.absolute(source.url)
    entry = storage.stat(url)
    identity = file_identity(url, entry.bytes, entry.etag)
    shown = storage.shown(url)
    with storage.open_to_read(url, _BLOCK_BYTES) as file:
        try:
            content = h5py.File(file, "r")
        except OSError as error:
            raise UserError(
                f"data.source.url {shown} is not a readable HDF5 file: {_line(error)}; restore it"
            ) from error
        with content:
            parts = [part for part in ("train", "test") if _has_part(shown, content, part)]
            if not parts:
                raise UserError(
                    f"data.source.url {shown} holds neither train_data and train_idx nor test_data and test_idx "
                    f"(found: {', '.join(sorted(content)) or 'nothing'}); docs/sources.md shows the layout"
                )
            splits: dict[str, Literal["train", "val"]] = {"train": "train", "test": "val"} if len(parts) == 2 else {}
            for part in parts:
                frames, starts = content[f"{part}_data"], content[f"{part}_idx"][:]
                frame_bytes = int(np.prod(frames.shape[1:]))
                for number, num_frames in enumerate(np.diff(starts, append=len(frames)).tolist()):
                    yield SourceVideo(
                        name=entry.name,
                        bytes=num_frames * frame_bytes,
                        etag=entry.etag,
                        split=splits.get(part),
                        member=f"{part}/{number}",
                        identity=f"{identity}:{part}:{number}",
                    )


def _has_part(url: str, content: Any, part: str) -> bool:
    """Whether a part is present. Raises `UserError` if it does not match the layout."""
    names = [f"{part}_data", f"{part}_idx"]
    try:
        present = [name for name in names if _dataset(content, name) is not None]
    except DamagedVideo as damaged:
        raise UserError(f"data.source.url {url}: {damaged}") from damaged
    if not present:
        return False
    if len(present) == 1:
        (missing,) = set(names) - set(present)
        raise UserError(f"data.source.url {url} holds {present[0]} but no dataset {missing}; add it")
    frames, starts = (content[name] for name in names)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise UserError(
            f"{names[0]} of {url} is {frames.dtype} {list(frames.shape)}; it must be uint8 [frames, height, width, 3]"
        )
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise UserError(f"{names[1]} of {url} is {starts.dtype} {list(starts.shape)}; it must be integers [videos]")
    values = starts[:].astype(np.int64)
    if len(values) and (values[0] < 0 or values[-1] >= len(frames) or (np.diff(values) <= 0).any()):
        raise UserError(
            f"{names[1]} of {url} must increase from video to video, and stay within the {len(frames)} frames"
        )
    return True


def _dataset(content: Any, name: str) -> Any | None:
    """A dataset of this file; None if it does not exist.

    Raises:
        DamagedVideo: its values are in another file. HDF5 would open any file that the dataset names.
    """
    link = content.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise DamagedVideo(f"{name} is a link; copy what it points to into the file")
    dataset = content[name]
    if not isinstance(dataset, h5py.Dataset):
        return None
    if dataset.is_virtual or dataset.external:
        raise DamagedVideo(f"the values of {name} lie in other files; copy them into this one")
    return dataset


def read_array(url: str, member: str, num_bytes: int) -> ArrayVideo:
    """Reads the frames of one video, and its rows of actions if the file has them.

    Raises:
        DamagedVideo: this part of the file cannot be read, or has changed.
        FileNotFoundError: the file is missing.
    """
    part, number = member.split("/")
    with storage.open_to_read(url, _BLOCK_BYTES) as file, _as_damaged_video(), h5py.File(file, "r") as content:
        data, starts, actions = (_dataset(content, f"{part}_{kind}") for kind in ("data", "idx", "actions"))
        if data is None or starts is None:
            raise DamagedVideo(f"changed since it was planned: no {part}_data or {part}_idx")
        bounds = starts[int(number) : int(number) + 2].tolist()
        rows = slice(bounds[0], bounds[1] if len(bounds) == 2 else len(data))
        found_bytes = (rows.stop - rows.start) * int(np.prod(data.shape[1:]))
        if found_bytes != num_bytes:
            raise DamagedVideo(f"changed since it was planned: {num_bytes} -> {found_bytes} bytes")
        frames = data[rows]
        return ArrayVideo(frames, None if actions is None else np.asarray(actions[rows], np.float32))


@contextmanager
def _as_damaged_video() -> Iterator[None]:
    """Turns HDF5's errors into `DamagedVideo`. OSErrors with a number come from the disk or the network and pass."""
    try:
        yield
    except (OSError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedVideo(f"cannot read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
