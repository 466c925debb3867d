"""Reading with decord, for ``data.decoder=decord``. Nothing else needs the package.

decord is imported only to read a file, because it loads its own FFmpeg into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import av
import numpy as np

from clipmill.errors import UserError
from clipmill.video.decoders.picture import Picture
from clipmill.video.errors import VideoError, as_video_error
from clipmill.video.probe import VideoInfo, open_video

__all__ = ["decord_version", "read_decord"]

_DISTRIBUTIONS = ("decord", "decord2")
"""Both provide the module ``decord``. decord has wheels for x86_64, decord2 has them for aarch64 too."""


def decord_version() -> dict[str, str]:
    """Name and version of the installed distribution, such as ``{"decord2": "3.4.0"}``.

    Raises:
        UserError: decord is not installed.
    """
    if util.find_spec("decord") is None:
        raise UserError(
            "data.decoder=decord needs the package decord (decord2 on aarch64), which is not installed; install it "
            "or set data.decoder=auto"
        )
    for name in _DISTRIBUTIONS:
        try:
            return {name: metadata.version(name)}
        except metadata.PackageNotFoundError:
            continue
    return {"decord": "unknown"}  # built from source, without metadata


def read_decord(path: str | Path, info: VideoInfo) -> Iterator[Picture]:
    """All frames by decord. It cannot report damage: it fails, or repeats the last good frame."""
    import decord  # imported here, because it loads its own FFmpeg

    decord.logging.set_level(decord.logging.ERROR)
    with as_video_error("cannot decode", path):
        times = _packet_times(path, info)  # exact: decord's own times are float32
        # With any tolerance for failures, decord would silently replace a failed frame by the last good one.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-6)
        if len(reader) != len(times):
            raise VideoError(f"decord counts {len(reader)} frames where the demuxer finds {len(times)}")
        for number, time in enumerate(times):
            pixels = reader.next().asnumpy()
            # For MP4 and MOV, decord itself turns frames upright, as FFmpeg 4.1 did. Undo it: the resizer does it for
            # all decoders.
            if info.rotation and info.container.startswith("mov"):
                pixels = np.ascontiguousarray(np.rot90(pixels, -info.rotation // 90))
            frame = av.VideoFrame.from_numpy_buffer(pixels, format="rgb24")
            geometry = info.geometry._replace(width=frame.width, height=frame.height)
            yield Picture(number, frame, time, geometry, begins_scene=False)


def _packet_times(path: str | Path, info: VideoInfo) -> list[float]:
    """Presentation times of all frames in seconds from the first one, ascending, without decoding."""
    ticks = []
    with open_video(path) as container:
        stream = container.streams[info.stream_index]
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError("damaged packets")
            if packet.pts is not None:
                ticks.append(packet.pts)
        ticks.sort()
        return [float((tick - ticks[0]) * stream.time_base) for tick in ticks]
