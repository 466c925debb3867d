from __future__ import annotations

from pathlib import Path

import pytest

from clipmill.shards.manifest import Manifest
from tests.shards.folders import COUNTS, write_dataset


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path / "tokens", tmp_path, COUNTS)
