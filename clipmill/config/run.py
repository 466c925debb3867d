"""One run: a root folder, a section for each stage, and where the work runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clipmill.config.data import DataConfig
from clipmill.config.place import StoragePlace
from clipmill.config.section import FREE, PLACE, Place, PositiveInt, Section
from clipmill.config.training import PriorConfig, VQVAEConfig

__all__ = ["ClusterConfig", "EvaluateConfig", "RunConfig", "SampleConfig", "TokenizeConfig", "WorkerRange"]


class TokenizeConfig(Section):
    """Stage ``tokenize``: clip shards become token shards."""

    tokenizer: Annotated[str, Place(lambda name: "/" in name)] = "vqvae"
    """Tokenizer to encode with: a training folder's name under ``root``, or the URL of a training folder or export."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the encoder; distances to codes stay float32."""
    batch_size: Annotated[PositiveInt | None, FREE] = None
    """Clips encoded at once. Each unit records it, because rounding depends on it: a few of 10,000 codes may differ
    between batch sizes. None uses 16 on a CPU, and on a GPU what its memory holds."""
    decode_cpus: Annotated[int | None, Field(ge=0), FREE] = None
    """CPUs with which each worker decodes clips, in addition to ``cluster.fanout_cpus`` for its model. 0 decodes in one
    thread on the model's CPUs. None uses 3 for a worker with a GPU, otherwise 0."""
    condition_frames: Annotated[int, Field(ge=0)] = 0
    """Number of first frames of each clip to store with its codes, for ``prior.model.condition=frames``. 0 stores
    none."""
    text_embeddings: Annotated[str | None, FREE, PLACE] = None
    """URL of a folder of text embeddings, for ``prior.model.condition=text``. The file ``h.npy``, where ``h`` is the
    SHA-256 of a clip's text, holds float [length, channels]; all files have the same shape. Any text encoder may write
    them. None stores no embeddings."""


def _folder_name(key: str, name: str) -> str:
    """Returns the name if it is a plain folder name. Names that begin with ``.`` or ``_`` are reserved for clipmill."""
    if not name or "/" in name or name.startswith((".", "_")):
        raise ValueError(f"{key} {name!r} must be a plain folder name")
    return name


Temperature = Annotated[float, Field(gt=0)]


def _is_place(given: str) -> bool:
    """Whether a value of ``sample.given`` is a path or URL rather than the name of a split."""
    return "/" in given or "." in given


class SampleConfig(Section):
    """Stage ``sample``: generates videos with the newest export of the prior."""

    name: str = "default"
    """Samples go to ``samples/NAME`` under ``root``."""
    num_samples: Annotated[PositiveInt, FREE] = 64
    """Number of videos to generate. Raising it later keeps the existing ones."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the noise. Sample i is a function of the export, the seed and i."""
    temperature: Temperature | Annotated[tuple[Temperature, ...], Field(min_length=1)] = 1.0
    """Softmax temperature: the logits are divided by it. A list gives one value for each latent frame; later frames use
    its last value."""
    top_k: PositiveInt | None = None
    """Keep the k most likely codes, and ties with the k-th. None keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the most likely codes until their probabilities sum to this. 1 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep codes whose probability is at least this share of the most likely code's. 0 keeps all."""
    classes: list[Annotated[str, Field(coerce_numbers_to_str=True)]] | None = None
    """Names of the classes to sample, in rotation. None rotates through all classes. A published prior names its
    classes by numbers."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance scale: logits are ``without + guidance * (with - without)``, with and without class and
    condition. 1 disables it. Needs ``prior.model.label_dropout`` or ``prior.model.condition_dropout``."""
    decoder: Literal["auto", "sequential", "parallel"] = "auto"
    """``sequential``: one forward pass for each code. ``parallel``: the same codes, up to rounding, in several times
    fewer passes, each over many positions. ``auto``: the one measured to be faster at the batch size; the recipe
    records which."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the prior's weights, activations and cache of keys and values."""
    prefix_latents: Annotated[int, Field(ge=0)] = 0
    """Number of first latent frames to take from ``given``; the prior continues them. 0 generates whole clips."""
    given: Annotated[str, Place(_is_place)] = "val"
    """Source of prefixes and conditions: a split of ``tokens/``; the URL of such a data set; the URL of a video, a
    picture, or a ``.npy`` file of actions or of an embedding; or a folder or table of these. Sample i uses clip i
    modulo their number. A prior with classes also uses the clip's class, unless ``classes`` is set."""
    num_frames: PositiveInt | None = None
    """Frames of a sample: the length of the prior's window, or longer in steps of a latent frame; the window then
    slides. None uses the window."""
    overlap_latents: PositiveInt | None = None
    """Latent frames shared by consecutive windows of a sample longer than the window. None uses three quarters of the
    window, or more if the frames that the prior is conditioned on need more."""
    batch_size: PositiveInt | None = None
    """Videos generated at once. None uses 16 on a CPU, and on a GPU the largest power of two up to 256 that its memory
    holds. Samples are bit-identical at the recorded batch size, precision and hardware class."""
    format: Literal["mp4", "npy"] = "mp4"
    """How samples are stored. ``mp4``: h264 at a constant rate factor of 10, which every player can show. ``npy``:
    lossless uint8 [T, H, W, 3]."""

    @property
    def given_is_place(self) -> bool:
        """Whether ``given`` is a path or URL rather than the name of a split."""
        return _is_place(self.given)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        return _folder_name("sample.name", name)


