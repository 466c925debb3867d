"""Videos in many containers and codecs whose frames carry their numbers, and what the clip rule makes of each.

The truth is known from how a file was written, not from a decoder: which numbers it shows, and when. ``expected``
states the clip rule a second time, slowly. ``python -m tests.video.variants`` prints the table of ``docs/formats.md``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from clipmill.config import ClipConfig
from clipmill.video import BadVideo, Decoder, Limits, probe
from tests.video.conftest import make_edited, make_video, read_barcode, state_display_width, state_pixel_aspect

NUM_FRAMES = 40
RULES = {
    "stride": ClipConfig(num_frames=5, frame_stride=2, clip_stride=7, resolution=64, fit="stretch"),
    "slower": ClipConfig(num_frames=3, fps=4, clip_stride=2, resolution=64, fit="stretch"),
    "faster": ClipConfig(num_frames=6, fps=30, clip_stride=5, resolution=64, fit="stretch"),
}
MATRICES = {
    "mirrored": (-1, 0, 0, 1),
    "upside down mirrored": (1, 0, 0, -1),
    "turned 90": (0, -1, 1, 0),
    "turned 180": (-1, 0, 0, -1),
    "turned 270": (0, 1, -1, 0),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}
VFR_TICKS = np.cumsum([0, *([1, 1, 3, 1, 7, 2] * 10)])[:NUM_FRAMES].tolist()
X265 = {"preset": "ultrafast", "x265-params": "log-level=none"}
VP9 = {"deadline": "realtime", "cpu-used": "8"}
AV1 = {"preset": "10", "crf": "10"}


@dataclass(frozen=True)
class Variant:
    """One file.

    Attributes:
        name: what is special about it.
        file: its name, whose ending chooses the container.
        codec: encoder.
        decoder: ``decord`` where that reads it right too.
        fast: whether it is one of those that every test run tries.
        options: for `make_video`.
        remake: turns the file that was written into the variant.
        numbers: of the frames that it shows.
        shown: width over height as a player shows it; None for that of the stored frames.
    """

    name: str
    file: str
    codec: str
    decoder: str = "pyav"
    fast: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    remake: Callable[[Path, Path], Path] | None = None
    numbers: Sequence[int] = range(NUM_FRAMES)
    shown: float | None = None

    def write(self, folder: Path) -> Path:
        """Makes the file."""
        if self.remake is None:
            return make_video(folder / self.file, self.codec, **self.options)
        ending = "webm" if self.codec == "libvpx" else "mp4"
        whole = make_video(folder / f"whole-{self.file}.{ending}", self.codec, **self.options)
        return self.remake(folder / self.file, whole)

    def times(self) -> list[float]:
        """When each frame is shown."""
        ticks = self.options.get("pts", range(NUM_FRAMES))
        return [ticks[number] / self.fps for number in self.numbers]

    @property
    def fps(self) -> int:
        """Frames or, with variable rate, ticks a second."""
        return self.options.get("fps", 10)


def _edited(path: Path, whole: Path) -> Path:
    return make_edited(path, whole, shift_seconds=1.0)


def _copy_packets(path: Path, whole: Path, shift_seconds: float = 0, first_packet: int = 0) -> Path:
    """Remuxes from a packet on, with other times."""
    with av.open(str(whole)) as reading, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        packets = [packet for packet in reading.demux(stream) if packet.dts is not None]
        for packet in packets[first_packet:]:
            ticks = round(shift_seconds / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, copy
            writing.mux(packet)
    return path


def _late(path: Path, whole: Path) -> Path:
    return _copy_packets(path, whole, shift_seconds=95_000.0)


def _early(path: Path, whole: Path) -> Path:
    return _copy_packets(path, whole, shift_seconds=-1.5)


def _with_sound(path: Path, whole: Path) -> Path:
    """Adds a sound track that is longer than the pictures."""
    with av.open(str(whole)) as reading, av.open(str(path), "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        sound = writing.add_stream("aac", rate=16_000, layout="mono")
        for start in range(0, 96_000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            writing.mux(sound.encode(frame))
        writing.mux(sound.encode())
        for packet in reading.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                writing.mux(packet)
    return path


def _wide_webm(path: Path, whole: Path) -> Path:
    path.write_bytes(whole.read_bytes())
    state_display_width(path, 128)
    return path


def _wide_mp4(path: Path, whole: Path) -> Path:
    path.write_bytes(whole.read_bytes())
    state_pixel_aspect(path, 4, 3)
    return path


def _v(name: str, file: str, codec: str, decoder: str = "pyav", *, fast: bool = False, **options: Any) -> Variant:
    return Variant(name, file, codec, decoder, fast, options)


VARIANTS = [
    _v("h264", "h264.mp4", "libx264", "decord", fast=True),
    _v("h264, B-frames, open GOP", "open.mp4", "libx264", "decord", fast=True,
       options={"bf": "3", "x264-params": "open-gop=1:keyint=12"}),
    _v("h264, fragmented", "fragmented.mp4", "libx264", options={"g": "10"},
       container_options={"movflags": "frag_keyframe+empty_moov"}),
    _v("h264, index behind the data", "behind.mov", "libx264", "decord"),
    _v("h264, variable rate", "variable.mp4", "libx264", "decord", fast=True, pts=VFR_TICKS),
    _v("h264, variable rate", "variable.mkv", "libx264", "decord", pts=VFR_TICKS),
    _v("h264, rotated 90", "turned90.mp4", "libx264", "decord", fast=True, rotation=90),
    _v("h264, rotated 180", "turned180.mp4", "libx264", "decord", rotation=180),
    _v("h264, rotated 270", "turned270.mov", "libx264", "decord", rotation=-90),
    *(
        Variant(f"h264, {name}", f"{name.replace(' ', '')}.{ending}", codec, fast=fast, options={"matrix": matrix},
                shown=2 / 3 if matrix[0] == 0 else 3 / 2)
        for ending, codec, fast in (("mp4", "libx264", True), ("mov", "mpeg4", False), ("mkv", "libvpx", False))
        for name, matrix in MATRICES.items()
    ),
    *(
        Variant(f"{codec.removeprefix('lib')}, pixels 4:3", f"wide.{ending}", codec, fast=True, shown=2.0,
                options={"sample_aspect": Fraction(4, 3)})
        for ending, codec in (("mp4", "libx264"), ("mov", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"),
                              ("ts", "libx264"), ("mp4", "libvpx-vp9"))
    ),
    Variant("mpeg-2, pixels 64:45", "wide.mpg", "mpeg2video", fast=True, shown=16 / 9,
            options={"sample_aspect": Fraction(64, 45), "size": (360, 288), "fps": 25}),
    Variant("vp8, pixels 4:3 by the container", "aspect.webm", "libvpx", fast=True, remake=_wide_webm, shown=2.0),
    Variant("h264, pixels 4:3 by the container, 1:1 by the codec", "aspect.mp4", "libx264", fast=True,
            options={"sample_aspect": Fraction(1)}, remake=_wide_mp4, shown=2.0),
    _v("h264, 10 bit", "ten.mp4", "libx264", pix_fmt="yuv420p10le"),
    _v("h264, odd size, 4:4:4", "odd.mp4", "libx264", size=(97, 63), pix_fmt="yuv444p"),
    _v("h264, interlaced", "interlaced.mp4", "libx264", fast=True,
       options={"flags": "+ildct+ilme", "x264-params": "tff=1"}),
    _v("h264, 720 x 480", "large.mp4", "libx264", size=(720, 480), options={"preset": "ultrafast"}),
    _v("h264", "h264.mkv", "libx264", "decord"),
    _v("h264", "h264.avi", "libx264", options={"bf": "0"}),
    _v("h264, B-frames", "b.avi", "libx264", fast=True, options={"bf": "2"}),
    _v("h264", "h264.ts", "libx264", fast=True),
    _v("h264", "h264.m2ts", "libx264"),
    _v("h264", "h264.flv", "libx264"),
    Variant("h264, edit list", "edited.mp4", "libx264", fast=True, remake=_edited, numbers=range(10, NUM_FRAMES)),
    Variant("h264, edit list, closed GOP", "edited.mov", "libx264", options={"options": {"bf": "0", "g": "8"}},
            remake=_edited, numbers=range(10, NUM_FRAMES)),
    Variant("h264, longer sound", "sound.mp4", "libx264", "decord", remake=_with_sound),
    Variant("h264, times from 95,000 s", "late.mkv", "libx264", remake=_late),
    Variant("h264, times from 95,000 s (clock wraps)", "late.ts", "libx264", remake=_late),
    Variant("h264, begins inside (closed GOP)", "inside.ts", "libx264", options={"options": {"bf": "0", "g": "8"}},
            remake=lambda path, whole: _copy_packets(path, whole, first_packet=16), numbers=range(16, NUM_FRAMES)),
    _v("h264, two video streams", "two.mp4", "libx264", num_streams=2),
    _v("hevc", "hevc.mp4", "libx265", options=X265),
    _v("hevc, 10 bit", "hevc10.mkv", "libx265", fast=True, pix_fmt="yuv420p10le", options=X265),
    _v("hevc, open GOP", "hevc.mov", "libx265",
       options={**X265, "x265-params": "log-level=none:open-gop=1:keyint=12:bframes=3"}),
    _v("hevc", "hevc.ts", "libx265", options=X265),
    _v("vp8", "vp8.webm", "libvpx", "decord", fast=True),
    _v("vp9", "vp9.webm", "libvpx-vp9", "decord", options=VP9),
    _v("vp9, odd size", "vp9.mp4", "libvpx-vp9", "decord", size=(97, 63), options=VP9),
    _v("vp9, variable rate", "vp9.mkv", "libvpx-vp9", "decord", options=VP9, pts=VFR_TICKS),
    _v("av1", "av1.mp4", "libsvtav1", fast=True, options=AV1),
    _v("av1, 10 bit", "av1.webm", "libsvtav1", pix_fmt="yuv420p10le", options=AV1),
    _v("mpeg-4", "mpeg4.mp4", "mpeg4", "decord"),
    _v("mpeg-4, B-frames (XVID)", "xvid.avi", "mpeg4", fast=True, tag="XVID", options={"bf": "2"}),
    _v("mpeg-4, rotated 90", "turned.mkv", "mpeg4", "decord", rotation=90),
    _v("mjpeg", "mjpeg.avi", "mjpeg", pix_fmt="yuvj420p"),
    _v("mjpeg, odd size", "mjpeg.mov", "mjpeg", "decord", size=(97, 63), pix_fmt="yuvj420p"),
    _v("wmv2", "wmv2.wmv", "wmv2", fast=True),
    _v("wmv2", "wmv2.avi", "wmv2"),
    _v("flv1", "flv1.flv", "flv"),
    _v("gif, odd size", "gif.gif", "gif", fast=True, pix_fmt="rgb8", size=(97, 63)),
    _v("mpeg-1", "mpeg1.mpg", "mpeg1video", fps=25),
    _v("mpeg-2, B-frames", "mpeg2.mpg", "mpeg2video", fast=True, fps=25, options={"bf": "2"}),
    _v("mpeg-2, interlaced", "mpeg2.ts", "mpeg2video", fps=25, options={"flags": "+ildct+ilme"}),
    _v("mpeg-2, B-frames", "mpeg2.mkv", "mpeg2video", fps=25, options={"bf": "2"}),
    _v("prores, 10 bit 4:2:2", "prores.mov", "prores_ks", pix_fmt="yuv422p10le"),
    _v("ffv1, 4:4:4", "ffv1.mkv", "ffv1", pix_fmt="yuv444p"),
    _v("huffyuv", "huffyuv.avi", "huffyuv", pix_fmt="yuv422p"),
]  # fmt: skip


def expected(times: Sequence[float], numbers: Sequence[int], clip: ClipConfig, last_seconds: float) -> list[list[int]]:
    """The frame numbers of each clip, by the clip rule."""
    if clip.fps is None:
        shown = list(numbers)
    else:
        length = times[-1] + last_seconds - times[0]
        ticks = [k / clip.fps for k in range(10_000) if k / clip.fps < length - 0.001]
        shown = [max(n for t, n in zip(times, numbers, strict=True) if t - times[0] <= tick + 0.001) for tick in ticks]
    starts = range(0, len(shown) - clip.span + 1, clip.step)
    return [shown[start : start + clip.span : clip.frame_stride] for start in starts]


def found(decoder: Decoder, path: Path, clip: ClipConfig, choice: Any, variant: Variant) -> list[list[int]]:
    """The numbers that are to be read in the pictures of each clip, once these lie as they are stored."""
    clips = decoder.clips(path, clip, choice, encode=("npy", None))
    return [[read_barcode(_as_stored(frame, variant)) for frame in clip.data] for clip in clips]


def _as_stored(frame: np.ndarray, variant: Variant) -> np.ndarray:
    a, b, c, d = variant.options.get("matrix", (1, 0, 0, 1))
    if a + c < 0:
        frame = frame[:, ::-1]
    if b + d < 0:
        frame = frame[::-1]
    if a == 0:
        frame = frame.transpose(1, 0, 2)
    return np.rot90(frame, -variant.options.get("rotation", 0) // 90)


def check(decoder: Decoder, variant: Variant, path: Path, choice: str) -> list[str]:
    """How the clips of a file differ from the rule; nothing: they are right."""
    info = probe(path)
    wrong = []
    height, width = info.geometry.shown_size
    if variant.shown is not None and abs(width / height / variant.shown - 1) > 0.02:
        wrong.append(f"shown at {width:g} x {height:g}")
    for name, clip in RULES.items():
        want = expected(variant.times(), variant.numbers, clip, 1 / info.fps)
        try:
            have = found(decoder, path, clip, choice, variant)
        except BadVideo as bad:
            return [f"{name}: {bad.cause}"]
        if have != want:
            wrong.append(f"{name}: {have} instead of {want}")
        assert decoder.outcome is not None
        if decoder.outcome.truncated:
            wrong.append(f"{name}: called truncated")
    return wrong


def main() -> int:
    """Prints the table, one row a variant; the status is the number of variants that are read wrong."""
    num_wrong = 0
    print("| container | video | clips | `auto` | `decord` | `pyav` |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Decoder(Limits(300, 2**32, 60)) as decoder:
        for variant in VARIANTS:
            path = variant.write(Path(folder))
            info = probe(path)
            num_clips = sum(
                len(expected(variant.times(), variant.numbers, clip, 1 / info.fps)) for clip in RULES.values()
            )
            words = []
            for choice in ("auto", "decord", "pyav"):
                wrong = check(decoder, variant, path, choice)
                for line in wrong:
                    print(variant.file, choice, line, file=sys.stderr)
                num_wrong += bool(wrong)
                took_over = choice == "decord" and decoder.outcome is not None and decoder.outcome.attempts
                words.append("WRONG" if wrong else "right, by PyAV" if took_over else "right")
            print(f"| {path.suffix[1:]} | {variant.name} | {num_clips} | {' | '.join(words)} |")
    return num_wrong


if __name__ == "__main__":
    sys.exit(main())
