"""What is listed and looked at in a bucket without fetching whole objects."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import av
import botocore.session
import numpy as np
import pytest

from clipmill import storage
from clipmill.config import RunConfig, SourceConfig
from clipmill.pipeline.planning import yields
from clipmill.pipeline.sources import list_videos
from clipmill.storage import pages
from tests.pipeline.corpus import listed, run_config, video_bytes
from tests.storage.test_listing import STRANGE

pytestmark = pytest.mark.slow


def test_first_bytes_tell_what_an_object_is(bucket_url: str) -> None:
    objects = {"a/noending": video_bytes(1, 8), "a/notes": b"text", "a/empty": b"", "a/x.MP4": b"x", "a/x.txt": b"t"}
    for name, content in objects.items():
        storage.publish_bytes(f"{bucket_url}/{name}", content)
    others: Counter[str] = Counter()
    videos = {video.name: video.sidecars for video in list_videos(SourceConfig(url=f"{bucket_url}/a"), others)}
    assert videos == {"noending": None, "x.MP4": ".txt"}
    assert others == {"": 2}


def write_film(path: Path, codec: str, **muxer: str) -> None:
    """Some hundred frames of noise."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=muxer) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 160, 120, "yuv420p", 8_000_000
        for _ in range(150):
            noise = random.integers(0, 256, (120, 160, 3), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        output.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "muxer"),
    [
        ("tail.mp4", "mpeg4", {}),
        ("front.mp4", "mpeg4", {"movflags": "faststart"}),
        ("a.mkv", "mpeg4", {}),
        ("a.avi", "mpeg4", {}),
        ("a.ts", "mpeg2video", {}),
    ],
)
def test_the_edges_of_a_large_object_tell_what_it_will_make(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, muxer: dict[str, str]
) -> None:
    (tmp_path / "v").mkdir()
    write_film(tmp_path / "v" / name, codec, **muxer)
    storage.publish_file(tmp_path / "v" / name, f"{bucket_url}/v/{name}")
    monkeypatch.setattr(yields, "SMALL_BYTES", 1)
    monkeypatch.setattr(yields, "_EDGE_BYTES", 2**18)
    assert (tmp_path / "v" / name).stat().st_size > 4 * 2**18
    configs: list[RunConfig] = [
        run_config(tmp_path, Path("."), source={"url": url}) for url in (str(tmp_path / "v"), f"{bucket_url}/v")
    ]
    here, there = (
        yields.measure_yield(config, [listed(config)], (tmp_path / "v" / name).stat().st_size) for config in configs
    )
    assert there.num_videos == here.num_videos == 1
    assert there.bytes_per_byte == pytest.approx(here.bytes_per_byte, rel=0.2)
    assert there.bytes_per_clip == pytest.approx(here.bytes_per_clip, rel=0.1)


def test_a_real_server_lists_keys_under_their_true_names(bucket_url: str) -> None:
    client = botocore.session.get_session().create_client("s3")
    keys = [key for key in STRANGE if not key.endswith("/")]
    for key in keys:
        client.put_object(Bucket=bucket_url.removeprefix("s3://"), Key=f"raw/{key}", Body=key.encode())
    names = [entry.name for entry in storage.walk(f"{bucket_url}/raw")]
    urls = [storage.resolve(f"{bucket_url}/raw", name) for name in names]
    assert [url.removeprefix(f"{bucket_url}/raw/") for url in urls] == sorted(keys)
    assert [storage.read_bytes(url).decode() for url in urls] == sorted(keys)
    for place, name in enumerate(names):
        assert [entry.name for entry in storage.walk(f"{bucket_url}/raw", after=name)] == names[place + 1 :]


def test_a_versioned_bucket_shows_its_newest_objects(bucket_url: str) -> None:
    client, bucket = botocore.session.get_session().create_client("s3"), bucket_url.removeprefix("s3://")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for content in (b"old", b"newest"):
        client.put_object(Bucket=bucket, Key="raw/a.mp4", Body=content)
        client.put_object(Bucket=bucket, Key="raw/deleted.mp4", Body=content)
    client.delete_object(Bucket=bucket, Key="raw/deleted.mp4")
    assert [(entry.name, entry.bytes) for entry in storage.walk(f"{bucket_url}/raw")] == [("a.mp4", 6)]
    assert storage.read_bytes(f"{bucket_url}/raw/a.mp4") == b"newest"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{bucket_url}/raw/deleted.mp4")


def test_a_real_server_lists_folders_side_by_side_in_order(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SERIAL_PAGES", 1)
    monkeypatch.setattr("clipmill.storage.s3.PAGE_KEYS", 10)
    objects = [f"c{folder}/{number:03d}" for folder in range(5) for number in range(25)] + ["c0-x", "c3", "c30"]
    for name in objects:
        storage.publish_bytes(f"{bucket_url}/raw/{name}", b"x")
    assert [entry.name for entry in storage.walk(f"{bucket_url}/raw")] == sorted(objects)
