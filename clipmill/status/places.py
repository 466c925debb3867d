"""Folders that the stages of a run write to, found without its configuration."""

from __future__ import annotations

from clipmill import storage
from clipmill.errors import UserError

__all__ = ["FOLDERS", "folder_of", "stage_folders"]

FOLDERS = {
    "shard": "clips",
    "train-vqvae": "vqvae",
    "tokenize": "tokens",
    "train-prior": "prior",
    "sample": "samples/default",
    "evaluate": "evaluation/default",
    "report": "report",
}
"""The folder of each stage below the root of a run, in the order of a run. Each sample set and each evaluation has its
own folder."""


def stage_folders(root: str) -> dict[str, str]:
    """URLs of the stages' folders by stage name; several sets of samples are named ``sample/NAME``,
    ``evaluate/NAME``.
    """
    root = storage.absolute(root)
    found: dict[str, str] = {}
    for stage, folder in FOLDERS.items():
        if "/" in folder:
            found |= _sets(root, stage, *folder.split("/"))
        else:
            found[stage] = storage.join(root, folder)
    return found


def _sets(root: str, stage: str, parent: str, default: str) -> dict[str, str]:
    """The folders of a stage that has one folder for each set of samples."""
    url = storage.join(root, parent)
    names = [name for name in storage.list_folders(url) if not name.startswith("_")]
    if len(names) <= 1:
        return {stage: storage.join(url, *(names or [default]))}
    return {f"{stage}/{name}": storage.join(url, name) for name in names}


def folder_of(root: str, stage: str) -> str:
    """The URL of one stage's folder.

    Raises:
        UserError: there is no stage of this name.
    """
    folders = stage_folders(root)
    if stage not in folders:
        raise UserError(f"no stage {stage!r} at {storage.shown(root)}; choose one of {', '.join(folders)}")
    return folders[stage]
