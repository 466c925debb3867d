"""One unit in this process, without Ray."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill.config import RunConfig
from clipmill.errors import StageFailed, UserError
from clipmill.lease import Lease, hold
from clipmill.pipeline.budget import Allowance
from clipmill.pipeline.plan import PlannedVideo, Unit
from clipmill.pipeline.unit import make_worker
from clipmill.shards.commits import committed_units, read_commit
from clipmill.shards.dataset import decode_clip
from clipmill.video import decord_version, encode_mp4
from clipmill.video.worker import is_measured
from tests.pipeline.corpus import make_plan, run_config, video_bytes, write_corpus
from tests.video.conftest import needs_decord


def one_unit(tmp_path: Path, **data: Any) -> tuple[RunConfig, Unit]:
    config = run_config(tmp_path / "run", tmp_path / "source", val_fraction=0.0, unit_bytes=10**9, **data)
    return config, make_plan(config).unit("train", 0)


def shard(config: RunConfig, unit: Unit, allowance: Allowance = Allowance(10, is_new=True)) -> dict[str, Any]:  # noqa: B008
    with hold(config.folder("clips"), "shard") as lease:
        return make_worker(config, lease, allowance)(unit)


def samples_of(config: RunConfig) -> dict[str, dict[str, bytes]]:
    """Members by key and name, over all tars of the split train."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(Path(config.folder("clips", "train")).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[name] = content.read()
    return samples


def test_moments_and_pixels_are_those_of_the_clips(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1)
    config, unit = one_unit(tmp_path, format="npy")
    counts = shard(config, unit)["counts"]
    clips = np.stack([np.load(io.BytesIO(sample["npy"])) for sample in samples_of(config).values()]).astype(np.int64)
    assert clips.shape[1:] == (4, 64, 64, 3)
    assert counts["num_clips"] == len(clips)
    assert counts["num_values"] == clips.size
    assert counts["pixel_sum"] == clips.sum()
    assert counts["pixel_square_sum"] == (clips**2).sum()


def test_the_json_says_where_a_clip_comes_from(tmp_path: Path) -> None:
    (tmp_path / "source" / "left").mkdir(parents=True)
    (tmp_path / "source" / "left" / "one.mp4").write_bytes(video_bytes(1, 11))
    config, unit = one_unit(tmp_path, clip={"num_frames": 3, "frame_stride": 2, "clip_stride": 4, "resolution": 32})
    shard(config, unit)
    samples = samples_of(config)
    video = unit.videos[0].id
    assert list(samples) == [f"{video}_{ordinal:06d}" for ordinal in range(2)]
    described = json.loads(samples[f"{video}_000001"]["json"])
    assert described == {
        "source": "left/one.mp4",
        "video": video,
        "start_seconds": pytest.approx(4 / 12.5),
        "end_seconds": pytest.approx(9 / 12.5),
        "first_frame": 4,
        "frame_stride": 2,
        "fps": pytest.approx(6.25),
        "crop": "center",
        "label": "left",
        "text": None,
        "metadata": None,
    }


