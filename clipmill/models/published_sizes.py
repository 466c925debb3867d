"""Settings and weights in a checkpoint of the published VideoGPT code: the names and shapes that settings imply.

These are facts of the public code (MIT licence). Settings that it accepts but no sensible checkpoint has are refused.

K: codes   D: channels of a latent   L: codes of a clip
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from clipmill.models.resnet import BLOCKS, WIDTHS

__all__ = ["AXES", "PriorSettings", "Settings", "Sizes", "VQVAESettings"]

Sizes = dict[str, tuple[int, ...]]
"""Shapes of weights by name."""

AXES = "wht"
"""Axes of the tokenizer's attention."""
_FRAME_DIM = 240
"""Channels of the features of conditioning frames."""
_MOST = 2**16
"""Limit for frames, pixels or channels, far above any real checkpoint."""

Count = Annotated[int, Field(ge=1, le=_MOST), Strict()]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), Strict()]


class Settings(BaseModel):
    """Settings that the published code saves with a model. It saves many others, which do not describe the model."""

    model_config = ConfigDict(frozen=True)

    resolution: Count
    """Height and width; the published code supports squares only."""
    sequence_length: Count


class VQVAESettings(Settings):
    """Settings of a VQ-VAE."""

    n_hiddens: Count
    n_res_layers: Annotated[int, Field(ge=0, le=_MOST), Strict()]
    embedding_dim: Count
    n_codes: Annotated[int, Field(ge=2, le=2**24), Strict()]
    downsample: tuple[Count, Count, Count]

    @model_validator(mode="after")
    def _fits(self) -> VQVAESettings:
        if any(factor & (factor - 1) for factor in self.downsample) or max(self.downsample) == 1:
            raise ValueError(f"downsample {self.downsample}: needs powers of two, at least one above 1")
        lengths = (self.sequence_length, self.resolution, self.resolution)
        if any(length % factor for length, factor in zip(lengths, self.downsample, strict=True)):
            raise ValueError(f"downsample {self.downsample} does not divide clips of {lengths}")
        return self

    @property
    def num_halvings(self) -> int:
        """Number of convolutions with a stride."""
        return max(self.downsample).bit_length() - 1

    def sizes(self, prefix: str = "") -> Sizes:
        """Shapes of all weights; each name starts with ``prefix``."""
        dim, half, last = self.n_hiddens, self.n_hiddens // 2, self.num_halvings - 1
        sizes: Sizes = {
            "encoder.conv_last.conv.weight": (dim, dim, 3, 3, 3),
            "encoder.conv_last.conv.bias": (dim,),
            "pre_vq_conv.conv.weight": (self.embedding_dim, dim, 1, 1, 1),
            "pre_vq_conv.conv.bias": (self.embedding_dim,),
            "post_vq_conv.conv.weight": (dim, self.embedding_dim, 1, 1, 1),
            "post_vq_conv.conv.bias": (dim,),
            "codebook.embeddings": (self.n_codes, self.embedding_dim),
            "codebook.N": (self.n_codes,),
            "codebook.z_avg": (self.n_codes, self.embedding_dim),
        }
        for i in range(self.num_halvings):
            sizes[f"encoder.convs.{i}.conv.weight"] = (dim, dim if i else 3, 4, 4, 4)
            sizes[f"encoder.convs.{i}.conv.bias"] = (dim,)
            sizes[f"decoder.convts.{i}.convt.weight"] = (dim, 3 if i == last else dim, 4, 4, 4)
            sizes[f"decoder.convts.{i}.convt.bias"] = (3 if i == last else dim,)
        for side in ("encoder", "decoder"):
            for i in range(self.n_res_layers):
                block = f"{side}.res_stack.{i}.block"
                for layer, width in ((0, dim), (3, half), (6, dim)):
                    sizes |= _batch_norm(f"{block}.{layer}", width)
                sizes[f"{block}.2.conv.weight"] = (half, dim, 3, 3, 3)
                sizes[f"{block}.5.conv.weight"] = (dim, half, 1, 1, 1)
                for axis in AXES:
                    sizes |= _attention(f"{block}.8.attn_{axis}", dim, dim, num_heads=2)
            sizes |= _batch_norm(f"{side}.res_stack.{self.n_res_layers}", dim)
        return {prefix + name: size for name, size in sizes.items()}


