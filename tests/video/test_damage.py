from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from clipmill.video.decode import is_truncated, read_frames
from clipmill.video.decoders.damage import DamageFilter, Packet
from clipmill.video.decoders.picture import Reading
from clipmill.video.probe import probe
from tests.video.conftest import barcode, make_video, read_barcode
from tests.video.damage import CASES, Case, all_frames, flipped, num_damaged, whole_frames, write_clean

TELLS_ALL = {"msmpeg4", "mpeg-2", "flv1", "prores", "png", "ffv1 with checksums", "hevc with checksums"}
"""Codecs of which FFmpeg tells every visible damage, by the table of ``docs/formats.md``."""


def _corrupt_times(path: Path) -> set[int]:
    """Milliseconds from the first frame of the frames that the decoder itself marks."""
    times, start = set(), None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                start = frame.time if start is None else start
                if frame.is_corrupt:
                    times.add(round((frame.time - start) * 1000))
    return times


def _check_flipped_bits(case: Case, folder: Path, num_files: int) -> None:
    clean = write_clean(case, folder)
    want = whole_frames(clean)
    assert len(want) == len(all_frames(clean)), "a whole frame was dropped"
    for path in flipped(clean, num_files):
        delivered = whole_frames(path)
        assert not {round(time * 1000) for time, _ in delivered} & _corrupt_times(path)
        if case.name in TELLS_ALL:
            assert not num_damaged(delivered, want)


@pytest.mark.parametrize("name", ["mpeg2.mpg", "xvid.avi", "h264.mp4"])
def test_no_frame_that_the_decoder_marks_is_delivered(tmp_path, name):
    (case,) = (case for case in CASES if case.file == name)
    _check_flipped_bits(case, tmp_path, num_files=10)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_no_frame_that_the_decoder_marks_is_delivered_for_any_codec(tmp_path, case):
    _check_flipped_bits(case, tmp_path, num_files=40)


def _numbers(path: Path, reading: Reading | None = None) -> list[int]:
    return [read_barcode(frame) for _, frame in read_frames(path, probe(path), 64, "stretch", reading=reading)]


GROUPS = {"g": "10", "bf": "2", "x264-params": "keyint=10:min-keyint=10:scenecut=0"}


def _part(path: Path, num_frames: int) -> bytes:
    return make_video(path, "libx264", num_frames=num_frames, options=GROUPS).read_bytes()


def test_every_frame_of_joined_recordings_is_delivered(tmp_path):
    path = tmp_path / "joined.ts"
    path.write_bytes(_part(tmp_path / "one.ts", 25) + _part(tmp_path / "two.ts", 31))
    reading = Reading()
    assert _numbers(path, reading) == [*range(25), *range(31)]
    assert (reading.joins, reading.damaged_frames, reading.scene_starts) == (1, 0, {25})
    times = [time for time, _ in read_frames(path, probe(path), 64, "stretch")]
    np.testing.assert_allclose(times, np.arange(56) / 10, atol=1e-4)


@pytest.mark.parametrize("name", ["joined.ts", "joined.mkv", "joined.mpg"])
def test_recordings_of_less_than_a_second_are_joined_as_well(tmp_path, name):
    codec, fps = ("mpeg2video", 25) if name.endswith(".mpg") else ("libx264", 20)
    part = make_video(tmp_path / f"one_{name}", codec, num_frames=15, fps=fps, options={"g": "5"}).read_bytes()
    path = tmp_path / name
    path.write_bytes(part + part)
    found = Reading()
    assert _numbers(path, found) == [*range(15), *range(15)]
    assert (found.joins, found.damaged_frames, found.scene_starts) == (1, 0, {15})


