"""Listings of a bucket: page by page, in order, under true names."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from clipmill import storage
from clipmill.errors import StorageUnavailable, UserError
from clipmill.storage import pages, retries
from tests.storage.s3_server import S3Server

FORBIDDEN = (403, "AccessDenied")
STRANGE = [
    "/leading",
    "//",
    "a//b.mp4",
    "a/x?y#z.mp4",
    "a/q?versionId=abc.mp4",
    "a/sp ace+plus%20.mp4",
    "a/new\nline.mp4",
    "a/ctrl\x01.mp4",
    "a/\u00e9\U0001f600.mp4",
    "a/end ",
    "a/back\\xe9",
    "http://x/y.mp4",
    "s3://x/y.mp4",
    "./here.mp4",
]


def names_of(url: str, after: str | None = None) -> list[str]:
    return [entry.name for entry in storage.walk(url, after)]


@pytest.mark.parametrize("key", STRANGE)
def test_every_key_is_listed_and_read_under_its_true_name(s3: S3Server, tmp_path: Path, key: str) -> None:
    if key.endswith("/"):
        key += "x"
    s3.objects = {f"raw/{key}": b"content", "raw": b"no folder", "rawest/x": b"beside it"}
    (entry,) = storage.walk("s3://b/raw")
    url = storage.resolve("s3://b/raw", entry.name)
    assert url == f"s3://b/raw/{key}"
    assert (entry.bytes, storage.stat(url).bytes) == (7, 7)
    assert storage.read_bytes(url) == b"content"
    assert storage.read_start(url, 3) == b"con"
    with storage.open_to_read(url) as file:
        file.seek(3)
        assert file.read() == b"tent"
    storage.fetch(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"


def test_a_listing_goes_on_behind_any_name(s3: S3Server) -> None:
    s3.objects = {f"raw/{key}": b"" for key in (*STRANGE, "a-b", "a/c", "ab", "folder/", "x_$folder$")}
    names = names_of("s3://b/raw")
    assert len(names) == len(STRANGE) + 2  # of those that end in a slash, and the Hadoop marker, none is a file
    for s3.knows_start_after in (True, False):
        for place, name in enumerate(names):
            assert names_of("s3://b/raw", after=name) == names[place + 1 :]


def test_a_page_is_one_request_and_is_repeated_alone(s3: S3Server) -> None:
    s3.objects = {f"raw/{number:05d}": b"x" for number in range(4321)}
    s3.fault = lambda request, number: (503, "SlowDown") if request == "LIST" and number == 3 else None
    walk = storage.walk("s3://b/raw")
    next(walk)
    assert s3.num_lists() == 1
    assert sum(1 for _ in walk) == 4320
    assert s3.num_lists() == 5 + 1


def test_a_page_that_never_comes_is_an_outage(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "0.3")
    s3.objects = {f"raw/{number:05d}": b"x" for number in range(1500)}
    s3.fault = lambda request, number: (503, "SlowDown") if number else None
    walk = storage.walk("s3://b/raw")
    with pytest.raises(StorageUnavailable, match="SlowDown"):
        list(walk)


def corpus(num_folders: int, num_files: int) -> dict[str, bytes]:
    """Folders of files, and files beside them."""
    names = [f"raw/deep/c{folder:02d}/{number:04d}" for folder in range(num_folders) for number in range(num_files)]
    return dict.fromkeys([*names, "raw/deep/c00-x", "raw/deep/c05", "raw/deep/c050", "raw/zzz"], b"")


@pytest.mark.parametrize("num_serial", [1, 2, 7, 100])
@pytest.mark.parametrize("knows_start_after", [True, False])
def test_folders_listed_ahead_come_in_the_order_of_keys(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, num_serial: int, knows_start_after: bool
) -> None:
    monkeypatch.setattr(pages, "SERIAL_PAGES", num_serial)
    monkeypatch.setattr("clipmill.storage.s3.PAGE_KEYS", 10)
    s3.objects, s3.knows_start_after = corpus(24, 23), knows_start_after
    expected = [key.removeprefix("raw/") for key in sorted(s3.objects)]
    assert names_of("s3://b/raw") == expected
    num_pages = -(-len(expected) // 10)
    lost = 0 if num_serial == 100 else 24 + 4 * 7  # the rest of a page at each border, and looks for borders
    assert num_pages <= s3.num_lists() <= num_pages + lost
    assert names_of("s3://b/raw", after=expected[300]) == expected[301:]


@pytest.mark.parametrize("knows_start_after", [True, False])
def test_a_listing_of_nothing_but_folders_ends(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, knows_start_after: bool
) -> None:
    monkeypatch.setattr(pages, "SERIAL_PAGES", 2)
    monkeypatch.setattr("clipmill.storage.s3.PAGE_KEYS", 10)
    s3.objects = {f"raw/{folder}/{number:02d}": b"" for folder in "abcdefgh" for number in range(20)}
    s3.knows_start_after = knows_start_after
    s3.fault = lambda _, number: (400, "TooMany") if number == 300 else None
    assert names_of("s3://b/raw") == [key.removeprefix("raw/") for key in sorted(s3.objects)]


def test_folders_are_listed_side_by_side(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SERIAL_PAGES", 1)
    monkeypatch.setattr("clipmill.storage.s3.PAGE_KEYS", 10)
    s3.objects = corpus(24, 23)
    s3.delay_seconds = 0.05
    assert len(names_of("s3://b/raw")) == len(s3.objects)
    assert s3.most_at_once >= 4


def test_a_listing_that_is_left_ends_its_threads(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SERIAL_PAGES", 1)
    monkeypatch.setattr(pages, "PAGES_AHEAD", 1)
    monkeypatch.setattr("clipmill.storage.s3.PAGE_KEYS", 10)
    s3.objects = corpus(24, 50)
    walk = storage.walk("s3://b/raw")
    for _ in range(30):
        next(walk)
    walk.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("listing")]


def test_an_error_ahead_is_met_in_its_place(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SERIAL_PAGES", 1)
    monkeypatch.setattr("clipmill.storage.s3.PAGE_KEYS", 10)
    s3.objects = corpus(24, 23)
    s3.fault = lambda request, number: FORBIDDEN if request == "LIST" and number > 20 else None
    walk = storage.walk("s3://b/raw")
    with pytest.raises(UserError, match="access denied"):
        list(walk)
