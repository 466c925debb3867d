"""The child of `clipmill.pipeline.sources.isolated`: reads files with libraries that a hostile file can crash."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from clipmill.config import SourceConfig
from clipmill.errors import ClipmillError
from clipmill.pipeline.sources import bair, hdf5
from clipmill.pipeline.sources.record import DamagedVideo
from clipmill.video import confine
from clipmill.video.confine import SendMessage

__all__ = ["serve"]

_VIDEOS_IN_MESSAGE = 1000
_READERS = {"hdf5": hdf5.read_array, "bair": bair.read_array}


def serve() -> None:
    """Answers requests until its parent closes the pipe."""
    confine.serve(_answer)


def _answer(request: dict[str, Any], spool: int, send: SendMessage) -> None:
    try:
        source = SourceConfig.model_validate(request["source"])
        if request["do"] == "list":
            _list(source, send)
        else:
            _read(source, request, spool, send)
    except (ClipmillError, DamagedVideo, FileNotFoundError) as error:
        send({"kind": "done", "raised": type(error).__name__, "cause": str(error)})
    except MemoryError:
        send({"kind": "video_fault", "cause": "memory limit reached"})
    except OSError as error:
        send({"kind": "environment_fault", "cause": f"{type(error).__name__}: {error}"})


def _list(source: SourceConfig, send: SendMessage) -> None:
    videos = hdf5.list_videos(source)
    while batch := [asdict(video) for video in islice(videos, _VIDEOS_IN_MESSAGE)]:
        send({"kind": "clip", "videos": batch})
    send({"kind": "done"})


def _read(source: SourceConfig, request: dict[str, Any], spool: int, send: SendMessage) -> None:
    video = _READERS[source.type](request["url"], request["member"], request["bytes"])
    offset, shapes = 0, []
    for array in (video.frames, video.actions):
        shapes.append(None if array is None else array.shape)
        if array is not None:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            confine.write_all(spool, data, offset)
            offset += len(data)
    send({"kind": "done", "frames": shapes[0], "actions": shapes[1]})
