"""Measures one index range of an evaluation, in a worker process or in the process of the command."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill.config import RunConfig
from clipmill.evaluation.baselines import CodeTables
from clipmill.evaluation.generation import decode_sample, sample_arrays, token_nats
from clipmill.evaluation.inputs import Inputs
from clipmill.evaluation.made import hardware_name
from clipmill.evaluation.nearest import describe_codes
from clipmill.evaluation.networks import Networks
from clipmill.evaluation.parts import Measure, Part, Unit
from clipmill.evaluation.protocols import most_clips
from clipmill.evaluation.reader import Picked
from clipmill.evaluation.reconstruction import copies_of, real_arrays, tokenizer_arrays
from clipmill.models.export import load_prior, load_vqvae
from clipmill.models.prior import Prior
from clipmill.models.provenance import make_process_deterministic
from clipmill.models.vqvae import VQVAE, to_pixels
from clipmill.shards.dataset import Decode, decode_clip, decode_codes
from clipmill.shards.manifest import Manifest

__all__ = ["Job", "decode_cpus", "make_worker", "torch_settings_kept"]

GPU_DECODE_CPUS = 3
"""Threads that decode ahead for a GPU. Without a GPU, the worker decodes a batch when it needs it."""


@dataclass(frozen=True)
class Job:
    """What all units of an evaluation share."""

    config: RunConfig
    inputs: Inputs
    measures: dict[str, Measure]
    """Measurements by name: ``real``, ``tokenizer``, ``val``, ``train``, ``samples``, ``shown``, ``nearest``."""
    shown: tuple[int, ...] = ()
    """Indices of the clips that the measure ``shown`` stores with their reconstructions."""
    nearest: tuple[tuple[int, int], ...] = ()
    """Indices of the samples and of the training clips that the measure ``nearest`` stores."""


def decode_cpus(config: RunConfig) -> int:
    """CPUs that a worker requests in addition to those of the models."""
    return GPU_DECODE_CPUS if config.cluster.use_gpu else 0


def make_worker(job: Job) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each worker process; returns the function that measures a unit and publishes its part."""
    return _Worker(job).measure


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Restores torch's number of threads and its determinism after the block."""
    threads = torch.get_num_threads()
    deterministic, tf32 = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = deterministic, tf32


