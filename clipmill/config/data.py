"""Section ``data``: raw videos become clip shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from clipmill.config.section import FREE, PLACE, PositiveInt, Section
from clipmill.config.source import SourceConfig

__all__ = ["ClipConfig", "DataConfig", "MixPart", "Resolution", "frame_size"]


def frame_size(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels of a resolution, as a config or a recipe states it: ``64`` or ``[36, 64]``."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return height, width


def _one_form(value: Any) -> Any:
    """Turns an equal pair into a number, so that equal sizes have equal identities."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(type(pixels) is int and pixels > 0 for pixels in pair):
        raise ValueError("must be a number of pixels such as 64, or [height, width] such as [36, 64]")
    height, width = pair
    return height if height == width else (height, width)


Resolution = Annotated[int | tuple[int, int], BeforeValidator(_one_form)]
"""Side of a square, or (height, width), in pixels."""

GreyLevels = Annotated[float, Field(ge=0, le=255)]
"""A level, or a difference of levels, of 8-bit colour channels."""


class ClipConfig(Section):
    """Which frames become a clip, and at which size."""

    num_frames: PositiveInt = 16
    """Frames of a clip."""
    frame_stride: PositiveInt = 1
    """Take every n-th frame of the video (native frame rate, presentation order)."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second of the clips: the video is resampled by its timestamps. Excludes ``frame_stride``."""
    clip_stride: PositiveInt | None = None
    """Frames between the starts of two clips, counted in the video, or in the resampled one where ``fps`` is set. None:
    clips do not overlap."""
    max_clips_per_video: PositiveInt | None = None
    """Keep this number of clips, the first ones that are not rejected; None keeps all."""
    scene_cut: GreyLevels | None = None
    """A frame whose mean absolute difference from the one before exceeds this begins a scene; no clip spans two scenes.
    30 finds most hard cuts. None finds no cuts."""
    reject_static: GreyLevels | None = None
    """Drops clips whose mean frame-to-frame difference is below this. 1 drops still pictures."""
    reject_black: GreyLevels | None = None
    """Drops clips whose brightest frame has a mean below this. 10 drops black clips."""
    min_seconds: Annotated[float, Field(ge=0)] | None = None
    """Skips videos that are shorter; a span of a file counts as a video."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Skips videos that are longer."""
    min_height: PositiveInt | None = None
    """Skips videos that a player shows with fewer rows of pixels."""
    min_width: PositiveInt | None = None
    """Skips videos that a player shows with fewer columns of pixels."""
    min_fps: Annotated[float, Field(gt=0)] | None = None
    """Skips videos with fewer frames per second."""
    max_fps: Annotated[float, Field(gt=0)] | None = None
    """Skips videos with more frames per second."""
    resolution: Resolution = 64
    """Size of a clip in pixels: ``64`` for 64 x 64, ``[36, 64]`` for height 36 and width 64."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How a video of another shape becomes a clip of this size. ``crop``: scale it until it covers the clip, crop the
    centre. ``pad``: scale it until it fits inside, pad with black. ``stretch``: scale height and width separately."""
    views_per_clip: PositiveInt = 1
    """Above 1, each clip is stored this number of times: random crops from frames resized to 8/7 of the resolution."""
    flip_views: bool = True
    """Mirror half of these views, at random. Switch it off where labels or actions know left from right."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fps is not None and self.frame_stride != 1:
            raise ValueError("fps and frame_stride exclude each other; remove one")
        if self.views_per_clip > 1 and self.fit != "crop":
            raise ValueError("views_per_clip above 1 cuts random crops; it needs fit=crop")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a clip in pixels."""
        return frame_size(self.resolution)

    @property
    def span(self) -> int:
        """Frames that one clip covers, counted in the video, or in the resampled one where ``fps`` is set."""
        return (self.num_frames - 1) * self.frame_stride + 1

    @property
    def step(self) -> int:
        """Frames between the starts of two clips, counted as in `span`."""
        return self.clip_stride or self.num_frames * self.frame_stride


class MixPart(Section):
    """One data set of a mixture."""

    url: Annotated[str, PLACE]
    """Root of a run, ``${root}`` for this one: its clips train the tokenizer, its tokens the prior."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the samples is this weight over the sum of all weights, rounded to thousandths."""


class DataConfig(Section):
    """Stage ``shard``: raw videos become clip shards."""

    source: SourceConfig = SourceConfig()
    mix: Annotated[tuple[MixPart, ...], FREE] = ()
    """Data sets that the training stages read; empty means this run's own. The identity of a training names their
    fingerprints and shares."""
    clip: ClipConfig = ClipConfig()
    format: Literal["mp4", "npy", "mjpeg"] = "mp4"
    """``mp4``: h264, small. ``npy``: lossless uint8 [num_frames, height, width, 3]. ``mjpeg``: a JPEG file for each
    frame, in Matroska (``.mkv``)."""
    crf: Annotated[int, Field(ge=0, le=51)] = 16
    """Constant rate factor of the h264 clips: lower is better and larger."""
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = 95
    """libjpeg quality of the ``mjpeg`` clips: higher is better and larger."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """``auto``: PyAV, right for more files and quicker. ``decord``: PyAV takes over where decord fails; needs
    the package decord, on aarch64 decord2."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the videos in the split ``val``, chosen by a hash of each video's identity."""
    unit_bytes: PositiveInt = 16 * 2**30
    """Source bytes in one unit of work (whole videos), at most."""
    shard_bytes: PositiveInt = 128 * 2**20
    """About the size of a tar. A unit of work is planned to make one; a unit that makes more closes a tar whenever it
    reaches this size, and its last tar has at least half of it."""
    cpu_seconds_per_video: Annotated[PositiveInt, FREE] = 3600
    """Processor time that a video may take at least. Large and long videos get more: a second for 20 million pixels."""
    memory_bytes_per_video: Annotated[PositiveInt, FREE] = 4 * 2**30
    """Address space of the decoding child beyond what it has at its start."""
    no_progress_seconds: Annotated[PositiveInt, FREE] = 120
    """A decoding child that delivers nothing for this long is killed."""
    fetch_seconds: Annotated[PositiveInt, FREE] = 4 * 3600
    """A web server that has not sent a whole file after this long is given up: the video fails."""
    fetch_bytes: Annotated[PositiveInt, FREE] = 256 * 2**30
    """Most that a web server may send as one file."""
    max_failed_videos: Annotated[int, Field(ge=0), FREE] = 10
    """The stage stops when more videos than this failed, and more than ``max_failed_share`` of those finished."""
    max_failed_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.05
    """See ``max_failed_videos``."""

    @model_validator(mode="after")
    def _colour_halves(self) -> Self:
        if self.format == "mp4" and any(pixels % 2 for pixels in self.clip.size):
            height, width = self.clip.size
            raise ValueError(
                f"clips of {height} x {width} pixels cannot be format=mp4 (h264 stores colour at half the resolution, "
                "so both axes must be even); set clip.resolution to even numbers, or format=npy"
            )
        return self

    @property
    def clip_suffix(self) -> str:
        """How the name of a clip's member ends: ``mp4``, ``npy`` or ``mkv``."""
        return "mkv" if self.format == "mjpeg" else self.format

    @property
    def quality(self) -> int | None:
        """``crf`` or ``jpeg_quality``, whichever the format has; None where it is lossless."""
        return {"mp4": self.crf, "mjpeg": self.jpeg_quality}.get(self.format)
