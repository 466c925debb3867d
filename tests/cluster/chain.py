"""A chain of stages that `clipmill submit` runs on separate hosts, watched from outside through its storage."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from clipmill import status, storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.shards.manifest import SPLITS
from clipmill.status.places import FOLDERS
from clipmill.training.checkpoint import newest_step
from tests.cluster import jobs_file

STAGES = ("shard", "train-vqvae", "tokenize", "train-prior", "sample")
TRAININGS = ("train-vqvae", "train-prior")
PATIENCE_SECONDS = 900
"""For one stage, on a busy machine."""
WATCH_SECONDS = 2.0
OF_ATTEMPTS = ("_lease", "logs", "status.json", "summary.json", "config.yaml", "previews")
"""What each attempt writes about itself."""

TRAINING = {"global_batch": 4, "log_every": 1, "val_every": 50, "val_clips": 8, "loader_workers": 0}
CONFIG = {
    "data": {
        "clip": {"num_frames": 8, "clip_stride": 8, "resolution": 32},
        "unit_bytes": 20_000,
        "val_fraction": 0.2,
        "source": {"actions_suffix": ".actions.npy"},
    },
    "vqvae": {
        "model": {"hidden_dim": 16, "num_res_layers": 1, "embedding_dim": 8, "num_codes": 32},
        "training": {"steps": 120, "checkpoint_every": 20, **TRAINING},
    },
    "prior": {
        "model": {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "class_conditional": True},
        "training": {"steps": 120, "checkpoint_every": 20, **TRAINING},
    },
    "sample": {"num_samples": 48, "batch_size": 2},
    "cluster": {"training_workers": 2},
}
"""Three hosts share the work of a fan-out; a training uses two of them."""


def write_jobs(folder: Path, root: str, source: str) -> Path:
    """The jobs file of a run and its config, in a folder of their own, which is what travels to the cluster."""
    config = copy.deepcopy(CONFIG)
    config["root"], config["data"]["source"]["url"] = root, source
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    jobs = [
        {"name": stage, "entrypoint": f"clipmill {stage}", "needs": list(STAGES[:number][-1:]), "retries": 10}
        for number, stage in enumerate(STAGES)
    ]
    return jobs_file.write_jobs(folder, jobs, config="run.yaml", runtime_env={"working_dir": "."})


class Chain:
    """One ``clipmill submit`` of the stages up to a last one, and what `clipmill status` says meanwhile.

    Args:
        root: of the run.
        jobs: its jobs file.
        last: the last stage.
        address: URL of the Jobs server.
        log: what ``submit`` says.
    """

    def __init__(self, root: str, jobs: Path, last: str, address: str, log: Path) -> None:
        self.root, self._log = root, log
        self._seen: list[dict[str, str]] = []
        """The state of each stage, each time it was read."""
        command = [sys.executable, "-m", "clipmill.cli", "submit", last, "--jobs", str(jobs), "--address", address]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "RAY_AUTH_MODE": "disabled"}
            )
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._is_over.wait(WATCH_SECONDS):
            try:
                with storage.limit_retries(5):
                    shown = {one.stage: one.shown for one in status.read_run(self.root)}
            except (UserError, StorageUnavailable):  # nothing has begun, or the gateway is away
                continue
            self._seen.append(shown)

    def close(self) -> None:
        """Ends what watches and waits; a job of the cluster is not ended."""
        self._is_over.set()
        self._watcher.join()
        self.process.kill()
        self.process.wait()

    def folder(self, stage: str) -> str:
        return storage.join(self.root, FOLDERS[stage])

    def progress(self, stage: str) -> int:
        """Committed units, or steps behind the newest checkpoint; 0 while the gateway is away."""
        try:
            with storage.limit_retries(2):
                if stage in TRAININGS:
                    return newest_step(self.folder(stage))
                urls = [self.folder(stage)] if stage == "sample" else [f"{self.folder(stage)}/{s}" for s in SPLITS]
                return sum(len(storage.list_folder(f"{url}/commits")) for url in urls)
        except StorageUnavailable:
            return 0

    def is_finished(self, stage: str) -> bool:
        try:
            with storage.limit_retries(2):
                return storage.exists(f"{self.folder(stage)}/summary.json")
        except StorageUnavailable:
            return False

    def wait_for(self, condition: Callable[[], bool], what: str, poll_seconds: float = 0.1) -> float:
        """Waits until a condition holds; returns the time.

        Raises:
            AssertionError: ``submit`` has ended before, or the wait is too long; with the end of its log.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() in (None, 0), f"no {what}: {self.log_tail()}"
            assert time.monotonic() < deadline, f"no {what}: {self.log_tail()}"
            time.sleep(poll_seconds)
        return time.monotonic()

    def log_tail(self) -> str:
        return self._log.read_text()[-3000:]

    def shown(self, stage: str) -> list[str]:
        """States of a stage as they were shown, without repetitions."""
        states = [shown[stage] for shown in self._seen]
        return [state for number, state in enumerate(states) if states[number - 1 : number] != [state]]


def results_of(root: str) -> dict[str, bytes]:
    """What a run leaves, without what each attempt writes about itself, by name."""
    found = {}
    for entry in storage.walk(root):
        kind, _, rest = entry.name.partition("/")
        parts = rest.split("/")
        is_kept = kind not in ("vqvae", "prior") or parts[0] == "exports"
        if is_kept and not set(parts) & set(OF_ATTEMPTS):
            found[entry.name] = storage.read_bytes(f"{root}/{entry.name}")
    return found
