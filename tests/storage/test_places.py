"""Two places in one process, each with its own address and its own keys."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from clipmill import storage
from clipmill.config import RunConfig, StoragePlace, load_config
from clipmill.errors import UserError
from clipmill.storage import connection
from clipmill.storage.places import PLACES_VARIABLE, place_of
from tests.storage.s3_server import S3Server


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Server, S3Server]]:
    """The server of the environment, and another one; neither takes the other's key."""
    here, there = S3Server(), S3Server()
    here.use(monkeypatch)
    here.access_key, there.access_key = "key", "other-key"
    monkeypatch.setenv("RAW_AWS_ACCESS_KEY_ID", "other-key")
    monkeypatch.setenv("RAW_AWS_SECRET_ACCESS_KEY", "other-secret")
    monkeypatch.delenv(PLACES_VARIABLE, raising=False)
    yield here, there
    here.stop()
    there.stop()


def set_places(monkeypatch: pytest.MonkeyPatch, *places: dict[str, object]) -> None:
    monkeypatch.setenv(PLACES_VARIABLE, "")  # to be restored
    storage.set_places([StoragePlace.model_validate(place) for place in places])


def test_each_place_has_its_own_address_and_keys(
    servers: tuple[S3Server, S3Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = servers
    set_places(monkeypatch, {"url": "s3://raw", "endpoint_url": there.endpoint, "credentials": "RAW_"})
    storage.publish_bytes("s3://raw/video", b"raw")
    storage.publish_bytes("s3://runs/clip", b"clip")
    storage.publish_bytes("s3://raw-not/clip", b"clip")
    assert (there.objects, set(here.objects)) == ({"video": b"raw"}, {"clip"})
    assert [entry.name for entry in storage.walk("s3://raw")] == ["video"]
    assert storage.read_bytes("s3a://raw/video") == b"raw"


def test_keys_of_another_place_are_refused(servers: tuple[S3Server, S3Server], monkeypatch: pytest.MonkeyPatch) -> None:
    there = servers[1]
    set_places(monkeypatch, {"url": "s3://raw", "endpoint_url": there.endpoint})
    with pytest.raises(UserError, match=r"s3://raw/video: access denied \(InvalidAccessKeyId\)"):
        storage.publish_bytes("s3://raw/video", b"raw")
    set_places(monkeypatch, {"url": "s3://raw", "endpoint_url": there.endpoint, "credentials": "ABSENT_"})
    with pytest.raises(UserError, match="set ABSENT_AWS_ACCESS_KEY_ID and ABSENT_AWS_SECRET_ACCESS_KEY on every node"):
        storage.publish_bytes("s3://raw/video", b"raw")


def test_a_profile_wins_over_the_keys_of_the_environment(
    servers: tuple[S3Server, S3Server], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    there = servers[1]
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = other-key\naws_secret_access_key = other-secret\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    set_places(monkeypatch, {"url": "s3://raw", "endpoint_url": there.endpoint, "profile": "lab"})
    storage.publish_bytes("s3://raw/video", b"raw")
    assert there.objects == {"video": b"raw"}


def test_the_most_special_place_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_places(
        monkeypatch,
        {"url": "s3://", "region": "any"},
        {"url": "s3://b/runs", "region": "runs"},
        {"url": "s3://b", "region": "b"},
        {"url": "az://box", "account": "lab"},
    )
    found = {
        url: place.region if (place := place_of(url)) else None
        for url in ("s3://b/runs/x", "s3://b/runs", "s3://b/runs-2/x", "s3://c/x", "/b/runs", "gs://b/runs")
    }
    assert list(found.values()) == ["runs", "runs", "b", "any", None, None]
    assert place_of("abfs://box/x").account == "lab"


def test_places_travel_to_workers_and_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipmill.cluster.connection import worker_environment

    monkeypatch.setenv("RAW_AWS_SECRET_ACCESS_KEY", "MARKER-OF-A-KEY")
    set_places(monkeypatch, {"url": "s3://raw", "credentials": "RAW_"})
    assert json.loads(worker_environment()[PLACES_VARIABLE]) == [{"url": "s3://raw", "credentials": "RAW_"}]
    assert "MARKER" not in str(worker_environment())


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"url": "s3://b", "secret": "MARKER"}, "storage.0: .*secret: a config holds no credentials"),
        ({"url": "s3://b", "account_key": "MARKER"}, "account_key: a config holds no credentials"),
        ({"url": "s3://b", "endpoint_url": "https://me:MARKER@host"}, "an address holds a user or password"),
        ({"url": "s3://me:MARKER@b"}, "an address holds a user or password"),
        ({"url": "s3://b", "profile": "a", "anonymous": True}, "exclude each other"),
        ({"url": "/local"}, "storage.0.url: String should match pattern"),
        ({"url": "s3://b", "endpoint": "x"}, "unknown key storage.0.endpoint"),
    ],
)
def test_credentials_and_mistakes_are_refused(tmp_path, place: dict[str, object], says: str) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({"root": "x", "storage": [place]}))
    with pytest.raises(UserError, match=says) as caught:
        load_config([tmp_path / "run.yaml"])
    assert "MARKER" not in str(caught.value)


def test_a_variable_that_is_no_list_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACES_VARIABLE, "https://s3.lab")
    with pytest.raises(UserError, match=r"CLIPMILL_STORAGE: .*docs/storage\.md"):
        storage.exists("s3://b/x")


def test_an_empty_list_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACES_VARIABLE, '[{"url": "s3://b"}]')
    storage.set_places(RunConfig(root="x").storage)
    connection._connected.cache_clear()
    assert place_of("s3://b/x") is not None
