"""The file systems of buckets and web servers, connected once per process.

Only this module, `s3` and `web` import fsspec and s3fs. `s3` and `web` are imported on first use.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from typing import Any

import fsspec

from clipmill.errors import UserError
from clipmill.storage.failures import S3_SCHEMES, first_line
from clipmill.storage.urls import WEB_SCHEMES, request_url, scheme, shown

__all__ = ["connect"]

_connecting = threading.Lock()


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a bucket URL, and the object's path in it.

    Raises:
        UserError: no file system for this scheme is installed.
    """
    try:
        with _connecting:
            filesystem = _connected(scheme(url), os.getpid())
    except (ImportError, TypeError, ValueError) as error:  # its package, or an option that it needs, is missing
        if isinstance(error, ValueError) and scheme(url) in S3_SCHEMES:
            raise  # the endpoint is not an address: `blame` reports it
        what = f"no storage for {scheme(url)}:// ({first_line(error)})"
        raise UserError(f"cannot open {shown(url)}: {what}; use a local path or an s3:// URL") from error
    return filesystem, request_url(url) if scheme(url) in WEB_SCHEMES else filesystem._strip_protocol(url)


@functools.cache
def _connected(protocol: str, process: int) -> Any:
    """One connected file system per process, shared by its threads. It does not survive a fork.

    fsspec would create one per thread, and each would read botocore's service description again. Listings are never
    cached, because other processes write into the same folders.
    """
    if protocol in S3_SCHEMES:
        from clipmill.storage import s3  # GPU boxes without s3fs train from local disks

        return s3.connected()
    if protocol in WEB_SCHEMES:
        from clipmill.storage import web

        return web.connected()
    kind, options = fsspec.get_filesystem_class(protocol), {"use_listings_cache": False}
    # Made without a host that it needs, a file system of fsspec prints a traceback when it is freed.
    inspect.signature(kind.__init__).bind(None, **options)
    return kind(**options, skip_instance_cache=True)
