"""A folder of good videos of every kind, and of more than 200 files that do harm, all made from films drawn here.

Each `Specimen` says what has to become of its file. Damage at random places may or may not be seen by a decoder:
those specimens are judged by `tests.pipeline.judge`, which decodes them once more without any of the code under test.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np

NUM_FRAMES = 4
"""Frames of a clip."""
NUM_PLACES = 10
"""At which a file is cut off."""
FLIP_RATES = (0.0003, 0.002, 0.01, 0.05, 0.3)
"""Share of the bytes of a file in which one bit is turned over."""

Fate = Literal["clips", "short", "excluded", "judged", "unlisted"]
"""``judged``: by `judge`, and excluded for ``cause`` where that fails."""


@dataclass(frozen=True)
class Specimen:
    """One file of the corpus.

    Attributes:
        name: path relative to the source.
        kind: what was done to it; ``good`` for a film as it should be.
        fate: what has to become of it.
        cause: pattern of the cause for which it is excluded.
        num_frames: of a film whose frames are all there.
    """

    name: str
    kind: str
    fate: Fate
    cause: str = ""
    num_frames: int = 0


# ---------------------------------------------------------------------------------------------- films


class Film(NamedTuple):
    """How a film is written; ``num_frames`` frames of ``size`` (width, height)."""

    suffix: str
    codec: str
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (64, 48)
    num_frames: int = 20
    options: tuple[tuple[str, str], ...] = ()
    muxer: tuple[tuple[str, str], ...] = ()
    rotation: int = 0
    ticks: Callable[[int], int] = int
    """Presentation time of frame i, in frames."""


_FILMS = {
    "h264": Film("mp4", "libx264"),
    "b-frames": Film("mp4", "libx264", options=(("bf", "3"), ("g", "8"))),
    "faststart": Film("mp4", "libx264", options=(("bf", "0"),), muxer=(("movflags", "faststart"),)),
    "fragmented": Film("mp4", "libx264", muxer=(("movflags", "frag_keyframe+empty_moov"),)),
    "hevc": Film("mp4", "libx265", options=(("x265-params", "log-level=none:pools=none"),)),
    "vp8": Film("webm", "libvpx", options=(("deadline", "realtime"),)),
    "vp9": Film("webm", "libvpx-vp9", options=(("deadline", "realtime"),)),
    "av1": Film("mkv", "libsvtav1", options=(("preset", "12"),)),
    "mpeg4": Film("avi", "mpeg4"),
    "mjpeg": Film("avi", "mjpeg", pix_fmt="yuvj420p"),
    "gif": Film("gif", "gif", pix_fmt="rgb8"),
    "mkv": Film("mkv", "libx264"),
    "mov": Film("mov", "mpeg4"),
    "ts": Film("ts", "libx264"),
    "mpg": Film("mpg", "mpeg2video", options=(("b:v", "1M"),)),
    "flv": Film("flv", "libx264", options=(("bf", "0"),)),
    "wmv": Film("wmv", "wmv2"),
    "odd-size": Film("mp4", "libx264", pix_fmt="yuv444p", size=(61, 47)),
    "odd-size-420": Film("mkv", "mpeg4", size=(61, 47)),
    "one-pixel": Film("mkv", "ffv1", size=(1, 1), pix_fmt="yuv444p"),
    "ten-bit": Film("mkv", "ffv1", pix_fmt="yuv420p10le"),
    "vfr": Film("mp4", "libx264", ticks=lambda index: index * (index + 3) // 4),
    "vfr-mkv": Film("mkv", "libx264", ticks=lambda index: index + 5 * (index > 9)),
    "late": Film("mp4", "libx264", ticks=lambda index: index + 30),
    "no-cues": Film("mkv", "libx264", muxer=(("live", "1"),)),
    **{f"rotated-{angle}": Film("mp4", "libx264", rotation=angle) for angle in (90, 180, 270)},
}


def write_film(path: Path, film: Film, seed: int) -> None:
    """A square that moves over a slope, both given by the seed: the same bytes each time, so that damage can be done
    to them once more.
    """
    width, height = film.size
    options = dict(film.options)
    if film.codec == "libx264":
        options["x264-params"] = "mbtree=0"  # its result varies
    with av.open(str(path), "w", options={"fflags": "+bitexact", **dict(film.muxer)}) as container:
        stream = container.add_stream(film.codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, film.pix_fmt
        stream.codec_context.thread_count = 1
        if film.rotation:
            stream.set_display_rotation(film.rotation)
        for index in range(film.num_frames):
            pixels = np.empty((height, width, 3), np.uint8)
            pixels[:] = (np.arange(width)[:, None] * (1, 2, 3) + 20 + 7 * seed % 100).clip(0, 255)
            left, top = (3 * index + 5 * seed) % max(width - 16, 1), seed % max(height - 16, 1)
            pixels[top : top + 16, left : left + 16] = (200, (30 + 11 * seed) % 256, (90 + 3 * seed) % 256)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = film.ticks(index), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _film_bytes(film: Film, seed: int, folder: Path) -> bytes:
    path = folder / f".film.{film.suffix}"
    write_film(path, film, seed)
    data = path.read_bytes()
    path.unlink()
    return data


# --------------------------------------------------------------------------------------------- corpus


def write_poison(source: Path, *, seed: int = 0, num_good: int = 60) -> list[Specimen]:
    """Fills ``source/good`` and ``source/bad``.

    Args:
        source: the folder, new.
        seed: of the damage done at random places.
        num_good: plain good films, beside one of each kind.
    """
    (source / "good").mkdir(parents=True)
    (source / "bad").mkdir()
    return [*_good(source, num_good), *_bad(source, random.Random(seed))]


def _good(source: Path, num_plain: int) -> Iterator[Specimen]:
    for number, (name, film) in enumerate(_FILMS.items()):
        path = f"good/{name}.{film.suffix}"
        write_film(source / path, film, seed=number)
        yield Specimen(path, "good", "clips", num_frames=film.num_frames)
    for number in range(num_plain):
        film = Film("mp4", "libx264", size=(64 + number % 5 * 2, 48), num_frames=9 + number % 8)
        path = f"good/plain-{number:03d}.mp4"
        write_film(source / path, film, seed=100 + number)
        yield Specimen(path, "good", "clips", num_frames=film.num_frames)
    path = "good/mp4-named.avi"
    write_film(source / "good" / "x.mp4", _FILMS["h264"], seed=90)
    (source / "good" / "x.mp4").rename(source / path)
    yield Specimen(path, "good", "clips", num_frames=20)
    signed = _FILMS["mpeg4"]._replace(muxer=(("fflags", "+autobsf"),))  # not bit-exact: with its writer's name
    data = _film_bytes(signed, 92, source)
    assert b"Lavf" in data
    (source / "good" / "title.avi").write_bytes(data.replace(b"Lavf", b"\xc4\xf6\xfc\xdf"))  # no UTF-8
    yield Specimen("good/title.avi", "good", "clips", num_frames=20)
    path = "good/before-zero.mp4"  # an edit list that cuts what lies before zero
    _write_shifted(source / path, _film_bytes(_FILMS["b-frames"], 91, source), num_ticks=5)
    yield Specimen(path, "good", "clips", num_frames=15)


def _bad(source: Path, rng: random.Random) -> Iterator[Specimen]:
    def save(name: str, kind: str, fate: Fate, cause: str, data: bytes) -> Specimen:
        (source / "bad" / name).write_bytes(data)
        return Specimen(f"bad/{name}", kind, fate, cause)

    yield save("empty.mp4", "zero bytes", "excluded", "^the file is empty$", b"")
    for name, data in _no_videos(rng).items():
        yield save(name, "wrong extension", "excluded", _NO_VIDEO, data)
    for suffix, codec in (("mp4", "aac"), ("mkv", "flac"), ("avi", "pcm_s16le"), ("mov", "aac"), ("webm", "libopus")):
        _write_sound(source / "bad" / f"sound.{suffix}", codec)
        yield Specimen(f"bad/sound.{suffix}", "audio only", "excluded", r"^no video stream \(found: audio\)$")
    for number, name in enumerate(("h264", "mpeg4", "mjpeg", "vp9", "gif")):
        film = _FILMS[name]._replace(num_frames=1)
        yield save(f"one-{name}.{film.suffix}", "one frame", "short", "", _film_bytes(film, 300 + number, source))
    for name, kind, data in (*_cut_off(source), *_flipped(source, rng), *_unordered(source, rng)):
        yield save(name, kind, "judged", _DAMAGE, data)
    for name, data in _without_index(source).items():
        yield save(name, "missing index", "judged", "^cannot open: Invalid data|^no decoder knows the codec", data)
    for name, cause, data in _huge(source):
        yield save(name, "promise of gigabytes", "excluded", cause, data)
    yield save("endless.gif", "decoder at work for ever", "excluded", "^CPU time limit reached$", _endless_gif())
    os.mkfifo(source / "bad" / "pipe.mp4")
    yield Specimen("bad/pipe.mp4", "a FIFO that never ends", "unlisted")
    (source / "bad" / "folder.mp4").mkdir()
    yield Specimen("bad/folder.mp4", "a folder", "unlisted")
    (source / "bad" / "gone.mp4").symlink_to("nowhere.mp4")
    yield Specimen("bad/gone.mp4", "a link to nothing", "unlisted")
    (source / "bad" / "up").symlink_to("..")
    yield Specimen("bad/up", "a link to the folder above", "unlisted")
    (source / "bad" / "itself.mp4").symlink_to("itself.mp4")
    yield Specimen("bad/itself.mp4", "a link to itself", "unlisted")
    (source / "bad" / "zeros.mp4").symlink_to("/dev/zero")
    yield Specimen("bad/zeros.mp4", "a device", "unlisted")


_NO_VIDEO = (
    "^cannot open: (Invalid data|End of file|Operation not permitted|cannot identify image file|not in a video format)|"
    "^no video stream|^cannot decode the first frame: Invalid data"
)
_DAMAGE = (
    "^cannot (open|decode|decode the first frame): |^the video stream holds no frame$|^no frame could be decoded$|"
    "^no video stream|^no decoder knows the codec|^memory limit reached$|^all [0-9]+ frames are damaged"
)

Series = Iterator[tuple[str, str, bytes]]
"""(name, kind, content)."""


def _cut_off(source: Path) -> Series:
    for number, name in enumerate(("h264", "faststart", "fragmented", "mkv", "vp9", "mpeg4", "ts", "gif", "flv")):
        film = _FILMS[name]
        data = _film_bytes(film, 400 + number, source)
        for place in range(NUM_PLACES):
            start = 40 + number  # of another length for each, else some would be the same file
            cut = start + place * (len(data) - 1 - start) // (NUM_PLACES - 1)
            yield f"cut-{name}-{place}.{film.suffix}", "truncated", data[:cut]


def _flipped(source: Path, rng: random.Random) -> Series:
    for number, name in enumerate(("h264", "b-frames", "hevc", "vp9", "mkv", "mpeg4", "mjpeg", "ts", "gif", "flv")):
        film = _FILMS[name]
        for rate, again in itertools.product(FLIP_RATES, range(2)):
            data = bytearray(_film_bytes(film, 500 + 10 * number + again, source))
            for position in rng.sample(range(len(data)), max(1, int(rate * len(data)))):
                data[position] ^= 1 << rng.randrange(8)
            yield f"flip-{name}-{rate}-{again}.{film.suffix}", "bit flips", bytes(data)


def _unordered(source: Path, rng: random.Random) -> Series:
    """FLV and MPEG-TS are sequences of tags and packets: any order can be written."""
    for number in range(4):
        every_frame_a_key = (("g", "1"), ("bf", "0")) if number % 2 else (("bf", "0"),)
        data = _film_bytes(_FILMS["flv"]._replace(options=every_frame_a_key), 600 + number, source)
        tags = _flv_tags(data)
        head, body = tags[:3], tags[3:]  # meta data, codec header, first key frame
        rng.shuffle(body)
        yield f"unordered-{number}.flv", "unordered packets", data[:13] + b"".join(head + body)
        data = _film_bytes(_FILMS["ts"], 610 + number, source)
        packets = [data[start : start + 188] for start in range(0, len(data), 188)]
        body = packets[3:]
        rng.shuffle(body)
        yield f"unordered-{number}.ts", "unordered packets", b"".join(packets[:3] + body)


def _flv_tags(data: bytes) -> list[bytes]:
    tags, start = [], 13
    while start < len(data):
        end = start + 11 + int.from_bytes(data[start + 1 : start + 4], "big") + 4
        tags.append(data[start:end])
        start = end
    return tags


def _without_index(source: Path) -> dict[str, bytes]:
    mp4 = _film_bytes(_FILMS["h264"], 700, source)
    avi = _film_bytes(_FILMS["mpeg4"], 701, source)
    mkv = _film_bytes(_FILMS["mkv"], 702, source)
    return {
        "no-moov.mp4": mp4.replace(b"moov", b"free"),
        "no-stbl.mp4": mp4.replace(b"stbl", b"free"),
        "no-idx1.avi": avi[: avi.index(b"idx1")],
        "junk-idx1.avi": avi.replace(b"idx1", b"JUNK"),
        "no-cues.mkv": mkv.replace(b"\x1c\x53\xbb\x6b", b"\xec\x53\xbb\x6b"),
    }


def _no_videos(rng: random.Random) -> dict[str, bytes]:
    still = _still("image2pipe", "png", "rgb24", 32)
    return {
        "text.mp4": b"this is no video\n" * 50,
        "page.webm": b"<!doctype html><html><body>404 Not Found</body></html>\n" * 20,
        "error.mp4": b'{"error": {"code": 403, "message": "quota exceeded"}}',
        "random.mkv": rng.randbytes(5000),
        "random.mp4": rng.randbytes(70_000),
        "zeros.avi": bytes(4096),
        "archive.mov": b"PK\x03\x04" + rng.randbytes(3000),
        "program.mpg": b"\x7fELF" + rng.randbytes(3000),
        "playlist.ts": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXTINF:10,\nfile:///etc/passwd\n",
        "list.mp4": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        "letter.gif": b"GIF89a",
        "brand.mp4": struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0),
        "index-only.mp4": struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4s", 8, b"moov"),
        "bombastic.mp4": struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4sQ", 1, b"moov", 2**62),
        "picture-cut.mov": still[:40],
    }


def _still(muxer: str, codec: str, pixel_format: str, side: int) -> bytes:
    """A file of one black square."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = side, side, pixel_format
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _huge(source: Path) -> Iterator[tuple[str, str, bytes]]:
    """Tiny files that promise large pictures (FFmpeg itself refuses those of 16,384 x 16,384) and large samples."""
    for side, cause in (
        (16000, "^memory limit reached$"),
        (16384, "^cannot decode the first frame: Invalid argument$"),
    ):
        gif = bytearray(_film_bytes(_FILMS["gif"], 800 + side, source))
        gif[6:10] = struct.pack("<HH", side, side)
        yield f"huge-{side}.gif", cause, bytes(gif)
    jpeg = _film_bytes(_FILMS["mjpeg"], 801, source)
    head = struct.Struct(">2sHBHH")  # of a frame: mark, length, bits, height, width
    small, large = head.pack(b"\xff\xc0", 17, 8, 48, 64), head.pack(b"\xff\xc0", 17, 8, 16384, 16384)
    assert small in jpeg
    yield "huge.avi", "^cannot decode the first frame: Invalid data", jpeg.replace(small, large)
    mp4 = bytearray(_film_bytes(_FILMS["h264"], 802, source))
    first_size = mp4.index(b"stsz") + 16  # after the box's name, its version, the size of all and their number
    mp4[first_size] |= 1 << 5
    yield "huge-sample.mp4", "^memory limit reached$", bytes(mp4)


