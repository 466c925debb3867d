"""Compares the decoding speed of the stage ``shard`` with bare loops, with two workers, and with ffmpeg calls.

The stage's own code (`clipmill.video.Decoder`: probe, sandboxed child, timestamps, clip rule, pixel statistics, spool
file) and the bare loops make uint8 clips of 16 frames from the same files on one core. Clips are resized and
centre-cropped to the same size, and not encoded (``data.format=npy``). Runs alternate; the results are medians.

    python benchmarks/shard.py [--rounds 5] [--scale 1.0]
    python benchmarks/shard.py --against CHECKOUT    # the stage alone, against that of another checkout of clipmill

prints a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import psutil
from av.video.reformatter import VideoReformatter

from clipmill.config import ClipConfig
from clipmill.video import Decoder, Limits

HERE = Path(__file__).resolve().parents[1]
NUM_FRAMES = 16
FPS = 30
LIMITS = Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, no_progress_seconds=120)
GOALS = {"stage_over_bare": 1.15, "two_workers_speedup": 1.7, "ffmpeg_over_stage": 3.0}


class Case(NamedTuple):
    """Footage of one size, and the clips to make of it."""

    width: int
    height: int
    resolution: int
    num_videos: int
    num_video_frames: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}->{self.resolution}"


CASES = (Case(320, 240, 64, 12, 480), Case(1920, 1080, 128, 4, 160))


# -------------------------------------------------------------------------------------------- footage


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] with detail at all scales, as natural images have it."""
    sums = np.zeros((height, width, 3), np.float32)
    for octave in range(7):
        cell = 2 ** (7 - octave)
        coarse = rng.standard_normal((height // cell + 2, width // cell + 2, 3), np.float32)
        fine = coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
        sums += fine * cell**0.5
    sums = (sums - sums.min()) / (sums.max() - sums.min())
    return (sums * 255).astype(np.uint8)


def write_video(path: Path, case: Case, seed: int) -> None:
    """h264 as cameras and phones write it: B-frames, a panning ground, moving things, grain."""
    rng = np.random.default_rng(seed)
    height, width, margin = case.height, case.width, 128
    ground = texture(rng, height + margin, width + margin)
    things = [texture(rng, height // 3, width // 4) for _ in range(3)]
    grain = rng.integers(-6, 7, (4, height, width, 1), np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(case.num_video_frames):
            pan = round((margin - 1) * (0.5 + 0.5 * np.sin(index / 40 + seed)))
            picture = ground[pan : pan + height, margin - pan : margin - pan + width].copy()
            for number, thing in enumerate(things):
                phase = index / (25 + 10 * number) + number
                top = round((height - thing.shape[0]) * (0.5 + 0.5 * np.sin(phase)))
                left = round((width - thing.shape[1]) * (0.5 + 0.5 * np.cos(0.7 * phase)))
                picture[top : top + thing.shape[0], left : left + thing.shape[1]] = thing
            noisy = (picture + grain[index % len(grain)]).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(noisy, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# -------------------------------------------------------------------------------- ways to make the clips


def stage(decoder: Decoder, paths: list[Path], case: Case) -> int:
    """The stage's path; returns the number of clips, as all of these do."""
    clip = ClipConfig(num_frames=NUM_FRAMES, resolution=case.resolution)
    return sum(1 for path in paths for _ in decoder.clips(path, clip, "auto", encode=("npy", 0)))


def resized(case: Case) -> tuple[int, int]:
    """(width, height) whose shorter side is that of the clips."""
    side = min(case.width, case.height)
    return round(case.width * case.resolution / side), round(case.height * case.resolution / side)


def bare_decord(paths: list[Path], case: Case) -> int:
    """decord with its own resize."""
    import decord

    width, height = resized(case)
    num_clips = 0
    for path in paths:
        reader = decord.VideoReader(str(path), width=width, height=height, num_threads=1)
        num_clips += cut((reader.next().asnumpy() for _ in range(len(reader))), case.resolution)
    return num_clips


def bare_pyav(paths: list[Path], case: Case) -> int:
    """PyAV and swscale with its default filter, one thread."""
    width, height = resized(case)
    num_clips = 0
    for path in paths:
        reformatter = VideoReformatter()
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            frames = (
                reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
                for frame in container.decode(stream)
            )
            num_clips += cut(frames, case.resolution)
    return num_clips


def cut(frames, resolution: int) -> int:
    clip, num_clips = [], 0
    for pixels in frames:
        top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
        clip.append(pixels[top : top + resolution, left : left + resolution])
        if len(clip) == NUM_FRAMES:
            np.stack(clip)
            clip.clear()
            num_clips += 1
    return num_clips


def ffmpeg_calls(paths: list[Path], case: Case) -> int:
    """One ffmpeg process a clip: seek, decode, resize and crop to raw RGB, as video2dataset cuts its clips."""
    width, height = resized(case)
    filters = f"scale={width}:{height},crop={case.resolution}:{case.resolution}"
    num_clips = 0
    for path in paths:
        for start in range(0, case.num_video_frames - NUM_FRAMES + 1, NUM_FRAMES):
            command = [
                "ffmpeg",
                "-v",
                "error",
                "-nostdin",
                "-threads",
                "1",
                "-ss",
                f"{start / FPS:.6f}",
                "-i",
                str(path),
            ]
            command += ["-an", "-frames:v", str(NUM_FRAMES), "-vf", filters, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
            done = subprocess.run(command, capture_output=True, check=True)
            num_clips += len(done.stdout) == NUM_FRAMES * case.resolution**2 * 3
    return num_clips


# ------------------------------------------------------------------------------------------ measuring


def cpu_seconds() -> float:
    """Of this process, of its living children, and of those it has waited for."""
    this = psutil.Process()
    own = this.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    return total + sum(sum(child.cpu_times()[:2]) for child in this.children(recursive=True))


def timed(make_clips: Callable[[], int], num_clips: int) -> dict[str, float]:
    began, cpu_began = time.perf_counter(), cpu_seconds()
    made = make_clips()
    seconds = {"wall": time.perf_counter() - began, "cpu": cpu_seconds() - cpu_began}
    assert made == num_clips, f"{made} clips instead of {num_clips}"
    return seconds


def interleaved(ways: dict[str, Callable[[], int]], num_clips: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each way; each round starts with another one, and each way warms up once."""
    for way in ways.values():
        timed(way, num_clips)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(timed(ways[name], num_clips))
    return {
        name: {clock: statistics.median(run[clock] for run in runs) for clock in ("wall", "cpu")}
        for name, runs in taken.items()
    }


def pin(core: int) -> None:
    """This process, and the children that it starts from now on, run on one core."""
    os.sched_setaffinity(0, {core})


def measure_case(case: Case, paths: list[Path], rounds: int) -> dict[str, object]:
    num_clips = len(paths) * (case.num_video_frames // NUM_FRAMES)
    with Decoder(LIMITS) as decoder:
        ways: dict[str, Callable[[], int]] = {
            "stage": lambda: stage(decoder, paths, case),
            "pyav": lambda: bare_pyav(paths, case),
        }
        if find_spec("decord") is not None:
            ways["decord"] = lambda: bare_decord(paths, case)
        seconds = interleaved(ways, num_clips, rounds)
        seconds["ffmpeg"] = timed(lambda: ffmpeg_calls(paths[:2], case), num_clips * 2 // len(paths))
        two_videos = interleaved({"stage": lambda: stage(decoder, paths[:2], case)}, num_clips * 2 // len(paths), 3)
    num_video_frames = len(paths) * case.num_video_frames
    bare = {clock: min(seconds[name][clock] for name in ways.keys() - {"stage"}) for clock in ("wall", "cpu")}
    return {
        "frames_per_second": {name: num_video_frames / seconds[name]["wall"] for name in ways},
        "stage_over_bare": seconds["stage"]["wall"] / bare["wall"],
        "stage_over_bare_cpu": seconds["stage"]["cpu"] / bare["cpu"],
        "ffmpeg_over_stage": seconds["ffmpeg"]["wall"] / two_videos["stage"]["wall"],
    }


def serve_worker(case: Case, core: int, paths: list[Path]) -> None:
    """A process of its own: takes its files once for each line on stdin, and answers with clips and CPU seconds."""
    pin(core)
    with Decoder(LIMITS) as decoder:
        stage(decoder, paths[:1], case)
        print("ready", flush=True)
        for _ in sys.stdin:
            began = cpu_seconds()
            num_clips = stage(decoder, paths, case)
            print(num_clips, cpu_seconds() - began, flush=True)


def start_worker(case: Case, core: int, share: list[Path], checkout: Path = HERE) -> subprocess.Popen[str]:
    """A process that runs `serve_worker` with the clipmill of a checkout."""
    script = HERE / "benchmarks" / "shard.py"
    command = [sys.executable, str(script), "--worker", json.dumps([case, core, list(map(str, share))])]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    # The decoding child imports from the working directory first.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout)
    assert process.stdout.readline() == "ready\n"
    return process


def go(workers: list[subprocess.Popen[str]]) -> tuple[int, float]:
    """Has all of them take their files; the number of clips, and CPU seconds."""
    for process in workers:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.stdout.readline().split() for process in workers]
    return sum(int(clips) for clips, _ in answers), sum(float(seconds) for _, seconds in answers)


def measure_against(checkout: Path, case: Case, paths: list[Path], rounds: int) -> dict[str, object]:
    """The stage here over the stage of another checkout; in each round both take a turn on the same core.

    On a busy machine the ratio of the least CPU seconds is the steadiest.
    """
    core = min(os.sched_getaffinity(0))
    workers = {name: [start_worker(case, core, paths, root)] for name, root in (("here", HERE), ("there", checkout))}
    num_clips = len(paths) * (case.num_video_frames // NUM_FRAMES)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    try:
        for number in range(rounds):
            for name in list(workers)[:: 1 if number % 2 else -1]:
                began = time.perf_counter()
                made, cpu = go(workers[name])
                assert made == num_clips, f"{made} clips instead of {num_clips}"
                taken[name].append({"wall": time.perf_counter() - began, "cpu": cpu})
    finally:
        for (process,) in workers.values():
            process.stdin.close()
            process.wait()
    ratios: dict[str, object] = {}
    for clock in ("wall", "cpu"):
        here, there = ([run[clock] for run in taken[name]] for name in ("here", "there"))
        ratios[f"here_over_there_{clock}_median"] = statistics.median(a / b for a, b in zip(here, there, strict=True))
        ratios[f"here_over_there_{clock}_least"] = min(here) / min(there)
    return ratios


def measure_two_workers(case: Case, paths: list[Path], cores: list[int], rounds: int) -> float:
    """How many times faster two processes on two cores get through the files than one process on one core."""
    one = [start_worker(case, cores[0], paths)]
    two = [start_worker(case, core, paths[number::2]) for number, core in enumerate(cores[:2])]
    try:
        num_clips = len(paths) * (case.num_video_frames // NUM_FRAMES)
        seconds = interleaved({"one": lambda: go(one)[0], "two": lambda: go(two)[0]}, num_clips, rounds)
    finally:
        for process in [*one, *two]:
            process.stdin.close()
            process.wait()
    return seconds["one"]["wall"] / seconds["two"]["wall"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the videos; less is quicker and noisier")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="only compare the stage with that of a folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case, core, paths = json.loads(arguments.worker)
        serve_worker(Case(*case), core, [Path(path) for path in paths])
        return
    cores = sorted(os.sched_getaffinity(0))
    result: dict[str, object] = {"benchmark": "shard", "goals": GOALS, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        for case in CASES:
            num_videos = max(2, round(case.num_videos * arguments.scale / 2) * 2)
            paths = [Path(folder, f"{case.height}-{number}.mp4") for number in range(num_videos)]
            for number, path in enumerate(paths):
                write_video(path, case, seed=number)
            if arguments.against:
                measured = measure_against(arguments.against.resolve(), case, paths, arguments.rounds)
                show(case, measured)
                result[case.name] = measured
                continue
            os.sched_setaffinity(0, cores)
            speedup = measure_two_workers(case, paths, cores, arguments.rounds) if len(cores) > 1 else None
            pin(cores[0])
            measured = {**measure_case(case, paths, arguments.rounds), "two_workers_speedup": speedup}
            show(case, measured)
            result[case.name] = measured
    print(json.dumps(result))


def show(case: Case, measured: dict[str, object]) -> None:
    for name, value in measured.items():
        print(f"{case.name:>16}  {name:28} {value}", file=sys.stderr)


if __name__ == "__main__":
    main()
