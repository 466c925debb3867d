"""Ranks that are killed, and started again in another number, serve what one undisturbed run would have."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clipmill.shards.dataset import ShardDataset, decode_codes
from clipmill.shards.order import Order, num_streams
from tests.shards.folders import write_dataset

GLOBAL_BATCH = 24
STEPS = 240
RANK = """\
import sys, time
from pathlib import Path
from clipmill.shards.dataset import ShardDataset, decode_codes, train_batches
from clipmill.shards.manifest import Manifest
from clipmill.shards.order import Order, num_streams

if __name__ == "__main__":
    url, cache, log, rank, world_size, first_step, num_workers, global_batch, steps = sys.argv[1:]
    dataset = ShardDataset(Manifest.load(url, "tokens"), decode_codes, Path(cache))
    order = Order(dataset.manifest.counts, 3, num_streams(int(global_batch)), 16)
    batches = train_batches(
        dataset, order, global_batch=int(global_batch), micro_batch=None, rank=int(rank), world_size=int(world_size),
        first_step=int(first_step), num_workers=int(num_workers),
    )
    with open(log, "a", buffering=1) as seen:
        for step in range(int(first_step), int(steps)):
            for batch in next(batches):
                keys = [key for key, weight in zip(batch["key"], batch["weight"].tolist()) if weight]
                seen.write(f"{step} {' '.join(keys)}\\n")
            time.sleep(0.01)  # a step: else the run is over before anybody can kill it
"""


def steps_seen(log: Path) -> dict[int, list[str]]:
    """Whole lines only: the last one may be cut by the kill."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return {int(step): keys for step, *keys in (line.decode().split() for line in lines)}


def shared_memory_of_the_dead() -> set[str]:
    """Files ``torch_PID_...`` whose process is gone: nobody will ever remove them."""
    names = [name for name in os.listdir("/dev/shm") if name.startswith("torch_")]
    return {name for name in names if not Path("/proc", name.split("_")[1]).exists()}


@pytest.mark.slow
def test_four_two_and_three_ranks_killed_serve_the_plan(tmp_path):
    manifest = write_dataset(tmp_path / "tokens", tmp_path, [30, 7, 0, 41, 25, 60, 13, 8] * 4)
    (script := tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    served: list[list[str]] = []
    residue_before = shared_memory_of_the_dead()
    for attempt, world_size in enumerate([4, 2, 3, 4]):
        last = attempt == 3
        first_step = len(served)
        logs = [tmp_path / f"seen-{attempt}-{rank}" for rank in range(world_size)]
        ranks = []
        for rank, log in enumerate(logs):
            numbers = [rank, world_size, first_step, attempt % 2, GLOBAL_BATCH, STEPS]
            command = [sys.executable, str(script), manifest.url, str(tmp_path / "cache"), str(log)]
            ranks.append(subprocess.Popen([*command, *map(str, numbers)], env=environment))
        try:
            if last:
                assert [process.wait(timeout=240) for process in ranks] == [0] * world_size
            else:
                target = first_step + chance.randrange(5, 40)
                deadline = time.monotonic() + 240
                while min(max(steps_seen(log), default=-1) for log in logs) < target:
                    assert time.monotonic() < deadline
                    assert all(process.poll() is None for process in ranks)
                    time.sleep(0.01)
        finally:
            for process in ranks:
                process.kill()
            codes = [process.wait() for process in ranks]
        if not last:
            assert codes == [-9] * world_size
        seen = [steps_seen(log) for log in logs]
        done = min(max(steps) for steps in seen) + 1  # what all ranks finished: a checkpoint holds no less
        served += [[key for steps in seen for key in steps[step]] for step in range(first_step, done)]
    assert len(served) == STEPS

    dataset = ShardDataset(manifest, decode_codes, tmp_path / "other-cache")
    order = Order(manifest.counts, 3, num_streams(GLOBAL_BATCH), 16)
    for step, keys in enumerate(served):
        positions = order.batch_positions(step, GLOBAL_BATCH)
        plan = [dataset.read(*place)["key"] for place in np.stack(order.locate(positions), axis=1).tolist()]
        assert keys == plan
    assert not shared_memory_of_the_dead() - residue_before
