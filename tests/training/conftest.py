from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.toy import write_inputs


@pytest.fixture(scope="package")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs for every root of this folder's tests."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder
