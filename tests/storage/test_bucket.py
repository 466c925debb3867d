"""What `clipmill.storage.bucket` does without a server; `tests/s3` has one."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import pytest

from clipmill import storage
from clipmill.cluster.connection import cluster_error, error_facts
from clipmill.errors import DamagedDocument, StageFailed, StorageUnavailable, UserError
from clipmill.storage import connection, retries

OPERATIONS = {
    "read": lambda url: storage.read_bytes(f"{url}/a"),
    "exists": lambda url: storage.exists(f"{url}/a"),
    "list": lambda url: storage.list_folder(url),
    "walk": lambda url: list(storage.walk(url)),
    "create": lambda url: storage.create_bytes(f"{url}/a", b"a"),
    "publish": lambda url: storage.publish_bytes(f"{url}/a", b"a"),
    "remove": lambda url: storage.remove(f"{url}/a"),
}


class _Overloaded(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline().strip():
            continue
        self.wfile.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture
def overloaded() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Overloaded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Credentials that look right for a server that is not there."""
    environment = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        retries.RETRY_SECONDS_VARIABLE: "0.3",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    connection._connected.cache_clear()
    yield
    connection._connected.cache_clear()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_server_that_is_not_there_is_an_outage(operation: str) -> None:
    with pytest.raises(StorageUnavailable, match=r"s3://here.* did not recover within 0\.3 s") as raised:
        OPERATIONS[operation]("s3://here")
    # As an outage of a disk for those who handle these, as a failed stage for the command line.
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, StageFailed)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_overloaded_server_is_an_outage(overloaded: str, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", overloaded)
    with pytest.raises(StorageUnavailable, match="503"):
        OPERATIONS[operation]("s3://here")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_DEFAULT_REGION", "us_east", "us_east"),
        ("AWS_ENDPOINT_URL", "no address", "no address"),
        ("AWS_PROFILE", "nobody", "nobody"),
    ],
)
def test_settings_that_the_client_refuses_are_no_damage(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    for read in (storage.read_bytes, lambda url: storage.read_document(url, 1)):
        with pytest.raises(UserError, match=f"s3://here/plan.json: .*{said}.*correct .*{name}") as raised:
            read("s3://here/plan.json")
        assert not isinstance(raised.value, DamagedDocument)
        assert "\n" not in str(raised.value)


def test_an_outage_ends_with_the_status_that_is_tried_again() -> None:
    with pytest.raises(StorageUnavailable) as raised:
        storage.read_bytes("s3://here/a")
    kind, message = error_facts(raised.value)
    assert cluster_error(kind, message).exit_status == raised.value.exit_status == 75


def test_what_is_no_bucket_url() -> None:
    with pytest.raises(UserError, match="use a local path or an s3:// URL"):
        storage.exists("nowhere://bucket/a")


def test_a_deadline_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "long")
    with pytest.raises(UserError, match="long is not a number"):
        storage.exists("s3://here/a")
