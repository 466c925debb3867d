"""Times in answers of S3 are what botocore makes of them."""

from __future__ import annotations

import pytest
from botocore.utils import parse_timestamp

from clipmill.storage.s3 import _timestamp, connected


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-29T12:00:00.000Z",
        "2026-11-29T12:00:00Z",
        "2026-11-29T12:00:00.5+02:00",
        "Sun, 29 Nov 2026 12:00:00 GMT",
    ],
)
def test_a_time_is_what_botocore_reads(text: str) -> None:
    assert _timestamp(text) == parse_timestamp(text)


def test_clients_read_times_so() -> None:
    factory = connected(None).session.get_component("response_parser_factory")
    assert factory._defaults["timestamp_parser"] is _timestamp
