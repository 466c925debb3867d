"""Stage ``tokenize``: every clip is encoded once, so that training the prior reads a few hundred codes a clip.

In each split, unit n of the clips becomes unit n of the tokens. A sample has ``{key}.codes.npy`` (shape t h w
[codebooks], in the narrowest dtype that holds the codes) and the clip's ``{key}.json``. It may also have inputs for
conditioning a prior: the clip's ``{key}.actions.npy``, its first frames ``{key}.frames.npy``, and the embedding of its
text ``{key}.text.npy``. `clipmill.tokenize.unit` makes a unit, with the same bytes on any worker.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

from clipmill.board import BOARD
from clipmill.cluster.fanout import fan_out
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.lease import Lease
from clipmill.models.export import require_vqvae_for
from clipmill.progress import bar
from clipmill.shards.commits import committed_units, read_commits
from clipmill.shards.freeze import freeze
from clipmill.shards.interop import publish_energon
from clipmill.shards.manifest import SPLITS, Manifest
from clipmill.tokenize.tally import SEGMENT_UNITS, Tally
from clipmill.tokenize.unit import TIMES, Unit, decode_cpus, make_worker

__all__ = ["clip_recipes", "folder_url", "is_finished", "run"]

logger = logging.getLogger(__name__)

NOTED_WAIT_SHARE = 0.1
"""If encoders wait for decoded clips for at least this share of their time, the log recommends more decoding CPUs."""


def run(config: RunConfig, lease: Lease) -> dict[str, Any]:
    """Encodes both splits and freezes them.

    Returns:
        Counts for the summary.

    Raises:
        UserError: clips or tokenizer are missing or do not fit each other, or the folder holds other tokens. Nothing
            has been written.
        StageFailed: a unit failed at every attempt.
    """
    clips, recipe = _inputs(config)
    num_codebooks = math.prod(recipe["latent_shape"][3:])
    tallies = {split: Tally(config.folder("tokens", split), recipe["num_codes"], num_codebooks) for split in SPLITS}
    pending = [unit for split in SPLITS for unit in _count_committed(config, clips[split], recipe, tallies[split])]
    times: Counter[str] = Counter(dict.fromkeys(TIMES, 0.0))
    with bar("tokenize", total=sum(manifest.num_samples for manifest in clips.values()), unit="clips") as progress:

        def on_result(unit: Unit, result: dict[str, Any]) -> None:
            tallies[unit.split].add(result)
            if tallies[unit.split].num_unpublished >= SEGMENT_UNITS:
                lease.check()
                tallies[unit.split].publish()
            times.update({name: result[name] for name in TIMES})
            progress.update(_num_clips(tallies))

        try:
            if pending:
                arguments = (config, lease, recipe["tokenizer"])
                fan_out(
                    make_worker,
                    arguments,
                    pending,
                    config=config.cluster,
                    on_result=on_result,
                    beside_cpus=decode_cpus(config),
                )
        finally:
            if lease.is_newest():  # a later run that took over stores its own totals
                for tally in tallies.values():
                    tally.publish()
    lease.check()
    _note_waits(config, times)
    return {**_freeze(config, clips, recipe, tallies), "clips_per_second": _num_clips(tallies) / BOARD.seconds, **times}


def folder_url(config: RunConfig) -> str:
    """The folder that this stage writes to."""
    return config.folder("tokens")


def clip_recipes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The recipe of the input clips, by their URL.

    Raises:
        UserError: there are no clips yet.
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


def _note_waits(config: RunConfig, times: Counter[str]) -> None:
    """Logs advice if encoders waited for decoders."""
    share = times["encoder_wait_seconds"] / max(1e-9, times["encode_seconds"] + times["encoder_wait_seconds"])
    if share >= NOTED_WAIT_SHARE:
        logger.info(
            "tokenize: encoders waited %.0f %% of their time for decoded clips; more CPUs for decoding "
            "(tokenize.decode_cpus, now %d a worker) or more workers make it faster",
            100 * share,
            decode_cpus(config),
        )


def _num_clips(tallies: dict[str, Tally]) -> int:
    return sum(tally.num_clips for tally in tallies.values())


def _inputs(config: RunConfig) -> tuple[dict[str, Manifest], dict[str, Any]]:
    """The clips of each split, and the recipe of the tokens to make."""
    clips = {split: Manifest.require(config.folder("clips", split), "clips") for split in SPLITS}
    clip_recipe = clips["train"].recipe
    body, sha8 = require_vqvae_for(config.tokenizer_url, config.folder("clips"), clip_recipe)
    num_frames = clip_recipe["clip"]["num_frames"]
    if config.tokenize.condition_frames > num_frames:
        raise UserError(
            f"tokenize.condition_frames={config.tokenize.condition_frames}, but a clip has {num_frames} frames; lower "
            "it"
        )
    recipe = {
        "tokenizer": sha8,
        "num_codes": body["num_codes"],
        "latent_shape": list(body["latent_shape"]),
        "precision": config.tokenize.precision,
        "condition_frames": config.tokenize.condition_frames,
        "clip": clip_recipe,
    }
    return clips, recipe


def _check_recipe(config: RunConfig, split: str, found: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Refuses tokens on disk whose recipe (from a manifest or a commit record) differs from the wanted one."""
    url = config.folder("tokens", split)
    recorded = {"precision": "float32"} | found  # old records have no precision; it was always float32
    for key in ("condition_frames", "precision"):
        if recorded[key] != recipe[key]:
            raise UserError(
                f"{url} holds tokens made with tokenize.{key}={recorded[key]}, not {recipe[key]}; restore it, remove "
                f"{folder_url(config)}, or choose another root"
            )
    if found["tokenizer"] != recipe["tokenizer"]:
        raise UserError(
            f"{url} holds tokens of tokenizer {found['tokenizer']}, but the one at {config.tokenizer_url} is "
            f"{recipe['tokenizer']}; remove {folder_url(config)}, choose another root, or set tokenize.tokenizer to "
            "the export that made them"
        )


