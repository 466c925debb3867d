"""Measures videos longer than a prior's window: how visible their seams are, and whether memory grows.

    python benchmarks/long.py ROOT [--num-frames 512] [--samples 4] [--overlap-latents N]

reads the prior of a finished run. A seam is measured as the mean absolute difference of the two frames at a border of
decoded pieces, divided by that of other neighbouring frames. For comparison, the same codes are also decoded window by
window without overlap, where seams are visible. Memory is the process's peak at four windows and at the whole length.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import time

import torch
from timing import device_name
from torch import Tensor

from clipmill.models.export import load_prior
from clipmill.models.vqvae import to_pixels
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.kept import Kept
from clipmill.sampling.long import Batch, sample_videos, video_length

GOALS = {"seam_ratio": 1.1}


def seam_ratio(pixels: Tensor, borders: range) -> float:
    """Difference of frames b - 1 and b at the borders over that elsewhere, of uint8 [B, T, H, W, 3]."""
    differences = pixels.float().diff(dim=1).abs().mean((0, 2, 3, 4))
    elsewhere = [place for place in range(len(differences)) if place + 1 not in borders]
    return float(differences[[border - 1 for border in borders]].mean() / differences[elsewhere].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of a finished run")
    parser.add_argument("--num-frames", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--overlap-latents", type=int)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prior, tokenizer, body, sha8 = load_prior(f"{arguments.root}/prior")
    indices = list(range(arguments.samples))
    labels = torch.tensor([index % len(body["classes"]) for index in indices]) if body["classes"] else None
    draw = functools.partial(
        generate, prior, seed=0, indices=indices, labels=labels, filters=Filters(top_p=arguments.top_p), kept=Kept()
    )
    window = video_length(body, None).window_frames
    peaks = {}
    for num_frames in (4 * window, arguments.num_frames):
        began = time.perf_counter()
        length = video_length(body, num_frames, arguments.overlap_latents)
        (videos,) = sample_videos([Batch(draw)], tokenizer, length, lambda _, videos: videos)
        seconds = time.perf_counter() - began
        peaks[num_frames] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{num_frames} frames: {seconds:.1f} s, peak {peaks[num_frames] / 2**20:.0f} MiB", flush=True)
    step = length.frames_per_latent * (length.window_latents - length.window_latents // 2)
    with torch.inference_mode():
        cut = torch.cat([to_pixels(tokenizer.decode(part)) for part in videos.codes.split(length.window_latents, 1)], 1)
    seams = {
        "seam_ratio": seam_ratio(videos.pixels, range(step, arguments.num_frames, step)),
        "seam_ratio_without_overlap": seam_ratio(cut, range(window, arguments.num_frames, window)),
    }
    result = {
        "benchmark": "long",
        "device": device_name(),
        "goals": GOALS,
        "prior": sha8,
        **vars(arguments),
        **{name: round(value, 3) for name, value in seams.items()},
        "seconds": round(seconds, 1),
        "grown_bytes": peaks[arguments.num_frames] - peaks[4 * window],
        "pixel_bytes": videos.pixels.numel(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
