"""How each tool is started, continued and read: its own best documented setting for recovery, nothing added to it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from killing.footage import SIDE

__all__ = ["TOOLS", "Tool"]

_JOBS = Path(__file__).parent / "jobs"
_RAY_WORKER = r"^ray::(?!IDLE)"
"""Ray names a worker after the task or the actor that it runs."""
_VIDEOS_PER_PART = 10
"""What one unit, shard, block or partition holds: equal for all, and little, since that is what a kill may cost."""
_UNREADABLE = b""
"""A damaged shard, table or list counts as one wrong clip: its reader runs into it."""


@dataclass(frozen=True)
class Tool:
    """A tool that cuts a folder of videos into clips.

    Attributes:
        distribution: its name on PyPI.
        requirements: what a virtual environment needs for this benchmark, for pip.
        recovery: the setting that makes it continue, and where it is documented.
        workers: regular expression of the command lines of busy worker processes.
        command: from its Python, the folder of videos and a folder for output to a command. The same command, run
            again, continues.
        clips: the clips in the folder of output, as their readers would find them.
    """

    distribution: str
    requirements: tuple[str, ...]
    recovery: str
    workers: str
    command: Callable[[Path, Path, Path], list[str]]
    clips: Callable[[Path], Iterator[bytes]]


def _tar_clips(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(".mp4") else None
                    if file is not None:
                        yield file.read()
        except tarfile.TarError:
            yield _UNREADABLE


# ------------------------------------------------------------------------------------------------------------ clipmill


def _clipmill(python: Path, videos: Path, out: Path) -> list[str]:
    return [
        str(python), "-m", "clipmill.cli", "shard", f"root={out}",
        f"data.source.url={videos}", "data.source.label=none", f"data.clip.resolution={SIDE}",
        f"data.shard_bytes={_CLIPMILL_SHARD_BYTES}", "cluster.num_cpus=2",
    ]  # fmt: skip


_CLIPMILL_SHARD_BYTES = 128 * 2**10
"""About ten videos of this footage."""


def _clipmill_clips(out: Path) -> Iterator[bytes]:
    shards = [folder.parent / name for folder in out.glob("clips/*/shards.txt") for name in folder.read_text().split()]
    return _tar_clips(sorted(shards))


# ------------------------------------------------------------------------------------------------------------ Ray Data


def _ray_data(python: Path, videos: Path, out: Path) -> list[str]:
    return [str(python), str(_JOBS / "ray_data_job.py"), str(videos), str(out), str(_VIDEOS_PER_PART)]


def _ray_data_clips(out: Path) -> Iterator[bytes]:
    for path in sorted(out.glob("clips/*.parquet")):
        try:
            rows = parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError):
            yield _UNREADABLE
            continue
        for row in rows:
            yield from row["clips"]


# ------------------------------------------------------------------------------------------------------- video2dataset


def _video2dataset(python: Path, videos: Path, out: Path) -> list[str]:
    # It cuts at times that its table lists.
    out.mkdir(parents=True, exist_ok=True)
    table, config = out.parent / f"{out.name}.json", out.parent / f"{out.name}.yaml"
    lengths = json.loads((videos.parent / "seconds.json").read_text())
    rows = [
        {"url": str(path), "clips": [[second, second + 1.0] for second in range(lengths[path.name])]}
        for path in sorted(videos.iterdir())
    ]
    table.write_text(json.dumps(rows))
    config.write_text(json.dumps(_VIDEO2DATASET))  # JSON is YAML
    return [
        str(python.parent / "video2dataset"), f"--url_list={table}", "--input_format=json", "--url_col=url",
        "--clip_col=clips", f"--output_folder={out}", "--output_format=webdataset", f"--config={config}",
        "--incremental_mode=incremental", "--enable_wandb=False", f"--tmp_dir={out.parent}",
    ]  # fmt: skip


_VIDEO2DATASET = {
    # Version 1.3.0 does not resize while it downloads: its worker asks ResolutionSubsampler for `encode_formats`, which
    # that has not, and every shard fails.
    "subsampling": {"ClippingSubsampler": {"args": {"precision": "exact"}}},
    "reading": {
        "yt_args": {"download_size": 360, "download_audio_rate": 44100, "yt_metadata_args": None},
        "timeout": 60,
        "sampler": None,
    },
    "storage": {"number_sample_per_shard": _VIDEOS_PER_PART, "oom_shard_count": 5, "captions_are_subtitles": False},
    "distribution": {"processes_count": 2, "thread_count": 2, "subjob_size": 1000, "distributor": "multiprocessing"},
}


def _video2dataset_clips(out: Path) -> Iterator[bytes]:
    # Its readers take all tars; a shard is done once its statistics are there, and one that is not is written again.
    return _tar_clips(sorted(out.glob("*.tar")))


# -------------------------------------------------------------------------------------------------------- data-juicer


def _data_juicer(python: Path, videos: Path, out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    table, config = out / "videos.jsonl", out / "recipe.yaml"
    paths = sorted(videos.iterdir())
    rows = [json.dumps({"text": "<__dj__video>", "videos": [str(path)]}) for path in paths]
    table.write_text("\n".join(rows) + "\n")
    recipe = {
        "project_name": "kills",
        "executor_type": "ray_partitioned",
        "ray_address": "local",
        "dataset_path": str(table),
        "export_path": str(out / "clips.jsonl"),
        "work_dir": str(out / "work" / "{job_id}"),
        "partition": {"mode": "manual", "num_of_partitions": -(-len(paths) // _VIDEOS_PER_PART)},
        "checkpoint": {"enabled": True, "strategy": "every_op"},
        "process": [
            {
                "video_split_by_duration_mapper": {
                    "split_duration": 1,
                    "min_last_split_duration": 0.5,
                    "keep_original_sample": False,
                    "batch_size": 1,  # a video that fails takes its whole batch with it
                    "video_backend": "ffmpeg",
                    # Cut and resized by one call; alone the operator copies packets.
                    "ffmpeg_extra_args": f"-c:v libx264 -vf scale={SIDE}:{SIDE}",
                    "legacy_split_by_text_token": False,
                    "save_dir": str(out / "clips"),
                }
            }
        ],
    }
    config.write_text(json.dumps(recipe))
    return [str(python.parent / "dj-process"), "--config", str(config), "--job_id", "kills"]


def _data_juicer_clips(out: Path) -> Iterator[bytes]:
    exported = out / "clips.jsonl"
    for path in sorted(exported.rglob("*.json*")) if exported.is_dir() else [exported] * exported.exists():
        for line in path.read_text().splitlines():
            try:
                clips = [Path(clip) for clip in json.loads(line)["videos"]]
            except ValueError:
                yield _UNREADABLE
                continue
            for clip in clips:
                yield clip.read_bytes() if clip.exists() else _UNREADABLE


# ------------------------------------------------------------------------------------------------------- NeMo Curator


def _nemo_curator(python: Path, videos: Path, out: Path) -> list[str]:
    return [str(python), str(_JOBS / "nemo_curator_job.py"), str(videos), str(out)]


def _nemo_curator_clips(out: Path) -> Iterator[bytes]:
    for path in sorted(out.glob("clips/*.mp4")):
        yield path.read_bytes()


TOOLS = {
    "clipmill": Tool(
        "clipmill", (), "the same command again (README)", _RAY_WORKER, _clipmill, _clipmill_clips,
    ),
    "ray-data": Tool(
        "ray", ("ray[data]", "av"), "CheckpointConfig(id_column, checkpoint_path) (its guide to checkpointing)",
        _RAY_WORKER, _ray_data, _ray_data_clips,
    ),
    "video2dataset": Tool(
        # Without the last two, pip takes a pyarrow that refuses the NumPy that video2dataset asks for.
        "video2dataset", ("video2dataset", "pyarrow==16.1.0", "pandas<2.3"), "incremental_mode=incremental (README)",
        r"multiprocessing\.spawn", _video2dataset, _video2dataset_clips,
    ),
    "data-juicer": Tool(
        "py-data-juicer", ("py-data-juicer", "ray[default,data]", "av==13.1.0", "ffmpeg-python", "pandas<3"),
        "ray_partitioned, checkpoint.strategy=every_op, the same job_id (config_all.yaml)",
        _RAY_WORKER, _data_juicer, _data_juicer_clips,
    ),
    "nemo-curator": Tool(
        "nemo-curator", ("nemo-curator[video-cpu]",), "Pipeline.run(checkpoint_path=...) (Resumable Processing)",
        _RAY_WORKER, _nemo_curator, _nemo_curator_clips,
    ),
}  # fmt: skip
