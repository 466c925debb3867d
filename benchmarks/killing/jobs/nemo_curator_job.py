"""Clips by NeMo Curator, resumable: ``python nemo_curator_job.py VIDEOS OUT``.

The stages of its tutorial for fixed strides, and its documented way to continue: ``Pipeline.run(checkpoint_path=...)``
in a Ray cluster that is there before the pipeline. It has no stage that resizes. VP9 is the only one of its encoders
that runs on a CPU with any build of FFmpeg.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.video.clipping.clip_extraction_stages import ClipTranscodingStage, FixedStrideExtractorStage
from nemo_curator.stages.video.io.clip_writer import ClipWriterStage
from nemo_curator.stages.video.io.video_reader import VideoReader
from ray.data import DataContext

START_SECONDS = 300


def start_cluster(folder: Path) -> subprocess.Popen[bytes]:
    """Starts Ray as NeMo Curator's ``RayClient`` does, but without its ten seconds for ``ray status``.

    On a busy machine that command takes longer each time, and ``RayClient`` gives up. The cluster states four CPUs: of
    two, the pipeline's two actors leave less than the one that a task of Ray Data asks for, and it stands still.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    log = folder / f"start-{port}.log"
    options = [f"--port={port}", "--num-cpus=4", "--include-dashboard=false", f"--temp-dir={folder}"]
    with log.open("wb") as output:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
        cluster = subprocess.Popen(command, stdout=output, stderr=output)
    deadline = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text():
        if cluster.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"Ray did not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)
    os.environ["RAY_ADDRESS"] = f"{socket.gethostbyname(socket.gethostname())}:{port}"
    return cluster


def main() -> None:
    videos, out = sys.argv[1:]
    del os.environ["RAY_ADDRESS"]
    cluster = start_cluster(Path(os.environ["RAY_TMPDIR"]))
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
    cluster.terminate()
    cluster.wait()


main()
