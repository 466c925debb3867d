from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.toy_run import make_samples, toy_config, write_run


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of toy size with clips, tokens, a tokenizer, a prior and samples; nobody writes to it."""
    root = tmp_path_factory.mktemp("api") / "runs" / "demo"
    config = toy_config(root)
    write_run(config, tmp_path_factory.mktemp("scratch"))
    make_samples(config)
    return root
