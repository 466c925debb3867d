"""Prefixes and conditions of samples from files: videos, pictures, actions and embeddings, single, in a folder or
table.

    cat.png, cat.mp4            frames
    cat.npy                     the condition of a prior that needs no frames, alone
    cat.actions.npy             float [T, A], beside the frames of the same name
    cat.text.npy                float [S, E], beside the frames of the same name

The table (`clipmill.tables`) has those of the columns ``url``, ``actions``, ``embedding`` and ``label`` that are
needed; file names in it are relative to its folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from clipmill import storage
from clipmill.config import PriorModelConfig, fingerprint
from clipmill.errors import UserError
from clipmill.models.vqvae import VQVAE, num_frames_of
from clipmill.sampling.arrays import check_array, read_array
from clipmill.sampling.frames import FrameReader, clip_rule, encode_first
from clipmill.tables import SUFFIXES, UnreadableTable, read_rows
from clipmill.video.kinds import PICTURE_SUFFIXES, VIDEO_SUFFIXES, stem_of, suffix_of

__all__ = ["FileList", "GivenFile", "GivenFiles", "list_files"]

_HEAD_BYTES = 2**20
_MOST_FILES = 100_000
_KEPT_CLIPS = 64
"""Number of clips kept after reading, because many samples may reuse a few files."""
_ARRAY_OF = {"actions": "actions", "text": "embedding"}
"""Column of a table for each condition."""


@dataclass(frozen=True)
class GivenFile:
    """The files of one clip.

    Attributes:
        name: file name of its frames, or of its array if it has no frames.
        frames: URL of a video or picture; None without frames.
        array: URL of a ``.npy`` file with the condition; None without one.
        label: its class; None without one.
    """

    name: str
    frames: str | None = None
    array: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class FileList:
    """Given files, in the order in which samples use them.

    Attributes:
        url: URL at which they were found.
        files: the files of each clip; never empty.
    """

    url: str
    files: tuple[GivenFile, ...]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the files' sizes and first bytes; it does not depend on their location."""
        return fingerprint([[file.label, *map(_tag, (file.frames, file.array))] for file in self.files])


def list_files(url: str, condition: str | None, prefix_latents: int) -> FileList:
    """Lists the files that provide prefixes and conditions for a prior.

    Args:
        url: URL of a video, picture or ``.npy`` file, of a folder of them (not searched recursively), or of a table.
        condition: ``condition`` of the prior's config.
        prefix_latents: number of latent frames in the prefix.

    Raises:
        UserError: there are no such files, or one lacks something that the prior needs.
    """
    needs_frames = prefix_latents > 0 or condition == "frames"
    suffix = suffix_of(storage.split(url)[1])
    if suffix in SUFFIXES:
        files = _of_table(url, suffix, condition)
    elif suffix in VIDEO_SUFFIXES | PICTURE_SUFFIXES | {".npy"}:
        folder, name = storage.split(url)
        files = _grouped(folder, [name, *_companions(url)], condition)
    else:
        if storage.is_local(url) and not storage.exists(url):
            raise UserError(
                f"sample.given: there is nothing at {url}; name tokens, a file, or a folder or table of files"
            )
        names = [entry.name for entry in storage.list_folder(url)]
        files = _grouped(url, sorted(name for name in names if not name.startswith(".")), condition)
    if not needs_frames:
        files = [file for file in files if file.array is not None]
    if not files:
        what = "video or picture" if needs_frames else f".npy file of {condition}"
        raise UserError(f"sample.given {storage.shown(url)} holds no {what}; name a file, a folder or a table of them")
    for file in files:
        if needs_frames and file.frames is None:
            raise UserError(f"sample.given: {file.name} at {storage.shown(url)} has no video or picture; add one")
        if condition in _ARRAY_OF and file.array is None:
            raise UserError(
                f"sample.given: the prior is conditioned on {condition}, and {file.name} comes without; put "
                f"{PurePosixPath(file.name).stem}.{condition}.npy beside it, or name it in the table's column "
                f"{_ARRAY_OF[str(condition)]}"
            )
    return FileList(url, tuple(files))


def _companions(url: str) -> list[str]:
    """Names of the arrays that exist beside one file."""
    folder, name = storage.split(url)
    beside = (f"{stem_of(name)}.{condition}.npy" for condition in _ARRAY_OF)
    return [each for each in beside if each != name and storage.exists(storage.join(folder, each))]


