"""Videos of any length from a prior of a fixed window.

The window slides over the latent frames. It starts with the last known latent frames, at the positions that the prior
was trained on, and draws the others. The last window ends with the video. The memory of a window does not depend on the
length of the video.

B: batch   t: latent frames of the window   L: latent frames of the video   T: frames of the video   n: frames of a
condition
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from clipmill.config import PriorModelConfig, VQVAEModelConfig
from clipmill.errors import UserError
from clipmill.models.chunks import decode_to_pixels
from clipmill.models.export import model_config
from clipmill.models.vqvae import VQVAE, num_frames_of, to_pixels, whole_latents_of

__all__ = ["Batch", "DrawWindow", "VideoLength", "Videos", "nearest_num_frames", "sample_videos", "video_length"]


T = TypeVar("T")

DECODED_VIDEOS = 16
"""Number of videos decoded at once: more are not faster, and the prior needs the memory."""


class DrawWindow(Protocol):
    """`clipmill.sampling.generate.generate` with all other arguments bound."""

    def __call__(self, *, condition: Tensor | None, prefix: Tensor | None, first_frame: int) -> Tensor:
        """Codes int64 [B, t, h, w] or [B, t, h, w, M] of one window."""


class Batch(NamedTuple):
    """Videos that are drawn together.

    Attributes:
        draw: draws one window: `generate` with prior, seed, indices, labels and filters bound.
        condition: condition of each video (see `clipmill.models.conditioning`). Actions cover all T frames. For a prior
            conditioned on frames, these are the first frames of the video; later windows use generated frames.
        prefix: known first latent frames, int64 [B, n, h, w] or [B, n, h, w, M], n < L.
    """

    draw: DrawWindow
    condition: Tensor | None = None
    prefix: Tensor | None = None


class Videos(NamedTuple):
    """Result of `sample_videos` for a batch, on the CPU."""

    codes: Tensor
    """int64 [B, L, h, w] or [B, L, h, w, M]."""
    pixels: Tensor
    """uint8 [B, T, H, W, 3]."""


@dataclass(frozen=True)
class VideoLength:
    """Length of videos, and how the window slides over them; created by `video_length`.

    Attributes:
        num_frames: T.
        num_latents: L.
        window_frames: frames of the window.
        window_latents: t.
        overlap_latents: latent frames that a window shares with the previous one, 1 .. t - 1; 0 if one window suffices.
        frames_per_latent: frames by which the window moves for each latent frame.
        condition: kind of the prior's condition.
        condition_frames: n for a prior conditioned on frames or actions, else 0.
    """

    num_frames: int
    num_latents: int
    window_frames: int
    window_latents: int
    overlap_latents: int
    frames_per_latent: int
    condition: str | None
    condition_frames: int

    @property
    def slides(self) -> bool:
        """Whether a video takes more than one window."""
        return self.num_latents > self.window_latents

    def start(self, num_known: int) -> int:
        """Latent frame at which the next window begins, given the number of known latent frames."""
        if num_known < self.window_latents:
            return 0
        return min(num_known - self.overlap_latents, self.num_latents - self.window_latents)


def video_length(body: Mapping[str, Any], num_frames: int | None, overlap_latents: int | None = None) -> VideoLength:
    """Computes the length of a prior's videos.

    Args:
        body: body of the prior's export.
        num_frames: T; None uses the length of the window.
        overlap_latents: latent frames that consecutive windows share; None uses three quarters of the window, or more
            if the condition needs more.

    Raises:
        UserError: the prior cannot make videos of this length, or its windows cannot have this overlap.
    """
    settings = model_config(body["tokenizer"], VQVAEModelConfig)
    model = model_config(body, PriorModelConfig)
    step, absent = settings.downsample[0], settings.downsample[0] - 1 if settings.causal else 0
    window_latents = body["latent_shape"][0]
    window_frames = num_frames_of(settings, window_latents)
    num_frames = window_frames if num_frames is None else num_frames
    nearest = _round_up(num_frames, window_frames, step)
    if num_frames != nearest:
        raise UserError(
            f"num_frames={num_frames}: this prior makes {window_frames} frames, or more in steps of {step}; set it to "
            f"{nearest}"
        )
    condition_frames = body["condition_shape"][0] if model.condition in ("frames", "actions") else 0
    overlap = 0
    if num_frames > window_frames:
        shown = condition_frames if model.condition == "frames" else 1
        overlap = _overlap(window_latents, overlap_latents, -(-(shown + absent) // step))
    return VideoLength(
        num_frames,
        whole_latents_of(settings, num_frames),
        window_frames,
        window_latents,
        overlap,
        step,
        model.condition,
        condition_frames,
    )


def nearest_num_frames(body: Mapping[str, Any], at_least: int) -> int:
    """The smallest number of frames that a prior can make and that is not below ``at_least``.

    Args:
        body: body of the prior's export.
        at_least: wanted number of frames.
    """
    window = video_length(body, None)
    return _round_up(at_least, window.window_frames, window.frames_per_latent)


def _round_up(num_frames: int, window_frames: int, step: int) -> int:
    return window_frames + max(0, -(-(num_frames - window_frames) // step)) * step


def _overlap(window_latents: int, wanted: int | None, least: int) -> int:
    """Latent frames that consecutive windows share.

    Args:
        window_latents: t.
        wanted: the user's setting; None uses the default.
        least: smallest possible overlap, which holds the frames that the next window is conditioned on.
    """
    if least >= window_latents:
        raise UserError(
            f"num_frames exceeds the window of this prior, which cannot slide: of its {window_latents} latent frames, "
            f"{least} must be known; remove num_frames"
        )
    usual = max(least, window_latents * 3 // 4)
    if wanted is None:
        return usual
    if not least <= wanted < window_latents:
        raise UserError(
            f"overlap_latents={wanted}: windows of {window_latents} latent frames of this prior can overlap by {least} "
            f"to {window_latents - 1}; remove it for the default {usual}"
        )
    return wanted


def sample_videos(
    batches: Iterable[Batch],
    tokenizer: VQVAE,
    length: VideoLength,
    finish: Callable[[int, Videos], T],
) -> Iterator[T]:
    """Draws videos of any length; each batch is decoded and finished in a thread while the next one is drawn.

    Args:
        batches: the batches, in order.
        tokenizer: the prior's tokenizer, in eval mode on its device.
        length: length of the videos.
        finish: called in the thread with the number of a batch and its videos.

    Yields:
        The results of ``finish``, in order.

    Raises:
        UserError: there are fewer actions than frames, or `generate` refuses an input.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="decode-samples") as thread:
        decoding: Future[T] | None = None
        for number, batch in enumerate(batches):
            codes = _draw_codes(batch, tokenizer, length)
            if decoding is not None:
                yield decoding.result()
            drawn = torch.cuda.current_stream(codes.device).record_event() if codes.is_cuda else None
            decoding = thread.submit(_decode, tokenizer, length, codes, drawn, functools.partial(finish, number))
        if decoding is not None:
            yield decoding.result()


