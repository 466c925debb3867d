"""`make bench-gpu` keeps what its parts print, and names those that fail or take too long."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", REPOSITORY / "benchmarks" / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_is_its_last_line(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text('print("on its way"); print(\'{"mfu": {"100m": 0.4}}\')')
    result = gpu.run((str(tmp_path / "part.py"),), limit_seconds=60)
    assert result == {"mfu": {"100m": 0.4}}
    assert "| prior | mfu.100m | 0.4 |" in gpu.table("1 x H100", {"prior": result})


def test_a_part_that_fails_or_does_not_end_is_named(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    assert gpu.run((str(tmp_path / "fails.py"),), limit_seconds=60) == {"failed": "exit status 3"}
    assert gpu.run((str(tmp_path / "hangs.py"),), limit_seconds=0.5) == {"failed": "not finished after 0 s"}


def test_every_part_is_a_program_of_the_folder(gpu: ModuleType) -> None:
    assert all((REPOSITORY / "benchmarks" / part.command[0]).is_file() for part in gpu.PARTS.values())
    assert sum(part.share for part in gpu.PARTS.values()) == pytest.approx(1)
