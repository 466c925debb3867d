"""UCF-101: a folder of class folders, and the official lists of training and test videos.

``trainlist01.txt`` holds ``Class/v_Class_g08_c01.avi 1`` in each line, ``testlist01.txt`` the same without a number.
Files are matched by class folder and name; the class folders may be anywhere below ``data.source.url``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from clipmill import storage
from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources.folder import walk_files
from clipmill.pipeline.sources.record import SourceVideo
from clipmill.video.kinds import VIDEO_SUFFIXES

__all__ = ["list_videos"]

logger = logging.getLogger(__name__)


def list_videos(source: SourceConfig, others: Counter[str]) -> Iterator[SourceVideo]:
    """Yields the videos of one official split, labelled with their class folder; ``test`` becomes val.

    ``others`` counts the other files by extension.

    Raises:
        UserError: a list is missing, or names a video that does not exist.
    """
    base = storage.absolute(source.url)
    folder = storage.resolve(base, source.split_files or "ucfTrainTestlist")
    unseen_train, unseen_val = (_read_list(folder, kind, source.split_number) for kind in ("train", "test"))
    num_unlisted = 0
    for path, entry in walk_files(base, VIDEO_SUFFIXES, others):
        name = "/".join(path.parts[-2:])
        if name in unseen_train:
            unseen_train.remove(name)
            yield SourceVideo(entry.name, entry.bytes, entry.etag, label=path.parent.name, split="train")
        elif name in unseen_val:
            unseen_val.remove(name)
            yield SourceVideo(entry.name, entry.bytes, entry.etag, label=path.parent.name, split="val")
        else:
            num_unlisted += 1
    if unseen := unseen_train | unseen_val:
        raise UserError(
            f"the lists in {folder} name {len(unseen)} videos that are not below {base}, such as {min(unseen)}; "
            "restore them, or remove their lines"
        )
    if num_unlisted:
        logger.warning("skipped %d videos that neither list of split %d names", num_unlisted, source.split_number)


def _read_list(folder: str, kind: str, split_number: int) -> set[str]:
    url = storage.join(folder, f"{kind}list{split_number:02d}.txt")
    try:
        lines = storage.read_bytes(url).decode().splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{url} does not exist; set data.source.split_files to the folder of the official lists"
        ) from error
    return {line.split()[0] for line in lines if line.strip()}