def test_segments_of_one_recording_are_one_scene(tmp_path):
    options = {"segment_time": "1", "segment_format": "mpegts"}
    # a muxer of its own for each segment: packet counters begin anew, the clock goes on
    with av.open(str(tmp_path / "%d.ts"), "w", format="segment", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options=GROUPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(30):
            frame = av.VideoFrame.from_ndarray(barcode(index, 96, 64), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    parts = [(tmp_path / f"{segment}.ts").read_bytes() for segment in range(3)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(parts))
    found = Reading()
    assert _numbers(joined, found) == list(range(30))
    assert found.damaged_frames == 0


def test_a_lost_transport_packet_costs_frames_up_to_the_next_key_frame(tmp_path):
    data = _part(tmp_path / "whole.ts", 60)
    path = tmp_path / "lost.ts"
    num_packets, num_harmed = len(data) // 188, 0
    for lost in range(num_packets // 4, num_packets * 3 // 4, 3):
        path.write_bytes(data[: lost * 188] + data[(lost + 1) * 188 :])
        reading = Reading()
        numbers = _numbers(path, reading)
        assert numbers == sorted(set(numbers)), "a frame shows what it should not"
        missing = sorted(set(range(60)) - set(numbers))
        if missing:
            num_harmed += 1
            # B-frames of the group before the next key frame are decoded after it: two more may go
            assert missing[-1] - missing[0] < 12
            assert bool(reading.scene_starts) == (missing[-1] < 59 and reading.damaged_frames > 0)
    assert num_harmed > 3


def test_reading_goes_on_behind_damage_in_a_scene_of_its_own(tmp_path):
    path = make_video(tmp_path / "hit.mkv", "mpeg4", options={"g": "10"})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    hit = packets[13]
    data[hit.pos + 12 : hit.pos + hit.size] = b"\xff" * (hit.size - 12)
    path.write_bytes(data)
    reading = Reading()
    assert _numbers(path, reading) == [*range(13), *range(20, 40)]
    assert (reading.damaged_frames, reading.scene_starts) == (7, {20})
    assert not is_truncated(probe(path), 33, reading.first_seconds, reading.last_seconds)


def _ruin(path: Path, number: int, fill: bytes, header: int = 0) -> None:
    """Overwrites the data of one packet, which begins after the header that its container gives it."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    data = bytearray(path.read_bytes())
    data[packet.pos + header : packet.pos + packet.size] = fill * (packet.size - header)
    path.write_bytes(data)


def test_no_scene_spans_a_dropped_b_frame(tmp_path):
    path = make_video(tmp_path / "b.mp4", "libx264", options=GROUPS)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    b_frame = next(n for n in range(12, 20) if packets[n].pts < packets[n - 1].pts)
    _ruin(path, b_frame, b"\xff")
    reading = Reading()
    delivered = []
    for _, frame in read_frames(path, probe(path), 64, "stretch", reading=reading):
        delivered.append((reading.number, read_barcode(frame)))
    assert all(number == shown for number, shown in delivered)
    numbers = [number for number, _ in delivered]
    assert len(numbers) + reading.damaged_frames == 40
    holes = {late for early, late in itertools.pairwise(numbers) if late != early + 1}
    assert holes
    assert holes <= reading.scene_starts


def test_a_packet_that_silently_gives_no_frame_is_counted(tmp_path):
    path = make_video(tmp_path / "b.mkv", "mpeg2video", fps=25, options={"bf": "2"})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    _ruin(path, next(n for n in range(12, 20) if packets[n].pts < packets[n - 1].pts), b"\xff", header=12)
    reading = Reading()
    shown = [
        (reading.number, read_barcode(frame))
        for _, frame in read_frames(path, probe(path), 64, "stretch", reading=reading)
    ]
    assert all(number == barcode_number for number, barcode_number in shown)
    assert len(shown) + reading.damaged_frames == 40
    assert reading.scene_starts


@pytest.mark.parametrize(("file", "codec"), [("cut.avi", "mpeg4"), ("cut.flv", "flv"), ("cut.avi", "msmpeg4v2")])
def test_frames_before_the_first_key_frame_are_dropped(tmp_path, file, codec):
    whole = make_video(tmp_path / f"whole-{file}", codec, options={"g": "10"})
    path = tmp_path / file
    with av.open(str(whole)) as reading, av.open(str(path), "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        packets = [packet for packet in reading.demux(stream) if packet.size]
        for packet in packets[5:]:
            packet.stream = copy
            writing.mux(packet)
    assert _numbers(path) == list(range(10, 40))


class _Frame:
    """What a filter looks at."""

    def __init__(self, *, key: bool = False, corrupt: bool = False):
        self.key_frame, self.is_corrupt = key, corrupt


def _judge(order: str, corrupt: str = "", shown: str | None = None) -> str:
    """Frames that are whole, by letters in the order of the file; capitals are key frames; ``shown`` is their order."""
    judged: DamageFilter[str] = DamageFilter("h264", 1.0)
    packets, left, whole = {}, list(shown or order), ""
    for number, letter in enumerate(order):
        packets[letter] = Packet(number, letter.isupper(), pts=(shown or order).index(letter), dts=number)
        judged.sent(packets[letter])
        while left and left[0] in packets and (shown is None or number >= order.index(left[0]) + 1 or len(left) == 1):
            letter_shown = left.pop(0)
            judged.add(
                letter_shown, _Frame(key=letter_shown.isupper(), corrupt=letter_shown in corrupt), packets[letter_shown]
            )
        whole += "".join(item for item, is_whole, _ in judged.judged() if is_whole)
    for letter in left:
        judged.add(letter, _Frame(key=letter.isupper(), corrupt=letter in corrupt), packets[letter])
    return whole + "".join(item for item, is_whole, _ in judged.judged(at_end=True) if is_whole)


@pytest.mark.parametrize(
    ("order", "shown", "corrupt", "whole"),
    [
        ("AbcDef", None, "", "AbcDef"),
        ("bcDef", None, "", "Def"),  # begins inside a group
        ("AbcDef", None, "b", "ADef"),
        ("AbcDefGh", None, "D", "AbcGh"),  # a damaged key frame spoils its group
        ("AdbcGef", "AbcdefG", "d", "AG"),  # b and c are shown before d, but refer to it; e and f before G do as well
        ("AdbcGef", "AbcdefG", "", "AbcdefG"),
        ("AdbcGefjhi", "AbcdefGhij", "e", "AbcdGhij"),  # a frame before its key frame spoils only its like
    ],
)
def test_damage_spreads_in_the_order_of_the_file(order, shown, corrupt, whole):
    assert _judge(order, corrupt, shown) == whole


def test_whole_videos_lose_nothing_whatever_their_order():
    letters = "Abcdefghij"
    for shown in itertools.islice(itertools.permutations(letters[1:5]), 24):
        order = letters[0] + letters[1:5]
        assert _judge(order, "", letters[0] + "".join(shown)) == letters[0] + "".join(shown)
