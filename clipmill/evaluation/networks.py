"""Networks that users bring as TorchScript files, because we may not distribute their weights.

    evaluate.fvd_weights    I3D    uint8 [B, 3, T, H, W], rescale=True, resize=True, return_features=True -> [B, 400]
    evaluate.is_weights     C3D    uint8 [B, 3, 16, H, W] -> probabilities [B, 101]
    evaluate.lpips_weights  LPIPS  two float32 [N, 3, H, W] in [-1, 1] -> N distances, of any shape

The first two signatures are those of ``i3d_torchscript.pt`` and ``c3d_ucf101.pt``, which published numbers use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.config import EvaluateConfig
from clipmill.errors import UserError
from clipmill.models.torchscript import load_torchscript, reason_of

__all__ = ["I3D_CHANNELS", "I3D_FEWEST_FRAMES", "C3D_FRAMES", "Network", "Networks"]

I3D_CHANNELS = 400
I3D_FEWEST_FRAMES = 9
"""Minimum number of frames: its strides reduce fewer to nothing."""
C3D_FRAMES = 16
C3D_CLASSES = 101


class Network:
    """A TorchScript module from a file, in eval mode.

    Args:
        key: the config key that names the file.
        url: of the file.
        device: to run on.

    Raises:
        UserError: the file does not exist, or is not TorchScript.
    """

    def __init__(self, key: str, url: str, device: torch.device) -> None:
        self._name = f"{key} {url}"
        self._device = device
        self._module = load_torchscript(key, url, device)

    def features(self, clips: NDArray[np.uint8]) -> NDArray[np.floating]:
        """I3D's logits of clips uint8 [B, T, H, W, 3]: [B, 400], in the network's dtype."""

        def call(video: Tensor) -> Tensor:
            return self._module(video, rescale=True, resize=True, return_features=True)

        return self._checked(call, (len(clips), I3D_CHANNELS), self._channels_first(clips))

    def probabilities(self, clips: NDArray[np.uint8]) -> NDArray[np.floating]:
        """C3D's class probabilities of clips uint8 [B, 16, H, W, 3]: [B, 101], in the network's dtype."""
        return self._checked(self._module, (len(clips), C3D_CLASSES), self._channels_first(clips))

    def distances(self, original: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> NDArray[np.float64]:
        """LPIPS of clips uint8 [B, T, H, W, 3], averaged over the frames of each: float64 [B]."""
        per_clip = np.empty(len(original), np.float64)
        for clip, pair in enumerate(zip(original, reconstruction, strict=True)):  # features of a batch need gigabytes
            frames = [torch.from_numpy(video).to(self._device).permute(0, 3, 1, 2) / 127.5 - 1 for video in pair]
            per_clip[clip] = self._checked(
                lambda *inputs: self._module(*inputs).reshape(-1), (len(pair[0]),), *frames
            ).mean(dtype=np.float64)
        return per_clip

    def _channels_first(self, clips: NDArray[np.uint8]) -> Tensor:
        """[B, T, H, W, 3] -> [B, 3, T, H, W] on the device."""
        return torch.from_numpy(clips).to(self._device).permute(0, 4, 1, 2, 3).contiguous()

    def _checked(self, call: Callable[..., Any], shape: tuple[int, ...], *inputs: Tensor) -> NDArray[np.floating]:
        """Calls the network and checks that the result is finite and has the given shape.

        Raises:
            UserError: the result is not, or the network does not accept these inputs.
        """
        try:
            with torch.inference_mode():
                output = call(*inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:  # an operation failed; the module raised an exception
            raise UserError(f"{self._name} cannot be called as docs/evaluation.md says: {reason_of(error)}") from error
        if not isinstance(output, Tensor) or output.shape != shape:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{self._name} returned {found}, not {list(shape)}; docs/evaluation.md says what it must be"
            )
        if not output.isfinite().all():
            raise UserError(f"{self._name} returned NaN or infinity; use its weights in float32, or another file")
        return output.cpu().numpy()


@dataclass(frozen=True)
class Networks:
    """The networks that the section ``evaluate`` names; None for those it does not name."""

    i3d: Network | None = None
    c3d: Network | None = None
    lpips: Network | None = None

    @classmethod
    def load(cls, settings: EvaluateConfig, device: torch.device) -> Networks:
        """Loads all networks, before anything is measured.

        Raises:
            UserError: a file does not exist, or is not TorchScript.
        """

        def network(key: str, url: str | None) -> Network | None:
            return None if url is None else Network(f"evaluate.{key}", url, device)

        return cls(
            network("fvd_weights", settings.fvd_weights),
            network("is_weights", settings.is_weights),
            network("lpips_weights", settings.lpips_weights),
        )
