"""Describes a data set: counts, classes, durations, and a contact sheet."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import yaml

from clipmill import storage
from clipmill.errors import UserError
from clipmill.shards.commits import committed_units, read_commits
from clipmill.shards.dataset import ShardDataset, decode_clip, decode_codes
from clipmill.shards.manifest import Manifest
from clipmill.video.pictures import contact_sheet

__all__ = ["inspect"]

SHEET_CLIPS = 16


def inspect(url: str) -> dict[str, Any]:
    """Describes one frozen split of clips (such as ``runs/demo/clips/train``) or of tokens, or a set of samples.

    Returns:
        ``clips``, ``tokens`` or ``samples``, ``shards``, ``bytes``, ``fingerprint``, ``recipe``; ``contact_sheet``, a
        PNG of up to `SHEET_CLIPS` clips spread evenly over the split, or None if it is empty; tokens are decoded by the
        tokenizer that made them. For clips also ``videos``; ``classes`` {label: clips} (clips without a label under
        ``"-"``); ``video_seconds`` {min, median, max, total} over the videos that state a duration; ``excluded``
        [{url, cause}].

    Raises:
        UserError: there is no manifest, or the tokenizer of tokens no longer exists.
    """
    url = storage.absolute(url)
    try:
        manifest = Manifest.load(url)
    except FileNotFoundError as error:
        raise UserError(
            f"{url} holds no finished clips, tokens or samples; name a split of a run, such as runs/demo/clips/train"
        ) from error
    sheet = _sheet(manifest) if manifest.num_samples else None
    return _common(manifest) | (_of_videos(manifest) if manifest.kind == "clips" else {}) | {"contact_sheet": sheet}


def _common(manifest: Manifest) -> dict[str, Any]:
    """The facts that clips and samples share."""
    return {
        manifest.kind: manifest.num_samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "fingerprint": manifest.fingerprint,
        "recipe": manifest.recipe,
    }


def _of_videos(manifest: Manifest) -> dict[str, Any]:
    """The facts about a split's videos, from the commit records."""
    classes: Counter[str] = Counter()
    durations: list[float] = []
    excluded: dict[str, dict[str, Any]] = {}
    for record in read_commits(manifest.url, committed_units(manifest.url)):
        # Units ascend, so a retried video's latest result wins.
        excluded |= {video["id"]: {"url": video["url"], "cause": video["cause"]} for video in record["exclusions"]}
        for video in record["videos"]:
            excluded.pop(video["id"], None)
            classes[video["label"] or "-"] += video["clips"]
            if video["info"]["duration_seconds"] is not None:
                durations.append(video["info"]["duration_seconds"])
    return {
        "videos": manifest.facts["num_videos"],
        "classes": dict(sorted(classes.items())),
        "video_seconds": _spread(durations),
        "excluded": list(excluded.values()),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values), "total": sum(values)}


def _sheet(manifest: Manifest) -> bytes:
    chosen = np.unique(np.linspace(0, manifest.num_samples - 1, SHEET_CLIPS).astype(np.int64))
    if manifest.kind == "tokens":
        return contact_sheet(_decoded(manifest, chosen))
    dataset = ShardDataset(manifest, decode_clip)
    return contact_sheet(np.stack([dataset[int(index)]["video"] for index in chosen]))


def _decoded(tokens: Manifest, chosen: np.ndarray) -> np.ndarray:
    """Some samples of tokens as pixels, uint8 [N, T, H, W, 3]."""
    import torch  # imported here: it takes seconds, and clips and samples do not need it

    from clipmill.models.export import load_vqvae
    from clipmill.models.vqvae import to_pixels

    model, _, _ = load_vqvae(_tokenizer_url(tokens))
    dataset = ShardDataset(tokens, decode_codes)
    codes = torch.from_numpy(np.stack([dataset[int(index)]["codes"] for index in chosen]).astype(np.int64))
    with torch.inference_mode():
        return np.concatenate([to_pixels(model.decode(each[None])).numpy() for each in codes])


def _tokenizer_url(tokens: Manifest) -> str:
    """URL of the export that made these tokens: in their run, or at the place that their recorded config names."""
    from clipmill.models.export import read_latest  # as above

    root, sha8 = tokens.url.rsplit("/", 2)[0], tokens.recipe["tokenizer"]
    places = [storage.join(root, "vqvae", "exports", sha8)]
    try:
        recorded = yaml.safe_load(storage.read_bytes(storage.join(root, "tokens", "config.yaml")))
        named = recorded["tokenize"]["tokenizer"]
        places += [storage.join(named, "exports", sha8), named] if "/" in named else []
    except (FileNotFoundError, yaml.YAMLError, TypeError, KeyError):
        pass
    for url in places:
        if storage.exists(storage.join(url, "model.json")) and (found := read_latest(url)) and found[1] == sha8:
            return url
    raise UserError(f"the tokenizer {sha8} that made {tokens.url} is not at {places[0]}; restore its export")
