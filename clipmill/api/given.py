"""Inputs of a generator from users: frames, actions and embeddings, validated and expanded to one for each sample.

n: number of given frames   T: frames of a video   t, h, w: latents of the window
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
"""First frames: uint8 [n, H, W, 3] for all samples, or [num, n, H, W, 3]; or paths of videos or pictures."""
Condition = np.ndarray | Tensor | str | Path
"""Actions or an embedding: an array for all samples, an array with a first axis of samples, or a ``.npy`` file."""


@dataclass(frozen=True)
class GeneratorInfo:
    """Sizes, classes and condition of a generator.

    Attributes:
        sha8: name of its export.
        step: number of training steps.
        classes: names of its classes; empty for a generator without classes.
        condition: ``frames``, ``actions`` or ``text``; None for a generator without a condition.
        condition_shape: shape of one clip's condition; None without a condition.
        num_frames: length T of its window; for longer videos the window slides.
        height: H in pixels.
        width: W in pixels.
        fps: frames per second; None if the training clips kept the rates of their videos.
        codes_shape: (t, h, w) or (t, h, w, M) of the window.
        num_codes: number of codes K in a codebook.
        num_parameters: number of trained parameters, without the tokenizer.
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
        """Number of frames that it is conditioned on; 0 for any other condition."""
        return self.condition_shape[0] if self.condition == "frames" and self.condition_shape else 0


def given_frames(
    info: GeneratorInfo,
    tokenizer: Tokenizer,
    length: VideoLength,
    num: int,
    frames: Frames | None,
    prefix_latents: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The prefix, int64 [num, n, h, w] or [num, n, h, w, M], and the frames to condition on; None for either if unused.

    Args:
        info: info of the generator.
        tokenizer: tokenizer of the generator.
        length: length of the videos; it must exceed the prefix.
        num: number of samples.
        frames: first frames, in any form of `Frames`.
        prefix_latents: number of latent frames in the prefix. None uses 0 for a generator conditioned on frames;
            otherwise all whole latent frames of an array, and 1 of a file.

    Raises:
        UserError: the frames cannot be read, or do not fit the generator.
    """
    if frames is None:
        if prefix_latents:
            raise UserError(f"prefix_latents={prefix_latents} needs first_frames; give them, or remove prefix_latents")
        return None, None
    read = _read_arrays if isinstance(frames, np.ndarray | Tensor) else _read_files
    clips, num_latents = read(info, tokenizer, frames, prefix_latents)  # type: ignore[arg-type]
    if len(clips) not in (1, num):
        raise UserError(f"first_frames has {len(clips)} videos for {num} samples; give one, or one for each")
    most = min(length.window_latents, length.num_latents - 1)
    if num_latents > most:
        raise UserError(
            f"first_frames give {num_latents} of the video's {length.num_latents} latent frames, too many to continue; "
            f"give at most {num_frames_of(tokenizer.model.config, most)} frames, or raise num_frames"
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
    """Reads clips uint8 [n, H, W, 3] from files; also returns the number of latent frames in the prefix."""
    num_latents = prefix_latents if prefix_latents is not None else 0 if info.frames_shown else 1
    needed = max(num_frames_of(tokenizer.model.config, num_latents), info.frames_shown)
    if not needed:
        raise UserError("prefix_latents=0 uses no frame of first_frames; remove both")
    urls = [frames] if isinstance(frames, str | Path) else list(frames)
    with FrameReader(tokenizer.clip) as reader:
        wanted = tokenizer.info.num_frames if num_latents else None
        return [reader.read(storage.absolute(str(url)), needed, wanted) for url in urls], num_latents


def _read_arrays(
    info: GeneratorInfo, tokenizer: Tokenizer, frames: np.ndarray | Tensor, prefix_latents: int | None
) -> tuple[list[np.ndarray], int]:
    """As `_read_files`, but from an array."""
    videos, _ = as_videos(frames, "first_frames")
    if tuple(videos.shape[2:4]) != (info.height, info.width):
        raise UserError(
            f"first_frames are {described(videos)}, but this generator makes {info.height} x {info.width} pixels; "
            "resize them, or give a path: frames of files are resized"
        )
    whole = whole_latents_of(tokenizer.model.config, videos.shape[1])
    num_latents = prefix_latents if prefix_latents is not None else 0 if info.frames_shown else max(1, whole)
    needed = max(num_frames_of(tokenizer.model.config, num_latents), info.frames_shown)
    if videos.shape[1] < needed or not needed:
        raise UserError(
            f"first_frames has {videos.shape[1]} frames, but this generator needs {max(1, needed)}; give more, or the "
            "path of a picture"
        )
    return list(videos.numpy()), num_latents


def given_condition(
    info: GeneratorInfo, length: VideoLength, num: int, frames: Tensor | None, arrays: Mapping[str, Condition | None]
) -> Tensor | None:
    """The condition of each sample, [num, ...]; None for a generator without a condition.

    Args:
        info: info of the generator.
        length: length of the videos; videos longer than the window use all given actions.
        num: number of samples.
        frames: frames to condition on, uint8 [num, n, H, W, 3].
        arrays: actions and text by name, in any form of `Condition`.

    Raises:
        UserError: the condition is missing, cannot be read, does not fit, or is of a kind that the generator lacks.
    """
    kind, shape = info.condition, info.condition_shape or ()
    for name, array in arrays.items():
        if array is not None and name != kind:
            raise UserError(f"this generator is conditioned on {kind or 'nothing'}; remove {name}")
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
        raise UserError(f"{name} is for {len(rows)} videos, but {num} samples are wanted; give one, or one for each")
    last = length.num_frames if length.slides and kind == "actions" else shape[0]
    return _one_for_each([torch.from_numpy(check_array(row, shape, name, kind)[:last].copy()) for row in rows], num)
