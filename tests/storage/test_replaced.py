"""Objects of a bucket that are replaced while they are read in several requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipmill import storage
from clipmill.storage import connection
from tests.storage.s3_server import S3Server

OLD, NEW = b"old " * 1024, b"new " * 1024


def test_a_reader_gives_one_version_or_none(s3: S3Server) -> None:
    s3.objects = {"a": OLD}
    with storage.open_to_read("s3://b/a", 1024) as file:
        assert file.read(1024) == OLD[:1024]
        s3.objects["a"] = NEW
        with pytest.raises(storage.Unreadable, match="s3://b/a was replaced while it was read"):
            file.read(1024)
        s3.objects["a"] = OLD
        assert file.read() == OLD[1024:]


def test_a_copy_is_of_one_version(s3: S3Server, tmp_path: Path) -> None:
    filesystem, _ = connection.connect("s3://b/a")
    filesystem.default_block_size = 1024  # s3fs copies larger objects in ranges
    s3.objects = {"a": OLD}

    def replace(request: str, number: int) -> None:
        if (request, number) == ("GET a", 2):
            s3.objects["a"] = NEW

    s3.fault = replace
    storage.fetch("s3://b/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == NEW