@torch.inference_mode()
def _draw_codes(batch: Batch, tokenizer: VQVAE, length: VideoLength) -> Tensor:
    """Codes int64 [B, L, h, w] or [B, L, h, w, M]."""
    prefix = batch.prefix
    codes = None if prefix is None else prefix.to(tokenizer.from_latent.weight.device)
    num_known = 0 if prefix is None else prefix.shape[1]
    _check_given(length, batch.condition, num_known)
    while num_known < length.num_latents:
        start = length.start(num_known)
        known = None if codes is None or num_known == start else codes[:, start:]
        condition = _condition_at(tokenizer, length, start, batch.condition, codes)
        window = batch.draw(condition=condition, prefix=known, first_frame=start)
        new = window[:, num_known - start :]
        codes = new if codes is None else torch.cat((codes, new), 1)
        num_known = start + length.window_latents
    assert codes is not None
    return codes


def _decode(
    tokenizer: VQVAE,
    length: VideoLength,
    codes: Tensor,
    drawn: torch.cuda.Event | None,
    finish: Callable[[Videos], T],
) -> T:
    """Decodes and finishes a batch; on a GPU, the event ``drawn`` marks when its codes are computed."""
    trained = (length.window_latents, *codes.shape[2:4])
    with _beside(codes, drawn):
        pixels = [decode_to_pixels(tokenizer, part, trained) for part in codes.split(DECODED_VIDEOS)]
        return finish(Videos(codes.cpu(), torch.cat(pixels)))


@contextmanager
def _beside(codes: Tensor, drawn: torch.cuda.Event | None) -> Iterator[None]:
    """On a GPU, uses a separate stream; otherwise decoding would wait for the launched steps of the next batch."""
    if drawn is None:
        yield
        return
    stream = torch.cuda.Stream(codes.device)
    stream.wait_event(drawn)
    codes.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def _check_given(length: VideoLength, condition: Tensor | None, num_known: int) -> None:
    if num_known >= length.num_latents:
        raise UserError(
            f"the given frames fill {num_known} latent frames, but the video has only {length.num_latents}; give "
            "fewer, or raise num_frames"
        )
    if condition is None or length.condition != "actions" or not length.slides:
        return
    if condition.shape[1] < length.num_frames:
        raise UserError(
            f"the given actions cover {condition.shape[1]} frames, but the video has {length.num_frames}; give actions "
            "for every frame, or lower num_frames"
        )


def _condition_at(
    tokenizer: VQVAE, length: VideoLength, start: int, condition: Tensor | None, codes: Tensor | None
) -> Tensor | None:
    """The condition of the window that begins at a latent frame."""
    first = start * length.frames_per_latent  # with a causal tokenizer, the last frame of that latent
    if condition is None or not length.slides or length.condition == "text":
        return condition
    if length.condition == "actions":
        return condition[:, first : first + length.condition_frames]
    if not first or codes is None:
        return condition
    behind = max(0, codes.shape[1] - length.window_latents)
    seen = to_pixels(tokenizer.decode(codes[:, behind:]))
    offset = first - behind * length.frames_per_latent
    return seen[:, offset : offset + length.condition_frames]
