"""Videos are fetched while others are decoded: bounded, in order, each with its own error, and nothing stays."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipmill.config import DataConfig
from clipmill.pipeline import ahead as ahead_module
from clipmill.pipeline.ahead import FetchAhead, fetch_pool
from clipmill.pipeline.fetch import ExcludedVideo, LocalVideo
from clipmill.pipeline.plan import PlannedVideo
from tests.pipeline.corpus import files_of, write_corpus
from tests.pipeline.test_unit import one_unit, shard

PATIENCE_SECONDS = 20
POOL = fetch_pool(DataConfig())


def planned(index: int, num_bytes: int = 1, url: str | None = None, **more: Any) -> PlannedVideo:
    return PlannedVideo(f"{index:016x}", url or f"{index}.mp4", num_bytes, None, *[None] * 5, **more)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that were fetched; each is a file of its name."""
    names: list[str] = []

    def fetch(data: DataConfig, video: PlannedVideo, folder: Path, kept: Any) -> LocalVideo:
        names.append(video.name)
        path = folder / "video.mp4"
        path.write_text(video.name)
        return LocalVideo(path, None)

    monkeypatch.setattr(ahead_module, "fetch_video", fetch)
    return names


def wait_until(is_true: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(PATIENCE_SECONDS * 100):
        if is_true():
            return
        waiting.wait(0.01)
    raise AssertionError("it has not become true")


def test_the_next_videos_come_while_one_is_worked_on(tmp_path: Path, fetched: list[str]) -> None:
    videos = [planned(index) for index in range(20)]
    with FetchAhead(POOL, DataConfig(), videos, tmp_path) as ahead:
        for index, video in enumerate(videos):
            assert ahead.take(index).local.path.read_text() == video.name
            wait_until(lambda: len(fetched) == min(index + 1 + ahead_module.MOST_VIDEOS, 20))  # noqa: B023
            ahead.release(index)
            assert len(list(tmp_path.glob("video-*"))) <= ahead_module.MOST_VIDEOS
    assert sorted(fetched) == sorted(video.name for video in videos)
    assert list(tmp_path.iterdir()) == []


def test_large_videos_do_not_fill_the_disk(tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "MOST_BYTES", 100)
    videos = [planned(0, 40), planned(1, 40), planned(2, 40), planned(3, 500), planned(4, 40)]
    with FetchAhead(POOL, DataConfig(), videos, tmp_path) as ahead:
        for index, begun in enumerate([2, 3, 3, 4, 5]):
            ahead.take(index)
            wait_until(lambda: len(fetched) == begun)  # noqa: B023
            ahead.release(index)
    assert fetched[3:] == ["3.mp4", "4.mp4"]


def test_what_videos_of_one_file_share_comes_once_and_goes_with_the_last(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.mp4").write_bytes(b"12345")
    spans = [planned(i, 5, "ab"[i // 3] + ".mp4", start_seconds=float(i), end_seconds=i + 1.0) for i in range(6)]
    made: list[str] = []
    real = ahead_module.KeptFiles.get

    def counting(self: Any, url: str, part: str, make: Callable[[Path], Path]) -> Path:
        def copy(path: Path) -> Path:
            made.append(url)
            path.write_bytes((source / url).read_bytes())
            return path

        return real(self, url, part, copy)

    data = DataConfig.model_validate({"source": {"url": str(source)}})
    (tmp_path / "copies").mkdir()
    with pytest.MonkeyPatch.context() as patch, FetchAhead(POOL, data, spans, tmp_path / "copies") as ahead:
        patch.setattr(ahead_module.KeptFiles, "get", counting)
        for index in range(6):
            path = ahead.take(index).local.path
            assert path.read_bytes() == b"12345"
            ahead.release(index)
            assert path.exists() == (index not in (2, 5))
    assert sorted(made) == ["a.mp4", "b.mp4"]


def test_each_video_raises_its_own_error_in_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {1: ValueError("broken"), 2: OSError(errno.EIO, "Input/output error")}

    def fetch(data: Any, video: PlannedVideo, folder: Path, kept: Any) -> LocalVideo:
        if error := errors.get(int(video.id, 16)):
            raise error
        return LocalVideo(folder, None)

    monkeypatch.setattr(ahead_module, "fetch_video", fetch)
    with FetchAhead(POOL, DataConfig(), [planned(index) for index in range(4)], tmp_path) as ahead:
        ahead.take(0)
        ahead.release(0)
        with pytest.raises(ExcludedVideo, match="ValueError: broken"):
            ahead.take(1)
        ahead.release(1)
        with pytest.raises(OSError, match="Input/output error"):
            ahead.take(2)


def test_a_disk_that_later_videos_fill_is_no_fault_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for one video."""
    lock = threading.Lock()

    def fetch(data: Any, video: PlannedVideo, folder: Path, kept: Any) -> LocalVideo:
        with lock:
            if list(tmp_path.glob("*/video.mp4")):
                raise OSError(errno.ENOSPC, "No space left on device")
            path = folder / "video.mp4"
            path.write_text(video.name)
        return LocalVideo(path, None)

    monkeypatch.setattr(ahead_module, "fetch_video", fetch)
    videos = [planned(index) for index in range(12)]
    with FetchAhead(POOL, DataConfig(), videos, tmp_path) as ahead:
        for index, video in enumerate(videos):
            assert ahead.take(index).local.path.read_text() == video.name
            ahead.release(index)


def test_what_a_unit_becomes_does_not_depend_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "source", 2)
    config, unit = one_unit(tmp_path, shard_bytes=20_000)  # several shards, uploaded while the next are made
    shard(config, unit)
    monkeypatch.setattr(ahead_module, "MOST_VIDEOS", 1)
    alone = config.model_copy(update={"root": str(tmp_path / "alone")})
    shard(alone, unit)
    found, wanted = (files_of(Path(run.folder("clips", "train"))) for run in (config, alone))
    assert sum(name.endswith(".tar") for name in wanted) > 1
    assert found == wanted


def test_a_unit_that_is_given_up_does_not_wait_for_what_stalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_stalled, goes_on = threading.Event(), threading.Event()

    def stall(*_: Any) -> LocalVideo:
        is_stalled.set()
        goes_on.wait(PATIENCE_SECONDS)
        return LocalVideo(tmp_path, None)

    monkeypatch.setattr(ahead_module, "fetch_video", stall)
    pool = fetch_pool(DataConfig())
    ahead = FetchAhead(pool, DataConfig(), [planned(0)], tmp_path)
    ahead._begin(0)
    assert is_stalled.wait(PATIENCE_SECONDS)
    ahead.__exit__(KeyboardInterrupt, None, None)
    (fetching,) = ahead._begun.values()
    assert not fetching.done()
    goes_on.set()
    pool.shutdown()
