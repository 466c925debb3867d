"""Clips by NeMo Curator, resumable: ``python nemo_curator_job.py VIDEOS OUT``.

The stages of its tutorial for fixed strides, and its documented way to continue: ``Pipeline.run(checkpoint_path=...)``.
It has no stage that resizes. VP9 is the only one of its encoders that runs on a CPU with any build of FFmpeg.
"""

import json
import os
import sys

from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.video.clipping.clip_extraction_stages import ClipTranscodingStage, FixedStrideExtractorStage
from nemo_curator.stages.video.io.clip_writer import ClipWriterStage
from nemo_curator.stages.video.io.video_reader import VideoReader
from ray.data import DataContext


def main() -> None:
    videos, out = sys.argv[1:]
    # Of two CPUs its two actors leave less than the one that a task of Ray Data asks for, and it stands still. The
    # executor starts Ray anew, so the number cannot be an argument.
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": 4})
    # An exception over one video ends the job, and every continuation of it. Ray Data's message names the way out; a
    # block holds one video here, so a block that fails costs its video.
    DataContext.get_current().max_errored_blocks = -1
    pipeline = Pipeline(name="kills")
    pipeline.add_stage(VideoReader(input_video_path=videos))
    pipeline.add_stage(FixedStrideExtractorStage(clip_len_s=1, clip_stride_s=1, min_clip_length_s=0.5, limit_clips=0))
    pipeline.add_stage(ClipTranscodingStage(num_cpus_per_worker=1, encoder="libvpx-vp9"))
    pipeline.add_stage(
        ClipWriterStage(
            output_path=out,
            input_path=videos,
            upload_clips=True,
            dry_run=False,
            generate_embeddings=False,
            generate_previews=False,
            generate_captions=False,
        )
    )
    pipeline.run(RayDataExecutor(), checkpoint_path=f"{out}/checkpoint")


main()
