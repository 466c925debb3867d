"""A generator: a prior with its tokenizer makes videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from clipmill.api.given import Condition, Frames, GeneratorInfo, given_condition, given_frames
from clipmill.api.tokenizer import Tokenizer
from clipmill.config import SampleConfig
from clipmill.errors import UserError
from clipmill.models.prior import Prior
from clipmill.sampling.fitting import batch_size_for
from clipmill.sampling.kept import Kept
from clipmill.sampling.long import Batch, VideoLength, sample_videos, video_length
from clipmill.sampling.settings import draw_by

__all__ = ["Generator", "Samples"]

Given = dict[str, Tensor | None]
"""Inputs of all samples by name: labels, condition, prefix."""


class Samples(NamedTuple):
    """What a generator made, on the CPU."""

    videos: Tensor
    """uint8 [num, T, H, W, 3]."""
    codes: Tensor
    """int64 [num, t, h, w] or [num, t, h, w, M]."""


class Generator:
    """A prior with its tokenizer, in eval mode; made by `clipmill.load`. It keeps no gradients.

    Attributes:
        info: what it is.
        tokenizer: its own.
        model: the network itself.
        body: of its export.
    """

    def __init__(self, model: Prior, tokenizer: Tokenizer, body: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.body = model, tokenizer, body
        self._kept = Kept()
        shape = body.get("condition_shape")
        self.info = GeneratorInfo(
            sha8=body["sha8"],
            step=body["step"],
            classes=tuple(body["classes"]),
            condition=model.config.condition,
            condition_shape=None if shape is None else tuple(shape),
            num_frames=video_length(body, None).num_frames,
            height=tokenizer.info.height,
            width=tokenizer.info.width,
            fps=tokenizer.info.fps,
            codes_shape=tuple(body["latent_shape"]),
            num_codes=body["num_codes"],
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    def __repr__(self) -> str:
        return f"Generator({self.info})"

    def sample(
        self,
        num: int = 1,
        *,
        label: str | Sequence[str] | None = None,
        seed: int = 0,
        first_index: int = 0,
        first_frames: Frames | None = None,
        prefix_latents: int | None = None,
        actions: Condition | None = None,
        text: Condition | None = None,
        num_frames: int | None = None,
        overlap_latents: int | None = None,
        guidance: float = 1.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        decoder: Literal["auto", "sequential", "parallel"] = "auto",
        precision: Literal["float32", "bfloat16"] = "float32",
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Draws videos.

        Args:
            num: number of videos.
            label: class of all, or of each; None takes the classes in turn, as the stage ``sample`` does.
            seed: of the noise. Sample i of a seed is the same in any call, up to rounding between batch sizes.
            first_index: i of the first sample.
            first_frames: the condition of a generator that takes frames; for others, the frames to continue from.
            prefix_latents: latent frames to copy from ``first_frames``. None copies 0 for a generator conditioned on
                frames; for others all whole ones of an array, and 1 of a file.
            actions: for a generator conditioned on them, float [T, A].
            text: for a generator conditioned on it, an embedding float [S, E].
            num_frames: T of the videos; None is the window's. Beyond the window, the window slides.
            overlap_latents: of windows that slide; see `clipmill.sampling.long.video_length`.
            guidance: scale of classifier-free guidance; 1 draws without it.
            temperature: divides the logits; one number, or one for each latent frame.
            top_k: keep the k most likely codes of a position; None keeps all.
            top_p: keep the most likely codes up to this probability; 1 keeps all.
            min_p: drop codes whose probability is below this share of the largest one.
            decoder: both draw the same codes, up to rounding; ``auto`` takes the faster one.
            precision: compute dtype of the draw.
            batch_size: videos drawn at once. None is 16 on a CPU, and on a GPU what its memory holds.
            on_progress: gets the number of codes drawn so far, and that of all.

        Raises:
            UserError: an input does not fit this generator; the message says what it takes.
        """
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        how = {"seed": seed, "guidance": guidance, "decoder": decoder, "precision": precision, "batch_size": batch_size}
        settings = self._settings(num_samples=num, **filters, **how)
        length = video_length(self.body, num_frames, overlap_latents)
        prefix, frames = given_frames(self.info, self.tokenizer, length, num, first_frames, prefix_latents)
        condition = given_condition(self.info, length, num, frames, {"actions": actions, "text": text})
        given = {"labels": self._labels(num, label, first_index), "condition": condition, "prefix": prefix}
        progress = _Progress(on_progress, self.info.codes_shape, length, num, 0 if prefix is None else prefix.shape[1])
        return self._draw(settings, length, range(first_index, first_index + num), progress, given)

    def _draw(
        self, settings: SampleConfig, length: VideoLength, indices: range, progress: _Progress, given: Given
    ) -> Samples:
        """Draws and decodes all samples, batch by batch."""
        num = len(indices)
        batch_size = batch_size_for(settings, self.model, self.tokenizer.model, length)
        batches = [slice(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
        drawn = (self._batch(settings, progress, indices[rows], rows, given) for rows in batches)
        made = list(sample_videos(drawn, self.tokenizer.model, length, lambda _, videos: videos))
        # Concatenation makes ordinary tensors, on which a user may train.
        return Samples(torch.cat([each.pixels for each in made]), torch.cat([each.codes for each in made]))

    def _batch(self, settings: SampleConfig, progress: _Progress, indices: range, rows: slice, given: Given) -> Batch:
        """The samples ``indices``, and these rows of what is given to each sample."""
        batch = {name: None if each is None else each[rows] for name, each in given.items()}
        labels = batch.pop("labels")
        return Batch(
            draw_by(settings, self.model, indices, labels, self._kept, progress.of_batch(len(indices))), **batch
        )

    def _settings(self, **settings: Any) -> SampleConfig:
        """The settings of the draw, checked as the config checks them."""
        try:
            wanted = SampleConfig.model_validate(settings)
        except ValidationError as error:
            problem = error.errors()[0]  # of a union each member has its own
            raise UserError(
                f"{problem['loc'][0]}={problem['input']!r}: {problem['msg'].lower()}; correct it"
            ) from error
        if wanted.guidance != 1 and not self.model.guidable:
            raise UserError(
                f"guidance={wanted.guidance:g} needs a generator trained with prior.model.label_dropout or "
                "condition_dropout above 0; leave it out"
            )
        return wanted

    def _labels(self, num: int, label: str | Sequence[str] | None, first_index: int) -> Tensor | None:
        """Class numbers int64 [num]."""
        classes = self.info.classes
        if not classes:
            if label is not None:
                raise UserError("this generator was trained without classes; leave label out")
            return None
        if label is None:
            return torch.arange(first_index, first_index + num) % len(classes)
        names = [label] * num if isinstance(label, str) else list(label)
        if len(names) != num:
            raise UserError(f"{len(names)} labels for {num} videos; give one for all, or one for each")
        if unknown := sorted({str(name) for name in names if name not in classes}):
            raise UserError(f"unknown label {', '.join(unknown)}; this generator knows {', '.join(classes)}")
        return torch.tensor([classes.index(name) for name in names])


class _Progress:
    """Counts the codes that are drawn, over all windows of all batches."""

    def __init__(
        self,
        tell: Callable[[int, int], None] | None,
        codes_shape: Sequence[int],
        length: VideoLength,
        num: int,
        num_known: int,
    ) -> None:
        self._tell, self._done = tell, 0
        self._total = num * math.prod(codes_shape[1:]) * (length.num_latents - num_known)

    def of_batch(self, num_samples: int) -> Callable[[int], None]:
        """Counts the positions of a batch."""

        def count(num_positions: int) -> None:
            self._done += num_positions * num_samples
            if self._tell is not None:
                self._tell(self._done, self._total)

        return count