class _Worker:
    """Models and networks, each loaded when the first unit needs it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._device = make_process_deterministic(job.config.cluster)
        self._batch_size = job.config.evaluate.batch_size
        self._readers: dict[str, Picked] = {}

    @torch.inference_mode()
    def measure(self, unit: Unit) -> dict[str, Any]:
        """Measures a unit and publishes its part."""
        work = {
            "real": self._measure_clips,
            "tokenizer": self._measure_clips,
            "shown": self._measure_shown,
            "val": self._measure_tokens,
            "train": self._measure_tokens,
            "samples": self._measure_samples,
            "nearest": self._measure_nearest,
        }
        work[unit.measure](unit)
        return {"hardware": hardware_name(self._device), "work": {"clips": unit.num_clips}}

    def _measure_clips(self, unit: Unit) -> None:
        """Measures real clips and their reconstructions, in one pass if both parts are missing."""
        missing = {name for name in ("real", "tokenizer") if not self._job.measures[name].has(unit)}
        parts = {name: Part() for name in missing}
        clips = self._reader("clips", self._job.inputs.clips, decode_clip)
        for batch in clips.batches(unit.first, unit.stop, self._batch_size):
            video = self._to_device(batch["video"])
            if "real" in missing:
                parts["real"].add(real_arrays(batch, video, self._networks))
            if "tokenizer" in missing:
                parts["tokenizer"].add(*tokenizer_arrays(video, self._tokenizer, self._networks))
        for name, part in parts.items():
            self._job.measures[name].publish(unit, part)

    def _measure_shown(self, unit: Unit) -> None:
        part = Part()
        clips = self._reader("clips", self._job.inputs.clips, decode_clip)
        for index in self._job.shown[unit.first : unit.stop]:
            (batch,) = clips.batches(index, index + 1, 1)
            _, copies = copies_of(self._tokenizer, self._to_device(batch["video"]))
            part.add({"real": batch["video"], "reconstruction": copies.cpu().numpy()})
        self._job.measures["shown"].publish(unit, part)

    def _measure_tokens(self, unit: Unit) -> None:
        """Counts codes and stores their features; for validation codes also measures the prior's cross-entropy."""
        inputs = self._job.inputs
        of_val = unit.measure == "val"
        manifest = inputs.val_tokens if of_val else inputs.train_tokens
        assert manifest is not None
        assert inputs.prior is not None
        tables, part = CodeTables(*self._codebooks), Part()
        for batch in self._reader(unit.measure, manifest, decode_codes).batches(
            unit.first, unit.stop, self._batch_size
        ):
            tables.update(batch["codes"])
            rows = {"key": np.array(batch["key"], np.str_), "place": self._place(batch)}
            if of_val:
                rows["nats"] = token_nats(batch, self._prior, inputs.prior["classes"], self._device)
            part.add(rows)
        part.tables = tables.arrays()
        self._job.measures[unit.measure].publish(unit, part)

    def _measure_samples(self, unit: Unit) -> None:
        part, samples = Part(), self._job.inputs.samples
        assert samples is not None
        for batch in self._reader("samples", samples, decode_sample).batches(unit.first, unit.stop, self._batch_size):
            video = self._to_device(batch["video"])
            rows, sums = sample_arrays(batch, video, self._networks, *self._codebooks)
            part.add({**rows, "place": self._place(batch)}, sums)
        self._job.measures["samples"].publish(unit, part)

    def _measure_nearest(self, unit: Unit) -> None:
        """Samples, and their nearest training clips as the tokenizer reconstructs them: samples are no sharper."""
        inputs, part = self._job.inputs, Part()
        assert inputs.samples is not None
        assert inputs.train_tokens is not None
        samples = self._reader("samples", inputs.samples, decode_sample)
        train = self._reader("train", inputs.train_tokens, decode_codes)
        for sample, clip in self._job.nearest[unit.first : unit.stop]:
            (made,) = samples.batches(sample, sample + 1, 1)
            (codes,) = train.batches(clip, clip + 1, 1)
            training = to_pixels(self._tokenizer.decode(self._codes(codes)))
            part.add({"sample": made["video"], "training clip": training.cpu().numpy()})
        self._job.measures["nearest"].publish(unit, part)

    def _codes(self, batch: dict[str, Any]) -> Tensor:
        return torch.from_numpy(batch["codes"].astype(np.int64)).to(self._device)

    def _place(self, batch: dict[str, Any]) -> np.ndarray:
        return describe_codes(self._codes(batch), self._tokenizer)

    def _reader(self, name: str, manifest: Manifest, decode: Decode) -> Picked:
        if name not in self._readers:
            settings = self._job.config.evaluate
            most = settings.max_train_clips if name == "train" else most_clips(settings)
            self._readers[name] = Picked(manifest, decode, most, decode_cpus(self._job.config))
        return self._readers[name]

    def _to_device(self, video: np.ndarray) -> Tensor:
        return torch.from_numpy(video).to(self._device)

    @functools.cached_property
    def _networks(self) -> Networks:
        return Networks.load(self._job.config.evaluate, self._device)

    @functools.cached_property
    def _models(self) -> tuple[Prior | None, VQVAE]:
        if self._job.inputs.prior is None:
            return None, load_vqvae(self._job.inputs.tokenizer_url)[0].to(self._device)
        prior, tokenizer, _, _ = load_prior(self._job.inputs.tokenizer_url)
        return prior.to(self._device), tokenizer.to(self._device)

    @property
    def _prior(self) -> Prior:
        prior = self._models[0]
        assert prior is not None
        return prior

    @property
    def _tokenizer(self) -> VQVAE:
        return self._models[1]

    @property
    def _codebooks(self) -> tuple[int, int]:
        """Number of codes per codebook, and number of codebooks."""
        model = self._tokenizer.config
        return model.num_codes, model.num_codebooks
