"""A place to run stages as on a real cluster: separate hosts that share an S3 gateway and no file system."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import botocore.session
import pytest

from clipmill import storage
from clipmill.storage import connection
from tests.cluster import separate_hosts
from tests.cluster.chain import Chain, write_jobs
from tests.cluster.separate_hosts import REPOSITORY, Network, SeparateHosts
from tests.s3.gateway import ACCESS_KEY, SECRET_KEY, Gateway, missing_programs


def missing() -> str | None:
    """Why there can be no such place here."""
    if names := missing_programs():
        return f"no S3 server: {', '.join(names)} not installed (Debian: radosgw ceph-mon ceph-osd ceph-common)"
    return separate_hosts.missing()


def use_gateway(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, *hosts: str) -> dict[str, str]:
    """Makes a gateway the storage of this process, with a bucket ``runs``; returns the variables, for hosts too."""
    environment = {
        "AWS_ENDPOINT_URL": gateway.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": ",".join([gateway.host, *hosts]),
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    connection._connected.cache_clear()
    botocore.session.get_session().create_client("s3").create_bucket(Bucket="runs")
    return environment


def upload(folder: Path, write_videos: Callable[[Path], object]) -> None:
    """Writes videos and puts them into ``s3://runs/raw``."""
    write_videos(folder / "videos")
    for entry in storage.walk(str(folder / "videos")):
        storage.publish_file(folder / "videos" / entry.name, f"s3://runs/raw/{entry.name}")


class Site:
    """A network, an S3 gateway on it with a bucket ``runs``, and a cluster of separate hosts.

    Args:
        folder: for logs.
        monkeypatch: gives this process the credentials of the gateway.
        write_videos: writes source videos into a folder; they are uploaded to ``s3://runs/raw``.
        num_hosts: with the head.
    """

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        write_videos: Callable[[Path], object],
        num_hosts: int = 3,
    ) -> None:
        self.folder, self._num_hosts = folder, num_hosts
        self.network = Network(num_hosts)
        self._gateway: Gateway | None = None
        self.hosts: SeparateHosts | None = None
        try:
            self.gateway = self._gateway = Gateway(folder / "gateway", self.network.gateway_address)
            self.gateway.start()
            addresses = map(self.network.address_of, range(num_hosts))
            self._environment = use_gateway(self.gateway, monkeypatch, *addresses)
            upload(folder, write_videos)
            self.start_cluster()
        except BaseException:
            self.remove()
            raise

    def start_cluster(self) -> SeparateHosts:
        """A new cluster, at the addresses of the one before."""
        self.hosts = None
        self.hosts = SeparateHosts(self.network, self._num_hosts, **self._environment)
        return self.hosts

    def cluster(self) -> SeparateHosts:
        """The cluster with all its hosts; one that was lost has been started again."""
        assert self.hosts is not None
        for number in range(1, self._num_hosts):
            if not self.hosts.is_alive(number):
                self.hosts.start_again(number)
        return self.hosts

    def remove(self) -> None:
        if self.hosts is not None:
            self.hosts.stop()
        if self._gateway is not None:
            self._gateway.stop()
        self.network.remove()
        connection._connected.cache_clear()

    def submit(self, name: str, last: str) -> Chain:
        """Submits the stages up to a last one; ``name`` is the root's."""
        (folder := self.folder / name).mkdir()
        (travels := folder / "travels").mkdir()
        jobs = write_jobs(travels, f"s3://runs/{name}", "s3://runs/raw")
        return Chain(f"s3://runs/{name}", jobs, last, self.cluster().jobs, folder / "submit.log")
