"""Stage ``tokenize``: every clip is encoded once, so that training the prior reads a few hundred codes a clip.

Unit n of the clips becomes unit n of the tokens, in each split: ``{key}.codes.npy`` (as narrow as the codebook
allows, shape t h w [codebooks]) with the clip's own ``{key}.json``, where it has them its ``{key}.actions.npy``, and
what else a prior is to be told of it: ``{key}.frames.npy``, its first frames, and ``{key}.text.npy``, the embedding of
its text. A worker loads the tokenizer once, keeps to a fixed number of threads, and forms its batches inside a unit in
order, so a unit's bytes do not depend on which worker does it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipmill import storage
from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import load_vqvae, require_vqvae_for
from clipmill.models.provenance import computed_with, deterministic_device
from clipmill.models.quantizers import codebook_metrics, table_rows
from clipmill.models.vqvae import VQVAE, to_input
from clipmill.progress import bar
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import commit_unit, committed_units, read_commits
from clipmill.shards.dataset import ShardDataset, decode_clip
from clipmill.shards.format import Sample, UnitWriter, code_dtype, npy_bytes, parse_npy
from clipmill.shards.freeze import freeze
from clipmill.shards.interop import publish_energon
from clipmill.shards.manifest import SPLITS, Manifest

__all__ = ["clip_recipes", "folder_url", "is_finished", "run"]

CONDITIONS = {"actions.npy", "text.npy", "frames.npy"}
"""Members that a prior may be told."""


@dataclass(frozen=True, repr=False)
class Unit:
    """One unit of clips to encode.

    Attributes:
        split: ``train`` or ``val``.
        number: of the clip unit, and of the token unit to be.
        shards: names of its tars.
    """

    split: str
    number: int
    shards: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{self.split}/{self.number:06d}"


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Encodes both splits and freezes them.

    Returns:
        Counts for the summary.

    Raises:
        UserError: clips or tokenizer are missing or do not fit each other, or the folder holds other tokens. Nothing
            has been written then.
        StageFailed: a unit failed at every attempt.
    """
    clips, recipe = _inputs(config)
    num_codebooks = math.prod(recipe["latent_shape"][3:])
    tallies = {split: Tally(recipe["num_codes"], num_codebooks) for split in SPLITS}
    pending = [unit for split in SPLITS for unit in _count_committed(config, clips[split], recipe, tallies[split])]
    began, num_clips_before = time.monotonic(), _num_clips(tallies)
    with bar("tokenize", total=sum(manifest.num_samples for manifest in clips.values()), unit="clips") as progress:

        def on_result(unit: Unit, result: dict[str, Any]) -> None:
            tallies[unit.split].add(result)
            progress.update(_num_clips(tallies))

        if pending:
            arguments = (config, lease, recipe["tokenizer"])
            fan_out(make_worker, arguments, pending, config=config.cluster, on_result=on_result)
    clips_per_second = (_num_clips(tallies) - num_clips_before) / (time.monotonic() - began)
    lease.check()
    return {**_freeze(config, clips, recipe, tallies), "clips_per_second": clips_per_second}


