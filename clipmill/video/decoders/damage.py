"""Finds the undamaged frames from FFmpeg's reports. ``docs/formats.md`` lists what FFmpeg reports for each codec.

A damaged frame also spoils the frames that refer to it. FFmpeg does not mark those, so all frames up to the next key
frame are dropped. Packets are decoded in file order, and damage spreads in that order. With B-frames, the presentation
order differs: a B-frame may leave the decoder before a frame that it refers to, when the damage of that frame is not
known yet. A frame therefore waits until everything decoded before it has been judged.
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
"""A packet whose frame has not come after this many packets has no own frame (for example the second field of a
picture).
"""

_GAP = 1.5
"""A step between two decoding times above this multiple of the usual step means that a frame is missing."""

_SILENT_CODECS = ("gif", "ffv1")
"""Codecs whose decoders report damage only in the log."""

_ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg1video", "mpeg2video", "av1")
"""Codecs for which a packet without a frame is a lost frame. Other codecs have packets that are never shown."""

_NO_EXPLODE = ("h264", "mpeg1video", "mpeg2video")
"""Codecs in which ``explode`` finds no further damage, and would cost undamaged frames."""


def detect_damage(stream: Any) -> None:
    """Sets the checks of a decoder before it opens. ``aggressive`` and similar would report undamaged frames."""
    checks = "crccheck+bitstream+buffer"
    if stream.codec_context.codec.canonical_name not in _NO_EXPLODE:
        checks += "+explode"
    stream.codec_context.options = {"err_detect": checks}


class ErrorLog:
    """Counts the errors in FFmpeg's log, the only report of damage for some codecs. The log is one per process.

    Attributes:
        tells_of_decoding: whether the log is the only report of damage by the decoder of this stream.
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
    """Facts about a packet, carried through the decoder to its frame.

    Attributes:
        number: number in file order, from 0.
        is_key: whether the container marks it as a key frame.
        is_flagged: whether the demuxer noticed missing data.
        pts: presentation time in ticks.
        dts: decoding time in ticks.
        sample_aspect: pixel aspect ratio of the frame; set when it is decoded.
        key: the last key packet before this one; set when it goes to the decoder.
        recording: number of the recording, if several were joined in the file; set when it goes to the decoder.
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
    """Holds frames back until it is known whether they are damaged.

    Args:
        codec: codec of the stream.
        step_ticks: usual distance of two packets' decoding times.
        has_times: whether every packet becomes one frame and states its presentation time.
        flags_early: whether the demuxer flags the packet before the incomplete one, as for transport streams.
    """

    def __init__(self, codec: str, step_ticks: float, *, has_times: bool = True, flags_early: bool = False):
        self._step_ticks, self._flags_early = step_ticks, flags_early
        self._counts_packets = codec in _ONE_FRAME_A_PACKET and has_times
        self._late = int(codec == "av1")  # dav1d reports a damaged packet with the next one
        # Numbers of damaged packets: everything decoded from them up to an undamaged key frame is bad.
        self._damaged: list[int] = []
        self._breaks = [0]  # the same, but the packet itself is intact and may be a key frame
        self._waiting: deque[tuple[T, Packet, bool]] = deque()
        self._unshown: dict[int, Packet] = {}  # decoded packets without their frames, ascending
        self._newest_key: Packet | None = None
        self._last_key_shown = -1
        self._newest = -1
        self._codec_marks_keys = self._container_marks_keys = False
        self._suspect: Packet | None = None  # waits for the packet after it
        self._before: Packet | None = None

    def sent(self, packet: Packet) -> None:
        """Notes that a packet goes to the decoder."""
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
        """Decides whether the packet after a flagged one (the suspect) is damaged, using the packet after that."""
        suspect, before = self._suspect, self._before
        if before is not None and before.is_flagged and suspect is None:
            self._suspect = packet
        if suspect is None:
            return
        self._suspect = None
        if packet.is_key:  # recordings were joined: the last frame of the first one is whole
            return
        gap = None not in (packet.dts, suspect.dts) and packet.dts - suspect.dts > _GAP * self._step_ticks  # type: ignore[operator]
        # if a complete frame is missing, the suspect is intact, but the packet after it refers to the missing frame
        self._damaged.append(packet.number if gap else suspect.number)

    def failed(self, packet: Packet) -> None:
        """Notes that a packet, or its frame, is damaged."""
        if not self.will_be_missing(packet):
            self._unshown.pop(packet.number, None)
        key = packet.key
        if key is None or packet.is_key or None in (packet.pts, key.pts) or packet.pts > key.pts:  # type: ignore[operator]
            self._damaged.append(packet.number - self._late)
        elif self._last_key_shown < key.number:
            # decoded after a key frame but shown before it: only other such frames refer to it
            self._breaks.append(key.number)

    def starts_over(self, packet: Packet) -> None:
        """Notes that the data before this packet is lost or belongs to another recording."""
        key = self._newest_key
        self._breaks.append(
            packet.number if key is None else min(packet.number, max(key.number, self._last_key_shown + 1))
        )

    def cut(self, packet: Packet) -> None:
        """Notes that an edit list cuts the key frame of this packet. Decoded frames may still refer to it."""
        self._unshown.pop(packet.number, None)
        self._forget_damage(packet.number)

    def will_be_missing(self, packet: Packet) -> bool:
        """Whether `shown` will count this packet's frame as missing if it never comes."""
        return self._counts_packets and packet.pts is not None

    def num_never_shown(self) -> int:
        """Frames that are missing at the end of the file."""
        return sum(self.will_be_missing(packet) for packet in self._unshown.values())

    def shown(self, packet: Packet) -> int:
        """Notes that a packet's frame is shown. Returns how many frames before it are missing; each is counted once."""
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
        """Adds a frame, in presentation order."""
        marked = frame.key_frame
        self._codec_marks_keys |= marked
        if frame.is_corrupt:
            self.failed(packet)
        # Codec and container must both mark a key frame, but some decoders (svq1, qtrle, cfhd) and some containers mark
        # none.
        is_key = marked or not self._codec_marks_keys if packet.is_key else marked and not self._container_marks_keys
        self._waiting.append((item, packet, is_key))

    def judged(self, *, at_end: bool = False) -> list[tuple[T, bool, bool]]:
        """The frames judged so far: (item, whether it is undamaged, whether it is the first one after damage)."""
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
        """Number of the last packet up to which all packets have been decoded, shown and judged."""
        last = self._newest - self._late
        if self._unshown:
            last = min(last, next(iter(self._unshown)))
        return last if self._suspect is None else min(last, self._suspect.number - 1)

    def _is_untouched(self, packet: Packet) -> bool:
        return packet.number < min(*self._damaged, *self._breaks, packet.number + 1)

    def _forget_damage(self, key: int) -> None:
        """Forgets damage up to a key frame, which refers to nothing before it."""
        self._damaged = [number for number in self._damaged if number > key]
        self._breaks = [number for number in self._breaks if number > key]
