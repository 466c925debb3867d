"""Measures how much better a prior predicts codes than tables do, and how much classes help it.

On the tokens of a finished run (such as `make demo`), this trains the run's prior twice, without and with classes, for
equal steps. It compares their bits per token on the whole split val with those of three tables fitted on the split
train (see ``clipmill/evaluation/baselines.py``). The goal is 25 % fewer bits than the better bigram, and fewer bits
with classes than without. A class can save at most its own entropy, once per clip. Over hundreds of tokens that is
small compared with the noise of a training, so use several seeds.

    python benchmarks/learning.py runs/demo [--steps 1600] [--seeds 3] [prior.training.weights_ema=0.99 ...]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from clipmill.config import RunConfig, load_config
from clipmill.evaluation.baselines import CodeTables, baseline_scores
from clipmill.metrics import read_metrics
from clipmill.shards.dataset import ShardDataset, decode_codes, eval_batches
from clipmill.shards.manifest import Manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="of a run that has tokens of labelled clips, on this machine")
    parser.add_argument("--steps", type=int, help="of each training; none: the run's own")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("assignments", nargs="*", help="over the run's configuration")
    arguments = parser.parse_args()
    config_file = arguments.root.resolve() / "tokens" / "config.yaml"
    config = load_config([config_file], arguments.assignments)
    tables = table_bits(config)
    for name, bits in tables.items():
        print(f"{name}: {bits:.3f} bits a token", flush=True)
    steps = arguments.steps or config.prior.training.steps
    trained: dict[str, list[float]] = {"unconditional": [], "classes": []}
    for seed in range(arguments.seeds):
        for name, bits in trained.items():
            began = time.monotonic()
            bits.append(trained_bits(config_file, config, steps, seed, name == "classes", arguments.assignments))
            print(f"prior, {name}, seed {seed}: {bits[-1]:.4f} bits, {time.monotonic() - began:.0f} s", flush=True)
    means = {name: statistics.mean(bits) for name, bits in trained.items()}
    differences = [told - untold for told, untold in zip(trained["classes"], trained["unconditional"], strict=True)]
    bigram = min(tables["raster_bigram"], tables["temporal_bigram"])
    result = {
        "benchmark": "learning",
        "steps": steps,
        "seeds": arguments.seeds,
        "bits_per_token": {name: round(bits, 4) for name, bits in (tables | means).items()},
        "saved_of_bigram": {name: round(1 - bits / bigram, 4) for name, bits in means.items()},
        "bits_more_with_classes": [round(difference, 4) for difference in differences],
        "bits_that_classes_tell": round(class_bits(config), 4),
    }
    print(json.dumps(result))


def class_bits(config: RunConfig) -> float:
    """Entropy of the class of a clip of the split val, in bits a token."""
    manifest = Manifest.load(config.folder("tokens", "val"), "tokens")
    counts: Counter[str] = Counter()
    for batch in eval_batches(ShardDataset(manifest, decode_codes), batch_size=64, rank=0, world_size=1):
        counts.update(label for label, weight in zip(batch["label"], batch["weight"], strict=True) if weight)
    shares = [count / counts.total() for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares) / math.prod(manifest.recipe["latent_shape"])


def table_bits(config: RunConfig) -> dict[str, float]:
    """Bits a token of the split val under each table."""
    counted = {}
    for split in ("train", "val"):
        manifest = Manifest.load(config.folder("tokens", split), "tokens")
        counted[split] = CodeTables(manifest.recipe["num_codes"], math.prod(manifest.recipe["latent_shape"][3:]))
        for batch in eval_batches(ShardDataset(manifest, decode_codes), batch_size=64, rank=0, world_size=1):
            counted[split].update(batch["codes"][batch["weight"] > 0].numpy())
    scores = baseline_scores(counted["train"], counted["val"])
    return {name: scores[f"{name}_bits"] for name in ("unigram", "temporal_bigram", "raster_bigram")}


def trained_bits(
    config_file: Path, config: RunConfig, steps: int, seed: int, classes: bool, assignments: list[str]
) -> float:
    """Bits a token of the split val under a prior after so many steps of the stage ``train-prior``, run by itself."""
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        (Path(folder) / "tokens").symlink_to(config.folder("tokens"))
        settings = [
            f"root={folder}",
            f"seed={seed}",
            f"tokenize.tokenizer={config.tokenizer_url}",
            "cluster.training_launcher=process",
            f"prior.model.class_conditional={json.dumps(classes)}",
            f"prior.training.steps={steps}",
            f"prior.training.val_every={steps}",
            f"prior.training.checkpoint_every={steps}",
            "prior.training.val_clips=1000000000",
        ]
        if not classes:
            settings.append("prior.model.label_dropout=0")
        command = ["train-prior", "--config", str(config_file), *assignments, *settings]
        subprocess.run([sys.executable, "-m", "clipmill.cli", *command], check=True, stdout=subprocess.DEVNULL)
        records = read_metrics(str(Path(folder) / "prior"))
    return [record["loss"] for record in records if record["split"] == "val"][-1] / math.log(2)


if __name__ == "__main__":
    main()
