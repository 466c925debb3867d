"""All stages at toy size, on real videos, with real Ray, DeepSpeed and WebDataset."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import webdataset
import yaml

from clipmill import stages, status
from clipmill.cluster import launch
from clipmill.config import load_config
from clipmill.demo import CLASSES, generate

CONFIG = {
    "data": {
        "clip": {"num_frames": 8, "clip_stride": 8, "resolution": 32},
        "unit_bytes": 60_000,
        "val_fraction": 0.2,
        "source": {"actions_suffix": ".actions.npy"},
    },
    "vqvae": {
        "model": {"hidden_dim": 16, "num_res_layers": 1, "embedding_dim": 8, "num_codes": 32},
        "training": {"steps": 12, "global_batch": 4},
    },
    "prior": {
        "model": {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "class_conditional": True},
        "training": {"steps": 12, "global_batch": 4},
    },
    "sample": {"num_samples": 10, "batch_size": 5},
    "cluster": {"num_cpus": 2},
}
TRAINING = {"log_every": 1, "val_every": 6, "val_clips": 8, "checkpoint_every": 4, "loader_workers": 0}


def write_config(root: Path, source: Path) -> Path:
    config = json.loads(json.dumps(CONFIG))
    config["root"] = str(root)
    config["data"]["source"]["url"] = str(source)
    for section in ("vqvae", "prior"):
        config[section]["training"] |= TRAINING
    path = root.parent / f"{root.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    generate(str(folder), num_videos=25)
    (folder / CLASSES[0] / "broken.mp4").write_bytes(b"this is no video")
    return folder


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    """A root in which all stages have run in one process, as `clipmill demo` runs them."""
    root = tmp_path_factory.mktemp("whole") / "run"
    config = load_config([write_config(root, source)])
    summaries = stages.run_all(config)
    assert all(summaries.values())
    assert (summaries["shard"]["videos"], summaries["shard"]["failed"]) == (26, 1)
    return root


def shard_names(root: Path, *folders: str) -> dict[str, str]:
    """Every tar and index with its hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted((root / folder).rglob("*.tar*"))
    }


def test_every_stage_leaves_its_result(finished):
    page = (finished / "report" / "index.html").read_text()
    for text in ("real", "reconstruction", "sample", *CLASSES):
        assert text in page
    metrics = json.loads((finished / "evaluation" / "default" / "metrics.json").read_text())
    assert metrics["reconstruction"]["nmse"] > 0
    for stage in ("clips", "vqvae", "tokens", "prior", "samples/default", "evaluation/default", "report"):
        summary = json.loads((finished / stage / "summary.json").read_text())
        assert summary["seconds"] > 0
        assert (finished / stage / "config.yaml").exists()
    shown = status.read_run(str(finished))
    assert [(one.stage, one.shown) for one in shown] == [(name, "finished") for name in stages.STAGES]
    shard, train, *_ = (one.record for one in shown)
    assert (shard.progress.done, shard.quarantine[0].count) == (26, 1)
    assert train.progress.done == train.progress.total
    assert (train.attempt, train.failures) == (1, [])
    (line,) = (finished / "clips" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["url"].endswith("broken.mp4")
    assert json.loads(line)["cause"]


def test_webdataset_reads_the_shards_without_us(finished):
    expected = {"clips": {"mp4", "json", "actions.npy"}, "tokens": {"codes.npy", "json", "actions.npy"}}
    for kind, members in expected.items():
        folder = finished / kind / "train"
        names = (folder / "shards.txt").read_text().split()
        dataset = webdataset.WebDataset([str(folder / name) for name in names], shardshuffle=False).decode()
        samples = list(dataset)
        assert len(samples) == json.loads((folder / "manifest.json").read_text())["num_samples"]
        assert members <= set(samples[0])
        assert samples[0]["json"]["label"] in CLASSES
        assert samples[0]["actions.npy"].shape == (8, 2)
    assert samples[0]["codes.npy"].shape == (2, 8, 8)
    assert samples[0]["codes.npy"].max() < 32


def test_running_everything_again_finds_nothing_to_do(finished, source):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    summaries = stages.run_all(load_config([finished.parent / "run.yaml"]))
    assert set(summaries.values()) == {None}
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_verify_and_inspect_through_the_command_line(finished, tmp_path):
    result = run_cli("verify", str(finished), "--deep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("whole: ") == 5
    result = run_cli("inspect", str(finished), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "ball_bouncing" in result.stdout
    assert (tmp_path / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
    damaged = next((finished / "tokens" / "val").glob("*.tar"))
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-1] + b"x")
        result = run_cli("verify", str(finished), cwd=tmp_path)
        assert result.returncode == 1
        assert f"{damaged.name}: its sha256 is not the committed one" in result.stdout
    finally:
        damaged.write_bytes(content)


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipmill.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)


# ------------------------------------------------------------------------------------------- killed

SIGNS_OF_WORK = {
    "shard": "clips/train/commits/*.json",
    "train-vqvae": "vqvae/checkpoints/*/*/COMMITTED",
    "tokenize": "tokens/train/commits/*.json",
    "train-prior": "prior/checkpoints/*/*/COMMITTED",
    "sample": "samples/default/commits/*.json",
}
"""What each stage has left when it is in its middle."""


def kill_in_the_middle(stage: str, path: Path, root: Path, log: Path) -> bool:
    """Starts a stage and kills its driver with SIGKILL at the first sign of work; False: it had ended before."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "clipmill.cli", stage, "--config", str(path)], stdout=output, stderr=output
        )
    family = [psutil.Process(process.pid)]
    while process.poll() is None and not list(root.glob(SIGNS_OF_WORK[stage])):
        family = list({*family, *psutil.Process(process.pid).children(recursive=True)})
        time.sleep(0.005)
    killed = process.poll() is None
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # An embedded Ray dies with its driver. Its idle agents look for the dead head for a minute before they follow.
    _, alive = psutil.wait_procs(family, timeout=30)
    workers = [process for process in alive if process.is_running() and not process.name().endswith("Agent")]
    assert not workers, f"{stage} left {workers}"
    return killed


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1500)
def test_every_stage_completes_after_a_kill_with_the_same_bytes(finished, source, tmp_path):
    root, log = tmp_path / "run", tmp_path / "log.txt"
    path = write_config(root, source)
    killed = {}
    for stage in ("shard", "train-vqvae", "tokenize", "train-prior", "sample"):
        killed[stage] = kill_in_the_middle(stage, path, root, log)
        result = run_cli(stage, "--config", str(path), cwd=tmp_path)
        assert result.returncode == 0, f"{stage}: {result.stderr}\n{log.read_text()[-2000:]}"
    assert killed == dict.fromkeys(killed, True)
    for folder in ("clips", "tokens", "samples"):
        assert shard_names(root, folder) == shard_names(finished, folder)
    config = load_config([path])
    with launch.connect(config.cluster):
        for stage in ("evaluate", "report"):
            stages.run_stage(stage, config)
    same = [json.loads((run / "evaluation" / "default" / "metrics.json").read_text()) for run in (root, finished)]
    assert same[0]["prior"] == same[1]["prior"]
    assert same[0]["reconstruction"] == same[1]["reconstruction"]
