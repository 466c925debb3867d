from __future__ import annotations

from collections.abc import Iterator

import pytest

from clipmill.cluster import connect
from clipmill.config import ClusterConfig


@pytest.fixture(scope="package")
def embedded() -> Iterator[None]:
    """One Ray of three logical CPUs for all tests of this folder; the functions under test join it."""
    with connect(ClusterConfig(num_cpus=3)):
        yield


@pytest.fixture(autouse=True)
def _no_cluster_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
