"""A plain implementation of the published tokenizer (VideoGPT, arXiv 2104.10157), for `vqvae.py` and `quality.py`.

Its layers are computed as in the public code, with PyTorch's own operations and layout: SAME padding by a copy,
separate projections and an explicit softmax in each attention, and a codebook that learns through an N x K one-hot
table. Nothing is slower than in that code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import VQVAEModelConfig
from clipmill.models.coders import halvings

__all__ = ["PublishedVQVAE"]


def same_padding(kernel: int, stride: tuple[int, int, int]) -> list[int]:
    """For `F.pad` (last axis first); of an odd padding more is in front."""
    total = [kernel - s for s in reversed(stride)]
    return [part for pad in total for part in (pad // 2 + pad % 2, pad // 2)]


class SameConv(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1), bias=True):
        super().__init__()
        self.padding = same_padding(kernel, stride)
        self.conv = nn.Conv3d(in_dim, out_dim, kernel, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class SameConvTranspose(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.padding = same_padding(kernel, stride)
        self.conv = nn.ConvTranspose3d(in_dim, out_dim, kernel, stride, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Attention(nn.Module):
    """Multi-head attention along one axis of [B, T, H, W, C]."""

    def __init__(self, dim: int, num_heads: int, axis: int) -> None:
        super().__init__()
        self.num_heads, self.axis = num_heads, axis
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(part(x)) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).movedim(-2, self.axis + 1).movedim(1, -2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, heads, two other axes, length, D] of [B, T, H, W, C]."""
        return x.unflatten(-1, (self.num_heads, -1)).movedim(-2, 1).movedim(self.axis + 1, -2)


class AxialAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.along = nn.ModuleList(Attention(dim, num_heads, axis) for axis in (3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        return sum(attention(x) for attention in self.along).movedim(-1, 1)


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm3d(dim),
            nn.ReLU(),
            SameConv(dim, dim // 2, 3, bias=False),
            nn.BatchNorm3d(dim // 2),
            nn.ReLU(),
            SameConv(dim // 2, dim, 1, bias=False),
            nn.BatchNorm3d(dim),
            nn.ReLU(),
            AxialAttention(dim, num_heads),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residual_stack(config: VQVAEModelConfig) -> list[nn.Module]:
    blocks = [ResidualBlock(config.hidden_dim, config.num_heads) for _ in range(config.num_res_layers)]
    return [*blocks, nn.BatchNorm3d(config.hidden_dim), nn.ReLU()]


class Codebook(nn.Module):
    """Nearest codes, and their moving averages through a one-hot table [N, K]."""

    def __init__(self, num_codes: int, dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("embeddings", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.embeddings.clone())
        self.is_started = False

    def codes(self, rows: Tensor) -> Tensor:
        """int64 [N] of rows [N, D]."""
        squares = rows.square().sum(1, keepdim=True) + self.embeddings.t().square().sum(0, keepdim=True)
        return (squares - 2 * rows @ self.embeddings.t()).argmin(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, D, t, h, w] -> embeddings of the same shape, commitment, perplexity."""
        rows = z.movedim(1, -1).flatten(0, -2)
        if self.training and not self.is_started:
            self._start(rows.detach())
        codes = self.codes(rows)
        onehot = F.one_hot(codes, len(self.embeddings)).type_as(rows)
        chosen = F.embedding(codes.view(z.shape[0], *z.shape[2:]), self.embeddings).movedim(-1, 1)
        commitment = F.mse_loss(z, chosen.detach())
        if self.training:
            self._update(rows.detach(), onehot)
        share = onehot.mean(0)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        return z + (chosen - z).detach(), commitment, perplexity

    @torch.no_grad()
    def _update(self, rows: Tensor, onehot: Tensor) -> None:
        self.counts.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(onehot.t() @ rows, alpha=1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-7) / (total + len(self.counts) * 1e-7) * total
        self.embeddings.copy_(self.sums / smoothed[:, None])
        used = (self.counts >= 1).float()[:, None]
        self.embeddings.mul_(used).add_(self._random_rows(rows) * (1 - used))

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """Takes rows of the first batch as codes."""
        self.is_started = True
        self.embeddings.copy_(self._random_rows(rows))
        self.sums.copy_(self.embeddings)
        self.counts.fill_(1)

    def _random_rows(self, rows: Tensor) -> Tensor:
        """A row for each code; where there are fewer rows, some with noise more than once."""
        if len(rows) < len(self.counts):
            rows = rows.repeat(-(-len(self.counts) // len(rows)), 1)
            rows = rows + torch.randn_like(rows) * 0.01 / rows.shape[1] ** 0.5
        return rows[torch.randperm(len(rows), device=rows.device)][: len(self.counts)]


class PublishedVQVAE(nn.Module):
    """The published tokenizer."""

    def __init__(self, config: VQVAEModelConfig, pixel_variance: float) -> None:
        super().__init__()
        dim, strides = config.hidden_dim, halvings(config.downsample)
        self.commitment_cost, self.pixel_variance = config.commitment_cost, pixel_variance
        encoder: list[nn.Module] = []
        for index, stride in enumerate(strides):
            encoder += [SameConv(dim if index else 3, dim, 4, stride), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder, SameConv(dim, dim, 3), *residual_stack(config))
        self.to_latent = SameConv(dim, config.embedding_dim, 1)
        self.codebook = Codebook(config.num_codes, config.embedding_dim, config.ema_decay)
        self.from_latent = SameConv(config.embedding_dim, dim, 1)
        decoder: list[nn.Module] = []
        for index, stride in enumerate(strides):
            last = index == len(strides) - 1
            decoder += [SameConvTranspose(dim, 3 if last else dim, 4, stride), *([] if last else [nn.ReLU()])]
        self.decoder = nn.Sequential(*residual_stack(config), *decoder)

    def start_as_released(self) -> None:
        """Draws the attentions' weights as the released code does; the others start as torch's layers do there, too."""
        for attention in (each for each in self.modules() if isinstance(each, Attention)):
            for layer in (attention.q, attention.k, attention.v, attention.out):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def decode(self, codes: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] of codes int64 [B, t, h, w]."""
        return self.decoder(self.from_latent(F.embedding(codes, self.codebook.embeddings).movedim(-1, 1)))

    def encode(self, video: Tensor) -> Tensor:
        """Codes int64 [B, t, h, w] of a video [B, 3, T, H, W]."""
        z = self.to_latent(self.encoder(video))
        return self.codebook.codes(z.movedim(1, -1).flatten(0, -2)).view(z.shape[0], *z.shape[2:])

    def forward(self, video: Tensor) -> Tensor:
        """The loss of a video [B, 3, T, H, W], 0-d."""
        latents, commitment, _ = self.codebook(self.to_latent(self.encoder(video)))
        reconstruction = self.decoder(self.from_latent(latents))
        return F.mse_loss(reconstruction, video) / self.pixel_variance + self.commitment_cost * commitment
