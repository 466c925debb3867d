"""The code in docs/python.md runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_code_of_the_page_runs(run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) == 6
    (tmp_path / "runs").symlink_to(run_root.parent)
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "four.mp4").stat().st_size > 0
    assert (tmp_path / "long.mp4").stat().st_size > 0
