"""Section ``vqvae.sharpness``: losses that reward sharp reconstructions, in addition to the squared error."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from clipmill.config.section import FREE, PLACE, PositiveInt, Section

__all__ = ["SharpnessConfig"]


class SharpnessConfig(Section):
    """Additional losses of the tokenizer's training. You supply the networks as TorchScript files (URLs): see
    ``docs/training.md``.
    """

    perceptual_weights: Annotated[str | None, FREE, PLACE] = None
    """LPIPS or another distance between frames, called like ``evaluate.lpips_weights``. The file's hash is identity.
    None disables the perceptual loss."""
    perceptual_cost: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the mean distance between frames and their reconstructions; needs ``perceptual_weights``."""
    gram_weights: Annotated[str | None, FREE, PLACE] = None
    """Network that returns feature maps of frames; the loss compares their Gram matrices. The file's hash is identity.
    None disables the Gram loss."""
    gram_cost: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean squared difference of Gram matrices (AToken, arXiv 2509.14476); needs ``gram_weights``."""
    frames: PositiveInt = 4
    """Frames of each clip, drawn at random, that these networks see in a step."""
    adversarial_cost: Annotated[float, Field(ge=0)] = 0.0
    """Norm of the adversarial gradient at the reconstruction, relative to the norm of the gradient of all other terms.
    VQGAN uses 0.8, MAGVIT about 0.1. 0 trains no discriminator."""
    adversarial_start: Annotated[int, Field(ge=0)] = 10_000
    """Step from which the adversarial loss trains the tokenizer. The discriminator trains from half of it on."""
    discriminator_dim: Annotated[PositiveInt, Field(multiple_of=8)] = 64
    """Channels after the discriminator's first convolution; each later convolution doubles them."""
    discriminator_layers: Annotated[int, Field(ge=1, le=6)] = 3
    """Number of the discriminator's convolutions with stride 2."""
    lecam_cost: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the discriminator's LeCam regularisation. 0 disables it."""

    @model_validator(mode="after")
    def _terms_have_networks(self) -> SharpnessConfig:
        for name in ("perceptual", "gram"):
            cost, weights = f"{name}_cost", f"{name}_weights"
            is_chosen = getattr(self, cost) not in (0, type(self).model_fields[cost].default)
            if is_chosen and getattr(self, weights) is None:
                raise ValueError(f"sharpness.{cost} needs sharpness.{weights}, a TorchScript file; set it too")
        return self
