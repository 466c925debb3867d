"""Measures how many copies of clips the search for duplicates finds, and how many wrong pairs it reports.

Footage, robot episodes and the demo's videos are copied in three ways: re-encoded (x264, crf 32), cropped (by 5 % of
width and height, at a random place) and trimmed (1 to 15 frames at the start). Originals and copies are sharded alike.
A copied clip counts as found if it is paired with any clip of its original video. A pair of clips of different
originals is wrong. Needs ffmpeg.

    python benchmarks/duplicates.py --videos /work/shared/videos --robot /work/shared/robot
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from clipmill.config import RunConfig
from clipmill.demo import draw_video
from clipmill.pipeline.duplicates import LARGEST_DIFFERENCE, find_pairs
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import Manifest
from clipmill.shards.signatures import signature_of
from clipmill.stages import run_stage
from clipmill.video.encode import encode_mp4

COPIES = ("recoded", "cropped", "trimmed")
NUM_FRAMES = 16
EVEN = "scale=trunc(iw/2)*2:trunc(ih/2)*2"


def originals(folder: Path, videos: Path | None, robot: Path | None, num_demo: int) -> list[Path]:
    """The files to copy; robot episodes and the demo's videos are written to ``folder``."""
    found = sorted(videos.iterdir()) if videos else []
    folder.mkdir()
    frames = {f"demo_{index:04d}": draw_video(0, index)[1] for index in range(num_demo)}
    for path in sorted(robot.glob("*.npz")) if robot else []:
        with np.load(path) as arrays:
            if "image" in arrays:
                frames[path.stem] = arrays["image"].astype(np.uint8)
            else:  # three frames beside each other along the channels; the last is the newest
                frames[path.stem] = arrays["observation"][:, -3:].transpose(0, 2, 3, 1)
    for name, video in frames.items():
        path = folder / f"{name}.mp4"
        path.write_bytes(encode_mp4(np.ascontiguousarray(video), 10, 10))
        found.append(path)
    return found


def write_copies(path: Path, folder: Path, random: np.random.Generator) -> None:
    """The video and its three copies, below ``folder``. One that ffmpeg cannot read makes no file."""
    x, y = random.random(2)
    first = int(random.integers(1, NUM_FRAMES))
    ways = {
        "original": (EVEN, 14),
        "recoded": (EVEN, 32),
        "cropped": (f"crop=trunc(iw*.95/2)*2:trunc(ih*.95/2)*2:(iw-ow)*{x:.3f}:(ih-oh)*{y:.3f}", 20),
        "trimmed": (f"{EVEN},trim=start_frame={first},setpts=PTS-STARTPTS", 20),
    }
    folder.mkdir(parents=True)
    for way, (filters, crf) in ways.items():
        command = ["ffmpeg", "-v", "quiet", "-i", str(path), "-map", "0:v:0", "-an", "-vf", filters]
        command += ["-fps_mode", "passthrough", "-c:v", "libx264", "-preset", "veryfast", "-crf", str(crf)]
        subprocess.run([*command, "-pix_fmt", "yuv420p", str(folder / f"{way}.mp4")], check=False)


def clips_of(root: Path, source: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Signatures of all clips, and of each the name of its original and the way in which it was copied."""
    data = {"source": {"url": str(source)}, "val_fraction": 0, "max_failed_share": 1.0}
    data["clip"] = {"num_frames": NUM_FRAMES, "resolution": 64}
    run_stage("shard", RunConfig.model_validate({"root": str(root), "data": data, "cluster": {"num_cpus": 2}}))
    dataset = ShardDataset(Manifest.load(str(root / "clips" / "train"), "clips"), decode_clip)
    signatures, names, ways = [], [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        path = Path(sample["meta"]["source"])
        signatures.append(signature_of(sample["video"]))
        names.append(path.parent.name)
        ways.append(path.stem)
    return np.stack(signatures), names, ways


def measure(grey: np.ndarray, names: list[str], ways: list[str]) -> dict[str, object]:
    """What is found, and what is found wrongly: by the search, and by comparing every pair."""
    names_array, ways_array = np.array(names), np.array(ways)
    _, videos = np.unique([f"{name}/{way}" for name, way in zip(names, ways, strict=True)], return_inverse=True)
    began = time.perf_counter()
    pairs = np.array([pair[:2] for pair in find_pairs(grey, videos)], np.int64).reshape(-1, 2)
    seconds = time.perf_counter() - began
    result: dict[str, object] = {"clips": int((ways_array == "original").sum()), "seconds": round(seconds, 2)}
    true = pairs[names_array[pairs[:, 0]] == names_array[pairs[:, 1]]]
    to_original = {
        int(clip) for clip, other in (*true.tolist(), *true[:, ::-1].tolist()) if ways_array[other] == "original"
    }
    for way in COPIES:
        copies = np.flatnonzero(ways_array == way)
        result[f"found_{way}"] = round(float(np.mean([int(copy) in to_original for copy in copies])), 4)
    num_different = sum(int((names_array != name).sum()) for name in names) // 2
    false = len(pairs) - len(true)
    result |= {"false_pairs": false, "different_pairs": num_different, "false_rate": false / num_different}
    wrong = pairs[names_array[pairs[:, 0]] != names_array[pairs[:, 1]]]
    result["clips_in_false_pairs"] = len(np.unique(wrong))
    result["false_pairs_of_demo"] = sum(name.startswith("demo_") for name in names_array[wrong[:, 0]])
    return result


def main() -> None:
    """Ends in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of footage")
    parser.add_argument("--robot", type=Path, help="folder of robot episodes (.npz)")
    parser.add_argument("--demo", type=int, default=330, help="videos of the demo")
    arguments = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        parser.error("ffmpeg is not installed")
    with tempfile.TemporaryDirectory() as folder:
        root, random = Path(folder), np.random.default_rng(0)
        for path in originals(root / "made", arguments.videos, arguments.robot, arguments.demo):
            write_copies(path, root / "source" / path.stem, random)
        grey, names, ways = clips_of(root / "run", root / "source")
        print(
            json.dumps(
                {"benchmark": "duplicates", "largest_difference": LARGEST_DIFFERENCE, **measure(grey, names, ways)}
            )
        )


if __name__ == "__main__":
    main()
