"""What a training stage brings to the loop, and the loss of a few clips that says how good its weights are."""

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
"""Whose loss a checkpoint records, so that a conversion to another world size can show that it gives the same."""


@dataclass(frozen=True)
class Job:
    """What a training stage brings to the loop."""

    folder_url: str
    objective: nn.Module
    """See `Engine`: its ``model`` attribute is what gets exported. In training its batches say the ``step``, an int."""
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """Turns a collated micro-batch into what the objective takes, tensors still on the CPU."""
    train: ShardDataset | MixedDataset
    val: ShardDataset | MixedDataset
    config: TrainingConfig
    seed: int
    identity: dict[str, Any]
    """Identity keys and data set fingerprints; a resume with others is refused."""
    batch_statistics: bool
    """Whether the model normalises over the clips of a micro-step, so that their number is part of the training."""
    export: Callable[[dict[str, Deferred], int], str]
    """Publishes the model's float32 state dict after that number of steps, and names the export."""
    score_counts: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
    """Scores of the objective's 1-d metrics, summed over a validation: for what no mean of batches gives."""
    tokens_per_clip: int | None = None
    """For the rate in tokens; none of a model that knows only clips."""
    flops_per_clip: Callable[[], float] | None = None
    """Forward and backward, without what checkpointing repeats."""
    augment: Augment | None = None
    """Changes the samples that are trained on."""
    samples: Samples | None = None
    """What a prior shows while it trains."""
    studio: Studio | None = None
    """Encodes previews; without it TensorBoard and W&B alone have them."""


def probe(job: Job, engine: Engine, on_batch: Callable[[], object]) -> float | None:
    """Loss on the same few clips, of the weights themselves; training clips if there are no others. Part of a save."""

    def go_on() -> bool:
        on_batch()
        return False

    clips = job.val if len(job.val) else job.train
    rows = job.config.rows_and_accumulation(engine.world.size)[0]
    result = validate(engine, clips, job.prepare, rows=rows, max_clips=PROBE_CLIPS, score_counts=None, on_batch=go_on)
    return None if result is None else result.scores.get("loss")
