from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from clipmill.storage import connection
from tests.clouds.emulators import Azurite, FakeGCS


def started(kind: type[Azurite] | type[FakeGCS]) -> Iterator[Azurite | FakeGCS]:
    if missing := kind.missing():
        pytest.skip(missing)
    emulator = kind()
    emulator.serve()
    yield emulator
    emulator.kill()


# Not for the session: fake-gcs-server computes without end after some of the tests.
@pytest.fixture(scope="module")
def azurite() -> Iterator[Azurite | FakeGCS]:
    yield from started(Azurite)


@pytest.fixture(scope="module")
def fake_gcs() -> Iterator[Azurite | FakeGCS]:
    yield from started(FakeGCS)


@pytest.fixture(params=["azurite", "fake_gcs"])
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Azurite | FakeGCS]:
    """Each emulator, known to this process and its children by the variables that users set."""
    found = request.getfixturevalue(request.param)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    connection._connected.cache_clear()
    yield found
    connection._connected.cache_clear()


@pytest.fixture
def bucket_url(emulator: Azurite | FakeGCS) -> str:
    """A new, empty bucket or container."""
    name = f"tests-{uuid.uuid4().hex[:12]}"
    emulator.create_bucket(name)
    return f"{emulator.scheme}://{name}"
