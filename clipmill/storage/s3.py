"""S3 through s3fs: objects under their true names, and listings page by page.

The retries of botocore and s3fs are off. Together they would make 25 attempts; `bucket.call` retries within one
deadline instead.
"""

from __future__ import annotations

from contextvars import ContextVar
from datetime import datetime
from typing import Any

from aiobotocore.session import AioSession
from botocore.utils import parse_timestamp
from fsspec.asyn import sync
from s3fs import S3FileSystem

from clipmill.config.place import StoragePlace
from clipmill.errors import UserError
from clipmill.storage.places import secret

__all__ = ["PAGE_KEYS", "TrueNames", "connected"]

CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
"""Limit between two arrivals of data, not for the whole transfer: a slow transfer may take as long as it needs."""
PAGE_KEYS = 1000
"""The most that S3 lists in one answer."""

_version: ContextVar[list[str] | None] = ContextVar("version", default=None)
"""The ETag of an object that is read in several requests. The first answer fills it in."""


class TrueNames(S3FileSystem):
    """s3fs, but keys are used unchanged: s3fs would drop trailing slashes and parse ``?versionId=``."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return next((path.removeprefix(f"{name}://") for name in cls.protocol if path.startswith(f"{name}://")), path)

    def split_path(self, path: str) -> tuple[str, str, None]:
        """Bucket and key; the version is always None, the newest."""
        return (*self._find_bucket_key(self._strip_protocol(path)), None)

    async def _cat_file(self, path: str, version: list[str] | None = None, **options: Any) -> bytes:
        """As in s3fs, but fails with HTTP 412 if the object's ETag is not ``version``. An empty ``version`` is filled
        in.
        """
        token = _version.set(version)
        try:
            content: bytes = await super()._cat_file(path, **options)
        finally:
            _version.reset(token)
        return content

    async def _get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """As in s3fs, which reads a large object in ranges, but fails with HTTP 412 if the object is replaced
        meanwhile.
        """
        token = _version.set([])
        try:
            await super()._get_file(rpath, lpath, **options)
        finally:
            _version.reset(token)

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        version = _version.get() if method == "get_object" else None
        if version:
            options["IfMatch"] = version[0]
        answer = await super()._call_s3(method, *arguments, **options)
        if version == [] and answer.get("ETag"):
            version.append(answer["ETag"])
        return answer

    def page(self, bucket: str, prefix: str, **place: str) -> dict[str, Any]:
        """One answer of ListObjectsV2, in one request.

        Args:
            bucket: name of the bucket.
            prefix: prefix of the keys.
            place: further parameters: ``StartAfter`` or ``ContinuationToken``, and ``Delimiter``.
        """
        # botocore asks for keys in URL encoding and decodes them: XML cannot hold every key.
        asked = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **place}
        answer: dict[str, Any] = sync(self.loop, self._call_s3, "list_objects_v2", **asked)
        return answer


def _timestamp(text: Any) -> datetime:
    """Parses a time of an answer. botocore's parser tries many formats and takes 4/5 of the time to parse a listing."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):  # headers use HTTP's date format
        return parse_timestamp(text)


def _options(place: StoragePlace) -> dict[str, Any]:
    """Options of s3fs for a place."""
    options: dict[str, Any] = {"endpoint_url": place.endpoint_url, "anon": place.anonymous}
    if place.region:
        options["client_kwargs"] = {"region_name": place.region}
    if place.credentials:
        names = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}
        options |= {option: secret(place, name) for option, name in names.items()}
        if missing := [place.credentials + names[option] for option in ("key", "secret") if not options[option]]:
            raise UserError(f"{place.url}: no credentials found; set {' and '.join(missing)} on every node")
    return options


def connected(place: StoragePlace | None) -> TrueNames:
    """A new client with the credentials and the endpoint of a place; None uses those of the environment.

    Raises:
        UserError: the variables that the place names are not set.
    """
    session = AioSession(profile=place.profile if place else None)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    filesystem = TrueNames(
        session=session,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": READ_TIMEOUT_SECONDS,
            "retries": {"total_max_attempts": 1},
        },
        **(_options(place) if place else {}),
    )
    filesystem.retries = 1
    filesystem.connect()
    return filesystem
