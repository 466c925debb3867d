"""``clipmill generate`` through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmill.video import decode_mp4
from tests.evaluation.toy_run import HEIGHT, WIDTH


@pytest.fixture
def export(run_root: Path, tmp_path: Path) -> Path:
    """One export, and nothing else of the run."""
    (source,) = [path for path in (run_root / "prior" / "exports").iterdir() if path.is_dir()]
    return Path(shutil.copytree(source, tmp_path / "export"))


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from clipmill.cli import main; main(); assert 'ray' not in sys.modules"
    return subprocess.run([sys.executable, "-c", program, "generate", *arguments], capture_output=True, text=True)


def test_an_export_makes_a_file(export: Path, tmp_path: Path):
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "cat.png")
    out = tmp_path / "out.mp4"
    done = generate(str(export), "--label", "up", "--first-frame", f"{tmp_path}/cat.png", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "generate: 1/1 windows" in done.stderr
    facts = json.loads(done.stdout)
    assert (facts["videos"], facts["frames"], facts["fps"]) == (1, 8, 8.0)
    assert decode_mp4(out.read_bytes()).shape == (8, HEIGHT, WIDTH, 3)


def test_several_become_a_grid_of_the_wanted_length(export: Path, tmp_path: Path):
    out = tmp_path / "out.mp4"
    done = generate(str(export), "--num", "4", "--seconds", "2.2", "--fps", "5", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert decode_mp4(out.read_bytes()).shape == (11, 2 * 11 * HEIGHT + 4, 2 * 11 * WIDTH + 4, 3)


def test_mistakes_are_one_line(export: Path, run_root: Path, tmp_path: Path):
    out = ("--out", str(tmp_path / "out.mp4"))
    for arguments, message in (
        ((str(export), "--label", "sideways", *out), "unknown label sideways; this generator knows down, left, up"),
        ((str(run_root / "vqvae"), *out), "is a tokenizer, which makes no videos by itself"),
        ((str(export), "--out", "cat.gif"), "--out cat.gif must end in .mp4"),
    ):
        done = generate(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("clipmill: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.mp4").exists()
