from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.s3_server import S3Server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The storage of ``s3://`` URLs in this process."""
    server = S3Server()
    server.use(monkeypatch)
    yield server
    server.stop()
