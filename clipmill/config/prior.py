"""Section ``prior.model``: sizes, style, conditioning, and presets of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clipmill.config.section import FREE, PositiveInt, Section

__all__ = ["PRESETS", "PriorModelConfig"]


def _published(hidden_dim: int, num_heads: int, num_layers: int) -> dict[str, Any]:
    sizes = {"hidden_dim": hidden_dim, "num_heads": num_heads, "num_layers": num_layers}
    return {"style": "videogpt", **sizes, "dropout": 0.2, "attention_dropout": 0.3}


def _modern(hidden_dim: int, num_heads: int, num_kv_heads: int, num_layers: int, mlp_dim: int) -> dict[str, Any]:
    sizes = {"hidden_dim": hidden_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_layers": num_layers}
    return {"style": "modern", **sizes, "mlp_dim": mlp_dim, "dropout": 0.0, "attention_dropout": 0.0}


PRESETS: dict[str, dict[str, Any]] = {
    # VideoGPT, arXiv 2104.10157, table 9.
    "videogpt-bair": _published(512, 4, 16),
    "videogpt-ucf101": _published(1024, 8, 20),
    "videogpt-tgif": _published(1024, 8, 20),
    # By parameters, for 1,024 codes and no classes: 106 M, 348 M, 1.07 B, 3.03 B, 6.99 B. Heads of 128 channels, whose
    # attention fills a GPU's matrix units better than that of 64.
    "100m": _modern(768, 6, 2, 12, 3072),
    "350m": _modern(1024, 8, 2, 24, 3840),
    "1b": _modern(2048, 16, 4, 24, 5504),
    "3b": _modern(3072, 24, 8, 30, 8192),
    "7b": _modern(4096, 32, 8, 32, 14336),
}


class PriorModelConfig(Section):
    """The prior: VideoGPT's transformer (arXiv 2104.10157, section 3.2), or a current decoder-only transformer."""

    preset: Annotated[str | None, FREE] = None
    """Name of a set of sizes (see ``PRESETS``); other keys of this section override it. Not part of the identity; the
    values it expands to are. None uses the defaults below."""
    style: Literal["videogpt", "modern"] = "videogpt"
    """``videogpt``: as published (axial learned positions, layer norm, quick-GELU). ``modern``: rotary positions over
    t, h, w, RMS norm, normalised queries and keys, SwiGLU, grouped keys and values, no biases."""
    hidden_dim: PositiveInt = 576
    """Channels of the residual stream; a multiple of ``num_heads``."""
    num_heads: PositiveInt = 4
    """Attention heads."""
    num_kv_heads: PositiveInt | None = None
    """Heads of keys and values, each shared by several query heads. None uses ``num_heads``. ``modern`` only."""
    num_layers: PositiveInt = 8
    """Transformer blocks."""
    mlp_dim: PositiveInt | None = None
    """Channels inside the MLP. None uses 4 x ``hidden_dim`` (``modern``: 8/3 of it, rounded up to a multiple of 64)."""
    rope_base: Annotated[float, Field(gt=1)] = 100.0
    """Base of the rotary positions: wavelengths range from 2 pi to 2 pi x this number, in latents. An axis has tens of
    latents, not thousands, so the base is small (arXiv 2403.13298 uses 100 for images). ``modern`` only."""
    attention: Literal["full", "strided"] = "full"
    """Which earlier codes a code attends to. ``full``: all. ``strided``: blocks of 32 codes, as in the published sparse
    priors (``clipmill/models/strided.py``): nearby codes, and the same place in earlier rows and frames. ``videogpt``
    only."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout on the outputs of attention and MLP, before they are added to the residual stream. 0 disables it."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Dropout on the attention weights. 0 disables it; ``attention=strided`` needs 0, because its kernels have no
    dropout."""
    class_conditional: bool = False
    """Condition the prior on the class of a clip. Every video then needs a class."""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training clips whose class is hidden. Above 0, the prior also learns to predict without a class,
    which ``sample.guidance`` needs (classifier-free guidance, arXiv 2207.12598)."""
    condition: Literal["frames", "actions", "text"] | None = None
    """Condition the prior on more than the class. ``frames``: the first frames of the clip
    (``tokenize.condition_frames``). ``actions``: an action for each frame (``data.source.actions_suffix``). ``text``:
    an embedding of the clip's text (``tokenize.text_embeddings``). None conditions on nothing more."""
    condition_by: Literal["cross_attention", "norm", "add"] = "cross_attention"
    """How ``condition`` enters the prior. ``cross_attention``: blocks attend to it. ``norm``: it sets the gains and
    biases of the norms of each latent frame. ``add``: it is added to the input. The last two need
    ``condition=actions``."""
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training clips whose condition is replaced by a learned null. Above 0, the prior also learns to
    predict without the condition, which ``sample.guidance`` needs. One random number decides for class and condition
    of a clip, so equal shares hide both together."""
    checkpointed_share: Annotated[float, Field(ge=0, le=1), FREE] = 0.0
    """Share of the blocks with activation checkpointing: the backward pass recomputes their activations. 0 is fastest,
    1 needs the least memory."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if preset is None:
            return values
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
        return PRESETS[preset] | values

    @model_validator(mode="after")
    def _sizes_fit(self) -> PriorModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of num_heads {self.num_heads}")
        if self.style == "videogpt" and self.num_kv_heads is not None:
            raise ValueError("num_kv_heads needs style=modern; remove it: style=videogpt has as many keys as queries")
        if self.style == "videogpt" and self.rope_base != 100.0:
            raise ValueError("rope_base needs style=modern; remove it: the positions of style=videogpt are learned")
        if self.attention == "strided" and self.style != "videogpt":
            raise ValueError("attention=strided needs style=videogpt; set attention=full")
        if self.attention == "strided" and self.attention_dropout:
            raise ValueError("attention=strided has no dropout on its weights; set attention_dropout=0")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.style == "modern" and self.head_dim % 2:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} over num_heads {self.num_heads} gives {self.head_dim} channels a head; "
                "rotary positions rotate pairs of channels, so change one to make this number even"
            )
        if self.label_dropout and not self.class_conditional:
            raise ValueError("label_dropout needs class_conditional=true, or there is no class to hide; set it too")
        if self.condition_dropout and self.condition is None:
            raise ValueError("condition_dropout needs condition, or there is nothing to hide; set it too")
        if self.condition_by != "cross_attention" and self.condition != "actions":
            raise ValueError(
                f"condition_by={self.condition_by} needs condition=actions; set condition_by=cross_attention for others"
            )
        return self

    @property
    def attends(self) -> bool:
        """Whether blocks attend to the condition."""
        return self.condition is not None and self.condition_by == "cross_attention"

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return 4 * self.hidden_dim if self.style == "videogpt" else -(-8 * self.hidden_dim // (3 * 64)) * 64

    @property
    def num_checkpointed(self) -> int:
        """Number of blocks, counted from the first, whose activations the backward pass recomputes."""
        return round(self.checkpointed_share * self.num_layers)
