"""The file systems of buckets and web servers, connected once per process and place.

Only this module, `s3` and `web` import fsspec and s3fs. `s3` and `web` are imported on first use.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from typing import Any

import fsspec

from clipmill.config.place import StoragePlace
from clipmill.errors import UserError
from clipmill.storage.failures import first_line
from clipmill.storage.places import place_of
from clipmill.storage.urls import WEB_SCHEMES, provider, request_url, scheme, shown

__all__ = ["connect"]

_connecting = threading.Lock()
_PACKAGES = {"az": "adlfs", "gs": "gcsfs"}


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a bucket URL, and the object's path in it.

    Raises:
        UserError: the package for this file system is not installed, or ``CLIPMILL_STORAGE`` is invalid.
    """
    place = place_of(url)
    try:
        with _connecting:
            filesystem = _connected(provider(url), os.getpid(), place)
    except (ImportError, TypeError, ValueError) as error:  # its package, or a required option, is missing
        if isinstance(error, ValueError) and provider(url) in ("s3", "gs", "az"):
            raise  # an endpoint that is no address, or no credentials: `failures` says so
        what = f"no storage for {scheme(url)}:// ({first_line(error)})"
        package = _PACKAGES.get(provider(url))
        advice = f"pip install {package}" if package else "use a local path or an s3:// URL"
        raise UserError(f"cannot open {shown(url)}: {what}; {advice}") from error
    return filesystem, request_url(url) if scheme(url) in WEB_SCHEMES else filesystem._strip_protocol(url)


@functools.cache
def _connected(protocol: str, process: int, place: StoragePlace | None) -> Any:
    """One connected file system per process and place, shared by its threads. It does not survive a fork.

    fsspec would create one per thread, and each would read botocore's service description again. Listings are never
    cached, because other processes write into the same folders.
    """
    if protocol == "s3":
        from clipmill.storage import s3  # GPU boxes without s3fs train from local disks

        return s3.connected(place)
    if protocol in WEB_SCHEMES:
        from clipmill.storage import web

        return web.connected()
    if protocol in ("az", "gs"):
        from clipmill.storage import clouds

        return clouds.azure(place) if protocol == "az" else clouds.google(place)
    kind, options = fsspec.get_filesystem_class(protocol), {"use_listings_cache": False}
    # If a required host is missing, a file system of fsspec prints a traceback when it is freed.
    inspect.signature(kind.__init__).bind(None, **options)
    return kind(**options, skip_instance_cache=True)
