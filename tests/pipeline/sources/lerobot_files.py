"""LeRobot data sets as lerobot's own writers leave them: versions 2.1 (lerobot 0.3.3) and 3.0 (0.4.4).

Episode e of ``LENGTHS`` shows, in frame t, the colour (40 e + 10, 3 t, 200 for the second camera); its rows hold the
action (e, t) and the state (e, t, 1). Its task is ``task {e % 2}``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS = 30
LENGTHS = (9, 12, 16, 10)
CAMERAS = ("observation.images.top", "observation.images.wrist")
SIZE = (48, 64)
V2 = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
V3 = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


def colours(episode: int, camera: str) -> np.ndarray:
    """float64 [num_frames, 3]: the mean colour of each frame."""
    frames = np.arange(LENGTHS[episode])
    return np.stack([0 * frames + 40 * episode + 10, 3 * frames, 0 * frames + 200 * CAMERAS.index(camera)], 1) * 1.0


def rows(episode: int, width: int) -> np.ndarray:
    """float32 [num_frames, width]: the first columns of action and state side by side."""
    frames = np.arange(LENGTHS[episode])
    columns = (0 * frames + episode, frames, 0 * frames + episode, frames, 0 * frames + 1)
    return np.stack(columns, 1).astype(np.float32)[:, :width]


def _info(version: str, paths: dict[str, str]) -> dict[str, Any]:
    def feature(dtype: str, *shape: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape), "names": None}

    details = {"video.codec": "h264", "video.fps": FPS, "video.is_depth_map": False, "has_audio": False}
    return {
        "codebase_version": version,
        "robot_type": None,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        **paths,
        "features": {
            "action": feature("float32", 2),
            "observation.state": feature("float32", 3),
            **{camera: {**feature("video", *SIZE, 3), "info": details} for camera in CAMERAS},
            "timestamp": feature("float32", 1),
            **{name: feature("int64", 1) for name in ("frame_index", "episode_index", "index", "task_index")},
        },
    }


def table(episode: int) -> pa.Table:
    """The rows of an episode, as the writer's schema has them."""
    num_rows = LENGTHS[episode]
    first = sum(LENGTHS[:episode])
    actions, states = rows(episode, 2), rows(episode, 5)[:, 2:]

    def vectors(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

    return pa.table(
        {
            "action": vectors(actions),
            "observation.state": vectors(states),
            "timestamp": pa.array(np.arange(num_rows) / FPS, pa.float32()),
            "frame_index": np.arange(num_rows),
            "episode_index": np.full(num_rows, episode),
            "index": np.arange(first, first + num_rows),
            "task_index": np.full(num_rows, episode % 2),
        }
    )


def write_video(path: Path, episode: int, camera: str) -> None:
    """An episode's own mp4, with a key frame every other frame, as lerobot encodes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", FPS, options={"g": "2", "crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for colour in colours(episode, camera):
            pixels = np.broadcast_to(colour.astype(np.uint8), (*SIZE, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


def _duration(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.duration * stream.time_base)


def _concatenate(first: Path, second: Path) -> None:
    """Appends a file to another by FFmpeg's concat demuxer, without encoding."""
    listed = first.with_suffix(".ffconcat")
    listed.write_text(f"ffconcat version 1.0\nfile '{first}'\nfile '{second}'\n")
    joined = first.with_suffix(".joined.mp4")
    with (
        av.open(str(listed), format="concat", options={"safe": "0"}) as container,
        av.open(str(joined), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(container.streams.video[0], opaque=True)
        stream.time_base = container.streams.video[0].time_base
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    listed.unlink()
    joined.rename(first)


def _write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=4))


def write_v2(folder: Path) -> Path:
    """A parquet file and an mp4 file a camera for each episode."""
    _write_json(folder / "meta" / "info.json", {**_info("v2.1", V2), "total_videos": 2 * len(LENGTHS)})
    episodes = [{"episode_index": e, "tasks": [f"task {e % 2}"], "length": n} for e, n in enumerate(LENGTHS)]
    (folder / "meta" / "episodes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in episodes))
    tasks = [{"task_index": i, "task": f"task {i}"} for i in range(2)]
    (folder / "meta" / "tasks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in tasks))
    for episode in range(len(LENGTHS)):
        place = {"episode_chunk": 0, "episode_index": episode}
        path = folder / V2["data_path"].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(episode), path)
        for camera in CAMERAS:
            write_video(folder / V2["video_path"].format(video_key=camera, **place), episode, camera)
    return folder


def write_v3(folder: Path, episodes_per_file: int = 3) -> Path:
    """Files of several episodes, a row group each."""
    _write_json(folder / "meta" / "info.json", {**_info("v3.0", V3), "data_files_size_in_mb": 100})
    described = []
    for episode in range(len(LENGTHS)):
        place = {"chunk_index": 0, "file_index": episode // episodes_per_file}
        row: dict[str, Any] = {
            "episode_index": episode,
            "tasks": [f"task {episode % 2}"],
            "length": LENGTHS[episode],
            **{f"data/{name}": value for name, value in place.items()},
            "dataset_from_index": sum(LENGTHS[:episode]),
            "dataset_to_index": sum(LENGTHS[: episode + 1]),
        }
        for camera in CAMERAS:
            path = folder / V3["video_path"].format(video_key=camera, **place)
            begin = _duration(path) if path.exists() else 0.0
            own = path if not path.exists() else path.with_suffix(".own.mp4")
            write_video(own, episode, camera)
            length = _duration(own)
            if own != path:
                _concatenate(path, own)
                own.unlink()
            facts = {**place, "from_timestamp": begin, "to_timestamp": begin + length}
            row |= {f"videos/{camera}/{name}": value for name, value in facts.items()}
        described.append({**row, "stats/action/min": [float(episode), 0.0], "meta/episodes/chunk_index": 0})
    for first in range(0, len(LENGTHS), episodes_per_file):
        write_rows(folder, first // episodes_per_file, range(first, min(first + episodes_per_file, len(LENGTHS))))
    write_episodes(folder, described)
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]}), folder / "meta" / "tasks.parquet"
    )
    return folder


def write_rows(folder: Path, file_index: int, episodes: range) -> None:
    path = folder / V3["data_path"].format(chunk_index=0, file_index=file_index)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table(0).schema) as writer:
        for episode in episodes:
            writer.write_table(table(episode))


def episodes_path(folder: Path) -> Path:
    return folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"


def write_episodes(folder: Path, described: list[dict[str, Any]]) -> None:
    path = episodes_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(described), path)
