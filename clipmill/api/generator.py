"""A generator: a prior and its tokenizer, which generate videos."""

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
    """Generated videos and their codes, on the CPU."""

    videos: Tensor
    """uint8 [num, T, H, W, 3]."""
    codes: Tensor
    """int64 [num, t, h, w] or [num, t, h, w, M]."""


class Generator:
    """A prior with its tokenizer, in eval mode and without gradients; create it with `clipmill.load`.

    Attributes:
        info: sizes, classes and condition of the generator.
        tokenizer: the tokenizer whose codes the prior generates.
        model: the prior's network.
        body: body of the prior's export.
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
        """Generates videos.

        Args:
            num: number of videos.
            label: class of all videos, or one class for each; None rotates through the classes, like stage ``sample``.
            seed: seed of the noise. Sample i of a seed is the same in any call, up to rounding between batch sizes.
            first_index: index i of the first sample.
            first_frames: the condition, for a generator conditioned on frames; otherwise the frames to continue.
            prefix_latents: number of latent frames to encode from ``first_frames`` and continue. None uses 0 for a
                generator conditioned on frames; otherwise all whole latent frames of an array, and 1 of a file.
            actions: float [T, A], for a generator conditioned on actions.
            text: a text embedding, float [S, E], for a generator conditioned on text.
            num_frames: length T of the videos; None uses the prior's window. For longer videos the window slides.
            overlap_latents: latent frames shared by consecutive windows; see `clipmill.sampling.long.video_length`.
            guidance: scale of classifier-free guidance; 1 disables it.
            temperature: softmax temperature: one number, or one for each latent frame.
            top_k: keep the k most likely codes of a position; None keeps all.
            top_p: keep the most likely codes up to this total probability; 1 keeps all.
            min_p: keep codes whose probability is at least this share of the most likely code's; 0 keeps all.
            decoder: ``sequential`` and ``parallel`` draw the same codes, up to rounding; ``auto`` uses the faster one.
            precision: compute dtype of the prior.
            batch_size: videos generated at once. None uses 16 on a CPU, and on a GPU what its memory holds.
            on_progress: called with the number of codes drawn so far and the number of all codes.

        Raises:
            UserError: an input does not fit this generator; the message says what it accepts.
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
        """Generates and decodes all samples, batch by batch."""
        num = len(indices)
        batch_size = batch_size_for(settings, self.model, self.tokenizer.model, length)
        batches = [slice(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
        drawn = (self._batch(settings, progress, indices[rows], rows, given) for rows in batches)
        made = list(sample_videos(drawn, self.tokenizer.model, length, lambda _, videos: videos))
        # Concatenation makes ordinary tensors from inference tensors, so a user may train on them.
        return Samples(torch.cat([each.pixels for each in made]), torch.cat([each.codes for each in made]))

    def _batch(self, settings: SampleConfig, progress: _Progress, indices: range, rows: slice, given: Given) -> Batch:
        """Draws one batch: the samples ``indices``, with these rows of the inputs."""
        batch = {name: None if each is None else each[rows] for name, each in given.items()}
        labels = batch.pop("labels")
        return Batch(
            draw_by(settings, self.model, indices, labels, self._kept, progress.of_batch(len(indices))), **batch
        )

    def _settings(self, **settings: Any) -> SampleConfig:
        """Validates the sampling settings with the config's schema."""
        try:
            wanted = SampleConfig.model_validate(settings)
        except ValidationError as error:
            problem = error.errors()[0]  # each member of a union reports an error; the first is enough
            raise UserError(
                f"{problem['loc'][0]}={problem['input']!r}: {problem['msg'].lower()}; correct it"
            ) from error
        if wanted.guidance != 1 and not self.model.guidable:
            raise UserError(
                f"guidance={wanted.guidance:g} needs a generator trained with prior.model.label_dropout or "
                "condition_dropout above 0; use guidance=1"
            )
        return wanted

    def _labels(self, num: int, label: str | Sequence[str] | None, first_index: int) -> Tensor | None:
        """Class numbers int64 [num]."""
        classes = self.info.classes
        if not classes:
            if label is not None:
                raise UserError("this generator was trained without classes; remove label")
            return None
        if label is None:
            return torch.arange(first_index, first_index + num) % len(classes)
        names = [label] * num if isinstance(label, str) else list(label)
        if len(names) != num:
            raise UserError(f"there are {len(names)} labels for {num} videos; give one for all, or one for each")
        if unknown := sorted({str(name) for name in names if name not in classes}):
            raise UserError(f"unknown label {', '.join(unknown)}; this generator knows {', '.join(classes)}")
        return torch.tensor([classes.index(name) for name in names])


class _Progress:
    """Counts drawn codes, over all windows of all batches."""

    def __init__(
        self,
        report: Callable[[int, int], None] | None,
        codes_shape: Sequence[int],
        length: VideoLength,
        num: int,
        num_known: int,
    ) -> None:
        self._report, self._done = report, 0
        self._total = num * math.prod(codes_shape[1:]) * (length.num_latents - num_known)

    def of_batch(self, num_samples: int) -> Callable[[int], None]:
        """Returns a function that counts the positions of one batch."""

        def count(num_positions: int) -> None:
            self._done += num_positions * num_samples
            if self._report is not None:
                self._report(self._done, self._total)

        return count
