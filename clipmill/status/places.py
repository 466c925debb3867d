"""Where the stages of a run write, known without its configuration."""

from __future__ import annotations

from clipmill import storage
from clipmill.errors import UserError

__all__ = ["FOLDERS", "SAMPLES", "folder_of", "stage_folders"]

FOLDERS = {
    "shard": "clips",
    "train-vqvae": "vqvae",
    "tokenize": "tokens",
    "train-prior": "prior",
    "sample": "samples/default",
    "evaluate": "evaluation",
    "report": "report",
}
"""The folder of each stage below the root of a run, in the order of a run; each set of samples has a folder."""
SAMPLES = "samples"


def stage_folders(root: str) -> dict[str, str]:
    """The URL of each stage's folder, by the stage's name; of several sets of samples each is ``sample/NAME``."""
    root = storage.absolute(root)
    found: dict[str, str] = {}
    for stage, folder in FOLDERS.items():
        if stage == "sample":
            found |= _sample_folders(root)
        else:
            found[stage] = storage.join(root, folder)
    return found


def _sample_folders(root: str) -> dict[str, str]:
    url = storage.join(root, SAMPLES)
    names = storage.list_folders(url)
    if len(names) <= 1:
        return {"sample": storage.join(url, *(names or ["default"]))}
    return {f"sample/{name}": storage.join(url, name) for name in names}


def folder_of(root: str, stage: str) -> str:
    """The URL of one stage's folder.

    Raises:
        UserError: no stage has this name.
    """
    folders = stage_folders(root)
    if stage not in folders:
        raise UserError(f"no stage {stage!r} at {storage.shown(root)}; choose one of {', '.join(folders)}")
    return folders[stage]
