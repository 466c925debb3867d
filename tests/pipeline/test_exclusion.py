"""Whose fault a failure is: a video's costs that video, with its cause; the environment's costs the unit an attempt."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import StorageUnavailable, UserError
from clipmill.pipeline import ahead, clips
from clipmill.pipeline.budget import Allowance
from clipmill.pipeline.plan import Unit
from clipmill.shards.commits import committed_units
from clipmill.video import DecoderLost
from tests.pipeline.corpus import video_bytes
from tests.pipeline.test_unit import one_unit, samples_of, shard

NUM_VIDEOS = 3


@pytest.fixture
def planned(tmp_path: Path) -> tuple[RunConfig, Unit]:
    """A unit of three good videos, of which the second will be the bad one."""
    (tmp_path / "source").mkdir()
    for number in range(NUM_VIDEOS):
        (tmp_path / "source" / f"{number}.mp4").write_bytes(video_bytes(number, 9))
    return one_unit(tmp_path)


def fail_second(monkeypatch: pytest.MonkeyPatch, unit: Unit, step: str, error: BaseException) -> None:
    """Lets a step of the worker fail for the second video alone."""
    real: Callable[..., Any] = getattr(ahead, step)

    def failing(*arguments: Any) -> Any:
        if unit.videos[1] in arguments:
            raise error
        return real(*arguments)

    monkeypatch.setattr(ahead, step, failing)


def check_second_is_excluded(config: RunConfig, unit: Unit, stage: str, cause: str) -> None:
    (exclusion,) = shard(config, unit)["exclusions"]
    assert (exclusion["id"], exclusion["stage"]) == (unit.videos[1].id, stage)
    assert exclusion["cause"] == cause
    assert {key[:16] for key in samples_of(config)} == {unit.videos[0].id, unit.videos[2].id}


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("a shape of -1"), "ValueError: a shape of -1"),
        (struct.error("unpack requires 8 bytes"), "error: unpack requires 8 bytes"),
        (KeyError("frames"), "KeyError: 'frames'"),
        (RecursionError(), "RecursionError"),
        (OSError("Can't read data (inflate() failed)\nmore"), "OSError: Can't read data (inflate() failed)"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/1.mp4"), None),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/data/" + "x" * 300), None),
        (storage.Unreadable("https://host/1.mp4: 403"), "Unreadable: https://host/1.mp4: 403"),
    ],
)
@pytest.mark.parametrize(("step", "stage"), [("fetch_video", "fetch"), ("read_sidecars", "sidecar")])
def test_what_belongs_to_a_video_costs_that_video(
    planned: tuple[RunConfig, Unit],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    stage: str,
    error: Exception,
    cause: str | None,
) -> None:
    config, unit = planned
    fail_second(monkeypatch, unit, step, error)
    check_second_is_excluded(config, unit, stage, cause or f"{type(error).__name__}: {str(error)[:300]}")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        ConnectionResetError("reset"),
        TimeoutError(),
        MemoryError(),
        ImportError("no module named h5py"),
        StorageUnavailable("s3://data is away"),
        UserError("the credentials are wrong"),
        DecoderLost("killed"),
    ],
)
def test_what_would_meet_the_next_video_too_fails_the_unit(
    planned: tuple[RunConfig, Unit], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config, unit = planned
    fail_second(monkeypatch, unit, "fetch_video", error)
    with pytest.raises(type(error)):
        shard(config, unit)
    assert committed_units(config.folder("clips", "train")) == []


def test_a_file_that_vanished_from_the_scratch_folder_is_no_fault_of_its_video(
    planned: tuple[RunConfig, Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, unit = planned

    def failing(data: Any, video: Any, copies: Path, kept: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(copies / "video.mp4"))

    monkeypatch.setattr(ahead, "fetch_video", failing)
    with pytest.raises(FileNotFoundError):
        shard(config, unit)


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ("{", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"score": NaN}', "ValueError: Out of range float values are not JSON compliant"),
        ('{"score": -Infinity}', "ValueError: Out of range float values are not JSON compliant"),
        ("[" * 200_000, None),
    ],
)
def test_metadata_that_is_no_json_costs_the_video(
    planned: tuple[RunConfig, Unit], metadata: str, cause: str | None
) -> None:
    config, unit = planned
    bad = replace(unit.videos[1], metadata=metadata)
    unit = replace(unit, videos=(unit.videos[0], bad, unit.videos[2]))
    (exclusion,) = shard(config, unit)["exclusions"]
    assert (exclusion["id"], exclusion["stage"]) == (bad.id, "pack")
    assert exclusion["cause"].startswith(cause or "RecursionError")
    assert {key[:16] for key in samples_of(config)} == {unit.videos[0].id, unit.videos[2].id}


def test_of_a_video_whose_second_clip_cannot_be_packed_no_clip_remains(
    planned: tuple[RunConfig, Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, unit = planned
    real = clips.clip_sample

    def failing(data: Any, video: Any, clip: Any, rows: Any) -> Any:
        sample = real(data, video, clip, rows)
        return replace(sample, key=sample.key + "/..") if (video.id, clip.ordinal) == (unit.videos[1].id, 1) else sample

    monkeypatch.setattr(clips, "clip_sample", failing)
    counts = shard(config, unit, Allowance(10, is_new=True))["counts"]
    samples = samples_of(config)
    assert {key[:16] for key in samples} == {unit.videos[0].id, unit.videos[2].id}
    assert counts["num_clips"] == len(samples) == 4
    assert counts["num_values"] == 4 * 4 * 64 * 64 * 3