def folder_url(config: RunConfig) -> str:
    """Where this stage writes."""
    return config.folder("tokens")


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the clips, by the URL of what this stage reads.

    Raises:
        UserError: there are none yet.
    """
    return {clips.url: clips.recipe for clips in [Manifest.require(config.folder("clips", "train"), "clips")]}


def is_finished(config: RunConfig) -> bool:
    """Whether both splits hold the tokens of these clips by this tokenizer.

    Raises:
        UserError: clips or tokenizer are missing or do not fit each other, or the folder holds other tokens.
    """
    clips, recipe = _inputs(config)
    for split in SPLITS:
        try:
            tokens = Manifest.load(config.folder("tokens", split), "tokens")
        except FileNotFoundError:
            return False
        _check_recipe(config, split, tokens.recipe, recipe)
        if tokens.facts["clips"] != clips[split].fingerprint:
            return False
    return True


# ------------------------------------------------------------------------------------------- the driver


class Tally:
    """What the finished units of a split amount to.

    Attributes:
        num_clips: clips encoded.
        code_counts: int64 [M * K], how often each of the K codes of each of the M codebooks occurs.
        versions: of the software that encoded them.
        fields: what clips come with beside codes: in how many of them, and the shapes it has.
    """

    def __init__(self, num_codes: int, num_codebooks: int) -> None:
        self.num_clips = 0
        self.num_codebooks = num_codebooks
        self.code_counts = np.zeros(num_codebooks * num_codes, np.int64)
        self.versions: list[dict[str, Any]] = []
        self.fields: dict[str, dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Adds one unit's commit record."""
        self.num_clips += record["num_clips"]
        self.code_counts += np.array(record["code_counts"], np.int64)
        if record["versions"] not in self.versions:
            self.versions.append(record["versions"])
        for name, found in record["fields"].items():
            known = self.fields.setdefault(name, {"clips": 0, "shapes": []})
            known["clips"] += found["clips"]
            known["shapes"] = sorted([*known["shapes"], *(s for s in found["shapes"] if s not in known["shapes"])])

    @property
    def perplexity(self) -> float:
        """See `codebook_metrics`."""
        counts = torch.from_numpy(self.code_counts).double()
        return codebook_metrics(counts, self.num_codebooks)["codebook_perplexity"].item()


def _num_clips(tallies: dict[str, Tally]) -> int:
    return sum(tally.num_clips for tally in tallies.values())


def _inputs(config: RunConfig) -> tuple[dict[str, Manifest], dict[str, Any]]:
    """The clips of each split, and the recipe of the tokens to be."""
    clips = {split: Manifest.require(config.folder("clips", split), "clips") for split in SPLITS}
    clip_recipe = clips["train"].recipe
    body, sha8 = require_vqvae_for(config.tokenizer_url, config.folder("clips"), clip_recipe)
    num_frames = clip_recipe["clip"]["num_frames"]
    if config.tokenize.condition_frames > num_frames:
        raise UserError(
            f"tokenize.condition_frames={config.tokenize.condition_frames}, but a clip has {num_frames} frames; choose "
            "fewer"
        )
    recipe = {
        "tokenizer": sha8,
        "num_codes": body["num_codes"],
        "latent_shape": list(body["latent_shape"]),
        "condition_frames": config.tokenize.condition_frames,
        "clip": clip_recipe,
    }
    return clips, recipe


