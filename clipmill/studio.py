"""Draws and encodes what a training in progress shows: `clipmill.training` imports neither sampler nor codecs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clipmill.config import RunConfig
from clipmill.models.prior import Prior
from clipmill.sampling.kept import Kept
from clipmill.sampling.settings import USUAL_FPS, draw_by
from clipmill.training.previews import Preview, Studio

__all__ = ["studio_of"]


def studio_of(config: RunConfig) -> Studio:
    """A studio that draws samples by ``config.sample``, and encodes them."""

    def draw(
        prior: Prior,
        num_samples: int,
        labels: Tensor | None,
        condition: Tensor | None,
        on_progress: Callable[[int], None],
    ) -> Tensor:
        guidance = config.sample.guidance if prior.guidable else 1.0
        settings = config.sample.model_copy(update={"guidance": guidance})
        window = draw_by(settings, prior, range(num_samples), labels, Kept(), on_progress)
        return window(condition=condition, prefix=None, first_frame=0)

    return Studio(draw, _encode, USUAL_FPS)


def _encode(preview: Preview) -> dict[str, bytes]:
    try:
        from clipmill.sampling.preview import film
        from clipmill.video.pictures import png_bytes
    except ModuleNotFoundError:  # a GPU machine that only trains has no codecs
        return {}
    files = {"png": png_bytes(preview.picture)}
    if preview.clips is not None:
        files["mp4"] = film(preview.clips, preview.fps)
    return files
