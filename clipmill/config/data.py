"""Section ``data``: raw videos become clip shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from clipmill.config.section import FREE, PLACE, PositiveInt, Section
from clipmill.config.source import SourceConfig

__all__ = ["ClipConfig", "DataConfig", "MixPart", "Resolution", "frame_size"]


def frame_size(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels of a resolution that a config or recipe writes as ``64`` or ``[36, 64]``."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return height, width


def _one_form(value: Any) -> Any:
    """Turns a pair of equal numbers into one number, so that equal sizes have equal identities."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(type(pixels) is int and pixels > 0 for pixels in pair):
        raise ValueError("must be a number of pixels such as 64, or [height, width] such as [36, 64]")
    height, width = pair
    return height if height == width else (height, width)


Resolution = Annotated[int | tuple[int, int], BeforeValidator(_one_form)]
"""Side of a square, or (height, width), in pixels."""

GreyLevels = Annotated[float, Field(ge=0, le=255)]
"""An 8-bit level of a colour channel, or a difference of two."""


class ClipConfig(Section):
    """Which frames become a clip, and at which size."""

    num_frames: PositiveInt = 16
    """Frames of a clip."""
    frame_stride: PositiveInt = 1
    """Take every n-th frame of the video (native frame rate, presentation order)."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second of the clips: the video is resampled by its timestamps. Excludes ``frame_stride``. None keeps
    the native frame rate."""
    clip_stride: PositiveInt | None = None
    """Frames from the start of one clip to the start of the next, counted in the video (after resampling, if ``fps`` is
    set). A number below the length of a clip makes clips overlap. None places clips end to end."""
    max_clips_per_video: PositiveInt | None = None
    """Keep the first clips of a video that pass the filters, up to this number. None keeps all."""
    scene_cut: GreyLevels | None = None
    """A frame whose mean absolute difference from the previous one exceeds this starts a new scene, and no clip spans
    two scenes. In grey levels (0 to 255); 30 finds most hard cuts. None detects no scenes."""
    reject_static: GreyLevels | None = None
    """Drop clips whose mean frame-to-frame difference is below this, in grey levels (0 to 255). 1 drops still pictures.
    None disables the filter."""
    reject_black: GreyLevels | None = None
    """Drop clips whose brightest frame has a mean below this, in grey levels (0 to 255). 10 drops black clips. None
    disables the filter."""
    min_seconds: Annotated[float, Field(ge=0)] | None = None
    """Skip videos shorter than this. A span of a file counts as a video. None sets no limit."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Skip videos longer than this. None sets no limit."""
    min_height: PositiveInt | None = None
    """Skip videos with fewer rows of pixels than this, as a player displays them. None sets no limit."""
    min_width: PositiveInt | None = None
    """Skip videos with fewer columns of pixels than this, as a player displays them. None sets no limit."""
    min_fps: Annotated[float, Field(gt=0)] | None = None
    """Skip videos with fewer frames per second than this. None sets no limit."""
    max_fps: Annotated[float, Field(gt=0)] | None = None
    """Skip videos with more frames per second than this. None sets no limit."""
    resolution: Resolution = 64
    """Size of a clip in pixels: ``64`` for 64 x 64, ``[36, 64]`` for height 36 and width 64."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How a video of another aspect ratio is fitted to ``resolution``. ``crop``: scale it to cover the clip and crop
    the centre. ``pad``: scale it to fit inside and pad with black. ``stretch``: scale height and width
    independently."""
    views_per_clip: PositiveInt = 1
    """Number of views stored of each clip. Above 1, each view is a random crop from frames resized to 8/7 of the
    resolution."""
    flip_views: bool = True
    """Mirror each of several views horizontally with probability 1/2. Switch it off where labels or actions distinguish
    left from right."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fps is not None and self.frame_stride != 1:
            raise ValueError("fps and frame_stride exclude each other; remove one")
        if self.views_per_clip > 1 and self.fit != "crop":
            raise ValueError("views_per_clip above 1 needs fit=crop, because each view is a random crop; set fit=crop")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a clip in pixels."""
        return frame_size(self.resolution)

    @property
    def span(self) -> int:
        """Frames that one clip covers, counted in the video (after resampling, if ``fps`` is set)."""
        return (self.num_frames - 1) * self.frame_stride + 1

    @property
    def step(self) -> int:
        """Frames between the starts of two clips, counted as in `span`."""
        return self.clip_stride or self.num_frames * self.frame_stride


