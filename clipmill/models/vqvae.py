"""The tokenizer: a 3D-convolutional VQ-VAE with axial attention.

VideoGPT (arXiv 2104.10157, section 3.1), laid out as in its published code, for any power-of-two downsampling per axis.
Features are kept in channels-last memory, which oneDNN and cuDNN prefer, and which makes the rows of latents and the
tokens of attention contiguous.

B: batch   T, H, W: frames, height, width   t, h, w: those of the latents   C: hidden channels
D: channels of a latent   M: codebooks (codes have a last axis [M] if M > 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipmill.config import VQVAEModelConfig
from clipmill.errors import UserError
from clipmill.models.coders import Decoder, Encoder
from clipmill.models.convolutions import Pointwise
from clipmill.models.lookup_free import FiniteScalar, LookupFree
from clipmill.models.modern_coders import ModernDecoder, ModernEncoder
from clipmill.models.quantizers import EMACodebook, LinearCodebook

__all__ = ["VQVAE", "VQVAEOutput", "codes_shape", "latent_shape", "to_input", "to_pixels"]


def to_input(video: Tensor) -> Tensor:
    """Pixels uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-0.5, 0.5]."""
    return (video.float() / 255 - 0.5).permute(0, 4, 1, 2, 3)


def to_pixels(video: Tensor) -> Tensor:
    """The inverse of ``to_input``, rounded and clipped: uint8 [B, T, H, W, 3]."""
    return ((video.float() + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def latent_shape(config: VQVAEModelConfig, num_frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """Shape (t, h, w) of a clip's latents.

    Args:
        config: config of the tokenizer.
        num_frames: T.
        size: (H, W) in pixels.

    Raises:
        UserError: the downsampling does not divide the clip's frames or pixels.
    """
    first = 1 if config.causal else 0  # in a causal model, the first frame has its own latent frame
    lengths = (num_frames - first, *size)
    if any(length % factor for length, factor in zip(lengths, config.downsample, strict=True)):
        rule = f" (causal: 1 + a multiple of {config.downsample[0]} frames)" if config.causal else ""
        raise UserError(
            f"clips of {num_frames} frames of {size[0]} x {size[1]} pixels do not divide by vqvae.model.downsample "
            f"{config.downsample}{rule}; change it, or data.clip.num_frames and data.clip.resolution"
        )
    t, h, w = (length // factor for length, factor in zip(lengths, config.downsample, strict=True))
    return first + t, h, w


def num_frames_of(config: VQVAEModelConfig, num_latents: int) -> int:
    """Number of frames of the first ``num_latents`` latent frames. In a causal model, the first frame has its own."""
    factor = config.downsample[0]
    return 1 + (num_latents - 1) * factor if config.causal and num_latents else num_latents * factor


def whole_latents_of(config: VQVAEModelConfig, num_frames: int) -> int:
    """Number of latent frames that are fully covered by the first ``num_frames`` frames."""
    factor = config.downsample[0]
    return 1 + (num_frames - 1) // factor if config.causal and num_frames else num_frames // factor


def codes_shape(config: VQVAEModelConfig, num_frames: int, size: tuple[int, int]) -> tuple[int, ...]:
    """Shape (t, h, w) or, with several codebooks, (t, h, w, M) of a clip's codes; arguments as for `latent_shape`."""
    shape = latent_shape(config, num_frames, size)
    return shape if config.num_codebooks == 1 else (*shape, config.num_codebooks)


@dataclass(frozen=True)
class VQVAEOutput:
    """Result of a forward pass, for a training step."""

    loss: Tensor
    """0-d: ``recon_mse / pixel_variance + commitment_cost * commitment``, averaged over this rank's clips with weight.
    If configured, plus ``l1_cost * recon_l1 / sqrt(pixel_variance)``, ``entropy_cost * entropy`` and the quantizer's
    codebook loss.
    """
    metrics: dict[str, Tensor]
    """0-d on the device, without gradient: ``recon_mse``, ``nmse`` (recon_mse over the pixel variance), ``commitment``;
    ``recon_l1`` and ``entropy`` if they are part of the loss; in training also the quantizer's metrics, over all ranks.
    """
    reconstruction: Tensor
    """Float [B, 3, T, H, W]."""
    codes: Tensor
    """int64 [B, t, h, w] or [B, t, h, w, M]."""
    counts: Tensor
    """float32 [M * K]: rows per code; over all ranks in training mode, otherwise over this rank."""


