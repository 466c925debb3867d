"""One run: a root folder, a section for each stage, and where the work runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clipmill.config.data import DataConfig
from clipmill.config.section import FREE, PLACE, Place, PositiveInt, Section
from clipmill.config.training import PriorConfig, VQVAEConfig

__all__ = ["ClusterConfig", "EvaluateConfig", "RunConfig", "SampleConfig", "TokenizeConfig", "WorkerRange"]


class TokenizeConfig(Section):
    """Stage ``tokenize``: clip shards become token shards."""

    tokenizer: Annotated[str, Place(lambda name: "/" in name)] = "vqvae"
    """Export to encode with: a name under ``root`` or a URL of a training folder or of one export."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the encoder; distances to codes stay float32."""
    batch_size: Annotated[PositiveInt | None, FREE] = None
    """Clips of a batch, recorded beside each unit: rounding differs between batch sizes, so that of 10,000 codes a few
    may differ. None: 16 on a CPU, on a GPU what its memory holds."""
    decode_cpus: Annotated[int | None, Field(ge=0), FREE] = None
    """CPUs of each worker that decode clips, beside the ``cluster.fanout_cpus`` of its model. 0: one thread decodes on
    those of the model. None: 3 for a worker with a GPU, else 0."""
    condition_frames: Annotated[int, Field(ge=0)] = 0
    """First frames of each clip that are kept beside its codes, for ``prior.model.condition=frames``."""
    text_embeddings: Annotated[str | None, FREE, PLACE] = None
    """Folder (URL) of embeddings for ``prior.model.condition=text``: for a clip whose text has the SHA-256 ``h``, the
    file ``h.npy`` holds float [length, channels], of one shape for all. Any text encoder may write it."""


def _folder_name(key: str, name: str) -> str:
    """The name, if it can be the name of one folder; names that begin with ``.`` or ``_`` are clipmill's own."""
    if not name or "/" in name or name.startswith((".", "_")):
        raise ValueError(f"{key} {name!r} must be a plain folder name")
    return name


Temperature = Annotated[float, Field(gt=0)]


def _is_place(given: str) -> bool:
    """Whether ``sample.given`` is a path or URL, and not the name of a split."""
    return "/" in given or "." in given


class SampleConfig(Section):
    """Stage ``sample``: videos from the newest export of the prior."""

    name: str = "default"
    """Samples go to ``samples/NAME`` under ``root``."""
    num_samples: Annotated[PositiveInt, FREE] = 64
    """Number of videos. Raising it later keeps those that exist."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the noise. Sample i is a function of the export, the seed and i."""
    temperature: Temperature | Annotated[tuple[Temperature, ...], Field(min_length=1)] = 1.0
    """Divides the logits. A list has one for each latent frame; its last value holds for all later frames."""
    top_k: PositiveInt | None = None
    """Keep the k most likely codes, and ties with the k-th. None keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the most likely codes until their probabilities sum to this. 1 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep codes at least this many times as likely as the most likely one. 0 keeps all."""
    classes: list[Annotated[str, Field(coerce_numbers_to_str=True)]] | None = None
    """Names of the classes to sample, in turn. None samples all in turn. A published prior names them by numbers."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance scale: logits are ``without + guidance * (with - without)`` class and condition. 1
    disables it. Needs ``prior.model.label_dropout`` or ``prior.model.condition_dropout``."""
    decoder: Literal["auto", "sequential", "parallel"] = "auto"
    """``parallel`` draws the same codes, up to rounding, in several times fewer passes over many positions each.
    ``auto`` takes the one that was measured to be faster at the batch size, and the recipe records which."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the prior's weights, activations and cache."""
    prefix_latents: Annotated[int, Field(ge=0)] = 0
    """First latent frames of a clip that are given; the prior continues from them."""
    given: Annotated[str, Place(_is_place)] = "val"
    """Where given latents and conditions come from: a split of ``tokens/``, the URL of such a data set, or the URL of a
    video, a picture, a ``.npy`` file of actions or of an embedding, or a folder or table of them. Sample i takes its
    clip i, round and round; of a prior with classes it also takes its class, unless ``classes`` are set."""
    num_frames: PositiveInt | None = None
    """Frames of a sample: those of the prior's window, or more in steps of a latent frame; then the window slides. None
    is the window."""
    overlap_latents: PositiveInt | None = None
    """Latent frames that consecutive windows of a longer sample share. None is three quarters of the window, or
    as many as hold the frames that the prior is conditioned on."""
    batch_size: PositiveInt | None = None
    """Videos drawn at once. None is 16 on a CPU, and on a GPU the largest power of two up to 256 that its memory holds.
    Samples are bit-identical at the recorded batch size, precision and hardware class."""
    format: Literal["mp4", "npy"] = "mp4"
    """How a sample's pixels are stored. ``mp4``: h264 at a constant rate factor of 10, which every player shows.
    ``npy``: lossless uint8 [T, H, W, 3]."""

    @property
    def given_is_place(self) -> bool:
        """Whether ``given`` is a path or URL, and not the name of a split."""
        return _is_place(self.given)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        return _folder_name("sample.name", name)


