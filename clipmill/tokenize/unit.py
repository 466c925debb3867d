"""Makes one unit of tokens: reads and decodes its clips ahead, encodes them in order, packs and commits them.

Batches never span units, so a unit's bytes do not depend on the worker that makes it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import load_vqvae
from clipmill.models.provenance import make_process_deterministic
from clipmill.scratch import ScratchFolder
from clipmill.shards.commits import commit_unit
from clipmill.shards.format import Sample, UnitWriter, npy_bytes, parse_npy
from clipmill.shards.manifest import SPLITS, Manifest
from clipmill.shards.signatures import publish_signatures
from clipmill.tokenize.ahead import Clip, ClipsAhead
from clipmill.tokenize.encoder import Encoder, make_encoder
from clipmill.tokenize.tally import pack_counts

__all__ = ["TIMES", "Unit", "decode_cpus", "make_worker"]

CONDITIONS = {"actions.npy", "text.npy", "frames.npy"}
"""Members that can condition a prior."""
GPU_DECODE_CPUS = 3
"""With the CPU that feeds the GPU these are four CPUs, as the smallest machines with a GPU have."""
TIMES = ("encode_seconds", "encoder_wait_seconds", "decode_seconds")
"""Timings that a worker returns for a unit, in addition to the commit record."""


@dataclass(frozen=True, repr=False)
class Unit:
    """One unit of clips to encode.

    Attributes:
        split: ``train`` or ``val``.
        number: number of the clip unit, and of the token unit made from it.
        shards: names of the clip unit's tars.
    """

    split: str
    number: int
    shards: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{self.split}/{self.number:06d}"


def decode_cpus(config: RunConfig) -> int:
    """CPUs that a worker requests for decoding, in addition to those of the model."""
    if config.tokenize.decode_cpus is not None:
        return config.tokenize.decode_cpus
    return GPU_DECODE_CPUS if config.cluster.use_gpu else 0


def make_worker(config: RunConfig, lease: Lease, tokenizer: str) -> Callable[[Unit], dict[str, Any]]:
    """Runs once in each actor: loads the tokenizer, and returns the function that encodes one unit."""
    device = make_process_deterministic(config.cluster)
    model, body, sha8 = load_vqvae(config.tokenizer_url)
    if sha8 != tokenizer:
        raise UserError(f"{config.tokenizer_url} changed from {tokenizer} to {sha8}; run `clipmill tokenize` again")
    clips = {split: Manifest.load(config.folder("clips", split), "clips") for split in SPLITS}
    encoder = make_encoder(model, body["num_codes"], device, config.tokenize, clips["train"].recipe["clip"])
    return functools.partial(_tokenize_unit, config, lease, tokenizer, encoder, clips)


def _tokenize_unit(
    config: RunConfig, lease: Lease, tokenizer: str, encoder: Encoder, clips: dict[str, Manifest], unit: Unit
) -> dict[str, Any]:
    """Encodes, packs and commits one unit; returns its commit record and `TIMES`."""
    with ScratchFolder("tokenize") as folder:
        finished, copies = folder / "finished", folder / "copies"
        finished.mkdir()
        packed = _Packed(config, encoder, UnitWriter(finished, "tokens", unit.number, config.data.shard_bytes))
        num_threads = max(1, decode_cpus(config))
        with ClipsAhead(clips[unit.split], unit.shards, copies, encoder.batch_size, num_threads) as ahead:
            encode_seconds = _encode_all(encoder, ahead, packed)
        body = {
            "tokenizer": tokenizer,
            "precision": encoder.precision,
            "clips": list(unit.shards),
            "num_clips": packed.num_clips,
            "code_counts": pack_counts(packed.counts),
            "fields": packed.fields,
            "condition_frames": config.tokenize.condition_frames,
            "versions": encoder.versions(),
        }
        parts = packed.writer.finish()
        lease.check()
        publish_signatures(config.folder("tokens", unit.split), unit.number, packed.keys, packed.signatures)
        record = commit_unit(config.folder("tokens", unit.split), unit.number, parts, body)
    times = (encode_seconds, ahead.wait_seconds, ahead.decode_seconds)
    work = {
        "clips": packed.num_clips,
        "frames": packed.num_clips * clips[unit.split].recipe["clip"]["num_frames"],
        "bytes": sum(part["bytes"] for part in record["parts"]),
        "gpu_wait_seconds": ahead.wait_seconds,
    }
    return record | dict(zip(TIMES, times, strict=True)) | {"work": work}


def _encode_all(encoder: Encoder, ahead: ClipsAhead, packed: _Packed) -> float:
    """Encodes and packs all batches; returns the seconds spent by the encoder.

    A batch is packed while the next one is encoded, so that a GPU never waits for packing.
    """
    encode_seconds = 0.0
    begun: deque[tuple[list[Clip], Tensor]] = deque()

    def pack_first() -> None:
        nonlocal encode_seconds
        clips, codes = begun.popleft()
        began = time.perf_counter()
        finished = encoder.finish(codes)
        encode_seconds += time.perf_counter() - began
        packed.add(clips, finished)

    for batch in ahead:
        began = time.perf_counter()
        begun.append((batch, encoder.start([clip.video for clip in batch])))
        encode_seconds += time.perf_counter() - began
        if len(begun) > 1:
            pack_first()
    while begun:
        pack_first()
    return encode_seconds


class _Packed:
    """The content of a unit so far.

    Attributes:
        writer: writer of its tars.
        num_clips: number of clips in them.
        counts: int64 [M * K], occurrences of each code.
        fields: members of the samples besides codes; see `clipmill.tokenize.tally.Tally`.
        keys: keys of the clips.
        signatures: signatures of the clips.
    """

    def __init__(self, config: RunConfig, encoder: Encoder, writer: UnitWriter) -> None:
        self.writer = writer
        self.num_clips = 0
        self.counts = encoder.count([])
        self.fields: dict[str, dict[str, Any]] = {}
        self.keys: list[str] = []
        self.signatures: list[np.ndarray] = []
        self._config, self._encoder = config.tokenize, encoder

    def add(self, clips: list[Clip], codes: np.ndarray) -> None:
        """Packs a batch of clips with codes [B, t, h, w] or [B, t, h, w, M]."""
        for clip, clip_codes in zip(clips, codes, strict=True):
            members = {"codes.npy": npy_bytes(clip_codes), **clip.copied}
            if self._config.condition_frames:
                members["frames.npy"] = npy_bytes(clip.video[: self._config.condition_frames])
            embedding = _text_embedding(self._config.text_embeddings, json.loads(members["json"]).get("text"))
            if embedding is not None:
                members["text.npy"] = embedding
            self.writer.add(Sample(clip.key, members))
            _count_fields(self.fields, members)
        self.counts += self._encoder.count(codes)
        self.num_clips += len(clips)
        self.keys += [clip.key for clip in clips]
        self.signatures += [clip.signature for clip in clips]


@functools.lru_cache(maxsize=1)  # the clips of a video come one after the other
def _text_embedding(folder_url: str | None, text: str | None) -> bytes | None:
    """Content of the ``.npy`` file with the embedding of a text; None if there is no text or no such file."""
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
    """Counts a sample's members besides codes, so that training can check them before it starts."""
    shapes: dict[str, list[int]] = {"label": []} if json.loads(members["json"])["label"] is not None else {}
    for name in CONDITIONS & members.keys():
        shapes[name.removesuffix(".npy")] = list(parse_npy(members[name]).shape)
    for name, shape in shapes.items():
        known = fields.setdefault(name, {"clips": 0, "shapes": []})
        known["clips"] += 1
        if shape not in known["shapes"]:
            known["shapes"].append(shape)
