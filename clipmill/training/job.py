"""What a training stage passes to the loop, and the probe loss: the loss on a few fixed clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clipmill.config import TrainingConfig
from clipmill.models.tensor_file import Deferred
from clipmill.shards.dataset import Augment, MixedDataset, ShardDataset
from clipmill.training.previews import Samples, Studio
from clipmill.training.validation import validate
from clipmill.training.zero.engine import Engine

__all__ = ["PROBE_CLIPS", "Job", "probe"]

PROBE_CLIPS = 32
"""Number of clips of the probe loss. Checkpoints record it, so that a conversion can be checked against it."""


@dataclass(frozen=True)
class Job:
    """What a training stage passes to the loop."""

    folder_url: str
    objective: nn.Module
    """See `Engine`; its ``model`` attribute is exported. In training, its batches also contain ``step``, an int."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """Converts a collated micro-batch to the objective's input, with tensors still on the CPU."""
    train: ShardDataset | MixedDataset
    val: ShardDataset | MixedDataset
    config: TrainingConfig
    seed: int
    identity: dict[str, Any]
    """Identity keys and data set fingerprints; a resume with others is refused."""
    batch_statistics: bool
    """Whether the model normalises over the clips of a micro-step; their number must then stay the same."""
    export: Callable[[dict[str, Deferred], int], str]
    """Takes the model's float32 state dict and the number of steps, publishes them, returns the export's name."""
    score_counts: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
    """Scores computed from 1-d metrics that are summed over a validation: they are not means over batches."""
    tokens_per_clip: int | None = None
    """For the rate in tokens; None if the model has no tokens."""
    flops_per_clip: Callable[[], float] | None = None
    """Forward and backward, without recomputation."""
    augment: Augment | None = None
    """Augments the training samples."""
    samples: Samples | None = None
    """Draws samples of a prior while it trains."""
    studio: Studio | None = None
    """Encodes previews as files; without it only TensorBoard and W&B show them."""


def probe(job: Job, engine: Engine, on_batch: Callable[[], object]) -> float | None:
    """Loss of the weights (not of their average) on a few fixed clips of ``val``, or else ``train``. Part of a save."""

    def go_on() -> bool:
        on_batch()
        return False

    clips = job.val if len(job.val) else job.train
    rows = job.config.rows_and_accumulation(engine.world.size)[0]
    result = validate(engine, clips, job.prepare, rows=rows, max_clips=PROBE_CLIPS, score_counts=None, on_batch=go_on)
    return None if result is None else result.scores.get("loss")
