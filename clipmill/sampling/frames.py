"""Reads a user's video or picture by the tokenizer's clip rule, as frames to condition on or to continue.

T: frames of the tokenizer's clip   n: number of given frames   t: latent frames
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from clipmill import storage
from clipmill.config import ClipConfig
from clipmill.errors import StageFailed, UserError
from clipmill.models.vqvae import VQVAE, to_input
from clipmill.scratch import ScratchFolder
from clipmill.video import BadVideo, Decoder, DecoderLost, Limits
from clipmill.video.kinds import HEAD_BYTES, PICTURE_SUFFIXES, is_video_head, suffix_of

__all__ = ["FrameReader", "clip_rule", "encode_first"]

_LIMITS = Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, no_progress_seconds=120)
_RULE = ("num_frames", "resolution", "fit", "fps", "frame_stride")
"""Keys of the recorded clip rule that determine size and timing of frames. The other keys select clips."""


def clip_rule(body: Mapping[str, Any]) -> ClipConfig:
    """The clip rule of a tokenizer's training clips; keys that its export does not record have their defaults.

    Args:
        body: body of the tokenizer's export.
    """
    recorded = body["clip"]["clip"]
    known = {key: recorded[key] for key in _RULE if recorded.get(key) is not None}
    return ClipConfig.model_validate(known | {"max_clips_per_video": 1})


@torch.inference_mode()
def encode_first(tokenizer: VQVAE, frames: np.ndarray, num_frames: int, num_latents: int) -> Tensor:
    """Encodes the first latent frames of one clip: int64 [num_latents, h, w] or [num_latents, h, w, M], on the CPU.

    Args:
        tokenizer: the tokenizer in eval mode.
        frames: uint8 [n, H, W, 3], at least the frames that these latents cover. Fewer than ``num_frames`` frames are
            padded with the last one, because a tokenizer that is not causal needs the later frames of a clip.
        num_frames: T.
        num_latents: number of latent frames to return.
    """
    missing = np.repeat(frames[-1:], max(0, num_frames - len(frames)), axis=0)
    clip = torch.from_numpy(np.concatenate((frames[:num_frames], missing)))
    device = next(tokenizer.parameters()).device
    return tokenizer.encode(to_input(clip[None].to(device)))[0, :num_latents].cpu()


class FrameReader:
    """Reads the first frames of videos, and pictures, in a decoding child process.

    Args:
        clip: clip rule of the tokenizer, see `clip_rule`.
    """

    def __init__(self, clip: ClipConfig) -> None:
        self.clip = clip
        self._decoder = Decoder(_LIMITS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoder.close()

    def read(self, url: str, num_needed: int, num_wanted: int | None = None) -> np.ndarray:
        """The first frames of a video, uint8 [n, H, W, 3], n = ``num_wanted`` or else ``num_needed``.

        A picture becomes ``num_needed`` equal frames. A video shorter than ``num_wanted`` returns ``num_needed``
        frames.

        Args:
            url: URL of a video or a picture.
            num_needed: number of frames that the video must have.
            num_wanted: number of frames to read if the video has them; None reads ``num_needed``.

        Raises:
            UserError: there is no such file, it cannot be read, or it has fewer frames than needed.
            StageFailed: another process killed the decoding child.
        """
        with ScratchFolder("given") as folder:
            path = _local(url, folder)
            try:
                if _is_picture(path, url):
                    return np.repeat(self._decoder.picture(path, self.clip)[None], num_needed, axis=0)
                for num_frames in dict.fromkeys((num_wanted or num_needed, num_needed)):
                    clip = self.clip.model_copy(update={"num_frames": num_frames})
                    for found in self._decoder.clips(path, clip, encode=("npy", None)):
                        return np.array(found.data)
            except BadVideo as bad:
                raise UserError(
                    f"{storage.shown(url)} cannot be read: {bad.cause}; give a video or a picture that plays"
                ) from bad
            except DecoderLost as lost:
                raise StageFailed(f"{storage.shown(url)} was not read: {lost}") from lost
        rate = f" at {self.clip.fps:g} frames a second" if self.clip.fps else ""
        stride = f", taking each {self.clip.frame_stride}th" if self.clip.frame_stride > 1 else ""
        raise UserError(
            f"{storage.shown(url)} is too short: the model needs {num_needed} frames{rate}{stride}; give a longer "
            "video, or a picture"
        )


def _local(url: str, folder: Path) -> Path:
    try:
        if storage.is_local(url):
            storage.stat(url)
            return storage.local_path(url)
        path = folder / f"given{suffix_of(storage.split(url)[1])}"
        storage.fetch(url, path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {storage.shown(url)}; name a video or a picture") from error
    return path


def _is_picture(path: Path, url: str) -> bool:
    """Whether a file is a still picture, by its name; for formats that can be animated, also by its content."""
    if suffix_of(storage.split(url)[1]) not in PICTURE_SUFFIXES:
        return False
    with path.open("rb") as file:
        return not is_video_head(file.read(HEAD_BYTES))
