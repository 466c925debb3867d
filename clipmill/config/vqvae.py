"""Section ``vqvae.model``: the tokenizer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from clipmill.config.section import PositiveInt, Section

__all__ = ["VQVAEModelConfig"]


class VQVAEModelConfig(Section):
    """The tokenizer (VideoGPT, arXiv 2104.10157, section 3.1)."""

    style: Literal["videogpt", "modern"] = "videogpt"
    """``videogpt``: the published architecture. ``modern``: down- and upsampling have shortcuts, attention is a
    residual branch of its own with relative positions, and residual branches start at zero; its defaults are
    ``hidden_dim`` 256 and ``norm`` group."""
    hidden_dim: PositiveInt = 240
    """Channels of the encoder, and of the decoder unless ``decoder_dim`` is set."""
    decoder_dim: PositiveInt | None = None
    """Channels of the decoder, which benefits more from width than the encoder. None uses ``hidden_dim``. ``modern``
    only."""
    num_res_layers: Annotated[int, Field(ge=0)] = 4
    """Number of residual blocks, in the encoder and in the decoder each."""
    num_heads: PositiveInt = 2
    """Heads of the axial attention."""
    axial_attention: bool = True
    """Residual blocks attend along time, height and width. False uses convolutions only."""
    norm: Literal["batch", "group"] = "batch"
    """``batch``: batch norm, with statistics over the clips of all ranks. ``group``: group norm, with statistics of
    each clip alone (of each frame, if ``causal``)."""
    causal: bool = False
    """Make each latent independent of later frames. Clips then have 1 + n * downsample[0] frames, and the first frame
    can be decoded alone."""
    quantizer: Literal["ema", "simvq", "fsq", "lfq", "bsq"] = "ema"
    """``ema``: a codebook updated by moving averages of the latents. ``simvq``: fixed codes under a learned linear map.
    ``fsq``: rounding to ``fsq_levels``. ``lfq``: the signs of log2(num_codes) channels. ``bsq``: ``lfq`` on the unit
    sphere."""
    embedding_dim: PositiveInt = 256
    """Channels of a latent, for ``ema`` and ``simvq``. The others ignore it: ``fsq`` has one channel for each entry of
    ``fsq_levels``, ``lfq`` and ``bsq`` one for each bit."""
    num_codes: Annotated[int, Field(ge=2)] = 2048
    """Number of codes in one codebook."""
    num_codebooks: Annotated[int, Field(ge=1, le=8)] = 1
    """Number of codebooks; each quantises a slice of the latent's channels, so a latent has this number of codes."""
    fsq_levels: tuple[Annotated[int, Field(ge=3)], ...] = ()
    """Levels of each channel, at least 3; their product must equal ``num_codes``: [4, 4, 4, 4] makes 256 codes,
    [8, 5, 5, 5] makes 1,000. With 2 levels the paper's shifted tanh would reach only one; use ``lfq`` for 2."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Distance between latents and codes of ``ema``."""
    codebook_start: Literal["rows", "kmeans"] = "rows"
    """Initial codes of ``ema``. ``rows``: latents of the first batch. ``kmeans``: the centres of their clusters."""
    code_gradient: Literal["straight_through", "rotation"] = "straight_through"
    """How the gradient passes through ``ema`` and ``simvq``. ``straight_through``: unchanged. ``rotation``: rotated and
    scaled by the transform that maps the latent to its code (arXiv 2410.06424)."""
    downsample: tuple[PositiveInt, PositiveInt, PositiveInt] = (4, 4, 4)
    """Frames, rows and columns of pixels for each latent; each a power of two."""
    l1_cost: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean absolute error, in units of the pixels' standard deviation, that is added to the mean squared
    error. 0 disables it."""
    commitment_cost: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the commitment loss, which pulls latents towards their codes."""
    entropy_cost: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the entropy loss of ``lfq`` and ``bsq``, in nats per bit."""
    entropy_temperature: Annotated[float, Field(gt=0)] = 0.01
    """Temperature of the code probabilities in the entropy loss, softmax(-distance^2 / temperature). The published code
    uses 0.01."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Decay of the moving averages from which ``ema`` updates its codes."""
    restart_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Restart a code of ``ema`` from a latent of the batch once its usage falls below this share of uniform usage
    (tokens of a step / codes). 0 disables restarts."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_style(cls, values: Any) -> Any:
        is_modern = isinstance(values, dict) and values.get("style") == "modern"
        return {"hidden_dim": 256, "norm": "group"} | values if is_modern else values

    @field_validator("downsample")
    @classmethod
    def _powers_of_two(cls, downsample: tuple[int, int, int]) -> tuple[int, int, int]:
        if any(factor & (factor - 1) for factor in downsample):
            raise ValueError(f"downsample {downsample} must be powers of two, such as (4, 4, 4) or (1, 4, 4)")
        return downsample

    @model_validator(mode="after")
    def _codes_fit(self) -> VQVAEModelConfig:
        if self.style == "videogpt" and self.decoder_dim is not None:
            raise ValueError("decoder_dim needs style=modern; remove it: style=videogpt uses hidden_dim for both")
        num_codes = math.prod(self.fsq_levels)
        if self.quantizer == "fsq" and num_codes != self.num_codes:
            raise ValueError(
                f"fsq_levels {self.fsq_levels} make {num_codes} codes, but num_codes is {self.num_codes}; "
                "set both, such as fsq_levels=[4,4,4,4] and num_codes=256"
            )
        if self.quantizer != "fsq" and self.fsq_levels:
            raise ValueError(f"fsq_levels needs quantizer=fsq, not {self.quantizer}; remove it, or set fsq")
        if self.quantizer != "ema" and (self.distance, self.codebook_start) != ("euclidean", "rows"):
            raise ValueError(f"distance and codebook_start need quantizer=ema, not {self.quantizer}; remove them")
        if self.quantizer not in ("ema", "simvq") and self.code_gradient != "straight_through":
            raise ValueError(f"code_gradient needs quantizer=ema or simvq, not {self.quantizer}; remove it")
        if self.quantizer in ("lfq", "bsq") and self.num_codes & (self.num_codes - 1):
            raise ValueError(
                f"num_codes {self.num_codes} must be a power of two for quantizer {self.quantizer}, such as 1024"
            )
        if self.latent_dim % self.num_codebooks:
            raise ValueError(
                f"embedding_dim {self.embedding_dim} must be a multiple of num_codebooks {self.num_codebooks}"
            )
        return self

    @property
    def decoder_width(self) -> int:
        """Channels of the decoder."""
        return self.hidden_dim if self.decoder_dim is None else self.decoder_dim

    @property
    def has_batch_statistics(self) -> bool:
        """Whether a micro-step computes statistics over its clips, so that its batch size affects the training."""
        return self.norm == "batch" or self.quantizer != "fsq"

    @property
    def latent_dim(self) -> int:
        """Channels of a latent, summed over all codebooks."""
        if self.quantizer == "fsq":
            return len(self.fsq_levels) * self.num_codebooks
        if self.quantizer in ("lfq", "bsq"):
            return (self.num_codes.bit_length() - 1) * self.num_codebooks
        return self.embedding_dim
