"""A tokenizer: encodes videos to codes, and decodes codes to videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill import storage
from clipmill.api.arrays import as_codes, as_videos
from clipmill.errors import UserError
from clipmill.models.chunks import decode_to_pixels
from clipmill.models.vqvae import VQVAE, to_input
from clipmill.sampling.frames import FrameReader, clip_rule

__all__ = ["Tokenizer", "TokenizerInfo"]

_BATCH = 16
"""Clips that are encoded or decoded at once."""


@dataclass(frozen=True)
class TokenizerInfo:
    """Sizes of a tokenizer.

    Attributes:
        sha8: name of its export.
        step: number of training steps.
        num_frames: frames T of its training clips.
        height: height H of its training clips in pixels.
        width: width W of its training clips in pixels.
        fps: frames per second of its training clips; None if they kept the rates of their videos.
        downsample: factors by which it divides T, H and W.
        causal: whether the first frame has a latent frame of its own, so that T is 1 + a multiple of ``downsample[0]``.
        codes_shape: (t, h, w) or (t, h, w, M) of a training clip.
        num_codes: number of codes K in a codebook; codes are 0 .. K - 1.
        num_parameters: number of trained parameters.
    """

    sha8: str
    step: int
    num_frames: int
    height: int
    width: int
    fps: float | None
    downsample: tuple[int, int, int]
    causal: bool
    codes_shape: tuple[int, ...]
    num_codes: int
    num_parameters: int


class Tokenizer:
    """A tokenizer in eval mode and without gradients; create it with `clipmill.load`.

    Attributes:
        info: sizes of the tokenizer.
        model: the network.
        body: body of its export.
    """

    def __init__(self, model: VQVAE, body: dict[str, Any]) -> None:
        self.model, self.body = model, body
        self.clip = clip_rule(body)
        self.info = TokenizerInfo(
            sha8=body["sha8"],
            step=body["step"],
            num_frames=self.clip.num_frames,
            height=self.clip.size[0],
            width=self.clip.size[1],
            fps=self.clip.fps,
            downsample=model.config.downsample,
            causal=model.config.causal,
            codes_shape=tuple(body["latent_shape"]),
            num_codes=body["num_codes"],
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.info})"

    @property
    def device(self) -> torch.device:
        """Device that the tokenizer computes on."""
        return self.model.from_latent.weight.device

    @torch.no_grad()
    def encode(self, video: np.ndarray | Tensor | str | Path, *, num_frames: int | None = None) -> Tensor:
        """Encodes a video to codes.

        Args:
            video: uint8 [T, H, W, 3] or [B, T, H, W, 3]; or the path or URL of a video or picture, whose frames are cut
                and resized by the tokenizer's clip rule (a picture is repeated).
            num_frames: frames to read from the start of a file; None reads the length of a training clip.

        Returns:
            int64 [t, h, w] or [t, h, w, M] on the CPU, with a first axis B if the input has one.

        Raises:
            UserError: the array has another dtype, its shape is not divisible by ``downsample``, or the file cannot be
                read or is too short.
        """
        if isinstance(video, str | Path):
            with FrameReader(self.clip) as reader:
                video = reader.read(storage.absolute(str(video)), num_frames or self.info.num_frames)
        elif num_frames is not None:
            raise UserError("num_frames applies to files; slice the array instead: video[..., :num_frames, :, :, :]")
        videos, is_single = as_videos(video)
        self._check_size(videos)
        batches = [self.model.encode(to_input(batch.to(self.device))).cpu() for batch in videos.split(_BATCH)]
        codes = torch.cat(batches)
        return codes[0] if is_single else codes

    def decode(self, codes: np.ndarray | Tensor) -> Tensor:
        """Decodes codes to a video, uint8 [T, H, W, 3] on the CPU, with a first axis B if the codes have one.

        Args:
            codes: integers [t, h, w] or [t, h, w, M], or with a first axis B. Clips larger than a training clip are
                decoded in overlapping chunks.

        Raises:
            UserError: the codes have another dtype or shape, or are out of range.
        """
        batch, is_single = as_codes(codes, self.info.codes_shape[1:], self.info.num_codes)
        trained = self.info.codes_shape[:3]
        videos = [decode_to_pixels(self.model, part.to(self.device), trained) for part in batch.split(_BATCH)]
        whole = torch.cat(videos)  # makes an ordinary tensor from inference tensors, so a user may train on it
        return whole[0] if is_single else whole

    def _check_size(self, videos: Tensor) -> None:
        first = 1 if self.info.causal else 0
        num_frames, height, width = videos.shape[1:4]
        lengths = (num_frames - first, height, width)
        if all(length % by == 0 for length, by in zip(lengths, self.info.downsample, strict=True)) and num_frames > 0:
            return
        step, rows, columns = self.info.downsample
        rule = f"1 + a multiple of {step}" if first else f"a multiple of {step}"
        raise UserError(
            f"a video of {num_frames} frames of {height} x {width} pixels does not fit: this tokenizer takes {rule} "
            f"frames of multiples of {rows} x {columns} pixels (it was trained on {self.info.num_frames} frames of "
            f"{self.info.height} x {self.info.width}); cut or pad the video"
        )
