"""Deinterlaces video whose frames interleave two fields."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import av
import av.filter

from clipmill.video.decoders.picture import Picture

__all__ = ["deinterlaced"]


def deinterlaced(pictures: Iterator[Picture]) -> Iterator[Picture]:
    """Deinterlaces the interlaced frames, one picture per frame; other frames stay unchanged."""
    graph: Any = None
    shape = None
    waiting: deque[Picture] = deque()

    def filtered(frame: Any) -> Iterator[Picture]:
        """Pushes a frame into the filter graph (None flushes it) and yields the finished pictures."""
        graph.push(frame)
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                whole = graph.pull()
                yield waiting.popleft()._replace(frame=whole)

    for picture in pictures:
        frame = picture.frame
        if picture.begins_scene or shape != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from filtered(None)
            graph, shape = _deinterlacer(frame), (frame.width, frame.height, frame.format.name)
        waiting.append(picture)
        yield from filtered(frame)
    if graph is not None:
        yield from filtered(None)


def _deinterlacer(frame: Any) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph
