"""Which frames are whole, by what FFmpeg tells of damage. ``docs/formats.md`` says what it tells for each codec.

A damaged frame spoils the frames that refer to it. FFmpeg does not mark those, so all up to the next key frame are
dropped. Packets are decoded in the order of the file, and damage spreads in that order. With B-frames, frames are shown
in another order: a B-frame leaves the decoder before a frame that it refers to, whose damage is not known until then.
So a frame waits until all that was decoded before it has been judged.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import av
import av.logging

__all__ = ["DamageFilter", "ErrorLog", "Packet", "detect_damage"]

T = TypeVar("T")

_REORDERED_PACKETS = 16
"""A packet whose frame has not come this much later has none of its own, such as the second field of a picture."""

_GAP = 1.5
"""A step between two decoding times above this multiple of the usual one means that a frame is missing."""

_SILENT_CODECS = ("gif", "ffv1")
"""Their decoders report damage in the log only."""

_NO_EXPLODE = ("h264", "mpeg1video", "mpeg2video")
"""``explode`` finds nothing more in these, and costs whole frames beside damaged ones."""


def detect_damage(stream: Any) -> None:
    """Sets what a decoder checks, before it opens. ``aggressive`` and the like would call whole frames damaged."""
    checks = "crccheck+bitstream+buffer"
    if stream.codec_context.codec.canonical_name not in _NO_EXPLODE:
        checks += "+explode"
    stream.codec_context.options = {"err_detect": checks}


class ErrorLog:
    """Counts what FFmpeg logs as errors, where nothing else tells of damage. One for the whole process."""

    def __init__(self, container: Any, stream: Any):
        self._of_codec = stream.codec_context.codec.canonical_name in _SILENT_CODECS
        self._of_pages = container.format.name == "ogg"  # their checksums
        if self._of_codec or self._of_pages:
            av.logging.set_level(av.logging.PANIC)  # below it errors are counted, but not printed
        self._count = av.logging.get_last_error()[0]

    def has_grown(self, packet: Packet, *, is_decoded: bool) -> bool:
        """Whether reading a packet, or decoding it, has just logged an error."""
        if not (self._of_codec if is_decoded else self._of_pages):
            return False
        before, self._count = self._count, av.logging.get_last_error()[0]
        # a damaged page is reported with the packet that follows it
        return self._count > before and (is_decoded or not packet.is_key)


@dataclass(slots=True)
class Packet:
    """Travels through the decoder with the frame that a packet becomes.

    Attributes:
        number: in the order of the file, from 0.
        is_key: the container says that decoding can begin here.
        is_flagged: the demuxer noticed that something is missing.
        pts: presentation time in ticks.
        dts: decoding time in ticks.
        sample_aspect: of the frame, known once it is decoded.
        key: the last key packet up to this one, known once it goes to the decoder.
    """

    number: int
    is_key: bool = False
    is_flagged: bool = False
    pts: int | None = None
    dts: int | None = None
    sample_aspect: float = 1.0
    key: Packet | None = None


class DamageFilter(Generic[T]):
    """Holds frames back until it is known whether they are whole; says which are.

    Args:
        step_ticks: usual distance of two packets' decoding times.
        flags_early: the demuxer flags the packet before the incomplete one, as that of transport streams does.
        fails_late: the decoder reports a damaged packet with the next one, as dav1d does.
    """

    def __init__(self, step_ticks: float, *, flags_early: bool = False, fails_late: bool = False):
        self._step_ticks, self._flags_early, self._late = step_ticks, flags_early, int(fails_late)
        self._damaged: list[int] = []  # packets; what was decoded from them on is bad, up to a whole key frame
        self._breaks = [0]  # the same, but the packet itself is whole: a key frame may begin with it
        self._waiting: deque[tuple[T, Packet, bool]] = deque()
        self._unshown: dict[int, None] = {}  # decoded packets without their frames, ascending
        self._newest_key: Packet | None = None
        self._last_key_shown = -1
        self._newest = -1
        self._codec_marks_keys = self._container_marks_keys = False
        self._suspect: Packet | None = None  # waits for the packet after it
        self._before: Packet | None = None

    def sent(self, packet: Packet) -> None:
        """A packet goes to the decoder."""
        self._newest = packet.number
        if packet.is_key:
            self._newest_key = packet
            self._container_marks_keys = True
        packet.key = self._newest_key
        if self._flags_early:
            self._judge_suspect(packet)
        elif packet.is_flagged:
            self.failed(packet)
        self._unshown[packet.number] = None
        if packet.number - next(iter(self._unshown)) > _REORDERED_PACKETS:
            del self._unshown[next(iter(self._unshown))]

    def _judge_suspect(self, packet: Packet) -> None:
        """Decides by the packet after it whether the one behind a flagged packet is damaged."""
        suspect, before, self._before = self._suspect, self._before, packet
        if before is not None and before.is_flagged and suspect is None:
            self._suspect = packet
        if suspect is None:
            return
        self._suspect = None
        if packet.is_key:  # recordings were joined: the last frame of the first one is whole
            return
        gap = None not in (packet.dts, suspect.dts) and packet.dts - suspect.dts > _GAP * self._step_ticks  # type: ignore[operator]
        # where a whole frame is missing, the suspect is whole, and the packet after it refers to what is missing
        self._damaged.append(packet.number if gap else suspect.number)

    def failed(self, packet: Packet) -> None:
        """A packet, or its frame, is damaged."""
        self._unshown.pop(packet.number, None)
        key = packet.key
        if key is None or packet.is_key or None in (packet.pts, key.pts) or packet.pts > key.pts:  # type: ignore[operator]
            self._damaged.append(packet.number - self._late)
        elif self._last_key_shown < key.number:
            # decoded after a key frame, but shown before it: only its like refer to it
            self._breaks.append(key.number)

    def started_over(self, packet: Packet) -> None:
        """With the frame of this packet another recording begins: it may refer to what is not there."""
        key = self._newest_key
        self._breaks.append(
            packet.number if key is None else min(packet.number, max(key.number, self._last_key_shown + 1))
        )

    def cut(self, packet: Packet) -> None:
        """An edit list cuts the key frame of this packet: it was decoded, and frames may refer to it."""
        self._unshown.pop(packet.number, None)
        self._forget_damage(packet.number)

    def add(self, item: T, frame: Any, packet: Packet) -> None:
        """Takes a frame, in presentation order."""
        self._unshown.pop(packet.number, None)
        self._codec_marks_keys |= frame.key_frame
        if frame.is_corrupt:
            self.failed(packet)
        self._waiting.append((item, packet, self._is_key(frame, packet)))

    def _is_key(self, frame: Any, packet: Packet) -> bool:
        """Both must say so, but some decoders (svq1, qtrle, cfhd) mark no frame, and some containers no packet."""
        return (frame.key_frame and (packet.is_key or not self._container_marks_keys)) or (
            packet.is_key and not self._codec_marks_keys
        )

    def judged(self, *, at_end: bool = False) -> list[tuple[T, bool, bool]]:
        """(item, whether its frame is whole, whether it is the first one after damage), as far as is known by now."""
        if at_end and self._suspect is not None:
            self._damaged.append(self._suspect.number)
            self._suspect = None
        judged = []
        while self._waiting:
            item, packet, is_key = self._waiting[0]
            if not at_end and self._must_wait(packet):
                break
            self._waiting.popleft()
            if is_key:
                self._last_key_shown = packet.number
            if self._is_untouched(packet):
                judged.append((item, True, False))
            elif is_key and packet.number not in self._damaged:
                self._forget_damage(packet.number)
                judged.append((item, True, True))
            else:
                judged.append((item, False, False))
        return judged

    def _must_wait(self, packet: Packet) -> bool:
        oldest = next(iter(self._unshown), packet.number)
        if oldest < packet.number or packet.number > self._newest - self._late:
            return True
        return self._suspect is not None and packet.number >= self._suspect.number

    def _is_untouched(self, packet: Packet) -> bool:
        if not self._damaged and not self._breaks:  # nearly always
            return True
        return packet.number < min(*self._damaged, *self._breaks, packet.number + 1)

    def _forget_damage(self, key: int) -> None:
        """A key frame refers to nothing before it."""
        self._damaged = [number for number in self._damaged if number > key]
        self._breaks = [number for number in self._breaks if number > key]
