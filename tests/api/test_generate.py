"""``clipmill generate``: one export is all there is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipmill.cli.command import app
from clipmill.errors import UserError
from clipmill.video import decode_mp4
from tests.evaluation.toy_run import HEIGHT, WIDTH


@pytest.fixture
def export(run_root: Path, tmp_path: Path) -> Path:
    """One export, and nothing else of the run."""
    (source,) = [path for path in (run_root / "prior" / "exports").iterdir() if path.is_dir()]
    return Path(shutil.copytree(source, tmp_path / "export"))


def test_an_export_makes_a_file_without_ray(export: Path, tmp_path: Path):
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "cat.png")
    out = tmp_path / "out.mp4"
    program = "import sys; from clipmill.cli import main; main(); assert 'ray' not in sys.modules"
    given = ["--label", "up", "--first-frame", f"{tmp_path}/cat.png", "--out", str(out)]
    command = [sys.executable, "-c", program, "generate", str(export), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate: 12/12 codes" in done.stderr
    facts = json.loads(done.stdout)
    assert (facts["videos"], facts["frames"], facts["fps"]) == (1, 8, 8.0)
    assert decode_mp4(out.read_bytes()).shape == (8, HEIGHT, WIDTH, 3)


def test_several_become_a_grid_of_the_wanted_length(export: Path, tmp_path: Path):
    out = tmp_path / "out.mp4"
    arguments = ["generate", str(export), "--num", "4", "--seconds", "2.2", "--fps", "5", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert decode_mp4(out.read_bytes()).shape == (11, 2 * 11 * HEIGHT + 4, 2 * 11 * WIDTH + 4, 3)


def test_mistakes_are_one_line(export: Path, run_root: Path, tmp_path: Path):
    out = ("--out", str(tmp_path / "out.mp4"))
    (tmp_path / "cat.png").write_text("a cat")
    for arguments, message in (
        ((str(export), "--label", "sideways", *out), "unknown label sideways; this generator knows down, left, up"),
        ((str(run_root / "vqvae"), *out), "is a tokenizer, which cannot generate videos alone"),
        ((str(export), "--first-frame", f"{tmp_path}/cat.png", *out), "cat.png cannot be read: no picture"),
        ((str(export), "--condition", "x.npy", *out), "--condition x.npy: this prior takes no actions"),
        ((str(export), "--out", "cat.gif"), "--out cat.gif must end in .mp4"),
    ):
        error = CliRunner().invoke(app, ["generate", *arguments]).exception
        assert isinstance(error, UserError)
        assert message in str(error)
        assert "\n" not in str(error)
    assert not (tmp_path / "out.mp4").exists()
