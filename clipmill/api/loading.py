"""Loads a model by the URL of a run, of a training folder or of one export."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from clipmill import storage
from clipmill.api.generator import Generator
from clipmill.api.tokenizer import Tokenizer
from clipmill.errors import UserError
from clipmill.models.export import load_prior, load_vqvae, read_latest

__all__ = ["load"]

Kind = Literal["generator", "tokenizer"]

_FOLDERS: dict[Kind, str] = {"generator": "prior", "tokenizer": "vqvae"}
"""The training folder of each kind in a run."""


@overload
def load(url: str, kind: Literal["generator"], *, device: str | None = None) -> Generator: ...


@overload
def load(url: str, kind: Literal["tokenizer"], *, device: str | None = None) -> Tokenizer: ...


@overload
def load(url: str, kind: None = None, *, device: str | None = None) -> Any: ...


def load(url: str, kind: Kind | None = None, *, device: str | None = None) -> Generator | Tokenizer:
    """Loads the newest model of a run or of a training folder, or one export.

    Args:
        url: path or bucket URL of a run (``runs/demo``), a training folder (``runs/demo/prior``) or an export
            (``runs/demo/prior/exports/1a2b3c4d``).
        kind: ``generator`` or ``tokenizer``; None loads what the URL holds, and the generator of a run that has both.
            The export of a generator contains its tokenizer.
        device: torch device, such as ``cuda:1``; None uses the GPU if torch finds one, else the CPU.

    Raises:
        UserError: there is no such model, it is damaged, or a newer clipmill wrote it.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found_url, body = _find(storage.absolute(url), kind)
    if body["kind"] == "vqvae":
        if kind == "generator":
            raise UserError(
                f"{storage.shown(found_url)} is a tokenizer, which cannot generate videos alone; name the folder of a "
                "prior, or load it with kind='tokenizer'"
            )
        model, body, _ = load_vqvae(found_url)
        return Tokenizer(model.to(place), body)
    prior, model, body, _ = load_prior(found_url)
    tokenizer = Tokenizer(model.to(place), body["tokenizer"])
    return tokenizer if kind == "tokenizer" else Generator(prior.to(place), tokenizer, body)


def _find(url: str, kind: Kind | None) -> tuple[str, dict[str, Any]]:
    """Finds the wanted export: the URL to load it by, and its body."""
    folders = [_FOLDERS[kind]] if kind is not None else list(_FOLDERS.values())
    if kind == "tokenizer":
        folders.append(_FOLDERS["generator"])
    for place in (url, *(storage.join(url, folder) for folder in folders)):
        found = read_latest(place)
        if found is not None:
            return place, found[0]
    raise UserError(
        f"there is no model at {storage.shown(url)}; name the root of a run, its prior/ or vqvae/ folder, or an export"
    )