def _grouped(folder: str, names: Sequence[str], condition: str | None) -> list[GivenFile]:
    """Groups the files of a folder: each video or picture with the array of the same name."""
    arrays = {name for name in names if name.endswith(".npy")}
    found, taken = [], set()
    for name in names:
        if suffix_of(name) in VIDEO_SUFFIXES | PICTURE_SUFFIXES:
            array = f"{stem_of(name)}.{condition}.npy"
            taken.add(array)
            url = storage.join(folder, array) if array in arrays else None
            found.append(GivenFile(name, storage.join(folder, name), url))
    others = {f".{other}.npy" for other in _ARRAY_OF if other != condition}
    alone = [name for name in names if name in arrays - taken and not name.endswith(tuple(others))]
    found += [GivenFile(name, None, storage.join(folder, name)) for name in alone]
    return sorted(found, key=lambda file: file.name)


def _of_table(url: str, suffix: str, condition: str | None) -> list[GivenFile]:
    folder = storage.split(url)[0]
    found = []
    try:
        with storage.open_to_read(url) as file:
            for row in read_rows(file, suffix):
                cells = {key: str(cell).strip() for key, cell in row.cells.items() if cell not in (None, "")}
                array = cells.get(_ARRAY_OF.get(str(condition), ""))
                name = cells.get("url") or array
                if row.fault is not None or name is None:
                    fault = row.fault or "neither url nor actions nor embedding is set"
                    raise UserError(f"sample.given {storage.shown(url)}, {row.place}: {fault}; correct the row")
                frames, array = (cell and storage.resolve(folder, cell) for cell in (cells.get("url"), array))
                found.append(GivenFile(name, frames, array, cells.get("label")))
                if len(found) > _MOST_FILES:
                    raise UserError(f"sample.given {storage.shown(url)} has more than {_MOST_FILES} rows; shorten it")
    except FileNotFoundError as error:
        raise UserError(f"there is no table {storage.shown(url)}; set sample.given") from error
    except UnreadableTable as error:
        raise UserError(f"sample.given {storage.shown(url)} cannot be read as {suffix}: {error}; repair it") from error
    return found


def _tag(url: str | None) -> str | None:
    """Size and hash of the first bytes of a file."""
    if url is None:
        return None
    try:
        return f"{storage.stat(url).bytes}:{hashlib.sha256(storage.read_start(url, _HEAD_BYTES)).hexdigest()}"
    except FileNotFoundError as error:
        raise UserError(f"sample.given: there is no file {storage.shown(url)}; correct its name") from error


class GivenFiles:
    """Given files as a data set of clips, in the form of a token data set; each is read and encoded on its own.

    Args:
        found: the files.
        body: body of the prior's export.
        tokenizer: the prior's tokenizer, in eval mode.
        config: config of the prior.
        prefix_latents: number of latent frames in the prefix.
    """

    def __init__(
        self, found: FileList, body: dict[str, Any], tokenizer: VQVAE, config: PriorModelConfig, prefix_latents: int
    ) -> None:
        self._found, self._tokenizer = found, tokenizer
        self._condition: str | None = config.condition
        self._shape: list[int] = body.get("condition_shape") or []
        self._prefix_latents = prefix_latents
        self._reader = FrameReader(clip_rule(body["tokenizer"]))
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._found.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip: ``key``, ``codes`` (the prefix), the prior's condition under its name, and ``label`` if it has one.

        Raises:
            UserError: a file cannot be read, is too short, or has another shape.
        """
        if index not in self._kept:
            if len(self._kept) >= _KEPT_CLIPS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[index] = self._read(self._found.files[index])
        return self._kept[index]

    def _read(self, file: GivenFile) -> dict[str, Any]:
        clip: dict[str, Any] = {"key": file.name}
        if file.label is not None:
            clip["label"] = file.label
        if self._condition in _ARRAY_OF:
            array = read_array(str(file.array))
            # Actions may be longer than the window; videos longer than the window use all of them.
            clip[self._condition] = check_array(array, self._shape, storage.shown(str(file.array)), self._condition)
        needed = num_frames_of(self._tokenizer.config, self._prefix_latents)
        num_frames = self._reader.clip.num_frames
        if self._condition == "frames":
            needed = max(needed, self._shape[0])
        if needed:
            frames = self._reader.read(str(file.frames), needed, num_frames if self._prefix_latents else None)
            if self._condition == "frames":
                clip["frames"] = frames[: self._shape[0]]
            if self._prefix_latents:
                clip["codes"] = encode_first(self._tokenizer, frames, num_frames, self._prefix_latents).numpy()
        return clip
