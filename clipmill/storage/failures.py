"""Sorts failed requests by cause: the server (which may recover), one object, or the configuration."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus

from clipmill.errors import ClipmillError, StageFailed, StorageUnavailable, UserError
from clipmill.storage.urls import is_web, provider, server, shown

__all__ = [
    "NO_BUCKET",
    "Refused",
    "ServerLost",
    "Unreadable",
    "WebLost",
    "WebUnavailable",
    "server_answer",
    "causes",
    "first_line",
    "transient_reason",
]

NO_BUCKET = "the bucket {} of {} does not exist; create it, or correct the URL"

_BOTOCORE_TRANSPORT_ERRORS = ("ConnectionError", "HTTPClientError", "IncompleteReadError")  # and their subclasses
_CREDENTIALS_ADVICE = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and the bucket's permissions",
    "az": "check AZURE_STORAGE_CONNECTION_STRING, or _ACCOUNT_NAME and _ACCOUNT_KEY, and the container's permissions",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS and the bucket's permissions",
}
_SETTINGS_ADVICE = {
    "s3": "correct the URL, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_PROFILE or ~/.aws/config",
    "az": "correct the URL, AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and _ACCOUNT_KEY",
    "gs": "correct the URL, GOOGLE_APPLICATION_CREDENTIALS or STORAGE_EMULATOR_HOST",
}
_CLOUD_TRANSPORT_ERRORS = frozenset(
    (
        "ServiceRequestError",  # of Azure's SDK, as the next three
        "ServiceRequestTimeoutError",
        "ServiceResponseError",
        "ServiceResponseTimeoutError",
        "TransportError",  # of Google's
        "ChecksumError",  # of gcsfs: the copy was damaged on its way
    )
)
_TRANSIENT_CODES = frozenset(
    (
        "BadDigest",
        "ConditionalRequestConflict",  # another create of the same name is under way
        "IncompleteBody",
        "NoSuchUpload",  # a restarted server may have lost the multipart upload; the next attempt starts a new one
        "OperationAborted",
        "PreconditionFailed",  # the object was replaced during a ranged download; the next attempt starts over
        "RequestTimeout",
        "SlowDown",
        "XAmzContentSHA256Mismatch",
    )
)


_TRANSIENT_STATUSES = frozenset((HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS))
_WRONG_CREDENTIALS = frozenset(
    (
        "AuthenticationFailed",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidAuthenticationInfo",
        "InvalidSecurity",
        "InvalidToken",
        "NoAuthenticationInformation",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    )
)
"""Error codes that blame the credentials; every other object of the bucket would get the same answer."""


class Refused(UserError):
    """Access to one object is denied, or its bucket does not exist. The caller tries another object to learn whether
    all are refused.
    """


class Unreadable(StageFailed, OSError):
    """One object cannot be read, and waiting will not help. Other objects may be readable."""


class ServerLost(Unreadable):
    """A web server does not answer at all, so its other objects cannot be read either."""


class WebUnavailable(Unreadable, StorageUnavailable):
    """A web server answered, but did not recover in time."""


class WebLost(ServerLost, StorageUnavailable):
    """A web server did not answer in time."""


def transient_reason(url: str, error: Exception) -> str | None:
    """The reason, in one line, of a failure that a retry may cure. None means that ``error`` is the operation's own
    answer.

    Raises:
        UserError: retries cannot cure the failure, and it affects all objects.
        Refused: retries cannot cure it; it may affect this object alone.
        Unreadable: it affects this object alone.
    """
    if isinstance(error, ClipmillError):
        return None
    if is_web(url):
        return _transient_web_reason(url, error)
    name = shown(url)
    code, status = server_answer(error)
    names = {type(one).__name__ for one in causes(error)}
    if code == "InvalidObjectState":
        raise Unreadable(f"{name} is archived; restore it") from error
    if code in ("NoSuchBucket", "ContainerNotFound"):
        raise Refused(NO_BUCKET.format(server(url), name)) from error
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        raise UserError(f"{name}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    if provider(url) in _CREDENTIALS_ADVICE and (isinstance(error, PermissionError) or status in (401, 403)):
        kind = UserError if code in _WRONG_CREDENTIALS or status == HTTPStatus.UNAUTHORIZED else Refused
        advice = _CREDENTIALS_ADVICE[provider(url)]
        raise kind(f"{name}: access denied ({code or first_line(error)}); {advice}") from error
    if status == HTTPStatus.NOT_IMPLEMENTED:
        raise UserError(f"{name}: the storage does not support this request ({code}); use another storage") from error
    if isinstance(error, FileNotFoundError | FileExistsError):
        return None
    if status is not None or code is not None:
        if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES or (status or 0) >= 500:
            return f"{code or 'answer'} (HTTP {status})"
        raise Unreadable(f"{name}: the storage answers {code} (HTTP {status})") from error
    if _is_network(error):
        return first_line(error)
    if any(isinstance(one, ValueError | TypeError) or _is_botocore(one) for one in causes(error)):
        # The client itself refused the request: the region, endpoint, profile or bucket name is wrong.
        advice = _SETTINGS_ADVICE.get(provider(url), "correct the URL or the settings of its client")
        raise UserError(f"{name}: {first_line(error)}; {advice}") from error
    return None


def _transient_web_reason(url: str, error: Exception) -> str | None:
    """`transient_reason` for a web server."""
    _, status = server_answer(error)
    if status == HTTPStatus.NOT_FOUND:
        raise FileNotFoundError(errno.ENOENT, "the server does not know it", shown(url)) from error
    if status == 0:  # how aiohttp reports too many redirections
        raise Unreadable(f"{shown(url)}: the server redirects without end") from error
    if type(error).__name__ == "NonHttpUrlRedirectClientError":
        raise Unreadable(f"{shown(url)}: the server redirects to {shown(str(error))}, no web server") from error
    if status is not None:
        if status in _TRANSIENT_STATUSES or status >= 500:
            return f"HTTP {status}"
        raise Unreadable(f"{shown(url)}: the server answers {_status_text(status)}") from error
    for one in causes(error):
        if getattr(one, "errno", None) == socket.EAI_NONAME:
            raise ServerLost(f"{shown(url)}: no such host") from error
        if isinstance(one, ssl.SSLCertVerificationError):
            raise ServerLost(f"{shown(url)}: {one.verify_message}") from error
    if isinstance(error, ValueError | TypeError):
        what = type(error).__name__ if "://" in str(error) else first_line(error)  # the message may hold credentials
        raise Unreadable(f"{shown(url)}: not the address of a file ({what})") from error
    return first_line(error.__cause__ or error) if _is_network(error) else None


def _status_text(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _is_network(error: BaseException) -> bool:
    return any(
        isinstance(one, ConnectionError | TimeoutError)
        or type(one).__module__.startswith(("aiohttp", "botocore.httpchecksum", "requests.exceptions"))
        or type(one).__name__ in _CLOUD_TRANSPORT_ERRORS
        or _is_botocore_transport(one)
        for one in causes(error)
    )


def _is_botocore(error: BaseException) -> bool:
    return any(kind.__module__ == "botocore.exceptions" for kind in type(error).__mro__)


def _is_botocore_transport(error: BaseException) -> bool:
    return any(
        kind.__module__ == "botocore.exceptions" and kind.__name__ in _BOTOCORE_TRANSPORT_ERRORS
        for kind in type(error).__mro__
    )


def server_answer(error: BaseException) -> tuple[str | None, int | None]:
    """(error code, HTTP status) of the server's answer that caused an exception; either is None if it is not known."""
    for one in causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return response.get("Error", {}).get("Code"), status
        if isinstance(getattr(one, "status_code", None), int):  # of Azure
            code = getattr(one, "error_code", None)
            return None if code is None else str(getattr(code, "value", code)), one.status_code  # type: ignore[attr-defined]
        # Google's errors have a code, which is not the answer's status in others, such as aiohttp's of a cut transfer.
        name = "code" if type(one).__module__.startswith(("gcsfs", "google")) else "status"
        if isinstance(getattr(one, name, None), int):
            return None, getattr(one, name)
    return None, None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def first_line(error: BaseException) -> str:
    """The first line of an error's message. A first line that ends with a colon (aiohttp) is joined with the second."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0] if lines else type(error).__name__
