"""``clipmill generate``: generates an mp4 file with an exported prior. It needs neither a data set nor Ray."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from clipmill.api.films import write_video
from clipmill.api.generator import Generator
from clipmill.api.loading import load
from clipmill.errors import UserError
from clipmill.progress import bar
from clipmill.sampling.long import nearest_num_frames
from clipmill.sampling.settings import USUAL_FPS

__all__ = ["generate_file"]


def generate_file(
    export: str,
    out: str,
    *,
    num: int,
    label: str | None,
    first_frame: str | None,
    condition: str | None,
    seconds: float | None,
    fps: float | None,
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> dict[str, Any]:
    """Samples videos and writes them to one file; several are tiled in a grid.

    Args:
        export: URL of an export, a training folder or a run.
        out: path or URL of the file.
        num: number of videos.
        label: class of all videos; None rotates through the classes.
        first_frame: URL of a picture or video to continue, or to condition on.
        condition: URL of a ``.npy`` file of actions or of a text embedding.
        seconds: duration of the video; None uses the window of the prior.
        fps: frames per second; None uses the rate of the training clips, or 8 if they have no common rate.
        seed: seed of the noise.
        temperature: softmax temperature; the logits are divided by it.
        top_k: keep the k most likely codes of a position; None keeps all.
        top_p: keep the most likely codes up to this total probability; 1 keeps all.

    Returns:
        Facts for the summary.

    Raises:
        UserError: the export is not a prior, or an input does not fit it. Nothing was written.
    """
    if not out.lower().endswith(".mp4"):
        raise UserError(f"--out {out} must end in .mp4; name another file")
    began = time.monotonic()
    generator = load(export, "generator")
    rate = fps or generator.info.fps or USUAL_FPS
    if condition is not None and generator.info.condition not in ("actions", "text"):
        raise UserError(f"--condition {condition}: this prior takes no actions and no embeddings; remove --condition")
    num_frames = generator.info.num_frames if seconds is None else max(1, math.ceil(seconds * rate))
    settings: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if condition is not None:
        settings[str(generator.info.condition)] = condition
    videos = _sample(generator, num, num_frames, label=label, first_frames=first_frame, **settings)
    write_video(out, videos[0] if num == 1 else videos, rate)
    return {
        "out": out,
        "videos": num,
        "frames": videos.shape[1],
        "fps": rate,
        "prior": generator.info.sha8,
        "seconds": round(time.monotonic() - began, 3),
    }


def _sample(generator: Generator, num: int, num_frames: int, **settings: Any) -> Tensor:
    """Samples uint8 [num, num_frames, H, W, 3] under a progress bar."""
    with bar("generate", total=None, unit="codes") as progress:
        made = generator.sample(
            num,
            num_frames=nearest_num_frames(generator.body, num_frames),
            on_progress=lambda done, total: progress.update(done, total=total),
            **settings,
        )
    return made.videos[:, :num_frames]
