"""Evaluations on Ray workers: their number does not matter, and a kill costs no finished part."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipmill.cluster import launch
from clipmill.config import RunConfig
from clipmill.evaluation import evaluate
from tests.evaluation.toy_run import Unleased, toy_config


def evaluation_files(config: RunConfig) -> dict[str, bytes]:
    folder = Path(evaluate.folder_url(config))
    return {name: (folder / name).read_bytes() for name in ("metrics.json", "gallery.npz")}


def parts(config: RunConfig) -> dict[str, tuple[int, bytes]]:
    """Every part with the time at which it was written, and its content."""
    folder = Path(config.root, "evaluation", "_parts")
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.npz")
    }


def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips to a part, and all of them on workers."""
    monkeypatch.setattr(evaluate, "CLIPS_PER_UNIT", 2)
    monkeypatch.setattr(evaluate, "TOKENS_PER_UNIT", 3)
    monkeypatch.setattr(evaluate, "FEW_CLIPS", 0)


@pytest.mark.slow
@pytest.mark.ci
def test_one_worker_and_four_find_the_same_bit_for_bit(config: RunConfig, tmp_path: Path, monkeypatch):
    in_small_parts(monkeypatch)
    found, written = [], []
    cluster = config.cluster.model_copy(update={"num_cpus": 4})
    with launch.connect(cluster):
        for number, workers in enumerate((1, 4)):
            root = tmp_path / f"{workers}-workers"
            shutil.copytree(config.root, root)
            shutil.rmtree(root / "evaluation")
            asked = toy_config(root)
            several = cluster.model_copy(update={"fanout_workers": workers})
            asked = asked.model_copy(update={"cluster": several})
            evaluate.run(asked, Unleased(evaluate.folder_url(asked), number + 1))
            found.append(evaluation_files(asked))
            written.append({name: content for name, (_, content) in parts(asked).items()})
    assert len(written[0]) > 10
    assert written[0] == written[1]
    assert found[0] == found[1]


KILLED = """
import sys
from pathlib import Path
from clipmill.evaluation import evaluate
from clipmill.evaluation.parts import Measure
from tests.evaluation.toy_run import Unleased, toy_config
evaluate.CLIPS_PER_UNIT, evaluate.TOKENS_PER_UNIT = 2, 3
publish = Measure.publish
def slowly(self, unit, part):
    publish(self, unit, part)
    print("part", flush=True)
    import time; time.sleep(0.2)
Measure.publish = slowly
config = toy_config(Path(sys.argv[1]))
evaluate.run(config, Unleased(evaluate.folder_url(config), 1))
"""


def test_a_killed_evaluation_goes_on_with_what_is_missing(config: RunConfig, tmp_path: Path, monkeypatch):
    in_small_parts(monkeypatch)
    monkeypatch.setattr(evaluate, "FEW_CLIPS", 256)  # in this process
    shutil.rmtree(Path(config.root, "evaluation"))
    shutil.copytree(config.root, tmp_path / "whole")
    whole = toy_config(tmp_path / "whole")
    evaluate.run(whole, Unleased(evaluate.folder_url(whole), 1))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, config.root], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == b"part\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts(config)
    assert 3 <= len(before) < len(parts(whole))
    assert not Path(evaluate.folder_url(config), "metrics.json").exists()
    time.sleep(0.01)
    evaluate.run(config, Unleased(evaluate.folder_url(config), 2))
    after = parts(config)
    assert {name: after[name] for name in before} == before  # none was measured again
    assert evaluation_files(config) == evaluation_files(whole)


def test_the_caller_keeps_its_threads_and_its_determinism(config: RunConfig):
    import torch

    shutil.rmtree(Path(config.root, "evaluation"))
    torch.set_num_threads(2)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = False, True
    evaluate.run(config, Unleased(evaluate.folder_url(config), 1))
    assert torch.get_num_threads() == 2
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == (False, True)
