"""What users give a generator: frames, actions, embeddings; checked, and one for each sample.

n: frames that are given   T: frames of a video   t, h, w: latents of the window
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipmill import storage
from clipmill.api.arrays import as_videos, described
from clipmill.api.tokenizer import Tokenizer
from clipmill.errors import UserError
from clipmill.models.vqvae import num_frames_of, whole_latents_of
from clipmill.sampling.arrays import check_array, read_array
from clipmill.sampling.frames import FrameReader, encode_first
from clipmill.sampling.long import VideoLength

__all__ = ["Condition", "Frames", "GeneratorInfo", "given_condition", "given_frames"]

Frames = np.ndarray | Tensor | str | Path | Sequence[str | Path]
"""Frames that are given: uint8 [n, H, W, 3] for all samples or [num, n, H, W, 3]; or paths of videos or pictures."""
Condition = np.ndarray | Tensor | str | Path
"""Actions or an embedding: an array for all samples, or with an axis of samples in front; or a ``.npy`` file."""


@dataclass(frozen=True)
class GeneratorInfo:
    """What a generator is.

    Attributes:
        sha8: name of its export.
        step: training steps behind it.
        classes: that it knows; empty for one without classes.
        condition: ``frames``, ``actions`` or ``text``; None for one that needs nothing.
        condition_shape: of one clip's condition.
        num_frames: T of its window; longer videos slide it.
        height: H.
        width: W.
        fps: frames per second; None where the training clips kept the rates of their videos.
        codes_shape: (t, h, w) or (t, h, w, M) of the window.
        num_codes: K.
        num_parameters: numbers that were trained, without the tokenizer.
    """

    sha8: str
    step: int
    classes: tuple[str, ...]
    condition: str | None
    condition_shape: tuple[int, ...] | None
    num_frames: int
    height: int
    width: int
    fps: float | None
    codes_shape: tuple[int, ...]
    num_codes: int
    num_parameters: int

    @property
    def frames_shown(self) -> int:
        """Frames that it is conditioned on; 0 for one that is not."""
        return self.condition_shape[0] if self.condition == "frames" and self.condition_shape else 0


def given_frames(
    info: GeneratorInfo,
    tokenizer: Tokenizer,
    length: VideoLength,
    num: int,
    frames: Frames | None,
    prefix_latents: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """First latents int64 [num, n, h, w] or [num, n, h, w, M], and the condition's frames; None if not given.

    Args:
        info: of the generator.
        tokenizer: of the generator.
        length: of the videos, of which something must be left to make.
        num: samples.
        frames: as a user gives them.
        prefix_latents: how many first latents to take; None: 0 for a generator conditioned on frames, else all whole
            ones of an array, and 1 of a file.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    if frames is None:
        if prefix_latents:
            raise UserError(f"prefix_latents={prefix_latents} needs first_frames to take them from")
        return None, None
    read = _read_arrays if isinstance(frames, np.ndarray | Tensor) else _read_files
    clips, num_latents = read(info, tokenizer, frames, prefix_latents)  # type: ignore[arg-type]
    if len(clips) not in (1, num):
        raise UserError(f"first_frames are of {len(clips)} videos, of {num} asked for; give one, or one for each")
    most = min(length.window_latents, length.num_latents - 1)
    if num_latents > most:
        raise UserError(
            f"{num_latents} latent frames are given, of {length.num_latents} that the video has; give fewer frames, at "
            f"most {num_frames_of(tokenizer.model.config, most)}, or raise num_frames"
        )
    prefix = shown = None
    if num_latents:
        rows = [encode_first(tokenizer.model, clip, tokenizer.info.num_frames, num_latents) for clip in clips]
        prefix = _one_for_each(rows, num)
    if info.condition == "frames":
        shown = _one_for_each([torch.from_numpy(clip[: info.frames_shown].copy()) for clip in clips], num)
    return prefix, shown


def _one_for_each(rows: list[Tensor], num: int) -> Tensor:
    return torch.stack(rows * num if len(rows) == 1 else rows)


def _read_files(
    info: GeneratorInfo, tokenizer: Tokenizer, frames: str | Path | Sequence[str | Path], prefix_latents: int | None
) -> tuple[list[np.ndarray], int]:
    """Clips uint8 [n, H, W, 3] of files, and how many first latents to take."""
    num_latents = prefix_latents if prefix_latents is not None else 0 if info.frames_shown else 1
    needed = max(num_frames_of(tokenizer.model.config, num_latents), info.frames_shown)
    if not needed:
        raise UserError("prefix_latents=0 takes nothing of first_frames; leave both out")
    urls = [frames] if isinstance(frames, str | Path) else list(frames)
    with FrameReader(tokenizer.clip) as reader:
        wanted = tokenizer.info.num_frames if num_latents else None
        return [reader.read(storage.absolute(str(url)), needed, wanted) for url in urls], num_latents


def _read_arrays(
    info: GeneratorInfo, tokenizer: Tokenizer, frames: np.ndarray | Tensor, prefix_latents: int | None
) -> tuple[list[np.ndarray], int]:
    """As `_read_files`, of an array."""
    videos, _ = as_videos(frames, "first_frames")
    if tuple(videos.shape[2:4]) != (info.height, info.width):
        raise UserError(
            f"first_frames are {described(videos)}, this generator makes {info.height} x {info.width} pixels; resize "
            "them, or give a path: files are resized"
        )
    whole = whole_latents_of(tokenizer.model.config, videos.shape[1])
    num_latents = prefix_latents if prefix_latents is not None else 0 if info.frames_shown else max(1, whole)
    needed = max(num_frames_of(tokenizer.model.config, num_latents), info.frames_shown)
    if videos.shape[1] < needed or not needed:
        raise UserError(
            f"first_frames are {videos.shape[1]} frames, this generator needs {max(1, needed)}; give more, or the path "
            "of a picture"
        )
    return list(videos.numpy()), num_latents


def given_condition(
    info: GeneratorInfo, length: VideoLength, num: int, frames: Tensor | None, arrays: Mapping[str, Condition | None]
) -> Tensor | None:
    """What a generator is conditioned on, of each sample; None for one without.

    Args:
        info: of the generator.
        length: of the videos: those that are longer than the window take all actions.
        num: samples.
        frames: of the condition, uint8 [num, n, H, W, 3].
        arrays: actions and text, as a user gives them.

    Raises:
        UserError: it is missing, cannot be read or does not fit, or is of another kind.
    """
    kind, shape = info.condition, info.condition_shape or ()
    for name, array in arrays.items():
        if array is not None and name != kind:
            raise UserError(f"this generator is conditioned on {kind or 'nothing'}; leave {name} out")
    if kind is None:
        return None
    if kind == "frames":
        if frames is None:
            raise UserError(f"this generator is conditioned on {shape[0]} frames; give first_frames, such as a picture")
        return frames
    given, name = arrays[kind], kind
    if given is None:
        raise UserError(f"this generator is conditioned on {kind}; give {kind}, float {list(shape)} or a .npy file")
    if isinstance(given, str | Path):
        name = storage.shown(str(given))
        given = read_array(storage.absolute(str(given)))
    array = np.asarray(given, np.float32)
    rows = list(array) if array.ndim == len(shape) + 1 else [array]
    if len(rows) not in (1, num):
        raise UserError(f"{name} is of {len(rows)} videos, of {num} asked for; give one, or one for each")
    last = length.num_frames if length.slides and kind == "actions" else shape[0]
    return _one_for_each([torch.from_numpy(check_array(row, shape, name, kind)[:last].copy()) for row in rows], num)
