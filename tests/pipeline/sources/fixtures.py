"""Tiny faithful instances of the published layouts, what their videos hold, and what the stage makes of them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import av
import h5py
import numpy as np

from clipmill.config import RunConfig
from clipmill.lease import hold
from clipmill.pipeline.budget import Allowance
from clipmill.pipeline.sources.tfrecord import masked_crc32c
from clipmill.pipeline.unit import make_worker
from clipmill.shards.commits import committed_units, read_commits
from clipmill.shards.manifest import SPLITS
from tests.pipeline.corpus import make_plan, video_bytes

UCF_CLASSES = ("ApplyEyeMakeup", "YoYo")
TGIF_URL = "https://38.media.tumblr.com/9f6c25cc350f12aa74a7dc386a5c4985/tumblr_{}o1_500.gif"


def random_frames(seed: int, num_frames: int, size: int = 64) -> np.ndarray:
    """uint8 [num_frames, size, size, 3]: noise, so that nothing but an exact copy equals it."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, size, size, 3), np.uint8)


# ------------------------------------------------------------------------------------------------ HDF5


def write_hdf5(path: Path, lengths: dict[str, list[int]], *, actions: bool = True, size: int = 64) -> None:
    """VideoGPT's layout; video i of a part holds ``random_frames(i + 100 if test, length)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for part, part_lengths in lengths.items():
            videos = [random_frames(100 * (part == "test") + i, n, size) for i, n in enumerate(part_lengths)]
            frames = np.concatenate(videos)
            file[f"{part}_data"] = frames
            file[f"{part}_idx"] = np.cumsum([0, *part_lengths[:-1]])
            if actions:
                file[f"{part}_actions"] = np.arange(3 * len(frames), dtype=np.float32).reshape(-1, 3)


# ------------------------------------------------------------------------------------------------ BAIR


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _feature(name: str, value: bytes) -> bytes:
    return _field(1, _field(1, name.encode()) + _field(2, value))


def bair_frames(seed: int, camera: str, num_frames: int) -> np.ndarray:
    """The frames of a record that `bair_record` writes."""
    return random_frames(2 * seed + (camera == "image_main"), num_frames)


def bair_actions(seed: int, num_frames: int) -> np.ndarray:
    """float32 [num_frames, 7]: action and end effector of such a record."""
    return np.random.default_rng(seed).standard_normal((num_frames, 7)).astype(np.float32)


def bair_record(seed: int, num_frames: int = 30) -> bytes:
    """A serialised record as the robot's recorder wrote it, built byte by byte: not with the reader's own library."""
    features = b""
    actions = bair_actions(seed, num_frames)
    for index in range(num_frames):
        for camera in ("image_main", "image_aux1"):
            pixels = bair_frames(seed, camera, num_frames)[index].tobytes()
            features += _feature(f"{index}/{camera}/encoded", _field(1, _field(1, pixels)))
        features += _feature(f"{index}/action", _field(2, _field(1, actions[index, :4].tobytes())))
        features += _feature(f"{index}/endeffector_pos", _field(2, _field(1, actions[index, 4:].tobytes())))
    return _field(1, features)


def framed(record: bytes) -> bytes:
    """A record with its length and checksums."""
    length = struct.pack("<Q", len(record))
    checksums = (struct.pack("<I", masked_crc32c(data)) for data in (length, record))
    return length + next(checksums) + record + next(checksums)


def write_bair(folder: Path, num_train: int = 3, num_test: int = 2, num_frames: int = 6) -> list[Path]:
    """Two files as the archive unpacks; record i of train holds seed i, of test seed 100 + i."""
    paths = []
    for part, first, count in (("train", 0, num_train), ("test", 100, num_test)):
        path = folder / "softmotion30_44k" / part / f"traj_{first}_to_{first + count - 1}.tfrecords"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(framed(bair_record(first + i, num_frames)) for i in range(count)))
        paths.append(path)
    return paths


# -------------------------------------------------------------------------------------- UCF-101 and TGIF


def film_file(path: Path, codec: str, pixel_format: str, fps: int, seed: int, num_frames: int) -> None:
    """A smooth film of 64 x 48 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        for frame in _smooth(seed, num_frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixel_format)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _smooth(seed: int, num_frames: int) -> np.ndarray:
    slope = (np.arange(64)[:, None] * (1, 2, 3) + 20 * seed) % 256
    return np.stack([np.broadcast_to(np.roll(slope, 3 * i, 0), (48, 64, 3)) for i in range(num_frames)]).astype(
        np.uint8
    )