class MixPart(Section):
    """One data set of a mixture."""

    url: Annotated[str, PLACE]
    """Root of the run whose clips train the tokenizer and whose tokens train the prior; ``${root}`` is this run."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Weight of this data set. Its share of the samples is the weight over the sum of all weights, rounded to
    thousandths."""


class DataConfig(Section):
    """Stage ``shard``: raw videos become clip shards."""

    source: SourceConfig = SourceConfig()
    mix: Annotated[tuple[MixPart, ...], FREE] = ()
    """Data sets that the training stages read, as a weighted mixture. An empty list reads this run's own data set. The
    identity of a training contains their fingerprints and shares."""
    exclude: Annotated[str | None, FREE, PLACE] = None
    """File of clips that trainings skip, as ``clipmill inspect ROOT --duplicates FILE`` writes it. Shards stay as they
    are; the identity of a training contains which clips are missing."""
    clip: ClipConfig = ClipConfig()
    format: Literal["mp4", "npy", "mjpeg"] = "mp4"
    """How clips are stored. ``mp4``: h264, small. ``npy``: lossless uint8 [num_frames, height, width, 3]. ``mjpeg``:
    one JPEG image a frame, in Matroska (``.mkv``)."""
    crf: Annotated[int, Field(ge=0, le=51)] = 16
    """Constant rate factor of the ``mp4`` clips: lower gives better quality and larger files."""
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = 95
    """libjpeg quality of the ``mjpeg`` clips: higher gives better quality and larger files."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """``auto``: same as ``pyav``, which decodes more files correctly and is faster. ``decord``: decord, with PyAV for
    files on which decord fails; needs the package decord (decord2 on aarch64)."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the videos in the split ``val``, chosen by a hash of each video's identity. A split that the source
    states wins."""
    unit_bytes: PositiveInt = 16 * 2**30
    """Maximum bytes of source videos in one unit of work; a unit holds whole videos."""
    shard_bytes: PositiveInt = 128 * 2**20
    """Target size of a tar in bytes. A unit of work is planned to fill one tar. A unit that yields more starts a new
    tar at this size, and its last tar has at least half of it."""
    cpu_seconds_per_video: Annotated[PositiveInt, FREE] = 3600
    """CPU seconds that decoding a video may take. Large and long videos get more: one second per 20 million pixels."""
    memory_bytes_per_video: Annotated[PositiveInt, FREE] = 4 * 2**30
    """Address space in bytes that decoding a video may add to the decoding process."""
    no_progress_seconds: Annotated[PositiveInt, FREE] = 120
    """Kill a decoding process that delivers no frame for this number of seconds; the video fails."""
    fetch_seconds: Annotated[PositiveInt, FREE] = 4 * 3600
    """Time limit for downloading one file from a web server; beyond it the video fails."""
    fetch_bytes: Annotated[PositiveInt, FREE] = 256 * 2**30
    """Size limit for one file from a web server; beyond it the video fails."""
    max_failed_videos: Annotated[int, Field(ge=0), FREE] = 10
    """The stage stops once more videos than this have failed and they are more than ``max_failed_share`` of the videos
    processed."""
    max_failed_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.05
    """Share of failed videos that is tolerated; see ``max_failed_videos``."""

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
        """Suffix of a clip in a tar: ``mp4``, ``npy`` or ``mkv``."""
        return "mkv" if self.format == "mjpeg" else self.format

    @property
    def quality(self) -> int | None:
        """``crf`` or ``jpeg_quality``, whichever the format uses; None for the lossless format."""
        return {"mp4": self.crf, "mjpeg": self.jpeg_quality}.get(self.format)
