"""``--help`` of a stage: its options, then its main keys with defaults, then an example."""

from __future__ import annotations

import json
from typing import NamedTuple

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand

from clipmill.config import schema_keys

__all__ = ["GUIDES", "Guide", "StageCommand"]


class Guide(NamedTuple):
    """Additions to the options in a stage's help: its main configuration keys, and an example command."""

    keys: tuple[str, ...]
    example: str


GUIDES = {
    "shard": Guide(
        (
            "root",
            "data.source.url",
            "data.source.type",
            "data.source.label",
            "data.clip.num_frames",
            "data.clip.resolution",
            "data.clip.fps",
            "data.clip.clip_stride",
            "data.format",
            "data.shard_bytes",
            "data.val_fraction",
            "cluster.fanout_workers",
        ),
        "clipmill shard root=runs/mine data.source.url=/path/to/videos data.clip.resolution=64",
    ),
    "train-vqvae": Guide(
        (
            "root",
            "vqvae.model.hidden_dim",
            "vqvae.model.num_codes",
            "vqvae.model.downsample",
            "vqvae.training.steps",
            "vqvae.training.global_batch",
            "vqvae.training.lr",
            "vqvae.training.precision",
            "vqvae.training.zero_stage",
            "vqvae.training.checkpoint_every",
            "cluster.training_workers",
            "cluster.use_gpu",
        ),
        "clipmill train-vqvae --config demo vqvae.training.steps=2000",
    ),
    "tokenize": Guide(
        (
            "root",
            "tokenize.tokenizer",
            "tokenize.precision",
            "tokenize.batch_size",
            "tokenize.condition_frames",
            "tokenize.text_embeddings",
            "cluster.fanout_workers",
            "cluster.use_gpu",
        ),
        "clipmill tokenize --config demo",
    ),
    "train-prior": Guide(
        (
            "root",
            "prior.model.preset",
            "prior.model.style",
            "prior.model.hidden_dim",
            "prior.model.num_layers",
            "prior.model.class_conditional",
            "prior.model.condition",
            "prior.training.steps",
            "prior.training.global_batch",
            "prior.training.lr",
            "prior.training.precision",
            "prior.training.zero_stage",
            "cluster.training_workers",
            "cluster.use_gpu",
        ),
        "clipmill train-prior --config demo prior.training.steps=3000",
    ),
    "sample": Guide(
        (
            "root",
            "sample.name",
            "sample.num_samples",
            "sample.seed",
            "sample.temperature",
            "sample.top_p",
            "sample.classes",
            "sample.guidance",
            "sample.given",
            "sample.num_frames",
            "sample.batch_size",
        ),
        "clipmill sample --config demo sample.name=sharp sample.temperature=0.9",
    ),
    "evaluate": Guide(
        (
            "root",
            "evaluate.what",
            "evaluate.max_clips",
            "evaluate.fvd_weights",
            "evaluate.is_weights",
            "evaluate.lpips_weights",
        ),
        "clipmill evaluate --config demo --what vqvae",
    ),
    "report": Guide(("root", "sample.name"), "clipmill report --config demo"),
}


class StageCommand(TyperCommand):
    """A command whose help ends with the guide of its stage."""

    def format_help(self, ctx, formatter) -> None:  # type: ignore[no-untyped-def] # typer's own click has no stable name
        """Prints the help of the options, then the guide."""
        super().format_help(ctx, formatter)
        guide = GUIDES[self.name or ""]
        by_path = {key.path: key for key in schema_keys()}
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
        table.add_column(no_wrap=True, style="bold cyan")
        table.add_column(no_wrap=True, style="dim")
        table.add_column()
        for path in guide.keys:
            key = by_path[path]
            default = json.dumps(key.default) if key.has_default else "required"
            table.add_row(path, default, _shortened(key.description.replace("``", "")))
        console = Console()
        console.print(Panel(table, title="Main keys, with their defaults", title_align="left", border_style="dim"))
        console.print(f" Example: {guide.example}", highlight=False, soft_wrap=True)
        console.print(" All keys: docs/configuration.md. Resolved values: clipmill config\n", highlight=False)


def _shortened(description: str) -> str:
    """A description, or only its first sentence if it is long."""
    return description if len(description) <= 160 else description.partition(". ")[0]
