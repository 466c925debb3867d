"""Files with one flipped bit: how many of them give damaged frames. ``python -m tests.video.damage`` prints the table.

A frame is compared with the frame of the clean file that is shown at the same time. It is visibly damaged if it differs
by more than 3 grey levels (mean absolute difference at 64 x 48).
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from clipmill.video.decode import read_frames
from clipmill.video.decoders.picture import Reading
from clipmill.video.errors import VideoError
from clipmill.video.probe import probe

NUM_FILES = 40
NUM_FRAMES = 50
VISIBLE_LEVELS = 3


@dataclass(frozen=True)
class Case:
    """One codec in one container; ``options`` go to the encoder."""

    file: str
    codec: str
    options: dict[str, str]
    pix_fmt: str = "yuv420p"
    note: str = ""

    @property
    def name(self) -> str:
        return self.note or self.codec


FINE = {"flags": "+qscale", "global_quality": "708"}
"""Quantizer 6, of the encoders that have quantizers."""
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12"}
CASES = [
    Case("h264.mp4", "libx264", {"bf": "2", "g": "12"}, note="h264"),
    Case("h264.mkv", "libx264", {"bf": "2", "g": "12"}, note="h264"),
    Case("h264.ts", "libx264", {"bf": "2", "g": "12", "x264-params": "open-gop=1"}, note="h264, open GOP"),
    Case("hevc.mp4", "libx265", X265, note="hevc"),
    Case("hash.mp4", "libx265", {**X265, "x265-params": X265["x265-params"] + ":hash=1"}, note="hevc with checksums"),
    Case("xvid.avi", "mpeg4", {**FINE, "bf": "2"}, note="mpeg-4 (XVID)"),
    Case("msmpeg4.avi", "msmpeg4", FINE, note="msmpeg4"),
    Case("mpeg2.mpg", "mpeg2video", {**FINE, "bf": "2"}, note="mpeg-2"),
    Case("mpeg1.mpg", "mpeg1video", {**FINE, "bf": "2"}, note="mpeg-1"),
    Case("mjpeg.avi", "mjpeg", FINE, "yuvj420p", "mjpeg"),
    Case("vp8.webm", "libvpx", {"g": "12", "b": "400000"}, note="vp8"),
    Case("vp9.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, note="vp9"),
    Case("av1.mkv", "libsvtav1", {"g": "12", "preset": "10"}, note="av1"),
    Case("flv1.flv", "flv", FINE, note="flv1"),
    Case("wmv2.wmv", "wmv2", FINE, note="wmv2"),
    Case("gif.gif", "gif", {}, "rgb8", "gif"),
    Case("prores.mov", "prores_ks", {}, "yuv422p10le", "prores"),
    Case("ffv1.mkv", "ffv1", {"level": "3", "slicecrc": "1"}, note="ffv1 with checksums"),
    Case("huffyuv.avi", "ffvhuff", {}, note="ffvhuff"),
    Case("png.mov", "png", {}, "rgb24", "png"),
]


def write_clean(case: Case, folder: Path) -> Path:
    """A moving pattern with noise, 128 x 96: no codec can leave a frame out."""
    path = folder / f"clean-{case.file}"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :128]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(case.codec, rate=25, options=case.options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, case.pix_fmt
        if case.codec == "mpeg4":
            stream.codec_context.codec_tag = "XVID"
        for index in range(NUM_FRAMES):
            waves = [
                96 + 80 * np.sin((x + shift * y) / 9 + index * speed)
                for shift, speed in ((0, 0.3), (1, 0.2), (-1, 0.4))
            ]
            picture = np.stack(waves, axis=-1) + rng.normal(0, 6, (96, 128, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def flipped(clean: Path, num_files: int, seed: int = 5) -> Iterator[Path]:
    """Copies with one bit flipped in the middle three fifths; each copy overwrites the one before."""
    data = clean.read_bytes()
    rng = random.Random(seed)
    path = clean.with_name(clean.name.removeprefix("clean-"))
    for _ in range(num_files):
        copy = bytearray(data)
        copy[rng.randrange(len(data) // 5, len(data) * 4 // 5)] ^= 1 << rng.randrange(8)
        path.write_bytes(copy)
        yield path


Timed = list[tuple[float, np.ndarray]]


def all_frames(path: Path) -> Timed:
    """Every frame that the decoder gives, damaged or not; what reading was before damage was looked for."""
    frames: Timed = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            if packet.is_corrupt:
                break
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                return []
            frames += [(frame.time, _small(frame)) for frame in decoded]
    start = frames[0][0] if frames else 0.0
    return [(time - start, pixels) for time, pixels in frames]


def _small(frame: Any) -> np.ndarray:
    return frame.reformat(width=64, height=48, format="rgb24", interpolation="AREA", threads=1).to_ndarray()


def whole_frames(path: Path, reading: Reading | None = None) -> Timed:
    """The frames that clipmill delivers."""
    try:
        return list(read_frames(path, probe(path), (48, 64), "stretch", reading=reading))
    except VideoError:
        return []


def num_damaged(frames: Timed, clean: Timed) -> int:
    """Frames that differ visibly from the clean ones shown at their times."""
    truth = {round(time * 1000): pixels for time, pixels in clean}
    return sum(
        np.abs(pixels.astype(int) - truth[round(time * 1000)]).mean() > VISIBLE_LEVELS
        for time, pixels in frames
        if round(time * 1000) in truth
    )


def main() -> None:
    """Prints the table of ``docs/formats.md``."""
    print("| container | codec | before | now | whole frames dropped |")
    print("|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            clean = write_clean(case, Path(folder))
            want_all, want = all_frames(clean), whole_frames(clean)
            before = now = dropped = 0
            for path in flipped(clean, NUM_FILES):
                raw, kept = all_frames(path), whole_frames(path)
                before += bool(num_damaged(raw, want_all))
                now += bool(num_damaged(kept, want))
                dropped += max(0, len(raw) - num_damaged(raw, want_all) - len(kept))
            share = dropped / (NUM_FILES * NUM_FRAMES)
            print(f"| {clean.suffix[1:]} | {case.name} | {before} | {now} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
