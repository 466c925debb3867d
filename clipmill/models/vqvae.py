"""The tokenizer: a 3D-convolutional VQ-VAE with axial attention.

VideoGPT (arXiv 2104.10157, section 3.1) in the layout of its published code, for any power-of-two
downsampling per axis. Features are kept in channels-last memory, which oneDNN and cuDNN prefer and
which makes the latents' rows and the attention's tokens contiguous.

B: batch   T, H, W: frames, height, width   t, h, w: the same of the latents   C: hidden channels   D: code channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import VQVAEModelConfig
from clipmill.errors import UserError
from clipmill.models.attention import AxialAttention
from clipmill.models.convolutions import Grow, Pointwise, Shrink
from clipmill.models.quantizers import EMACodebook
from clipmill.models.ranks import GlobalBatchNorm

__all__ = ["VQVAE", "VQVAEOutput", "latent_shape", "to_input", "to_pixels"]


def to_input(video: Tensor) -> Tensor:
    """Pixels uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-0.5, 0.5]."""
    return (video.float() / 255 - 0.5).permute(0, 4, 1, 2, 3)


def to_pixels(video: Tensor) -> Tensor:
    """The inverse of ``to_input``, rounded and clipped: uint8 [B, T, H, W, 3]."""
    return ((video.float() + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def latent_shape(config: VQVAEModelConfig, num_frames: int, resolution: int) -> tuple[int, int, int]:
    """Shape (t, h, w) of a clip's codes.

    Raises:
        UserError: the clip's frames or pixels do not divide by the downsampling.
    """
    size = (num_frames, resolution, resolution)
    if any(length % factor for length, factor in zip(size, config.downsample, strict=True)):
        raise UserError(
            f"clips of {num_frames} frames at {resolution}x{resolution} do not divide by vqvae.model.downsample "
            f"{config.downsample}; change it, or data.clip.num_frames and data.clip.resolution"
        )
    t, h, w = (length // factor for length, factor in zip(size, config.downsample, strict=True))
    return t, h, w


def halvings(downsample: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Strides of the convolutions that shrink a clip, first to last: 2 on each axis that still has to shrink."""
    powers = [factor.bit_length() - 1 for factor in downsample]
    t, h, w = ([2] * power + [1] * (max(powers) - power) for power in powers)
    return list(zip(t, h, w, strict=True))


