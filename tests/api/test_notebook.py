"""examples/look.ipynb runs, from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_notebook_shows_a_run(run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    notebook = nbformat.read(REPOSITORY / "examples" / "look.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs would grow old
    (tmp_path / "runs").symlink_to(run_root.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 12  # a row for each video
    assert (tmp_path / "long.mp4").stat().st_size > 0