def test_each_clip_carries_the_actions_of_its_frames(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.mp4").write_bytes(video_bytes(1, 12))
    actions = np.arange(24, dtype=np.float32).reshape(12, 2)
    np.save(source / "one.actions.npy", actions)
    clip = {"num_frames": 3, "frame_stride": 2, "resolution": 32}
    config, unit = one_unit(tmp_path, source={"url": str(source), "actions_suffix": ".actions.npy"}, clip=clip)
    shard(config, unit)
    found = [np.load(io.BytesIO(sample["actions.npy"])) for sample in samples_of(config).values()]
    np.testing.assert_array_equal(found, [actions[0:5:2], actions[6:11:2]])
    assert found[0].dtype == np.float32


def test_actions_follow_the_frames_that_a_frame_rate_chooses(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.mp4").write_bytes(video_bytes(1, 12))  # 12.5 frames a second
    actions = np.arange(24, dtype=np.float32).reshape(12, 2)
    np.save(source / "one.actions.npy", actions)
    clip = {"num_frames": 3, "fps": 5, "clip_stride": 1, "resolution": 32}
    config, unit = one_unit(tmp_path, source={"url": str(source), "actions_suffix": ".actions.npy"}, clip=clip)
    shard(config, unit)
    samples = samples_of(config).values()
    found = [np.load(io.BytesIO(sample["actions.npy"])) for sample in samples]
    # Ticks every 0.2 s on frames every 0.08 s.
    np.testing.assert_array_equal(found, [actions[[0, 2, 5]], actions[[2, 5, 7]], actions[[5, 7, 10]]])
    described = [json.loads(sample["json"]) for sample in samples]
    assert [document["first_frame"] for document in described] == [0, 2, 5]
    assert {(document["fps"], document["frame_stride"]) for document in described} == {(5, None)}


@pytest.mark.parametrize("form", ["mp4", "mjpeg", "npy"])
def test_the_loss_of_encodingis_measured_on_some_clips(tmp_path: Path, form: str) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    clip = {"num_frames": 2, "clip_stride": 1, "resolution": 32}
    config, unit = one_unit(tmp_path, format=form, clip=clip)
    counts = shard(config, unit)["counts"]
    stored = {key: decode_clip(dict(map(_view, sample.items())))["video"] for key, sample in samples_of(config).items()}
    lossless_config, lossless_unit = one_unit(
        tmp_path / "npy", source={"url": str(tmp_path / "source")}, format="npy", clip=clip
    )
    shard(lossless_config, lossless_unit)
    exact = {key: np.load(io.BytesIO(sample["npy"])) for key, sample in samples_of(lossless_config).items()}
    if form == "npy":
        assert (counts["num_measured_clips"], counts["squared_error"]) == (0, 0)
        return
    measured = [key for key in exact if is_measured(f"0:{key[:16]}:{int(key[17:])}:0")]
    assert 0 < counts["num_measured_clips"] == len(measured) < len(exact) / 4
    errors = [int(((stored[key].astype(np.int64) - exact[key]) ** 2).sum()) for key in measured]
    assert counts["squared_error"] == sum(errors) > 0
    assert counts["num_measured_values"] == len(measured) * 2 * 32 * 32 * 3


def _view(member: tuple[str, bytes]) -> tuple[str, memoryview]:
    return member[0], memoryview(member[1])


def test_each_view_is_a_sample_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.mp4").write_bytes(video_bytes(1, 8))
    config, unit = one_unit(
        tmp_path,
        format="mjpeg",
        clip={"num_frames": 4, "resolution": 32, "views_per_clip": 2, "max_clips_per_video": 2},
    )
    assert shard(config, unit)["counts"]["num_clips"] == 4
    samples = samples_of(config)
    video = unit.videos[0].id
    assert list(samples) == [f"{video}_{clip:06d}_v{view}" for clip in range(2) for view in range(2)]
    described = [json.loads(sample["json"]) for sample in samples.values()]
    assert [document["view"]["number"] for document in described] == [0, 1, 0, 1]
    assert {document["crop"] for document in described} == {"random"}
    assert all(
        decode_clip(dict(map(_view, sample.items())))["video"].shape == (4, 32, 32, 3) for sample in samples.values()
    )


def test_rejected_clips_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "still.mp4").write_bytes(encode_mp4(np.full((8, 48, 64, 3), 90, np.uint8), 10, 20))
    (source / "moving.mp4").write_bytes(video_bytes(1, 8))
    config, unit = one_unit(tmp_path, clip={"num_frames": 4, "resolution": 32, "reject_static": 1})
    counts = shard(config, unit)["counts"]
    assert (counts["num_clips"], counts["num_static"], counts["num_black"], counts["num_short"]) == (2, 2, 0, 0)
    videos = read_commit(config.folder("clips", "train"), 0)["videos"]
    assert {video["url"]: (video["clips"], video["static"]) for video in videos} == {
        "still.mp4": (0, 2),
        "moving.mp4": (2, 0),
    }


def _promising(num_rows: int) -> bytes:
    """An ``.npy`` file of two numbers whose header says more."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (num_rows, 2)})
    return file.getvalue() + bytes(8)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (
            lambda path: np.save(path, np.zeros((11, 2), np.float32)),
            "actions: 11 rows of actions for clips of 12 frames",
        ),
        (
            lambda path: np.save(path, np.array([*[0.0] * 7, np.nan, *[0.0] * 4])),
            "actions: the actions of frame 7 hold a value that is not finite",
        ),
        (lambda path: path.write_bytes(b"\x93NUMPY"), "actions: one.actions.npy: not an .npy file"),
        (
            lambda path: np.save(path, np.array(["a"] * 12)),
            "actions: one.actions.npy is <U1 [12]; actions must be numbers",
        ),
        (lambda path: np.savez(path.open("wb"), a=np.zeros((12, 2))), "actions: one.actions.npy: not an .npy file"),
        (lambda path: path.write_bytes(_promising(4 * 10**12)), "actions: one.actions.npy: its header says float32"),
    ],
)
def test_a_video_whose_actions_are_bad_is_excluded(tmp_path: Path, make: Callable[[Path], None], cause: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.mp4").write_bytes(video_bytes(1, 12))
    make(source / "one.actions.npy")
    config, unit = one_unit(tmp_path, source={"url": str(source), "actions_suffix": ".actions.npy"})
    (exclusion,) = shard(config, unit)["exclusions"]
    assert f"{exclusion['stage']}: {exclusion['cause']}".startswith(cause)
    assert samples_of(config) == {}


def test_a_video_without_an_action_file_has_clips_without_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.mp4").write_bytes(video_bytes(1, 12))
    config, unit = one_unit(tmp_path, source={"url": str(source), "actions_suffix": ".actions.npy"})
    monkeypatch.delattr("clipmill.storage.walk")  # to list a bucket for each such video would take hours
    counts = shard(config, unit)["counts"]
    assert (counts["num_with_actions"], counts["num_excluded"]) == (0, 0)
    samples = samples_of(config).values()
    assert samples
    assert not any("actions.npy" in sample for sample in samples)


def test_files_that_changed_or_vanished_since_the_plan_are_excluded(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config, unit = one_unit(tmp_path)
    (tmp_path / "source" / "up" / "003.mp4").unlink()
    (tmp_path / "source" / "down" / "000.mp4").write_bytes(b"other")
    exclusions = {exclusion["url"]: exclusion["cause"] for exclusion in shard(config, unit)["exclusions"]}
    assert exclusions.keys() == {"up/003.mp4", "down/000.mp4"}
    assert exclusions["up/003.mp4"] == "up/003.mp4 is missing"
    assert exclusions["down/000.mp4"].startswith("changed since it was planned")


def test_a_source_that_is_gone_is_no_fault_of_its_videos(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config, unit = one_unit(tmp_path)
    (tmp_path / "source").rename(tmp_path / "unmounted")
    (tmp_path / "source").mkdir()
    with pytest.raises(OSError, match="empty or gone"):
        shard(config, unit)
    assert committed_units(config.folder("clips", "train")) == []


def write_broken(tmp_path: Path, num_videos: int) -> None:
    (tmp_path / "source").mkdir()
    for number in range(num_videos):
        (tmp_path / "source" / f"{number}.mp4").write_text(f"no video {number}")


def test_nothing_is_committed_when_everything_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipmill.pipeline.budget.FIRST_VIDEOS", 4)  # each costs two fresh children
    write_broken(tmp_path, 6)
    config, unit = one_unit(tmp_path, max_failed_videos=1)
    result = shard(config, unit, Allowance(100, is_new=True))
    assert len(result["exclusions"]) == result["tried"] == 4
    assert "counts" not in result
    assert committed_units(config.folder("clips", "train")) == []


@pytest.mark.parametrize(("max_failed_videos", "is_new"), [(6, True), (1, False)])
def test_a_budget_or_an_earlier_success_spares_videos_that_all_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_failed_videos: int, is_new: bool
) -> None:
    monkeypatch.setattr("clipmill.pipeline.budget.FIRST_VIDEOS", 4)
    write_broken(tmp_path, 6)
    config, unit = one_unit(tmp_path, max_failed_videos=max_failed_videos)
    assert shard(config, unit, Allowance(100, is_new))["counts"]["num_excluded"] == 6


def test_spans_of_one_broken_film_are_no_broken_source(tmp_path: Path) -> None:
    films = tuple(PlannedVideo(f"{number:016x}", "film.mp4", 1, None, *[None] * 5) for number in range(30))
    unit = Unit("train", 0, films)
    data = run_config(tmp_path, tmp_path).data
    assert not Allowance(100, is_new=True).is_exceeded(data, unit, 30, 30)
    assert Allowance(29, is_new=True).is_exceeded(data, unit, 30, 30)


def test_a_worker_whose_run_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config, unit = one_unit(tmp_path)
    with hold(config.folder("clips"), "shard") as lease, pytest.raises(StageFailed, match="taken over"):
        make_worker(config, Lease(lease.url, lease.attempt - 1), Allowance(10, is_new=True))(unit)
    assert committed_units(config.folder("clips", "train")) == []


def test_the_commit_tells_all_about_the_unit(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1)
    config, unit = one_unit(tmp_path)
    shard(config, unit)
    record = read_commit(config.folder("clips", "train"), 0)
    by_url = {video["url"]: video for video in record["videos"]}
    assert by_url["short.mp4"]["short"]
    assert by_url["short.mp4"]["clips"] == 0
    assert record["num_short"] == 1
    good = by_url["left/001.mp4"]
    assert (good["info"]["codec"], good["info"]["width"], good["info"]["height"]) == ("h264", 64, 48)
    assert good["num_frames"] == 11
    assert {exclusion["url"] for exclusion in record["exclusions"]} == {"up/broken.mp4", "up/readme.mp4"}
    assert record["versions"].keys() == {"clipmill", "av", "pillow", "cpu"}
    assert str(tmp_path) not in json.dumps(record)


@needs_decord
def test_the_commit_names_the_decord_that_was_asked_for(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config, unit = one_unit(tmp_path, decoder="decord")
    assert decord_version().items() <= shard(config, unit)["versions"].items()


def test_a_node_without_decord_blames_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config, unit = one_unit(tmp_path, decoder="decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="needs the package decord"):
        shard(config, unit)
