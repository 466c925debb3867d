"""``clipmill generate``: an export makes an mp4 file, without a data set and without Ray."""

from __future__ import annotations

import math
import time
from typing import Any

from clipmill.api.films import write_video
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
    """Makes videos and writes them into one file: one as it is, several as a grid.

    Args:
        export: URL of an export, a training folder or a run.
        out: path or URL of the file.
        num: videos.
        label: class of all; None takes the classes in turn.
        first_frame: URL of a picture or video to go on from, or to condition on.
        condition: URL of a ``.npy`` file of actions or of a text's embedding.
        seconds: of the video; None is the window of the prior.
        fps: frames per second; None is that of the training clips, or 8 where they had none.
        seed: of the noise.
        temperature: of the draw, like the two below.
        top_k: of the codes of a position.
        top_p: of their probability.

    Returns:
        Facts for the summary.

    Raises:
        UserError: the export is no prior, or something does not fit it. Nothing was written.
    """
    if not out.lower().endswith(".mp4"):
        raise UserError(f"--out {out} must end in .mp4")
    began = time.monotonic()
    generator = load(export, "generator")
    rate = fps or generator.info.fps or USUAL_FPS
    if condition is not None and generator.info.condition not in ("actions", "text"):
        raise UserError(f"--condition {condition}: this prior takes no actions and no embeddings; leave it out")
    wanted = generator.info.num_frames if seconds is None else max(1, math.ceil(seconds * rate))
    with bar("generate", total=None, unit="codes") as progress:
        made = generator.sample(
            num,
            label=label,
            seed=seed,
            first_frames=first_frame,
            actions=condition if generator.info.condition == "actions" else None,
            text=condition if generator.info.condition == "text" else None,
            num_frames=nearest_num_frames(generator.body, wanted),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            on_progress=lambda done, total: progress.update(done, total=total),
        )
    videos = made.videos[:, :wanted]
    write_video(out, videos[0] if num == 1 else videos, rate)
    return {
        "out": out,
        "videos": num,
        "frames": videos.shape[1],
        "fps": rate,
        "prior": generator.info.sha8,
        "seconds": round(time.monotonic() - began, 3),
    }
