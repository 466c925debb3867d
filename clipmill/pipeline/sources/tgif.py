"""TGIF (Li et al., arXiv 1604.02748): a list of URLs and captions, and a folder of the GIF files.

Each line of ``tgif-v1.0.tsv`` holds a URL, a tab and a caption; a GIF with several captions has several lines. The file
of a URL is found by its name, in any folder below ``data.source.url``. ``train.txt``, ``val.txt`` and ``test.txt`` hold
a URL in each line.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources.folder import walk_files
from clipmill.pipeline.sources.record import SourceVideo

__all__ = ["list_videos"]

_SUFFIXES = frozenset((".gif",))
_SPLITS: dict[str, Literal["train", "val"]] = {"train": "train", "val": "val", "test": "val"}

logger = logging.getLogger(__name__)


def list_videos(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    """Yields the GIFs that have a caption. The first caption is the text; all captions are in the metadata.

    ``others`` counts the other files by extension.

    Raises:
        UserError: a list is missing or invalid, or none of its GIFs exists.
    """
    base = storage.absolute(source.url)
    captions = _read_captions(storage.resolve(base, source.captions))
    splits = None if source.split_files is None else _read_splits(storage.resolve(base, source.split_files))
    num_listed, num_skipped = len(captions), 0
    for path, entry in walk_files(base, _SUFFIXES, others):
        texts = captions.pop(path.name, None)
        if texts is None or (splits is not None and path.name not in splits):
            num_skipped += 1
            continue
        yield SourceVideo(
            name=entry.name,
            bytes=entry.bytes,
            etag=entry.etag,
            text=texts[0],
            split=None if splits is None else splits[path.name],
            metadata=json.dumps({"captions": texts}),
        )
    if len(captions) == num_listed:
        raise UserError(f"none of the {num_listed} GIFs of {source.captions} lies below {base}; download them there")
    if captions:  # GIFs vanish from the internet, so most downloads are partial
        logger.warning("%d of the %d GIFs of %s are missing", len(captions), num_listed, source.captions)
    if num_skipped:
        logger.warning("skipped %d GIFs that %s or the split files do not name", num_skipped, source.captions)


def _read_captions(url: str) -> dict[str, list[str]]:
    """Captions by file name."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_read_lines(url, "data.source.captions to the list of URLs and captions"), start=1):
        gif_url, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"{url}, line {number}: no tab between URL and caption")
        captions.setdefault(_file_name(gif_url), []).append(caption.strip())
    return captions


def _read_splits(folder: str) -> dict[str, Literal["train", "val"]]:
    """Split by file name."""
    hint = "data.source.split_files to the folder of train.txt, val.txt and test.txt"
    return {
        _file_name(line): split
        for name, split in _SPLITS.items()
        for line in _read_lines(storage.join(folder, f"{name}.txt"), hint)
    }


def _read_lines(url: str, hint: str) -> list[str]:
    try:
        return [line for line in storage.read_bytes(url).decode().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{url} does not exist; set {hint}") from error


def _file_name(url: str) -> str:
    return url.strip().rsplit("/", 1)[-1]
