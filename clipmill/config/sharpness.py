"""Section ``vqvae.sharpness``: losses that reward sharp reconstructions, beside the squared error."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from clipmill.config.section import FREE, PLACE, PositiveInt, Section

__all__ = ["SharpnessConfig"]


class SharpnessConfig(Section):
    """Losses in training alone. Networks are TorchScript files (URLs) that you bring: see ``docs/training.md``."""

    perceptual_weights: Annotated[str | None, FREE, PLACE] = None
    """LPIPS or another distance of frames, called as ``evaluate.lpips_weights`` is. Its hash is identity."""
    perceptual_cost: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the mean distance of frames to their reconstructions."""
    gram_weights: Annotated[str | None, FREE, PLACE] = None
    """Feature maps of frames, whose Gram matrices are compared. Its hash is identity."""
    gram_cost: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean squared difference of Gram matrices (AToken, arXiv 2509.14476)."""
    frames: PositiveInt = 4
    """Frames of each clip that these networks see in a step, drawn at random."""
    adversarial_cost: Annotated[float, Field(ge=0)] = 0.0
    """Norm of the discriminator's gradient at the reconstruction over that of all other terms; 0 trains none. VQGAN has
    0.8, MAGVIT about 0.1."""
    adversarial_start: Annotated[int, Field(ge=0)] = 10_000
    """Steps before the tokenizer feels the discriminator, which trains from half of them on."""
    discriminator_dim: Annotated[PositiveInt, Field(multiple_of=8)] = 64
    """Channels after its first convolution; each later one doubles them."""
    discriminator_layers: Annotated[int, Field(ge=1, le=6)] = 3
    """Its convolutions with stride 2."""
    lecam_cost: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the discriminator's regularisation."""

    @model_validator(mode="after")
    def _terms_have_networks(self) -> SharpnessConfig:
        for name in ("perceptual", "gram"):
            cost, weights = f"{name}_cost", f"{name}_weights"
            is_chosen = getattr(self, cost) not in (0, type(self).model_fields[cost].default)
            if is_chosen and getattr(self, weights) is None:
                raise ValueError(f"sharpness.{cost} needs sharpness.{weights}, a TorchScript file; set it too")
        return self