def write_ucf101(folder: Path, groups: int = 3, num_frames: int = 20) -> None:
    """Two classes, the archive's two folders; the last group of each class is the test set of split 1."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for number, name in enumerate(UCF_CLASSES, start=1):
        for group in range(1, groups + 1):
            video = f"{name}/v_{name}_g{group:02d}_c01.avi"
            film_file(folder / "UCF-101" / video, "mpeg4", "yuv420p", 25, 10 * number + group, num_frames)
            lists["test" if group == groups else "train"].append(video if group == groups else f"{video} {number}")
    (folder / "ucfTrainTestlist").mkdir()
    for kind, lines in lists.items():
        (folder / "ucfTrainTestlist" / f"{kind}list01.txt").write_text("\r\n".join(lines) + "\r\n")


def write_tgif(folder: Path, count: int = 6, num_frames: int = 20, *, splits: bool = False) -> None:
    """GIFs in a folder, the list of captions (GIF 0 has two), and the official split files."""
    urls = [TGIF_URL.format(f"m{number}") for number in range(count)]
    lines = [f"{url}\tcaption {number}" for number, url in enumerate(urls)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tgif-v1.0.tsv").write_text("\n".join([*lines, f"{urls[0]}\tanother caption"]) + "\n")
    for number, url in enumerate(urls):
        film_file(folder / "gifs" / url.rsplit("/", 1)[1], "gif", "rgb8", 10, number, num_frames)
    if splits:
        (folder / "splits").mkdir()
        for name, chosen in (("train", urls[:-2]), ("val", urls[-2:-1]), ("test", urls[-1:])):
            (folder / "splits" / f"{name}.txt").write_text("\n".join(chosen) + "\n")


# ----------------------------------------------------------------------------------------------- tables


def write_videos(folder: Path, count: int) -> list[str]:
    """Names of h264 files of 9 frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.mp4").write_bytes(video_bytes(number, 9))
    return [f"{number}.mp4" for number in range(count)]


# ------------------------------------------------------------------------------------ the stage, in process


class Sharded(NamedTuple):
    """What the units of a plan became.

    ``samples``: members by split and key; ``records``: commit records by split.
    """

    samples: dict[str, dict[str, dict[str, bytes]]]
    records: dict[str, list[dict[str, Any]]]

    def clips(self, split: str) -> dict[str, np.ndarray]:
        """The pixels by source and first frame (``train/0:4``), of ``.npy`` clips."""
        return {
            f"{described['source']}:{described['first_frame']}": np.load(io.BytesIO(members["npy"]))
            for members, described in self._described(split)
        }

    def actions(self, split: str) -> dict[str, np.ndarray]:
        """The actions by the same names."""
        return {
            f"{described['source']}:{described['first_frame']}": np.load(io.BytesIO(members["actions.npy"]))
            for members, described in self._described(split)
        }

    def described(self, split: str) -> list[dict[str, Any]]:
        """The json of each clip."""
        return [described for _, described in self._described(split)]

    def excluded(self) -> dict[str, str]:
        """Causes by name."""
        return {
            video["url"]: video["cause"]
            for records in self.records.values()
            for record in records
            for video in record["exclusions"]
        }

    def _described(self, split: str) -> list[tuple[dict[str, bytes], dict[str, Any]]]:
        return [(members, json.loads(members["json"])) for members in self.samples[split].values()]


def source_config(tmp_path: Path, source: dict[str, Any], **data: Any) -> RunConfig:
    """Clips of four frames, lossless."""
    clip = {"num_frames": 4, "resolution": 64}
    defaults = {"source": source, "clip": clip, "format": "npy", "val_fraction": 0.0}
    return RunConfig.model_validate({"root": str(tmp_path / "run"), "data": {**defaults, **data}})


def shard_in_process(config: RunConfig) -> Sharded:
    """Plans, and takes every unit through the worker of the stage, without Ray."""
    plan = make_plan(config)
    samples: dict[str, dict[str, dict[str, bytes]]] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    with hold(config.folder("clips"), "shard") as lease:
        work = make_worker(config, lease, Allowance(10, is_new=False))
        for split in SPLITS:
            for number in range(plan.num_units(split)):
                work(plan.unit(split, number))
            url = config.folder("clips", split)
            records[split] = list(read_commits(url, committed_units(url)))
            samples[split] = {}
            for path in sorted(Path(url).glob("*.tar")):
                with tarfile.open(path) as tar:
                    for member in tar:
                        key, _, name = member.name.partition(".")
                        content = tar.extractfile(member)
                        assert content is not None
                        samples[split].setdefault(key, {})[name] = content.read()
    return Sharded(samples, records)
