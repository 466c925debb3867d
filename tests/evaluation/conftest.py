from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clipmill.config import RunConfig
from clipmill.evaluation import evaluate
from tests.evaluation.toy_run import Unleased, make_samples, toy_config, write_run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def evaluated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    config = toy_config(root)
    write_run(config, tmp_path_factory.mktemp("scratch"))
    make_samples(config)
    evaluate.run(config, Unleased(evaluate.folder_url(config), 1))
    return root


@pytest.fixture
def config(evaluated_root: Path, tmp_path: Path) -> RunConfig:
    """A run of its own that has come as far as ``evaluate``."""
    shutil.copytree(evaluated_root, tmp_path / "run")
    return toy_config(tmp_path / "run")