class ResidualBlock(nn.Module):
    """x + [norm, ReLU, conv 3 to half the channels, norm, ReLU, conv 1 back, norm, ReLU, axial attention].

    Without axial attention the block ends with the second convolution.
    """

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        layers: list[nn.Module] = [
            GlobalBatchNorm(dim),
            nn.ReLU(inplace=True),
            nn.Conv3d(dim, dim // 2, kernel_size=3, padding=1, bias=False),
            GlobalBatchNorm(dim // 2),
            nn.ReLU(inplace=True),
            Pointwise(dim // 2, dim, bias=False),
        ]
        if config.axial_attention:
            layers += [GlobalBatchNorm(dim), nn.ReLU(inplace=True), AxialAttention(dim, config.num_heads)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to x [B, C, T, H, W]."""
        return x + self.layers(x)


def residual_stack(config: VQVAEModelConfig) -> nn.Sequential:
    """The residual blocks, then norm and ReLU."""
    blocks = [ResidualBlock(config) for _ in range(config.num_res_layers)]
    return nn.Sequential(*blocks, GlobalBatchNorm(config.hidden_dim), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """Video [B, 3, T, H, W] -> features [B, C, t, h, w]."""

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        strides = halvings(config.downsample)
        self.shrink = nn.ModuleList(Shrink(3 if i == 0 else dim, dim, stride) for i, stride in enumerate(strides))
        self.last = nn.Conv3d(dim, dim, kernel_size=3, padding=1)
        self.stack = residual_stack(config)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes x [B, 3, T, H, W]."""
        for conv in self.shrink:
            x = F.relu(conv(x), inplace=True)
        return self.stack(self.last(x))


class Decoder(nn.Module):
    """Features [B, C, t, h, w] -> video [B, 3, T, H, W]."""

    def __init__(self, config: VQVAEModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        strides = halvings(config.downsample)
        last = len(strides) - 1
        self.stack = residual_stack(config)
        self.grow = nn.ModuleList(Grow(dim, 3 if i == last else dim, stride) for i, stride in enumerate(strides))

    def forward(self, x: Tensor) -> Tensor:
        """Decodes x [B, C, t, h, w]."""
        x = self.stack(x)
        for conv in self.grow[:-1]:
            x = F.relu(conv(x), inplace=True)
        return self.grow[-1](x)


@dataclass(frozen=True)
class VQVAEOutput:
    """What a training step needs."""

    loss: Tensor
    """0-d: mean over this rank's clips that count of ``recon_mse / pixel_variance + commitment_cost * commitment``."""
    metrics: dict[str, Tensor]
    """0-d on the device, without gradient: ``recon_mse``, ``nmse`` (over the pixel variance), ``commitment``,
    ``codebook_usage``, ``codebook_perplexity``, ``codebook_restarts``. In training the
    codebook's are over all ranks."""
    reconstruction: Tensor
    """Float [B, 3, T, H, W]."""
    codes: Tensor
    """int64 [B, t, h, w]."""


class VQVAE(nn.Module):
    """The tokenizer.

    Args:
        config: its sizes.
        pixel_variance: variance of the training data's pixels in [-0.5, 0.5]; the reconstruction error's unit.

    Raises:
        UserError: sizes that do not go together.
    """

    def __init__(self, config: VQVAEModelConfig, pixel_variance: float) -> None:
        super().__init__()
        if max(config.downsample) == 1:
            raise UserError("vqvae.model.downsample (1, 1, 1) compresses nothing; use (4, 4, 4) or (1, 4, 4)")
        if config.hidden_dim % (2 * config.num_heads):
            raise UserError(
                f"vqvae.model.hidden_dim {config.hidden_dim} must be a multiple of 2 * num_heads ({config.num_heads})"
            )
        self.config = config
        self.pixel_variance = pixel_variance
        self.encoder = Encoder(config)
        self.to_latent = Pointwise(config.hidden_dim, config.embedding_dim)
        self.quantizer = EMACodebook(config.num_codes, config.embedding_dim, config.ema_decay, config.restart_share)
        self.from_latent = Pointwise(config.embedding_dim, config.hidden_dim)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor) -> Tensor:
        """Codes int64 [B, t, h, w] of a video [B, 3, T, H, W]; call in eval mode."""
        latents = self._latents(video)
        return self.quantizer(latents.flatten(0, -2)).codes.view(latents.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Video float [B, 3, T, H, W] of codes int64 [B, t, h, w]; call in eval mode."""
        return self._video(F.embedding(codes, self.quantizer.codebook))

    def forward(self, video: Tensor, weight: Tensor | None = None) -> VQVAEOutput:
        """One pass through the bottleneck, with its loss.

        Args:
            video: float [B, 3, T, H, W] in [-0.5, 0.5]; the same B on every rank.
            weight: float32 [B], 0 for a clip that only pads the batch: it enters neither loss nor codebook,
                only (a repeated clip) the batch statistics.
        """
        latents = self._latents(video)
        rows_per_clip = latents.shape[1:-1].numel()
        row_weight = None if weight is None else weight.repeat_interleave(rows_per_clip)
        quantized = self.quantizer(latents.flatten(0, -2), row_weight)
        reconstruction = self._video(quantized.latents.view(latents.shape))
        recon_mse = _weighted_mean(_mse_of_clips(reconstruction, video), weight)
        commitment = _weighted_mean(quantized.commitment.view(len(video), -1).mean(1), weight)
        loss = recon_mse / self.pixel_variance + self.config.commitment_cost * commitment
        metrics = {
            "recon_mse": recon_mse.detach(),
            "nmse": recon_mse.detach() / self.pixel_variance,
            "commitment": commitment.detach(),
        }
        codes = quantized.codes.view(latents.shape[:-1])
        return VQVAEOutput(loss, metrics | quantized.metrics, reconstruction, codes)

    def _latents(self, video: Tensor) -> Tensor:
        """Encoder outputs before quantisation, float [B, t, h, w, D]."""
        video = video.contiguous(memory_format=torch.channels_last_3d)
        return self.to_latent(self.encoder(video)).permute(0, 2, 3, 4, 1).contiguous()

    def _video(self, latents: Tensor) -> Tensor:
        """Video float [B, 3, T, H, W] of latents [B, t, h, w, D]."""
        return self.decoder(self.from_latent(latents.permute(0, 4, 1, 2, 3)))


def _mse_of_clips(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Mean square error of each clip, float32 [B]."""
    return (reconstruction.float() - video.float()).square().mean((1, 2, 3, 4))


def _weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of values [B] over the clips of this rank that count; 0 if none does."""
    if weight is None:
        return values.mean()
    return (values * weight).sum() / weight.sum().clamp(min=1)