class _ValidParts(NamedTuple):
    """The valid (not padded) parts of a batch of clips."""

    frames: Tensor
    """Bool [B, 1, T, 1, 1]: whether a frame is valid."""
    rows: Tensor
    """Float32 [B, rows of a clip]: 1 for a valid row of latents, otherwise 0."""
    scale: Tensor
    """Float32 [B]: number of frames over the number of valid frames."""


class VQVAE(nn.Module):
    """The tokenizer.

    Args:
        config: sizes.
        pixel_variance: variance of the training data's pixels in [-0.5, 0.5]; the unit of the reconstruction error.

    Raises:
        UserError: the sizes are not compatible.
    """

    def __init__(self, config: VQVAEModelConfig, pixel_variance: float) -> None:
        super().__init__()
        if max(config.downsample) == 1:
            raise UserError("vqvae.model.downsample (1, 1, 1) compresses nothing; use (4, 4, 4) or (1, 4, 4)")
        if min(config.hidden_dim, config.decoder_width) < max(2, config.num_heads):
            raise UserError(
                f"vqvae.model.hidden_dim {config.hidden_dim} and decoder_dim must be at least 2, and num_heads "
                f"({config.num_heads})"
            )
        self.config = config
        self.pixel_variance = pixel_variance
        is_modern = config.style == "modern"
        self.encoder = ModernEncoder(config) if is_modern else Encoder(config)
        self.to_latent = Pointwise(config.hidden_dim, config.latent_dim)
        self.quantizer = make_quantizer(config)
        self.from_latent = Pointwise(config.latent_dim, config.decoder_width)
        self.decoder = ModernDecoder(config) if is_modern else Decoder(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules to compile, each as a whole: encoder and decoder."""
        return [self.encoder, self.decoder]

    def encode(self, video: Tensor) -> Tensor:
        """Codes int64 [B, t, h, w] or [B, t, h, w, M] of a video [B, 3, T, H, W]; call in eval mode."""
        latents = self._latents(video)
        return self._as_clips(self.quantizer(latents.flatten(0, -2)).codes, latents)

    def decode(self, codes: Tensor) -> Tensor:
        """Video float [B, 3, T, H, W] of codes int64 [B, t, h, w] or [B, t, h, w, M]; call in eval mode."""
        return self._video(self.quantizer.embed(codes[..., None] if self.config.num_codebooks == 1 else codes))

    def forward(self, video: Tensor, weight: Tensor | None = None, num_frames: Tensor | None = None) -> VQVAEOutput:
        """Encodes, quantises and decodes a batch, and computes the loss.

        Args:
            video: float [B, 3, T, H, W] in [-0.5, 0.5]; the same B on every rank.
            weight: float32 [B], 0 for a clip that only pads the batch. Such a clip affects neither loss nor codebook,
                only batch statistics. None weights all clips by 1.
            num_frames: number of valid first frames of each clip, int64 [B]. The rest is padding up to T and affects
                neither loss nor codebook; in a causal model with group norm it does not affect the valid frames either.
                None: all frames are valid.
        """
        latents = self._latents(video)
        counts = None if num_frames is None else self._valid_parts(num_frames, video, latents)
        rows_per_clip = latents.shape[1:-1].numel()
        row_weight = None if weight is None else weight.repeat_interleave(rows_per_clip)
        if counts is not None:
            row_weight = counts.rows.flatten() if row_weight is None else row_weight * counts.rows.flatten()
        quantized = self.quantizer(latents.flatten(0, -2), row_weight)
        reconstruction = self._video(quantized.latents.view(latents.shape))
        scale = 1.0 if counts is None else counts.scale
        if counts is not None:  # padded frames are replaced by the input, so that no loss sees an error there
            reconstruction = torch.where(counts.frames, reconstruction, video.to(reconstruction.dtype))
        recon_mse = _weighted_mean(_mse_of_clips(reconstruction, video) * scale, weight)
        commitment = _weighted_mean(_mean_of_rows(quantized.commitment, len(video), counts), weight)
        loss = recon_mse / self.pixel_variance + self.config.commitment_cost * commitment
        optional = {}
        if self.config.l1_cost:
            optional["recon_l1"] = _weighted_mean(
                (reconstruction.float() - video).abs().mean((1, 2, 3, 4)) * scale, weight
            )
            loss = loss + self.config.l1_cost * optional["recon_l1"] / self.pixel_variance**0.5
        if quantized.codebook_loss is not None:
            loss = loss + _weighted_mean(_mean_of_rows(quantized.codebook_loss, len(video), counts), weight)
        if quantized.entropy is not None:
            optional["entropy"] = quantized.entropy
            loss = loss + self.config.entropy_cost * quantized.entropy
        metrics = {
            "recon_mse": recon_mse.detach(),
            "nmse": recon_mse.detach() / self.pixel_variance,
            "commitment": commitment.detach(),
            **{name: value.detach() for name, value in optional.items()},
            **quantized.metrics,
        }
        codes = self._as_clips(quantized.codes, latents)
        return VQVAEOutput(loss, metrics, reconstruction, codes, quantized.counts)

    def _valid_parts(self, num_frames: Tensor, video: Tensor, latents: Tensor) -> _ValidParts:
        """The valid parts of clips [B, 3, T, H, W] and of their latents [B, t, h, w, D]."""
        frames = torch.arange(video.shape[2], device=video.device) < num_frames[:, None]
        first = 1 if self.config.causal else 0
        num_latents = first + (num_frames - first) // self.config.downsample[0]
        rows = (torch.arange(latents.shape[1], device=video.device) < num_latents[:, None]).float()
        rows = rows[:, :, None].expand(-1, -1, latents.shape[2:-1].numel()).flatten(1)
        return _ValidParts(frames[:, None, :, None, None], rows, video.shape[2] / num_frames)

    def _as_clips(self, codes: Tensor, latents: Tensor) -> Tensor:
        """Reshapes codes [N, M] to the shape of latents [B, t, h, w, D]."""
        shape = latents.shape[:-1]
        return codes.view(shape if self.config.num_codebooks == 1 else (*shape, -1))

    def _latents(self, video: Tensor) -> Tensor:
        """Encoder outputs before quantisation, float [B, t, h, w, D]."""
        video = video.contiguous(memory_format=torch.channels_last_3d)
        return self.to_latent(self.encoder(video)).permute(0, 2, 3, 4, 1).contiguous()

    def _video(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, t, h, w, D] to video float [B, 3, T, H, W]."""
        return self.decoder(self.from_latent(latents.permute(0, 4, 1, 2, 3)))


def make_quantizer(config: VQVAEModelConfig) -> EMACodebook | LinearCodebook | FiniteScalar | LookupFree:
    """The configured quantizer."""
    if config.quantizer == "fsq":
        return FiniteScalar(config.fsq_levels, config.num_codebooks)
    if config.quantizer in ("lfq", "bsq"):
        num_bits = config.num_codes.bit_length() - 1
        spherical = config.quantizer == "bsq"
        return LookupFree(num_bits, config.num_codebooks, config.entropy_temperature, spherical)
    if config.quantizer == "simvq":
        return LinearCodebook(config.num_codes, config.embedding_dim, config.num_codebooks, config.code_gradient)
    return EMACodebook(
        config.num_codes,
        config.embedding_dim,
        config.ema_decay,
        config.restart_share,
        config.num_codebooks,
        cosine=config.distance == "cosine",
        start=config.codebook_start,
        gradient=config.code_gradient,
    )


def _mse_of_clips(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Mean square error of each clip, float32 [B]."""
    return (reconstruction.float() - video.float()).square().mean((1, 2, 3, 4))


def _mean_of_rows(values: Tensor, num_clips: int, counts: _ValidParts | None) -> Tensor:
    """Mean of values [N] over the valid rows of each clip, float32 [B]."""
    values = values.view(num_clips, -1)
    return values.mean(1) if counts is None else (values * counts.rows).sum(1) / counts.rows.sum(1)


def _weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean of values [B] over the clips of this rank; 0 if all weights are 0."""
    if weight is None:
        return values.mean()
    return (values * weight).sum() / weight.sum().clamp(min=1)
