"""Sources of files that hold many videos, in a bucket: the same clips as from a disk, and few bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill import storage
from tests.pipeline.sources.fixtures import Sharded, shard_in_process, source_config
from tests.pipeline.sources.lerobot_files import SIZE, write_v3
from tests.pipeline.sources.test_webdataset import write_download

pytestmark = pytest.mark.slow


def write_arrays(folder: Path) -> None:
    """Files of five videos: each a range of bytes, strided, and compressed."""
    folder.mkdir()
    videos = np.random.default_rng(0).integers(0, 256, (5, 4, 64, 64, 3), np.uint8)
    np.save(folder / "ranges.npy", videos)
    np.save(folder / "strided.npy", np.asfortranarray(videos[::-1]))
    np.savez_compressed(folder / "compressed.npz", video=videos + 1)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was fetched whole, by name."""
    counts: Counter[str] = Counter()
    fetch = storage.fetch

    def counting(url: str, path: Path, limits: storage.Limits | None = None) -> None:
        if "/in/" in url:
            counts[url.rsplit("/", 1)[1]] += 1
        fetch(url, path, limits)

    monkeypatch.setattr(storage, "fetch", counting)
    return counts


def content(found: Sharded) -> dict[str, Any]:
    """Pixels and actions by what a clip was made of: ids depend on the storage's own tags."""
    by_place = {}
    for split in ("train", "val"):
        for members, described in zip(found.samples[split].values(), found.described(split), strict=True):
            place = (described["source"], described["first_frame"], described["text"], str(described["metadata"]))
            by_place[place] = {name: data for name, data in members.items() if name != "json"}
    return by_place


@pytest.mark.parametrize(
    ("write", "source", "fetched"),
    [
        (write_download, {"type": "webdataset"}, {}),
        (write_v3, {"type": "lerobot"}, {"file-000.mp4": 2, "file-001.mp4": 2}),
        (write_arrays, {"type": "arrays"}, {"strided.npy": 1}),
    ],
)
def test_a_bucket_gives_the_clips_of_a_disk(
    bucket_url: str,
    tmp_path: Path,
    moved: Counter[str],
    write: Callable[[Path], object],
    source: dict[str, object],
    fetched: dict[str, int],
) -> None:
    write(tmp_path / "in")
    for entry in storage.walk(str(tmp_path / "in")):
        storage.publish_file(tmp_path / "in" / entry.name, f"{bucket_url}/in/{entry.name}")
    clip = {"num_frames": 4, "resolution": list(SIZE) if source["type"] == "lerobot" else 64}
    local = shard_in_process(source_config(tmp_path, {**source, "url": str(tmp_path / "in")}, clip=clip))
    moved.clear()
    config = source_config(tmp_path / "2", {**source, "url": f"{bucket_url}/in"}, clip=clip)
    remote = shard_in_process(config)
    assert remote.excluded() == {}
    assert content(remote) == content(local)
    assert len(content(remote)) > 7
    assert moved == fetched