class EvaluateConfig(Section):
    """Stage ``evaluate``. The networks are TorchScript files (URLs) that you bring: see ``docs/evaluation.md``."""

    name: Annotated[str | None, FREE] = None
    """Results go to ``evaluation/NAME`` under ``root``. None: ``sample.name``, or ``vqvae-STEP`` for ``what=vqvae``."""
    what: Literal["all", "vqvae"] = "all"
    """``vqvae``: the newest tokenizer alone, which needs neither tokens nor a prior nor samples."""
    batch_size: Annotated[PositiveInt, FREE] = 16
    """Clips that go through a network at once."""
    protocol: Literal["bair-256", "styleganv-2048-16f", "tats-2048", "larp-10k", "ucf101-is"] | None = None
    """What published numbers were measured on: clips, size, split, given frames and network files are then fixed. A run
    that does not meet it is refused."""
    split: Literal["train", "val"] = "val"
    """Where the real clips come from. A protocol has its own."""
    max_clips: PositiveInt | None = None
    """Real clips, and samples, that are read. None reads all."""
    fvd_seeds: Annotated[int, Field(ge=0)] = 5
    """Draws of half of the clips, for the deviation of FVD. 0 measures none."""
    max_train_clips: PositiveInt = 2048
    """Clips of the split ``train`` that the table baselines are counted on."""
    fvd_weights: Annotated[str | None, PLACE] = None
    """I3D, for rFVD, FVD and FVD*."""
    is_weights: Annotated[str | None, PLACE] = None
    """C3D, for the Inception Score of samples of 16 frames."""
    lpips_weights: Annotated[str | None, PLACE] = None
    """LPIPS, of frames in [-1, 1]."""

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str | None) -> str | None:
        return None if name is None else _folder_name("evaluate.name", name)


class WorkerRange(Section):
    """Numbers of training workers."""

    min: PositiveInt
    """Fewest workers that go on after a node is lost."""
    max: PositiveInt
    """Workers of a training that finds room for all of them."""

    @model_validator(mode="after")
    def _ascends(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} exceeds max {self.max}; swap them")
        return self


class ClusterConfig(Section):
    """Where the work runs. Nothing here is part of an identity; the device and its threads can change last digits, and
    so are recorded beside what was computed (``computed_with``).
    """

    address: Annotated[str | None, FREE] = None
    """Address of a running Ray cluster. None takes ``RAY_ADDRESS``, or starts an embedded Ray where it is not set."""
    training_launcher: Annotated[Literal["ray", "process"], FREE] = "ray"
    """``process``: train in this process, without Ray. Under torchrun, and without Ray installed, that is so anyway."""
    num_cpus: Annotated[PositiveInt | None, FREE] = None
    """CPUs of the embedded Ray. None takes all CPUs of this machine."""
    fanout_workers: Annotated[PositiveInt | None, FREE] = None
    """Workers of shard, tokenize, sample and evaluate. None: as many as the cluster's CPUs (or GPUs) hold. More than
    fit now are demand that an autoscaler sees."""
    fanout_cpus: Annotated[PositiveInt, FREE] = 1
    """CPUs, and so threads, of one such worker: sums are split over them, so bytes of samples depend on it."""
    training_workers: Annotated[PositiveInt | WorkerRange, FREE] = 1
    """Ranks of a training that Ray Train places, one for each GPU where ``use_gpu`` is set. ``{min, max}``: as many as
    the cluster's nodes hold; it goes on with fewer when a node is lost, and with more when nodes come back."""
    training_cpus: Annotated[PositiveInt | None, FREE] = None
    """CPUs of one training worker. None takes an even share of the cluster."""
    use_gpu: Annotated[bool, FREE] = False
    """Give each training, tokenize, sample and evaluate worker one GPU; without, all of them compute on the CPU. A
    training under torchrun or in this process takes the GPUs it sees."""
    spare_head: Annotated[bool, FREE] = False
    """Keep the workers of shard, tokenize, sample and evaluate off the cluster's head node; no effect on an embedded
    Ray."""
    max_failures: Annotated[int, Field(ge=0), FREE] = 3
    """How often a failed unit is tried again, and a failed group of training workers since its last checkpoint."""
    wait_seconds: Annotated[int, Field(ge=0), FREE] = 600
    """How long a stage waits for a cluster that has no node for a worker, or too few nodes for a training. Then it
    exits with 75, and `clipmill submit` tries it again later. An embedded Ray never grows and is not waited for."""
    drain_seconds: Annotated[int, Field(ge=0), FREE] = 15
    """After SIGTERM or Ctrl-C, running units of these stages get this long to finish; then they are given up, with 10 s
    to clean up, and the next run does them again. Both fit Kubernetes' 30 s. In a Ray job they shrink to
    ``RAY_JOB_STOP_WAIT_TIME_S``."""

    @property
    def fewest_workers(self) -> int:
        """Least number of training workers."""
        return self.training_workers.min if isinstance(self.training_workers, WorkerRange) else self.training_workers

    @property
    def most_workers(self) -> int:
        """Largest number of training workers."""
        return self.training_workers.max if isinstance(self.training_workers, WorkerRange) else self.training_workers


class RunConfig(Section):
    """One run: a root folder and a section for each stage."""

    root: Annotated[str, FREE, PLACE]
    """URL of the run's folder: ``runs/demo``, ``s3://bucket/runs/bair``."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the split, random views, initial weights, the order of samples, and dropout."""
    data: DataConfig = DataConfig()
    vqvae: VQVAEConfig = VQVAEConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    prior: PriorConfig = PriorConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    def folder(self, *names: str) -> str:
        """URL of a folder of this run."""
        return "/".join([self.root.rstrip("/"), *names])

    @property
    def tokenizer_url(self) -> str:
        """Where the tokenizer's export is."""
        return self.tokenize.tokenizer if "/" in self.tokenize.tokenizer else self.folder(self.tokenize.tokenizer)
