"""Losses that reward sharp reconstructions: distances in other networks' features, and an adversarial loss.

All terms are computed on a detached reconstruction, and their gradients with respect to it are computed here, once. The
adversarial gradient can thus be scaled relative to the others, and no network runs backward twice.

B: batch   T, H, W: frames, height, width   N: frames that the networks see
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import SharpnessConfig
from clipmill.errors import UserError
from clipmill.models.discriminator import PatchDiscriminator
from clipmill.models.ranks import sum_over_ranks
from clipmill.models.torchscript import load_torchscript, reason_of, weights_sha256

__all__ = ["Sharpness", "networks_sha256"]

SECTION = "vqvae.sharpness"
MOST_ADVERSARIAL_SCALE = 1e4
"""Maximum weight of the discriminator's gradient; limits it in steps where that gradient is nearly zero."""


def networks_sha256(config: SharpnessConfig) -> dict[str, str]:
    """Hashes of the networks that enter the loss, by name.

    Raises:
        UserError: a file is not there.
    """
    files = {"perceptual": config.perceptual_weights, "gram": config.gram_weights}
    return {name: weights_sha256(f"{SECTION}.{name}_weights", url) for name, url in files.items() if url is not None}


class Sharpness(nn.Module):
    """The configured terms. The tokenizer's optimizer also trains the discriminator in here.

    Args:
        config: which terms, and their weights.
        device: of the fixed networks. They are not submodules, so they are not moved, trained or saved.

    Raises:
        UserError: a file does not exist, or is not TorchScript.
    """

    def __init__(self, config: SharpnessConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self._networks: dict[str, Any] = {}
        for name, url in (("perceptual", config.perceptual_weights), ("gram", config.gram_weights)):
            if url is not None:
                self._networks[name] = load_torchscript(f"{SECTION}.{name}_weights", url, device)
                for parameter in self._networks[name].parameters():
                    parameter.requires_grad_(False)
        self.discriminator = None
        if config.adversarial_cost:
            self.discriminator = PatchDiscriminator(config.discriminator_dim, config.discriminator_layers)

    def forward(
        self, base: Tensor, reconstruction: Tensor, video: Tensor, step: int, num_frames: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's loss with these terms, and the discriminator's own.

        Args:
            base: the loss without them, 0-d. The discriminator's gradient at the reconstruction is scaled relative to
                the gradient of this loss and of the fixed networks' terms.
            reconstruction: float [B, 3, T, H, W].
            video: float [B, 3, T, H, W] in [-0.5, 0.5].
            step: steps done so far.
            num_frames: real frames of each clip, int64 [B]; later frames are padding. The last real frame replaces them
                in reconstruction and video, so a picture is treated as a still video. None: all frames are real.

        Returns:
            The sum, 0-d, and 0-d metrics: ``perceptual``, ``gram``, ``realism`` and ``discriminator``, as far as they
            are configured.
        """
        if not self._networks and self.discriminator is None:
            return base, {}
        seen = reconstruction.detach().float().requires_grad_()
        with torch.autocast(video.device.type, enabled=False):
            terms = self._compare(_still_after(seen, num_frames), _still_after(video, num_frames))
        costs = {"perceptual": self.config.perceptual_cost, "gram": self.config.gram_cost}
        gradient = torch.zeros_like(seen)
        loss = base
        if terms:
            value = torch.stack([costs[name] * term for name, term in terms.items()]).sum()
            (gradient,) = torch.autograd.grad(value, seen)
            loss = loss + value.detach()
        metrics = {name: term.detach() for name, term in terms.items()}
        if self.discriminator is not None:
            (base_gradient,) = torch.autograd.grad(base, reconstruction, retain_graph=True)
            own, adversarial, more = self._oppose(seen, video, num_frames, gradient + base_gradient.float(), step)
            gradient = gradient + adversarial
            loss = loss + own
            metrics |= more
        # Adds zero to the loss, but has the gradient that was computed above.
        surrogate = (reconstruction.float() * gradient).sum()
        return loss + surrogate - surrogate.detach(), metrics

    def _compare(self, seen: Tensor, video: Tensor) -> dict[str, Tensor]:
        """Losses of the fixed networks, 0-d each."""
        if not self._networks:
            return {}
        chosen = torch.rand(video.shape[0], video.shape[2], device=video.device).argsort(1)[:, : self.config.frames]
        frames = [_frames(each, chosen) for each in (seen, video)]
        terms = {}
        if "perceptual" in self._networks:
            distances = self._call("perceptual", *frames)
            if not isinstance(distances, Tensor) or distances.numel() != len(frames[0]):
                raise self._refused("perceptual", f"one distance for each of {len(frames[0])} frames", distances)
            terms["perceptual"] = distances.float().mean()
        if "gram" in self._networks:
            ours, theirs = (self._features(each) for each in frames)
            pairs = zip(ours, theirs, strict=True)
            terms["gram"] = torch.stack([F.mse_loss(_gram(a), _gram(b)) for a, b in pairs]).mean()
        return terms

    def _features(self, frames: Tensor) -> list[Tensor]:
        found = self._call("gram", frames)
        maps = [found] if isinstance(found, Tensor) else found
        is_maps = isinstance(maps, list | tuple) and maps and all(isinstance(each, Tensor) for each in maps)
        if not is_maps or any(each.dim() != 4 or len(each) != len(frames) for each in maps):
            raise self._refused("gram", f"feature maps [{len(frames)}, C, h, w]", found)
        return list(maps)

    def _call(self, name: str, *frames: Tensor) -> Any:
        try:
            return self._networks[name](*frames)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            raise UserError(
                f"{SECTION}.{name}_weights cannot be called as docs/training.md says: {reason_of(error)}"
            ) from error

    def _refused(self, name: str, wanted: str, found: Any) -> UserError:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        return UserError(
            f"{SECTION}.{name}_weights returned {shape}, not {wanted}; docs/training.md says what it must be"
        )

    def _oppose(
        self, seen: Tensor, video: Tensor, num_frames: Tensor | None, others: Tensor, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The discriminator's own loss, its scaled gradient at the reconstruction, and metrics.

        Args:
            seen: the detached reconstruction.
            video: the original.
            num_frames: see `forward`.
            others: the gradient of all other terms at the reconstruction.
            step: steps done so far.
        """
        assert self.discriminator is not None
        start = self.config.adversarial_start
        if step < start // 2:
            # The gradients must be zero, not None: the optimizer needs states of all parameters from the first step.
            idle = torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum() * 0
            return idle, torch.zeros_like(seen), {"realism": idle.detach(), "discriminator": idle.detach()}
        verdict = self.discriminator.judge(_still_after(seen, num_frames), _still_after(video, num_frames))
        own = verdict.loss + self.config.lecam_cost * verdict.lecam
        metrics = {"realism": verdict.realism.detach(), "discriminator": verdict.loss.detach()}
        if step < start:
            return own, torch.zeros_like(seen), metrics
        (gradient,) = torch.autograd.grad(-verdict.realism, seen, retain_graph=True)
        # All ranks use one scale, as if a single rank had all clips.
        norms = sum_over_ranks(torch.stack((others.square().sum(), gradient.square().sum()))).sqrt()
        scale = (norms[0] / norms[1].clamp(min=1e-12)).clamp(max=MOST_ADVERSARIAL_SCALE)
        return own, self.config.adversarial_cost * scale * gradient, metrics


def _still_after(video: Tensor, num_frames: Tensor | None) -> Tensor:
    """A video [B, 3, T, H, W]; each clip repeats a frame after its first ``num_frames`` (int64 [B]) frames."""
    if num_frames is None:
        return video
    index = torch.arange(video.shape[2], device=video.device).minimum(num_frames[:, None] - 1)  # [B, T]
    return video.gather(2, index[:, None, :, None, None].expand_as(video))


def _frames(video: Tensor, chosen: Tensor) -> Tensor:
    """Frames int64 [B, N] of a video [B, 3, T, H, W], float32 [B * N, 3, H, W] in [-1, 1]."""
    index = chosen[:, :, None, None, None].expand(-1, -1, *video.shape[1:2], *video.shape[3:])
    return 2 * video.float().transpose(1, 2).gather(1, index).flatten(0, 1)


def _gram(features: Tensor) -> Tensor:
    """Products of channels averaged over places, [N, C, C], of features [N, C, h, w]."""
    rows = features.float().flatten(2)
    return rows @ rows.transpose(1, 2) / rows.shape[2]
