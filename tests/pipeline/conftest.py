from __future__ import annotations

from collections.abc import Iterator

import pytest

from clipmill.cluster import connect
from clipmill.config import ClusterConfig


@pytest.fixture(scope="package")
def embedded() -> Iterator[None]:
    """One Ray of two logical CPUs for all tests of this folder; the stages under test join it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect(ClusterConfig(num_cpus=2)):
            yield
