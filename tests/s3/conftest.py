from __future__ import annotations

import uuid
from collections.abc import Iterator

import botocore.session
import pytest

from clipmill.storage import connection
from tests.s3.gateway import ACCESS_KEY, SECRET_KEY, Gateway, missing_programs
from tests.s3.proxy import Proxy


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One server for all tests of this folder."""
    if missing := missing_programs():
        pytest.skip(f"no S3 server: {', '.join(missing)} not installed (Debian: radosgw ceph-mon ceph-osd ceph-common)")
    server = Gateway(tmp_path_factory.mktemp("gateway"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def proxy(gateway: Gateway) -> Iterator[Proxy]:
    proxy = Proxy(gateway.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def credentials(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process and its children reach the server, by the variables that users set."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    connection._connected.cache_clear()
    yield
    connection._connected.cache_clear()


@pytest.fixture
def bucket_url(credentials: None) -> str:
    """A new, empty bucket."""
    name = f"tests-{uuid.uuid4().hex[:12]}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
