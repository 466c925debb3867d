"""The file systems of buckets and web servers, connected once a process. Alone with `s3` it imports fsspec and s3fs."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import fsspec

from clipmill.storage.blame import S3_SCHEMES
from clipmill.storage.urls import scheme

__all__ = ["connect"]

_connecting = threading.Lock()


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a bucket URL, and the object's path in it."""
    with _connecting:
        filesystem = _connected(scheme(url), os.getpid())
    return filesystem, filesystem._strip_protocol(url)


@functools.cache
def _connected(protocol: str, process: int) -> Any:
    """One connected file system a process (it does not survive a fork), shared by its threads.

    fsspec itself would make one a thread, each of which reads botocore's service description again.
    Listings are never cached: other processes write into the same folders.
    """
    if protocol in S3_SCHEMES:
        from clipmill.storage.s3 import connected  # GPU boxes without s3fs train from local disks

        return connected()
    return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