def _check_recipe(config: RunConfig, split: str, found: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Compares what tokens on disk were made by (a manifest's recipe or a commit record) with what is asked for."""
    url = config.folder("tokens", split)
    if found["condition_frames"] != recipe["condition_frames"]:
        raise UserError(
            f"{url} holds tokens made with tokenize.condition_frames={found['condition_frames']}, not "
            f"{recipe['condition_frames']}; restore it, remove {folder_url(config)}, or choose another root"
        )
    if found["tokenizer"] != recipe["tokenizer"]:
        raise UserError(
            f"{url} holds tokens of tokenizer {found['tokenizer']}, the one at {config.tokenizer_url} is "
            f"{recipe['tokenizer']}; remove {folder_url(config)}, choose another root, or set tokenize.tokenizer to "
            "the export that made them"
        )


def _count_committed(config: RunConfig, clips: Manifest, recipe: dict[str, Any], tally: Tally) -> list[Unit]:
    """Adds the units that an earlier run committed to the tally; the others are returned."""
    split = clips.url.rpartition("/")[2]
    shards: dict[int, list[str]] = {number: [] for number in range(clips.facts["num_units"])}
    for shard in clips.shards:
        shards[int(shard.name.split("-")[1])].append(shard.name)
    units = [Unit(split, number, tuple(names)) for number, names in shards.items()]
    url = config.folder("tokens", split)
    committed = set(committed_units(url))
    finished = [unit for unit in units if unit.number in committed]
    for unit, record in zip(finished, read_commits(url, [unit.number for unit in finished]), strict=True):
        _check_recipe(config, split, record, recipe)
        if tuple(record["clips"]) != unit.shards:
            raise UserError(
                f"{url} holds tokens of other clips (unit {unit.number}); remove {folder_url(config)} or choose "
                "another root"
            )
        tally.add(record)
    return [unit for unit in units if unit.number not in committed]


def _freeze(
    config: RunConfig, clips: dict[str, Manifest], recipe: dict[str, Any], tallies: dict[str, Tally]
) -> dict[str, Any]:
    summary: dict[str, Any] = {"tokenizer": recipe["tokenizer"]}
    manifests: dict[str, Manifest] = {}
    for split, tally in tallies.items():
        facts = {
            "classes": clips[split].facts["classes"],
            "clips": clips[split].fingerprint,
            "num_clips": tally.num_clips,
            "num_videos": clips[split].facts.get("num_videos"),
            "num_units": clips[split].facts["num_units"],
            "code_counts": tally.code_counts.tolist(),
            "versions": sorted(tally.versions, key=str),
            "fields": tally.fields,
        }
        manifests[split] = freeze(config.folder("tokens", split), "tokens", range(facts["num_units"]), recipe, facts)
        summary[f"{split}_clips"] = tally.num_clips
        summary[f"{split}_tokens"] = int(tally.code_counts.sum())
        summary[f"{split}_codes_used"] = int((tally.code_counts > 0).sum())
        summary[f"{split}_perplexity"] = tally.perplexity
    publish_energon(folder_url(config), manifests)
    return summary


# ------------------------------------------------------------------------------------------- the worker


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that is ready to work, and what its bytes depend on."""

    model: VQVAE
    num_codes: int
    device: torch.device
    batch_size: int

    @torch.inference_mode()
    def __call__(self, videos: list[np.ndarray]) -> np.ndarray:
        """uint8 [T, H, W, 3] each -> codes [B, t, h, w] or [B, t, h, w, M] in the narrowest little-endian type."""
        batch = torch.from_numpy(np.stack(videos)).to(self.device)
        codes = self.model.encode(to_input(batch)).cpu().numpy()
        return codes.astype(code_dtype(self.num_codes))

    def count(self, codes: npt.ArrayLike) -> np.ndarray:
        """How often each code occurs in codes [..., M] (or [...] of one codebook): int64 [M * K]."""
        num_codebooks = self.model.config.num_codebooks
        rows = table_rows(torch.from_numpy(np.asarray(codes, np.int64)).view(-1, num_codebooks), self.num_codes)
        return torch.bincount(rows.flatten(), minlength=num_codebooks * self.num_codes).numpy()

    def versions(self) -> dict[str, Any]:
        """What the codes depend on beside clips and tokenizer."""
        return {**computed_with(self.device), "batch_size": self.batch_size}


def make_worker(config: RunConfig, lease: Lease, tokenizer: str) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor: loads the tokenizer, and returns the function that encodes one unit."""
    device = deterministic_device(config.cluster)
    model, body, sha8 = load_vqvae(config.tokenizer_url)
    if sha8 != tokenizer:
        raise UserError(f"{config.tokenizer_url} changed from {tokenizer} to {sha8}; run `clipmill tokenize` again")
    encoder = Encoder(model.to(device), body["num_codes"], device, config.tokenize.batch_size)
    clips = {split: Manifest.load(config.folder("clips", split), "clips") for split in SPLITS}
    return functools.partial(_tokenize_unit, config, lease, tokenizer, encoder, clips)


def _tokenize_unit(
    config: RunConfig, lease: Lease, tokenizer: str, encoder: Encoder, clips: dict[str, Manifest], unit: Unit
) -> dict[str, Any]:
    """Encodes, packs and commits one unit; returns its commit record without the parts."""
    counts = encoder.count([])  # of none yet
    num_clips = 0
    fields: dict[str, dict[str, Any]] = {}
    with ScratchFolder("tokenize") as folder:
        finished, copies = folder / "finished", folder / "copies"
        finished.mkdir()
        writer = UnitWriter(finished, "tokens", unit.number, config.data.shard_bytes)
        for batch in _batches(_read_clips(clips[unit.split], unit, copies), encoder.batch_size):
            for clip, codes in zip(batch, encoder([clip["video"] for clip in batch]), strict=True):
                members = {"codes.npy": npy_bytes(codes), **clip["copied"]}
                if config.tokenize.condition_frames:
                    members["frames.npy"] = npy_bytes(clip["video"][: config.tokenize.condition_frames])
                embedding = _text_embedding(config.tokenize.text_embeddings, json.loads(members["json"]).get("text"))
                if embedding is not None:
                    members["text.npy"] = embedding
                writer.add(Sample(clip["key"], members))
                _count_fields(fields, members)
                counts += encoder.count(codes)
                num_clips += 1
        body = {
            "tokenizer": tokenizer,
            "clips": list(unit.shards),
            "num_clips": num_clips,
            "code_counts": counts.tolist(),
            "fields": fields,
            "condition_frames": config.tokenize.condition_frames,
            "versions": encoder.versions(),
        }
        parts = writer.finish()
        lease.check()
        record = commit_unit(config.folder("tokens", unit.split), unit.number, parts, body)
    return {name: record[name] for name in body}


@functools.lru_cache(maxsize=1)  # the clips of a video come one after the other
def _text_embedding(folder_url: str | None, text: str | None) -> bytes | None:
    """The ``.npy`` that holds the embedding of a text; none where there is no such text or file."""
    if folder_url is None or text is None:
        return None
    url = storage.join(folder_url, f"{hashlib.sha256(text.encode()).hexdigest()}.npy")
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    try:
        embedding = np.load(io.BytesIO(content), allow_pickle=False)
        if embedding.ndim != 2 or embedding.dtype.kind != "f":
            raise ValueError(f"an array {embedding.dtype} {list(embedding.shape)}")
    except (ValueError, EOFError) as error:
        raise UserError(f"{url} is no .npy file of float [length, channels]; write it again") from error
    return npy_bytes(embedding.astype(np.float32))


def _count_fields(fields: dict[str, dict[str, Any]], members: dict[str, bytes]) -> None:
    """Notes what a sample comes with beside its codes: training asks before it starts, not in its middle."""
    shapes: dict[str, list[int]] = {"label": []} if json.loads(members["json"])["label"] is not None else {}
    for name in CONDITIONS & members.keys():
        shapes[name.removesuffix(".npy")] = list(parse_npy(members[name]).shape)
    for name, shape in shapes.items():
        known = fields.setdefault(name, {"clips": 0, "shapes": []})
        known["clips"] += 1
        if shape not in known["shapes"]:
            known["shapes"].append(shape)


def _read_clips(manifest: Manifest, unit: Unit, cache: Path) -> Iterator[dict[str, Any]]:
    """The clips of a unit in order; a bucket's shards are fetched and verified one after the other."""
    dataset = ShardDataset(manifest, _decode, cache, cache_bytes=1)
    wanted = set(unit.shards)
    for index, shard in enumerate(manifest.shards):
        if shard.name in wanted:
            for row in range(shard.samples):
                yield dataset.read(index, row)


def _decode(members: dict[str, memoryview]) -> dict[str, Any]:
    """The pixels of a clip, and the members that its tokens take over as they are."""
    copied = {name: bytes(members[name]) for name in ("json", "actions.npy") if name in members}
    return {"video": decode_clip(members)["video"], "copied": copied}


def _batches(clips: Iterator[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(clips, batch_size)):
        yield batch
