"""Clips by Ray Data with its checkpointing: ``python ray_data_job.py VIDEOS OUT VIDEOS_PER_BLOCK``.

As its documentation asks: a unique id column that lives through all operators, one row a video; the data and the ids
written so far decide what is left. The function catches what FFmpeg raises, as the documentation recommends, since an
exception would end the job; a video that cannot be read becomes a row without clips.
"""

import io
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import ray
from ray.data.checkpoint import CheckpointConfig

CLIP_FRAMES, SIDE, FPS = 16, 64, 16


def encode(frames: list[np.ndarray]) -> bytes:
    """An mp4 of frames, uint8 [SIDE, SIDE, 3]."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "16"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def cut(row: dict) -> dict:
    clips: list[bytes] = []
    try:
        with av.open(row["id"]) as container:
            frames = [
                frame.reformat(SIDE, SIDE, "rgb24", interpolation="AREA").to_ndarray()
                for frame in container.decode(video=0)
            ]
        starts = range(0, len(frames) - CLIP_FRAMES + 1, CLIP_FRAMES)
        clips = [encode(frames[start : start + CLIP_FRAMES]) for start in starts]
    except (av.FFmpegError, IndexError, ValueError) as error:
        print(f"{row['id']}: {error}", file=sys.stderr)
    return {"id": row["id"], "clips": clips}


def main() -> None:
    videos, out, videos_per_block = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    # The checkpoint outlives success, so that what is run again after the end has nothing to do.
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(out / "checkpoint"), delete_checkpoint_on_success=False
    )
    rows = [{"id": str(path)} for path in sorted(videos.iterdir())]
    listing = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // videos_per_block))
    listing.map(cut).write_parquet(str(out / "clips"))


main()
