"""Which frames are whole, by what FFmpeg tells of damage. ``docs/formats.md`` says what it tells for each codec.

A damaged frame spoils the frames that refer to it. FFmpeg does not mark those, so all up to the next key frame are
dropped. Packets are decoded in the order of the file, and damage spreads in that order. With B-frames, frames are shown
in another order: a B-frame leaves the decoder before a frame that it refers to, whose damage is not known until then.
So a frame waits until all that was decoded before it has been judged.
"""

from __future__ import annotations

import math
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

_ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg1video", "mpeg2video", "av1")
"""Codecs of which a packet without a frame is a lost frame. Others have packets that are not to be shown."""

_NO_EXPLODE = ("h264", "mpeg1video", "mpeg2video")
"""``explode`` finds nothing more in these, and costs whole frames beside damaged ones."""


def detect_damage(stream: Any) -> None:
    """Sets what a decoder checks, before it opens. ``aggressive`` and the like would call whole frames damaged."""
    checks = "crccheck+bitstream+buffer"
    if stream.codec_context.codec.canonical_name not in _NO_EXPLODE:
        checks += "+explode"
    stream.codec_context.options = {"err_detect": checks}


class ErrorLog:
    """Counts what FFmpeg logs as errors, where nothing else tells of damage. One for the whole process.

    Attributes:
        tells_of_decoding: nothing but the log tells that the decoder of this stream met damage.
    """

    def __init__(self, stream: Any):
        self.tells_of_decoding = stream.codec_context.codec.canonical_name in _SILENT_CODECS
        av.logging.set_level(av.logging.PANIC)  # errors are counted, but not printed
        self._count = 0
        self.has_grown()

    def has_grown(self) -> bool:
        """Whether an error was logged since the last call."""
        before, self._count = self._count, av.logging.get_last_error()[0]
        return self._count > before


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
        key: the last key packet before this one, known once it goes to the decoder.
        recording: number of the recording in the file, where several were joined; known once it goes to the decoder.
    """

    number: int
    is_key: bool = False
    is_flagged: bool = False
    pts: int | None = None
    dts: int | None = None
    sample_aspect: float = 1.0
    key: Packet | None = None
    recording: int = 0


class DamageFilter(Generic[T]):
    """Holds frames back until it is known whether they are whole; says which are.

    Args:
        codec: of the stream.
        step_ticks: usual distance of two packets' decoding times.
        has_times: every packet states when its frame is shown, and becomes one.
        flags_early: the demuxer flags the packet before the incomplete one, as that of transport streams does.
    """

    def __init__(self, codec: str, step_ticks: float, *, has_times: bool = True, flags_early: bool = False):
        self._step_ticks, self._flags_early = step_ticks, flags_early
        self._counts_packets = codec in _ONE_FRAME_A_PACKET and has_times
        self._late = int(codec == "av1")  # dav1d reports a damaged packet with the next one
        self._damaged: list[int] = []  # packets; what was decoded from them on is bad, up to a whole key frame
        self._breaks = [0]  # the same, but the packet itself is whole: a key frame may begin with it
        self._waiting: deque[tuple[T, Packet, bool]] = deque()
        self._unshown: dict[int, Packet] = {}  # decoded packets without their frames, ascending
        self._newest_key: Packet | None = None
        self._last_key_shown = -1
        self._newest = -1
        self._codec_marks_keys = self._container_marks_keys = False
        self._suspect: Packet | None = None  # waits for the packet after it
        self._before: Packet | None = None

    def sent(self, packet: Packet) -> None:
        """A packet goes to the decoder."""
        number = self._newest = packet.number
        packet.key = self._newest_key
        if packet.is_key:
            self._newest_key = packet
            self._container_marks_keys = True
        before = self._before
        if before is not None:
            packet.recording = before.recording
            if before.dts is not None and packet.dts is not None and packet.dts < before.dts:
                packet.recording += 1
        if self._flags_early:
            self._judge_suspect(packet)
        elif packet.is_flagged:
            self.failed(packet)
        self._before = packet
        unshown = self._unshown
        unshown[number] = packet
        oldest = next(iter(unshown))
        if number - oldest > _REORDERED_PACKETS:
            del unshown[oldest]

    def _judge_suspect(self, packet: Packet) -> None:
        """Decides by the packet after it whether the one behind a flagged packet is damaged."""
        suspect, before = self._suspect, self._before
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
        if not self.will_be_missing(packet):
            self._unshown.pop(packet.number, None)
        key = packet.key
        if key is None or packet.is_key or None in (packet.pts, key.pts) or packet.pts > key.pts:  # type: ignore[operator]
            self._damaged.append(packet.number - self._late)
        elif self._last_key_shown < key.number:
            # decoded after a key frame, but shown before it: only its like refer to it
            self._breaks.append(key.number)

    def starts_over(self, packet: Packet) -> None:
        """What lay before this packet is not there: it was lost, or belongs to another recording."""
        key = self._newest_key
        self._breaks.append(
            packet.number if key is None else min(packet.number, max(key.number, self._last_key_shown + 1))
        )

    def cut(self, packet: Packet) -> None:
        """An edit list cuts the key frame of this packet: it was decoded, and frames may refer to it."""
        self._unshown.pop(packet.number, None)
        self._forget_damage(packet.number)

    def will_be_missing(self, packet: Packet) -> bool:
        """Whether `shown` counts the frame of this packet if it is never shown."""
        return self._counts_packets and packet.pts is not None

    def num_never_shown(self) -> int:
        """Frames that are missing at the end of the file."""
        return sum(self.will_be_missing(packet) for packet in self._unshown.values())

    def shown(self, packet: Packet) -> int:
        """The frame of a packet is shown; returns how many were missing before it, each of which counts once."""
        unshown, shown_at = self._unshown, packet.pts
        unshown.pop(packet.number, None)
        if not unshown or not self._counts_packets or shown_at is None:
            return 0
        missing = []
        for other in unshown.values():
            if other.pts is not None and other.pts < shown_at and other.recording == packet.recording:
                missing.append(other.number)
        for number in missing:
            del unshown[number]
        return len(missing)

    def add(self, item: T, frame: Any, packet: Packet) -> None:
        """Takes a frame, in presentation order."""
        marked = frame.key_frame
        self._codec_marks_keys |= marked
        if frame.is_corrupt:
            self.failed(packet)
        # Both must say so, but some decoders (svq1, qtrle, cfhd) mark no frame, and some containers no packet.
        is_key = marked or not self._codec_marks_keys if packet.is_key else marked and not self._container_marks_keys
        self._waiting.append((item, packet, is_key))

    def judged(self, *, at_end: bool = False) -> list[tuple[T, bool, bool]]:
        """(item, whether its frame is whole, whether it is the first one after damage), as far as is known by now."""
        if at_end and self._suspect is not None:
            self._damaged.append(self._suspect.number)
            self._suspect = None
        judged: list[tuple[T, bool, bool]] = []
        waiting = self._waiting
        last = math.inf if at_end else self._last_to_judge()
        while waiting and waiting[0][1].number <= last:
            item, packet, is_key = waiting.popleft()
            if is_key:
                self._last_key_shown = packet.number
            if not (self._damaged or self._breaks) or self._is_untouched(packet):
                judged.append((item, True, False))
            elif is_key and packet.number not in self._damaged:
                self._forget_damage(packet.number)
                judged.append((item, True, True))
            else:
                judged.append((item, False, False))
        return judged

    def _last_to_judge(self) -> int:
        """The last packet before which all have been decoded, shown and judged."""
        last = self._newest - self._late
        if self._unshown:
            last = min(last, next(iter(self._unshown)))
        return last if self._suspect is None else min(last, self._suspect.number - 1)

    def _is_untouched(self, packet: Packet) -> bool:
        return packet.number < min(*self._damaged, *self._breaks, packet.number + 1)

    def _forget_damage(self, key: int) -> None:
        """A key frame refers to nothing before it."""
        self._damaged = [number for number in self._damaged if number > key]
        self._breaks = [number for number in self._breaks if number > key]