class EvaluateConfig(Section):
    """Stage ``evaluate``. You supply the networks as TorchScript files (URLs): see ``docs/evaluation.md``."""

    name: Annotated[str | None, FREE] = None
    """Results go to ``evaluation/NAME`` under ``root``. None uses ``sample.name``, or ``vqvae-STEP`` with
    ``what=vqvae``."""
    what: Literal["all", "vqvae"] = "all"
    """``all``: tokenizer, prior and samples. ``vqvae``: only the newest tokenizer, without tokens, prior or samples."""
    batch_size: Annotated[PositiveInt, FREE] = 16
    """Clips in one forward pass of a network."""
    protocol: Literal["bair-256", "styleganv-2048-16f", "tats-2048", "larp-10k", "ucf101-is"] | None = None
    """Published protocol to follow. It fixes clips, size, split, given frames and network files; a run that does not
    meet it is refused. None follows no protocol."""
    split: Literal["train", "val"] = "val"
    """Split of the real clips. A protocol fixes its own."""
    max_clips: PositiveInt | None = None
    """Maximum number of real clips, and of samples, to measure. None uses all."""
    fvd_seeds: Annotated[int, Field(ge=0)] = 5
    """Number of random halves of the clips from which the deviation of FVD is estimated. 0 skips the estimate."""
    max_train_clips: PositiveInt = 2048
    """Maximum number of clips of the split ``train`` from which the table baselines are estimated, and among which the
    nearest one of each sample is searched."""
    fvd_weights: Annotated[str | None, PLACE] = None
    """I3D network for rFVD, FVD and FVD*. None skips them."""
    is_weights: Annotated[str | None, PLACE] = None
    """C3D network for the Inception Score of samples of 16 frames. None skips it."""
    lpips_weights: Annotated[str | None, PLACE] = None
    """LPIPS network for frames in [-1, 1]. None skips LPIPS."""

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str | None) -> str | None:
        return None if name is None else _folder_name("evaluate.name", name)


class WorkerRange(Section):
    """Range of the number of training workers."""

    min: PositiveInt
    """Fewest workers with which a training continues after nodes are lost."""
    max: PositiveInt
    """Most workers that a training starts, if the cluster has room for them."""

    @model_validator(mode="after")
    def _ascends(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} exceeds max {self.max}; swap them")
        return self


class ClusterConfig(Section):
    """Where the work runs. No key here is part of an identity. Device and number of threads can change last digits, so
    each result records them (``computed_with``).
    """

    address: Annotated[str | None, FREE] = None
    """Address of a running Ray cluster. None uses ``RAY_ADDRESS`` if it is set, and otherwise starts an embedded
    Ray."""
    training_launcher: Annotated[Literal["ray", "process"], FREE] = "ray"
    """``ray``: Ray Train starts the training workers. ``process``: train in this process, without Ray. Under torchrun,
    or where Ray is not installed, training never uses Ray."""
    num_cpus: Annotated[PositiveInt | None, FREE] = None
    """CPUs of the embedded Ray. None uses all CPUs of this machine."""
    fanout_workers: Annotated[PositiveInt | None, FREE] = None
    """Number of workers of shard, tokenize, sample and evaluate. An autoscaler sees workers that do not fit yet as
    demand. None asks for the number that fits the cluster's CPUs (or GPUs), and as many again that wait."""
    fanout_cpus: Annotated[PositiveInt, FREE] = 1
    """CPUs and threads of one such worker. Threads split sums, so the bytes of samples depend on it."""
    training_workers: Annotated[PositiveInt | WorkerRange, FREE] = 1
    """Number of ranks that Ray Train starts; with ``use_gpu``, each has one GPU. ``{min, max}``: as many as fit the
    cluster; the training continues with fewer when a node is lost, and with more when nodes return."""
    training_cpus: Annotated[PositiveInt | None, FREE] = None
    """CPUs of one training worker. None gives each an even share of the cluster."""
    use_gpu: Annotated[bool, FREE] = False
    """Give each training, tokenize, sample and evaluate worker one GPU. False computes on CPUs. Training under torchrun
    or in this process uses the GPUs it sees, either way."""
    spare_head: Annotated[bool, FREE] = False
    """Keep workers of shard, tokenize, sample and evaluate off the cluster's head node. No effect on an embedded
    Ray."""
    max_failures: Annotated[int, Field(ge=0), FREE] = 3
    """Number of retries of a failed unit, and of a failed group of training workers since its last checkpoint."""
    wait_seconds: Annotated[int, Field(ge=0), FREE] = 600
    """Seconds that a stage waits while the cluster has no node for any worker, or too few nodes for a training. It then
    exits with 75, and ``clipmill submit`` retries it later. An embedded Ray cannot grow, so a stage never waits for
    it."""
    drain_seconds: Annotated[int, Field(ge=0), FREE] = 15
    """Seconds that running units of shard, tokenize, sample and evaluate get to finish after SIGTERM or Ctrl-C. Units
    that do not finish get 10 s to clean up, and the next run repeats them. Together this fits Kubernetes' grace period
    of 30 s. In a Ray job both shrink to fit ``RAY_JOB_STOP_WAIT_TIME_S``."""

    @property
    def fewest_workers(self) -> int:
        """Smallest number of training workers."""
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
    """Seed of train/val split, random views, initial weights, sample order, and dropout."""
    storage: Annotated[tuple[StoragePlace, ...], FREE] = ()
    """Places that need other addresses or keys than the environment's: the root, the source, or any other."""
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
        """URL of the tokenizer's training folder or export."""
        return self.tokenize.tokenizer if "/" in self.tokenize.tokenizer else self.folder(self.tokenize.tokenizer)
