"""Functions of the step: the learning rate, and how fast the average of the weights moves."""

from __future__ import annotations

import math

from clipmill.config import TrainingConfig

__all__ = ["average_weight", "learning_rate"]


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the step with index ``step``: linear warm-up, then cosine or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * cosine)


def average_weight(config: TrainingConfig, step: int) -> float:
    """Weight of the newest weights in the running average, after the step with index ``step``.

    The average starts as a copy of the weights. At first its window is a tenth of the run so far, so it soon forgets
    the random start.
    """
    return 0.0 if config.weights_ema is None else max(1 - config.weights_ema, 10 / (10 + step))
