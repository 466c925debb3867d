"""Small marked videos, and ten ways to damage them.

Every frame states its video and its number in black and white blocks that survive any codec, so a clip tells where its
frames come from, whatever a tool names it. Videos are 128 x 128, 16 frames a second, with a key frame each second, and
last whole seconds. So a clip of 16 frames is one second, and a tool that cuts by seconds or at key frames can make the
same clips as one that counts frames.
"""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

__all__ = ["CLIP_FRAMES", "DAMAGES", "SIDE", "Footage", "decode", "read_mark"]

CLIP_FRAMES = 16
FPS = 16
SOURCE_SIDE = 128
SIDE = 64
"""Height and width of a clip in pixels."""

_VIDEO_BITS, _FRAME_BITS = 9, 7
_BLOCKS_PER_ROW = 8
_BLOCK = SIDE // _BLOCKS_PER_ROW


class Footage:
    """A folder of videos, of which some are damaged; those that the same numbers made before are used again.

    Attributes:
        folder: what the tools read: ``0000.mp4``, ``0001.mp4``, ...; ``seconds.json`` beside it says how long each is.
        few: a folder of two intact videos.
        damage_of: the kind of damage of each damaged video.
    """

    def __init__(self, root: Path, num_videos: int, num_damaged: int, seed: int) -> None:
        draw = random.Random(seed)
        self.folder = root / "videos"
        self._intact = root / "intact"  # damaged videos before the damage: the reference of what tools make of them
        self.num_clips_of = [draw.choice((2, 3, 4)) for _ in range(num_videos)]
        kinds = [list(DAMAGES)[number % len(DAMAGES)] for number in range(num_damaged)]
        self.damage_of = dict(zip(sorted(draw.sample(range(num_videos), num_damaged)), kinds, strict=True))
        recipe = {"videos": num_videos, "damaged": num_damaged, "seed": seed}
        made = root / "recipe.json"
        if not made.exists():
            self._write(draw)
            made.write_text(json.dumps(recipe))
        elif json.loads(made.read_text()) != recipe:
            raise SystemExit(f"{root} holds videos of {made.read_text()}; use another folder or remove it")
        self.few = self.without(list(DAMAGES), root / "few", num_intact=2)

    def without(self, kinds: list[str], root: Path, num_intact: int | None = None) -> Path:
        """Copies all but the videos with such damage to a folder, and at most this number of intact ones."""
        intact = [video for video in range(len(self.num_clips_of)) if video not in self.damage_of]
        damaged = [video for video, kind in self.damage_of.items() if kind not in kinds]
        shutil.rmtree(root, ignore_errors=True)
        folder = root / "videos"
        folder.mkdir(parents=True)
        for video in intact[:num_intact] + damaged:
            shutil.copy(self.folder / f"{video:04d}.mp4", folder)
        shutil.copy(self.folder.parent / "seconds.json", root)
        return folder

    def _write(self, draw: random.Random) -> None:
        for folder in (self.folder, self._intact):
            folder.mkdir(parents=True)
        for video, num_clips in enumerate(self.num_clips_of):
            kind = self.damage_of.get(video)
            path = (self.folder if kind is None else self._intact) / f"{video:04d}.mp4"
            _encode(path, video, num_clips * CLIP_FRAMES)
            if kind is not None:
                (self.folder / path.name).write_bytes(DAMAGES[kind](path.read_bytes(), draw))
        lengths = {f"{video:04d}.mp4": num_clips for video, num_clips in enumerate(self.num_clips_of)}
        (self.folder.parent / "seconds.json").write_text(json.dumps(lengths))

    def expected(self) -> set[tuple[int, int]]:
        """(video, first frame) of each clip that the intact videos hold."""
        return {
            (video, clip * CLIP_FRAMES)
            for video, num_clips in enumerate(self.num_clips_of)
            if video not in self.damage_of
            for clip in range(num_clips)
        }

    @functools.cache  # noqa: B019 (one footage a process; every clip asks for the frames of its video)
    def frames(self, video: int) -> np.ndarray:
        """All frames of a video before any damage: uint8 [T, SIDE, SIDE, 3], area-averaged."""
        folder = self._intact if video in self.damage_of else self.folder
        return decode((folder / f"{video:04d}.mp4").read_bytes())


# -------------------------------------------------------------------------------------------------- pictures and marks


