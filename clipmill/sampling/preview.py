"""``samples/NAME/preview/``: some samples as pictures and as videos that every player can show.

grid.mp4           the first samples, side by side
class-NAME.mp4     the first samples of each class
grid.png           a row for each sample of the grid, its frames from left to right; written last
"""

from __future__ import annotations

import re

import numpy as np

from clipmill import storage
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.manifest import Manifest
from clipmill.video.pictures import contact_sheet, playing_grid

__all__ = ["film", "has_preview", "publish_preview", "remove_preview"]

_GRID_SAMPLES = 16
_CLASS_SAMPLES = 8
_MOST_SEARCHED = 2048
"""Maximum number of samples to read in search of some of each class."""
_MOST_FRAMES = 256
"""Maximum length of a previewed sample; longer ones are cut."""
_SHOWN_PIXELS = 128
"""Smaller samples are enlarged by an integer factor, because h264 halves the resolution of colour."""
_GAP_PIXELS = 4


def has_preview(url: str) -> bool:
    """Whether the preview of a sample set is completely published."""
    return storage.exists(_url(url, "grid.png"))


def remove_preview(url: str) -> None:
    """Marks the preview of a sample set as unfinished, before the set changes."""
    if has_preview(url):
        storage.remove(_url(url, "grid.png"))


def publish_preview(manifest: Manifest, fps: float) -> None:
    """Writes the preview of a sample set.

    Args:
        manifest: manifest of the set, which must not be empty.
        fps: frames per second of the videos.
    """
    first, by_class = _chosen(manifest)
    storage.publish_bytes(_url(manifest.url, "grid.mp4"), film(np.stack(first), fps))
    for label, videos in by_class.items():
        name = f"class-{re.sub('[^A-Za-z0-9_.-]+', '_', label)}.mp4"
        storage.publish_bytes(_url(manifest.url, name), film(np.stack(videos), fps))
    storage.publish_bytes(_url(manifest.url, "grid.png"), contact_sheet(np.stack(first)))


def film(videos: np.ndarray, fps: float) -> bytes:
    """An mp4 file that plays videos uint8 [N, T, H, W, 3] side by side, about as many rows as columns."""
    scale = max(1, -(-_SHOWN_PIXELS // min(videos.shape[2:4])))
    columns = int(np.ceil(np.sqrt(len(videos))))
    return playing_grid(videos, fps=fps, scale=scale, gap=_GAP_PIXELS, columns=columns)


def _chosen(manifest: Manifest) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """The first samples, and the first of each class; each uint8 [T, H, W, 3]."""
    dataset = ShardDataset(manifest, decode_clip)
    first: list[np.ndarray] = []
    by_class: dict[str, list[np.ndarray]] = {label: [] for label in manifest.facts["classes"]}
    for index in range(min(len(dataset), _MOST_SEARCHED)):
        short = [label for label, videos in by_class.items() if len(videos) < _CLASS_SAMPLES]
        if len(first) == _GRID_SAMPLES and not short:
            break
        sample = dataset[index]
        video = np.array(sample["video"][:_MOST_FRAMES])
        if len(first) < _GRID_SAMPLES:
            first.append(video)
        if sample["label"] is not None and len(by_class.setdefault(sample["label"], [])) < _CLASS_SAMPLES:
            by_class[sample["label"]].append(video)
    return first, {label: videos for label, videos in by_class.items() if videos}


def _url(url: str, name: str) -> str:
    return storage.join(url, "preview", name)
