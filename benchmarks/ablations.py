"""The paper's ablations (VideoGPT, arXiv 2104.10157), at any scale, beside the paper's numbers.

Names are overlays of `configs/ablations/` (`base`: the config without an overlay). Each runs through the ordinary
stages with each seed, in its own root below ROOT; all use the same clips. An ablation that only changes the prior uses
the tokenizer and the tokens of `base`. Finished runs are skipped, so run the script again to resume, or to add names
and seeds.

    python benchmarks/ablations.py ROOT axial-attention-off axial-attention-on --seeds 0 1 2
    python benchmarks/ablations.py ROOT --config bair data.source.url=data/bair prior-layers-2 \\
        prior-layers-16 evaluate.fvd_weights=i3d_torchscript.pt cluster.use_gpu=true

The last line is one JSON object: for each name, the paper's numbers and ours (mean and standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from timing import device_name

from clipmill.config import RunConfig, load_config
from clipmill.demo import generate
from clipmill.evaluation.results import folder_url, read_evaluation
from clipmill.stages import run_stage
from clipmill.training.world import join_world

OVERLAYS = Path(__file__).parents[1] / "configs" / "ablations"
BASE = "base"
TOKENIZER_STAGES = ("train-vqvae",)
PRIOR_STAGES = ("train-vqvae", "tokenize", "train-prior", "sample")
PAPER = {
    "axial-attention-off": {"nmse": 0.0041, "rfvd": 15.3},
    "axial-attention-on": {"nmse": 0.0033, "rfvd": 14.9},
    "latents-8x32x32": {"rfvd": 14.9, "fvd": 103.6},
    "latents-4x32x32": {"rfvd": 28.3, "fvd": 104.6},
    "codes-256": {"rfvd": 18.2},
    "codes-1024": {"rfvd": 14.9},
    "codes-4096": {"rfvd": 11.3},
    "codebooks-1": {"fvd": 103.6},
    "codebooks-2": {"fvd": 106.3},
    "codebooks-4": {"fvd": 131.4},
    "codebooks-8": {"fvd": 135.7},
    "prior-layers-2": {"fvd": 120.4, "bits_per_token": 2.84},
    "prior-layers-4": {"fvd": 110.0, "bits_per_token": 2.52},
    "prior-layers-8": {"fvd": 103.3, "bits_per_token": 2.39},
    "prior-layers-16": {"fvd": 103.6, "bits_per_token": 2.05},
}
"""On BAIR. Its bits per dim are per latent, so here per token."""
COLUMNS = ("nmse", "psnr_db", "used_share", "perplexity", "bits_per_clip", "rfvd", "fvd", "bits_per_token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="local folder; its clips/ are made by the stage shard if missing")
    parser.add_argument("what", nargs="+", help="names of ablations, and section.key=value for all of them")
    parser.add_argument("--config", type=Path, default=OVERLAYS.parent / "demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--with-priors", action="store_true", help="train a prior on every tokenizer, for FVD and bits")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ablations = Ablations(arguments)
    ablations.make_clips()
    join_world()  # for all trainings: DeepSpeed does not survive the end of the process group that it met first
    for name in ablations.names:
        for seed in arguments.seeds:
            ablations.train(name, seed)
    rows = {name: [ablations.evaluate(name, seed) for seed in arguments.seeds] for name in ablations.names}
    print_table(rows)
    result = {
        "benchmark": "ablations",
        "device": device_name(),
        "config": arguments.config.name,
        "assignments": ablations.assignments,
        "seeds": arguments.seeds,
        "rows": {
            name: {
                "paper": PAPER.get(name, {}),
                "ours": {column: spread(found, column) for column in COLUMNS},
                "steps": [one["steps"] for one in found],
            }
            for name, found in rows.items()
        },
    }
    print(json.dumps(result))


class Ablations:
    """What was asked for, and where it lies."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.root = arguments.root.resolve()
        self.names = [word for word in arguments.what if "=" not in word]
        self.assignments = [word for word in arguments.what if "=" in word]
        self.config = arguments.config
        self.with_priors = arguments.with_priors

    def make_clips(self) -> None:
        """Shards the source, which for the demo is drawn first."""
        config = self._load(self.root, [])
        if config.data.source.url == config.folder("raw"):  # where the demo's videos are
            generate(config.data.source.url)
        run_stage("shard", config)

    def train(self, name: str, seed: int) -> None:
        """Runs all stages of an ablation but the last."""
        config = self._run(name, seed)
        share(self.root / "clips", config)
        if self._is_of_prior(name):
            self.train(BASE, seed)
            base = self._run(BASE, seed)
            run_stage("tokenize", base)
            for kind in ("vqvae", "tokens"):
                share(Path(base.folder(kind)), config)
        for stage in self._stages(name):
            run_stage(stage, config)

    def evaluate(self, name: str, seed: int) -> dict[str, Any]:
        """Runs the last stage; the numbers by column, none where they were not measured."""
        what = "all" if self._stages(name) == PRIOR_STAGES else "vqvae"
        config = self._run(name, seed, [f"evaluate.what={what}"])
        run_stage("evaluate", config)
        evaluation = read_evaluation(folder_url(config))
        assert evaluation is not None
        found = evaluation.metrics
        numbers = {**found["reconstruction"], **found["codebook"], **(found["fvd"] or {}), **found.get("prior", {})}
        # Of the codes as the tokenizer leaves them, not as a prior predicts them.
        numbers["bits_per_clip"] = found["codebook"]["bits_per_clip"]
        return {**{column: numbers.get(column) for column in COLUMNS}, "steps": found["steps"]}

    def _stages(self, name: str) -> tuple[str, ...]:
        return PRIOR_STAGES if self.with_priors or self._is_of_prior(name) else TOKENIZER_STAGES

    def _is_of_prior(self, name: str) -> bool:
        return name.startswith("prior-")

    def _run(self, name: str, seed: int, more: list[str] | None = None) -> RunConfig:
        overlays = [] if name == BASE else [OVERLAYS / f"{name}.yaml"]
        return self._load(self.root / name / f"seed-{seed}", overlays, [f"seed={seed}", *(more or [])])

    def _load(self, root: Path, overlays: list[Path], more: list[str] | None = None) -> RunConfig:
        own = [f"root={root}", "cluster.training_launcher=process"]
        return load_config([self.config, *overlays], [*own, *self.assignments, *(more or [])])


def share(folder: Path, config: RunConfig) -> None:
    """Makes a folder of another run this run's own."""
    link = Path(config.folder(folder.name))
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(folder)


def spread(found: list[dict[str, Any]], column: str) -> dict[str, float] | None:
    """Mean and standard deviation over seeds; none where a number was not measured."""
    values = [one[column] for one in found if one[column] is not None]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 5), "std": round(deviation, 5)}


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The paper's numbers and ours, a line of Markdown for each ablation."""
    paper = ("nmse", "rfvd", "fvd", "bits_per_token")
    heads = ["ablation", *(f"paper {name}" for name in paper), *COLUMNS]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, found in rows.items():
        published = [str(PAPER.get(name, {}).get(column, "-")) for column in paper]
        ours = [spread(found, column) for column in COLUMNS]
        cells = ["-" if one is None else f"{one['mean']:.4g} +- {one['std']:.2g}" for one in ours]
        print("| " + " | ".join([name, *published, *cells]) + " |")


if __name__ == "__main__":
    main()
