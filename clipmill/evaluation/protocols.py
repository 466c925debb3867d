"""Named protocols: the conditions under which published numbers were measured, so that ours are comparable.

A protocol fixes the number of clips, their frames, size and split, the given frames, and the network files, with their
SHA-256 if it is published. A run that does not meet the protocol is refused. Another network file may be used, but the
result says so. docs/evaluation.md names the sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipmill.config import EvaluateConfig, frame_size
from clipmill.errors import UserError

if TYPE_CHECKING:
    from clipmill.evaluation.inputs import Inputs

__all__ = ["PROTOCOLS", "Protocol", "most_clips", "protocol_section", "require_protocol", "split_of"]

_I3D_TORCHSCRIPT = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
"""SHA-256 of ``i3d_torchscript.pt``, as stated by several public projects."""


@dataclass(frozen=True)
class NetworkFile:
    """The network file with which a protocol's published numbers were measured."""

    name: str
    sha256: str | None
    """None if it is not published."""


@dataclass(frozen=True)
class Protocol:
    """The conditions of a set of published numbers."""

    num_clips: int
    """Number of real clips, and of samples."""
    resolution: int
    split: str
    """Split of the real clips."""
    networks: dict[str, NetworkFile]
    """By key of ``evaluate``, without the suffix ``_weights``."""
    source: str
    num_frames: int = 16
    given_frames: int = 0
    fit: str = "crop"
    """How videos become square: the centre is cropped."""
    fps: str = "native, every frame"


PROTOCOLS = {
    "bair-256": Protocol(
        256, 64, "val", {"fvd": NetworkFile("i3d_pretrained_400.pt", None)},
        "VideoGPT, scripts/compute_fvd.py: the 256 test videos, one given frame, 15 generated, 4 trials",
        given_frames=1,
    ),
    "styleganv-2048-16f": Protocol(
        2048, 256, "train", {"fvd": NetworkFile("i3d_torchscript.pt", _I3D_TORCHSCRIPT)},
        "StyleGAN-V, metric fvd2048_16f",
    ),
    "tats-2048": Protocol(
        2048, 128, "train", {"fvd": NetworkFile("i3d_pretrained_400.pt", None)},
        "TATS, scripts/sample_vqgan_transformer_short_videos.py --compute_fvd",
    ),
    "larp-10k": Protocol(
        10_000, 128, "train", {"fvd": NetworkFile("unknown", None)},
        "LARP, sample.py --num_samples 10000 on UCF-101; the file of its I3D is not in its repository",
    ),
    "ucf101-is": Protocol(
        10_000, 128, "train", {"is": NetworkFile("c3d_ucf101.pt", None)},
        "TGAN and its successors on UCF-101: 10,000 samples in their order, cut into 10 equal runs",
    ),
}  # fmt: skip


def most_clips(settings: EvaluateConfig) -> int | None:
    """Number of real clips, and of samples, to read; None reads all.

    Raises:
        UserError: ``max_clips`` is set although a protocol fixes it.
    """
    if settings.protocol is None:
        return settings.max_clips
    if settings.max_clips is not None:
        raise UserError(
            f"evaluate.max_clips and evaluate.protocol={settings.protocol} are both set, which fixes "
            f"{PROTOCOLS[settings.protocol].num_clips} clips; remove evaluate.max_clips"
        )
    return PROTOCOLS[settings.protocol].num_clips


def split_of(settings: EvaluateConfig) -> str:
    """The split of the real clips."""
    return settings.split if settings.protocol is None else PROTOCOLS[settings.protocol].split


def require_protocol(settings: EvaluateConfig, inputs: Inputs, given_frames: int) -> None:
    """Refuses a run that does not meet the configured protocol.

    Args:
        settings: the section ``evaluate``.
        inputs: the inputs that would be measured.
        given_frames: number of given first frames of the samples.

    Raises:
        UserError: one line that names every difference.
    """
    most_clips(settings)  # refuses max_clips beside a protocol
    if settings.protocol is None:
        return
    protocol, clip = PROTOCOLS[settings.protocol], inputs.clips.recipe["clip"]
    side = protocol.resolution
    wanted: dict[str, tuple[Any, Any]] = {
        "data.clip.num_frames": (protocol.num_frames, clip["num_frames"]),
        "data.clip.resolution": ((side, side), frame_size(clip["resolution"])),
        "data.clip.fit": (protocol.fit, clip.get("fit")),
    }
    if inputs.samples is not None:
        wanted["given frames of the samples"] = (protocol.given_frames, given_frames)
    problems = [f"{key} is {found}, not {value}" for key, (value, found) in wanted.items() if value != found]
    sets = {"real clips": inputs.clips, "samples": inputs.samples}
    problems += [
        f"there are {manifest.num_samples} {name}, not {protocol.num_clips}"
        for name, manifest in sets.items()
        if manifest is not None and manifest.num_samples < protocol.num_clips
    ]
    if problems:
        raise UserError(
            f"evaluate.protocol={settings.protocol} is not met: {'; '.join(problems)}. Change this, or unset the key"
        )


def protocol_section(settings: EvaluateConfig, weights_sha256: dict[str, str | None]) -> dict[str, Any] | None:
    """Section ``protocol`` of ``metrics.json``: its conditions, and whether its network files were used."""
    if settings.protocol is None:
        return None
    protocol = PROTOCOLS[settings.protocol]
    return {
        "name": settings.protocol,
        "num_clips": protocol.num_clips,
        "num_frames": protocol.num_frames,
        "given_frames": protocol.given_frames,
        "resolution": protocol.resolution,
        "fps": protocol.fps,
        "fit": protocol.fit,
        "split": protocol.split,
        "source": protocol.source,
        "networks": {key: _network(file, weights_sha256[key]) for key, file in protocol.networks.items()},
    }


def _network(file: NetworkFile, used: str | None) -> dict[str, str | None]:
    if used is None:
        status = f"not measured: {file.name} was not given"
    elif file.sha256 is None:
        status = f"unknown whether it is the protocol's file: no hash of {file.name} is publicly stated"
    elif used == file.sha256:
        status = f"{file.name}, the protocol's own file"
    else:
        status = f"another file than the protocol's {file.name}"
    return {"file": file.name, "sha256": file.sha256, "used_sha256": used, "status": status}