def _draw_frame(video: int, frame: int) -> np.ndarray:
    """uint8 [SOURCE_SIDE, SOURCE_SIDE, 3]: the mark above, a moving wave in a colour of the video below."""
    bits = [(video << _FRAME_BITS | frame) >> bit & 1 for bit in range(_VIDEO_BITS + _FRAME_BITS)]
    # Each bit is drawn twice, the second time inverted, so that a damaged mark is not read as another one.
    blocks = np.array(bits + [1 - bit for bit in bits]).reshape(-1, _BLOCKS_PER_ROW)
    mark = np.kron(blocks, np.full((SOURCE_SIDE // _BLOCKS_PER_ROW,) * 2, 255))
    columns = np.arange(SOURCE_SIDE, dtype=np.float32)
    rows = columns[len(mark) :, None]
    wave = 128 + 100 * np.sin((columns + 2 * frame) / (7 + video % 11) + rows / 20)  # [SOURCE_SIDE / 2, SOURCE_SIDE]
    colour = np.array([1, (video % 7) / 7, (video % 5) / 5], np.float32)
    picture = np.concatenate([np.repeat(mark[..., None], 3, axis=2), wave[..., None] * colour])
    return picture.clip(0, 255).astype(np.uint8)


def read_mark(frame: np.ndarray) -> tuple[int, int] | None:
    """(video, frame number) of a frame, uint8 [SIDE, SIDE, 3]; None where the mark is damaged."""
    grey = frame.mean(axis=2)
    num_rows = 2 * (_VIDEO_BITS + _FRAME_BITS) // _BLOCKS_PER_ROW
    blocks = grey[: num_rows * _BLOCK].reshape(num_rows, _BLOCK, _BLOCKS_PER_ROW, _BLOCK).mean(axis=(1, 3)).ravel()
    bits, inverted = np.split(blocks > 128, 2)
    if (bits == inverted).any():
        return None
    number = sum(1 << place for place, bit in enumerate(bits) if bit)
    return number >> _FRAME_BITS, number & (1 << _FRAME_BITS) - 1


def _encode(path: Path, video: int, num_frames: int) -> None:
    # The header comes first: a file that is cut can then be read up to the cut.
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        options = {"preset": "ultrafast", "crf": "18", "g": str(FPS), "bf": "0", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SOURCE_SIDE, SOURCE_SIDE, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(_draw_frame(video, number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode(data: bytes) -> np.ndarray:
    """All frames of a video file: uint8 [T, SIDE, SIDE, 3], each block of pixels averaged.

    Raises:
        av.FFmpegError: the file cannot be decoded.
        ValueError: it has no frames, or a size that is no multiple of SIDE.
    """
    with av.open(io.BytesIO(data)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    num_frames, height, width, _ = frames.shape
    if height != width or height % SIDE:
        raise ValueError(f"frames of {height} x {width}")
    blocks = frames.reshape(num_frames, SIDE, height // SIDE, SIDE, width // SIDE, 3)
    return np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- damages


def _flipped(data: bytes, start: int, end: int, num_bits: int, draw: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(num_bits):
        flipped[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _media(data: bytes) -> int:
    """Where the frames begin, behind the header."""
    return data.index(b"mdat")


def _zeroed(data: bytes, draw: random.Random) -> bytes:
    third = (len(data) - _media(data)) // 3
    return data[: -2 * third] + bytes(third) + data[-third:]


def _promising(data: bytes, draw: random.Random) -> bytes:
    """The table of sample sizes claims 2^30 entries: a reader that believes it allocates 4 GiB."""
    place = data.index(b"stsz") + 12
    return data[:place] + struct.pack(">I", 1 << 30) + data[place + 4 :]


def _picture(data: bytes, draw: random.Random) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = SOURCE_SIDE, SOURCE_SIDE, "rgb24"
    encoder.time_base = Fraction(1, FPS)
    frame = av.VideoFrame.from_ndarray(np.zeros((SOURCE_SIDE, SOURCE_SIDE, 3), np.uint8), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut in the middle": lambda data, draw: data[: len(data) // 2],
    "cut in the header": lambda data, draw: data[: _media(data) // 2],
    "bits flipped in the header": lambda data, draw: _flipped(data, 40, _media(data), 40, draw),
    "bits flipped in the frames": lambda data, draw: _flipped(data, _media(data) + 8, len(data), 60, draw),
    "a third of the frames zeroed": _zeroed,
    "header promises gigabytes": _promising,
    "text": lambda data, draw: b"<html><body>404 Not Found</body></html>\n" * 100,
    "empty": lambda data, draw: b"",
    "random bytes": lambda data, draw: draw.randbytes(len(data)),
    "a picture": _picture,
}
"""From the bytes of an intact video to those of a damaged one."""