def _endless_gif() -> bytes:
    """Megapixel frames of two kilobytes each. The first ones promise a slide show, then thousands come at once."""
    data = _still("gif", "gif", "rgb8", 1024)
    start = data.index(b"\x21\xf9")  # the graphic control extension of the only frame; its delay stands 4 bytes on
    slow, fast = (data[start : start + 4] + delay.to_bytes(2, "little") + data[start + 6 : -1] for delay in (65535, 10))
    return data[:start] + slow * 130 + fast * 6000 + data[-1:]


def _write_sound(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono")
        size = stream.codec_context.frame_size or 960
        for index in range(20):
            layout = stream.codec_context.format.name
            silence = np.zeros((1, size), np.float32 if layout.startswith("flt") else np.int16)
            frame = av.AudioFrame.from_ndarray(silence, format=layout, layout="mono")
            frame.sample_rate, frame.pts = 48_000, index * size
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_shifted(path: Path, data: bytes, num_ticks: int) -> None:
    """Remuxes with all times earlier by so many frames."""
    options = {"avoid_negative_ts": "disabled"}
    with av.open(io.BytesIO(data)) as reading, av.open(str(path), "w", options=options) as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        for packet in reading.demux(stream):
            if packet.dts is None:
                continue
            ticks = round(Fraction(num_ticks, 10) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
            writing.mux(packet)