class PriorSettings(Settings):
    """Settings of a prior."""

    hidden_dim: Count
    heads: Count
    layers: Count
    dropout: Share
    attn_type: Literal["full", "sparse"]
    attn_dropout: Share
    class_cond: Annotated[bool, Strict()]
    class_cond_dim: Count | None
    n_cond_frames: Annotated[int, Field(ge=0, le=_MOST), Strict()]

    @model_validator(mode="after")
    def _fits(self) -> PriorSettings:
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of heads {self.heads}")
        if self.class_cond != (self.class_cond_dim is not None):
            raise ValueError(f"class_cond={self.class_cond} does not fit class_cond_dim={self.class_cond_dim}")
        if self.n_cond_frames > self.sequence_length:
            raise ValueError(f"n_cond_frames {self.n_cond_frames} exceeds sequence_length {self.sequence_length}")
        if self.n_cond_frames and self.resolution % 4:
            raise ValueError(f"n_cond_frames {self.n_cond_frames} needs a resolution divisible by 4")
        return self

    @property
    def condition_shape(self) -> tuple[int, ...] | None:
        """Shape (n, H, W, 3) of the frames that it is conditioned on; None without a condition."""
        return (self.n_cond_frames, self.resolution, self.resolution, 3) if self.n_cond_frames else None

    def sizes(self, latent_shape: tuple[int, ...], vqvae: VQVAESettings) -> Sizes:
        """Shapes of all weights except those of the VQ-VAE."""
        dim, stack = self.hidden_dim, "attn_stack"
        sizes: Sizes = {
            "fc_in.weight": (dim, vqvae.embedding_dim),
            f"{stack}.right_shift.sos": (dim,),
            "fc_out.weight": (vqvae.n_codes, dim),
        }
        sizes |= _positions(f"{stack}.pos_embd", latent_shape, dim)
        for i in range(self.layers):
            block = f"{stack}.attn_nets.{i}"
            sizes |= self._norm(f"{block}.pre_attn_norm") | self._norm(f"{block}.pre_fc_norm")
            sizes |= _attention(f"{block}.attn", dim, dim, self.heads)
            if self.n_cond_frames:
                sizes |= self._norm(f"{block}.pre_enc_norm")
                sizes |= _attention(f"{block}.enc_attn", dim, _FRAME_DIM, self.heads)
            sizes[f"{block}.fc_block.0.weight"], sizes[f"{block}.fc_block.0.bias"] = (4 * dim, dim), (4 * dim,)
            sizes[f"{block}.fc_block.2.weight"], sizes[f"{block}.fc_block.2.bias"] = (dim, 4 * dim), (dim,)
        if self.n_cond_frames:
            quarter = self.resolution // 4
            sizes |= _positions("cond_pos_embd", (self.n_cond_frames, quarter, quarter), _FRAME_DIM) | _resnet()
        return sizes | self._norm("norm")

    def masks(self, length: int) -> Sizes:
        """Shapes of the causal masks that full attention stores like weights."""
        if self.attn_type != "full":
            return {}
        return {f"attn_stack.attn_nets.{i}.attn.attn.mask": (length, length) for i in range(self.layers)}

    def _norm(self, name: str) -> Sizes:
        if self.class_cond_dim is None:
            return {f"{name}.{part}": (self.hidden_dim,) for part in ("g", "b")}
        return {f"{name}.{part}.weight": (self.hidden_dim, self.class_cond_dim) for part in ("w", "wb")}


def _batch_norm(name: str, width: int) -> Sizes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def _attention(name: str, dim: int, memory_dim: int, num_heads: int) -> Sizes:
    """Sizes of an attention from ``dim`` to ``memory_dim`` channels; those beyond a multiple of the heads drop."""
    keys, values = dim // num_heads * num_heads, memory_dim // num_heads * num_heads
    return {
        f"{name}.w_qs.weight": (keys, dim),
        f"{name}.w_ks.weight": (keys, memory_dim),
        f"{name}.w_vs.weight": (values, memory_dim),
        f"{name}.fc.weight": (dim, values),
        f"{name}.fc.bias": (dim,),
    }


def _positions(name: str, shape: tuple[int, ...], dim: int) -> Sizes:
    return {f"{name}.emb.d_{axis}": (length, dim // len(shape)) for axis, length in enumerate(shape)}


def _resnet() -> Sizes:
    """Sizes of the network over the first frames."""

    def norm(name: str, width: int) -> Sizes:
        return {f"{name}.norm.norm.{part}": (width,) for part in ("weight", "bias")}

    width = WIDTHS[0]
    sizes: Sizes = {"resnet.stem.0.weight": (width, 3, 3, 3, 3)} | norm("resnet.stem.1", width)
    for group, (wider, count) in enumerate(zip((*WIDTHS, _FRAME_DIM), BLOCKS, strict=True), start=1):
        for index in range(count):
            block = f"resnet.group{group}." + (f"blocks.{index - 1}" if index else "start_block")
            if index == 0:
                sizes[f"{block}.proj_conv.weight"] = (wider, width, 1, 1, 1)
                sizes |= norm(f"{block}.proj_bnr", wider)
            sizes[f"{block}.conv1.weight"] = (wider, width, 3, 3, 3)
            sizes[f"{block}.conv2.weight"] = (wider, wider, 3, 3, 3)
            sizes |= norm(f"{block}.bnr1", wider) | norm(f"{block}.bnr2", wider)
            width = wider
    return sizes
