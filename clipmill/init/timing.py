"""Times a few real steps of a config's work on this machine.

Each number is measured with the config's own models, batches and precision, on random pixels and codes. Three things
are not measured: the start of each stage, waiting for a loader that is slower than the device, and uploads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from clipmill.config import RunConfig, TrainingConfig
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, codes_shape, to_input
from clipmill.progress import bar
from clipmill.sampling.filters import Filters
from clipmill.sampling.fitting import most_at_once
from clipmill.sampling.generate import generate
from clipmill.training.estimate import build_prior

__all__ = ["Timing", "measure"]

_SECONDS_A_MEASUREMENT = 3.0


class Timing(NamedTuple):
    """Measured times on this machine in seconds, and the micro-batches that they were measured with.

    Attributes:
        vqvae_step: one optimizer step of the tokenizer.
        vqvae_clip: reconstructing one clip, without gradients.
        encode_clip: encoding one clip to codes.
        prior_step: one optimizer step of the prior.
        prior_clip: the loss of one clip under the prior, without gradients.
        draw_sample: drawing the codes of one sample, in batches of ``sample.batch_size``, or of 16 if it is None.
        vqvae_micro_batch: largest micro-batch of the tokenizer that fits the device, in clips.
        prior_micro_batch: largest micro-batch of the prior that fits the device, in clips.
    """

    vqvae_step: float
    vqvae_clip: float
    encode_clip: float
    prior_step: float
    prior_clip: float
    draw_sample: float
    vqvae_micro_batch: int
    prior_micro_batch: int


def measure(config: RunConfig, num_gpus: int) -> Timing:
    """Times the models of a config on one GPU, or on all CPUs of this machine.

    Args:
        config: config of the run; its data need not exist.
        num_gpus: number of training ranks; 0 trains on the CPU.
    """
    device = torch.device("cuda" if num_gpus else "cpu")
    with bar("time", total=5, unit="measurements") as progress:
        vqvae = VQVAE(config.vqvae.model, pixel_variance=0.1).to(device)

        def vqvae_loss(rows: int) -> torch.Tensor:
            return vqvae(to_input(_pixels(config, rows, device))).loss

        rows, vqvae_step = _time_step(vqvae.train(), config.vqvae.training, num_gpus, vqvae_loss)
        progress.update(1)
        with torch.inference_mode():
            clips = to_input(_pixels(config, rows, device))
            vqvae_clip = _time(lambda: vqvae.eval()(clips)) / rows
            progress.update(2)
            encode_clip = _time(lambda: vqvae.encode(clips)) / rows
            progress.update(3)
        prior = build_prior(config, config.prior.model, _codes_shape(config)).to(device)

        def prior_loss(rows: int) -> torch.Tensor:
            return prior.loss(*_codes(config, rows, device)).mean()

        prior_rows, prior_step = _time_step(prior.train(), config.prior.training, num_gpus, prior_loss)
        progress.update(4)
        with torch.inference_mode():
            codes, labels = _codes(config, prior_rows, device)
            prior_clip = _time(lambda: prior.eval().loss(codes, labels)) / prior_rows
        draw = _time_draw(config, prior, device)
        progress.update(5)
    return Timing(vqvae_step, vqvae_clip, encode_clip, prior_step, prior_clip, draw, rows, prior_rows)


def _time_step(
    model: torch.nn.Module, training: TrainingConfig, num_ranks: int, loss: Callable[[int], torch.Tensor]
) -> tuple[int, float]:
    """(rows of the largest micro-batch that fits, seconds of a step of ``global_batch`` clips)."""
    share = math.ceil(training.global_batch / max(num_ranks, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    kind = next(model.parameters()).device.type
    rows = share

    def micro_step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=training.precision == "bfloat16"):
            value = loss(rows)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    while True:
        try:
            seconds = _time(micro_step)
            return rows, seconds * math.ceil(share / rows)
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            if rows == 1:
                raise
            rows = next(divisor for divisor in range(rows // 2, 0, -1) if share % divisor == 0)


def _time_draw(config: RunConfig, prior: Prior, device: torch.device) -> float:
    """Times only the last latent frame, after a given prefix: its cache is the longest, so this is an upper bound."""
    codes, labels = _codes(config, most_at_once(config.sample, use_gpu=False), device)
    filters = Filters(temperature=1.0, top_k=None, top_p=config.sample.top_p, min_p=0.0)
    num_frames = codes.shape[1]
    began = time.perf_counter()
    generate(
        prior.eval(),
        seed=0,
        indices=range(len(codes)),
        labels=labels,
        prefix=codes[:, : num_frames - 1],
        filters=filters,
        precision=config.sample.precision,
    )
    return (time.perf_counter() - began) * num_frames / len(codes)


def _pixels(config: RunConfig, rows: int, device: torch.device) -> torch.Tensor:
    """Random clips, uint8 [rows, T, H, W, 3]."""
    clip = config.data.clip
    return torch.randint(256, (rows, clip.num_frames, *clip.size, 3), dtype=torch.uint8, device=device)


def _codes(config: RunConfig, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random codes int64 [rows, t, h, w], and labels where the prior has classes."""
    codes = torch.randint(config.vqvae.model.num_codes, (rows, *_codes_shape(config)), device=device)
    labels = torch.zeros(rows, dtype=torch.int64, device=device) if config.prior.model.class_conditional else None
    return codes, labels


def _codes_shape(config: RunConfig) -> tuple[int, ...]:
    return codes_shape(config.vqvae.model, config.data.clip.num_frames, config.data.clip.size)


def _time(work: Callable[[], object]) -> float:
    """Median seconds of a call, after a warm-up call."""
    seconds: list[float] = []
    work()
    while len(seconds) < 3 or (sum(seconds) < _SECONDS_A_MEASUREMENT and len(seconds) < 20):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]