def _count_committed(config: RunConfig, clips: Manifest, recipe: dict[str, Any], tally: Tally) -> list[Unit]:
    """Adds units that earlier runs committed to the tally; returns the other units."""
    split = clips.url.rpartition("/")[2]
    shards: dict[int, list[str]] = {number: [] for number in range(clips.facts["num_units"])}
    for shard in clips.shards:
        shards[int(shard.name.split("-")[1])].append(shard.name)
    units = [Unit(split, number, tuple(names)) for number, names in shards.items()]
    url = config.folder("tokens", split)
    committed = set(committed_units(url))
    finished = {unit.number: unit for unit in units if unit.number in committed}
    for facts in tally.read_segments(committed):
        _check_unit(config, finished.get(facts["unit"]), facts, split, recipe)
    for record in read_commits(url, [number for number in finished if number not in tally.parts]):
        _check_unit(config, finished[record["unit"]], record, split, recipe)
        tally.add(record)
    return [unit for unit in units if unit.number not in committed]


def _check_unit(
    config: RunConfig, unit: Unit | None, facts: dict[str, Any], split: str, recipe: dict[str, Any]
) -> None:
    """Refuses a committed unit that was made from other clips or with another recipe."""
    _check_recipe(config, split, facts, recipe)
    if unit is None or tuple(facts["clips"]) != unit.shards:
        raise UserError(
            f"{config.folder('tokens', split)} holds tokens of other clips (unit {facts['unit']}); remove "
            f"{folder_url(config)} or choose another root"
        )


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
        url = config.folder("tokens", split)
        manifests[split] = freeze(url, "tokens", range(facts["num_units"]), recipe, facts, known=tally.parts)
        summary[f"{split}_clips"] = tally.num_clips
        summary[f"{split}_tokens"] = int(tally.code_counts.sum())
        summary[f"{split}_codes_used"] = int((tally.code_counts > 0).sum())
        summary[f"{split}_perplexity"] = tally.perplexity
    publish_energon(folder_url(config), manifests)
    return summary
