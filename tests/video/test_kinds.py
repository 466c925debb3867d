from __future__ import annotations

import io
import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from av.format import ContainerFormat, formats_available
from PIL import Image

from clipmill.video import encode_mp4
from clipmill.video.kinds import HEAD_BYTES, SNIFFED_SUFFIXES, VIDEO_SUFFIXES, is_video_head, suffix_of

NO_VIDEOS = {
    "audio": (
        "302 722 aa aa3 aac aax ac3 ac4 acm adp ads adts adx aea afc aif aifc aiff aix al amr apc ape apl "
        "apm aptx aptxhd ast au aud avr bcstm bfstm binka bit bonk brstm c2 caf cdata cvg daud dfpwm dss "
        "dtk dts dtshd eac3 ec3 fap flac fsb fwse g722 g723_1 g728 g729 genh gsm hca iamf ircam isma laf "
        "latm lbc lc3 loas m2a m4a m4b mac mca mka mlp mmf mp2 mp3 mpa mpc msbc msf mtaf musx nist nsp oga "
        "oma omg opus osq paf pcm pvf qoa ra rco rka rsd rso sb sbc sbg sdns sdr2 sds sdx sf shn sln sox "
        "spdif sph spx ss2 str svag svs sw tak tco thd tta tun ub ul uw vag voc vpk vqe vqf vql w64 wa wav "
        "way wma wsd wv xmd xvag"
    ),
    "single pictures": (
        "bmp dpx exr fits hdr ico im1 im24 im8 j2c j2k jls jp2 jpeg jpg jxl jxs ljpg mpo pam pbm pcx pfm "
        "pgm pgmyuv phm pix ppm qoi ras rs sgi sun sunras tga tif tiff vbn wbmp xbm xface xwd y"
    ),
    "text": (
        "adf ans aqt art asc ass diz ffmeta ice idf js jss lrc mcc mks mpl2 nfo pjs rt sami scc smi srt ssa "
        "stl ttml txt vt"
    ),
    "subtitles": "idx sub sup vtt webvtt",
    "playlists, and pieces of a stream": "chk m3u8 mpd xml",
    "raw pixels without their size": "bitpacked cif qcif rgb v210 yuv yuv10",
    "for a machine that FFmpeg only writes for": "a64",
}
"""What FFmpeg claims and we do not list."""

UNCLAIMED = {".bik", ".divx", ".flc", ".fli", ".m2p", ".mpe", ".ogm", ".qt", ".rmvb", ".smk", ".tp", ".trp"}
"""In common use; FFmpeg knows these files by their content."""


def claimed_suffixes() -> set[str]:
    """Every ending that a demuxer or muxer of the installed FFmpeg claims."""
    claimed: set[str] = set()
    for name in formats_available:
        for mode in ("r", "w"):
            try:
                claimed |= {f".{extension.strip().lower()}" for extension in ContainerFormat(name, mode).extensions}
            except ValueError:  # reads or writes only
                continue
    return claimed


def test_each_ending_that_ffmpeg_claims_is_a_video_or_is_something_else_for_a_reason() -> None:
    no_videos = {f".{name}" for names in NO_VIDEOS.values() for name in names.split()}
    listed = VIDEO_SUFFIXES | SNIFFED_SUFFIXES
    assert not VIDEO_SUFFIXES & SNIFFED_SUFFIXES
    assert not no_videos & listed
    assert claimed_suffixes() - listed == no_videos
    assert listed - claimed_suffixes() == UNCLAIMED | {""}


def test_every_ending_we_list_is_an_ending() -> None:
    assert {suffix_of(f"a.b{suffix.upper()}") for suffix in VIDEO_SUFFIXES} == VIDEO_SUFFIXES
    names = ["take.0001", "v1.2", "noending", "Mr. Smith and his dog", "a.mp4 copy", ".hidden", "caf\\xe9.mp4"]
    assert [suffix_of(name) for name in names] == ["", "", "", "", "", "", ".mp4"]


def written(container: str, codec: str, size: tuple[int, int] = (64, 48), pixel_format: str = "yuv420p") -> bytes:
    """A few frames as FFmpeg's muxer writes them."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 40 * index, np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("3gp", "h263"),
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("flv", "flv"),
        ("mpegts", "mpeg2video"),
        ("mpeg", "mpeg1video"),
        ("vob", "mpeg2video"),
        ("asf", "wmv2"),
        ("ogg", "libtheora"),
        ("gif", "gif"),
        ("apng", "apng"),
        ("nut", "mpeg4"),
        ("mxf", "mpeg2video"),
        ("ivf", "libvpx"),
        ("rm", "rv10"),
        ("yuv4mpegpipe", "wrapped_avframe"),
        ("h264", "libx264"),
        ("hevc", "libx265"),
        ("m4v", "mpeg4"),
        ("mpeg2video", "mpeg2video"),
        ("dv", "dvvideo"),
    ],
)
def test_what_ffmpeg_writes_is_a_video_by_its_first_bytes(container: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    size = (720, 576) if container == "dv" else (176, 144) if codec == "h263" else (64, 48)
    pixel_format = {"gif": "rgb8", "apng": "rgb24"}.get(container, "yuv420p")
    assert is_video_head(written(container, codec, size, pixel_format)[:HEAD_BYTES])


def test_blu_rays_packets_carry_a_clock_before_the_sync_byte() -> None:
    stream = written("mpegts", "mpeg2video")
    packets = [bytes(4) + stream[start : start + 188] for start in range(0, len(stream), 188)]
    assert is_video_head(b"".join(packets)[:HEAD_BYTES])


def pillow(frames: int, kind: str, **keys: object) -> bytes:
    pictures = [Image.new("RGB", (32, 32), (90 * index, 0, 0)) for index in range(frames)]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(file, kind, **more, **keys)
    return file.getvalue()


def audio(container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_is_a_video_if_it_is_animated(kind: str) -> None:
    profile = b"p" * 3000  # a colour profile stands before what says so
    assert is_video_head(pillow(3, kind, icc_profile=profile)[:HEAD_BYTES])
    assert not is_video_head(pillow(1, kind, icc_profile=profile)[:HEAD_BYTES])
    assert not is_video_head(pillow(1, kind, lossless=True)[:HEAD_BYTES])


def other_files() -> dict[str, bytes]:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as output:
        output.setparams((1, 2, 8000, 0, "NONE", ""))
        output.writeframes(bytes(999))
    array = io.BytesIO()
    np.save(array, np.arange(9))
    return {
        "text": b"the moov of a free ftyp\n" * 30,
        "json": b'{"a": 1}',
        "empty": b"",
        "zeros": bytes(5000),
        "G": b"G" * 3,
        "array": array.getvalue(),
        "wav": sound.getvalue(),
        "m4a": audio("ipod", "aac"),
        "ogg": audio("ogg", "libopus"),
        "jpeg": pillow(1, "JPEG"),
        "avif": pillow(1, "AVIF"),
        "tar": b"name".ljust(257, b"\0") + b"ustar\x0000",
        "icon": struct.pack("<HHH", 0, 1, 1) + bytes(100),
        "png cut": pillow(1, "PNG")[:20],
    }


@pytest.mark.parametrize("name", list(other_files()))
def test_what_is_no_video_is_told_by_its_first_bytes(name: str) -> None:
    assert not is_video_head(other_files()[name][:HEAD_BYTES])


@pytest.mark.parametrize("mark", [b"\x80theora\x03\x02\x01", b"\x01video\0\0\0XVID", b"BBCD\0", b"OVP80\x01"])
def test_ogg_is_a_video_where_a_stream_of_it_is(mark: bytes) -> None:
    def page(packet: bytes) -> bytes:
        return b"OggS\0\x02" + bytes(20) + bytes([1, len(packet)]) + packet

    assert is_video_head(page(b"\x01vorbis" + bytes(23)) + page(mark + bytes(30)))
    assert not is_video_head(page(b"\x01vorbis" + bytes(23)))


def test_an_animated_avif_is_a_video() -> None:
    assert is_video_head(pillow(3, "AVIF")[:HEAD_BYTES])


def test_our_own_mp4_is_one(tmp_path: Path) -> None:
    assert is_video_head(encode_mp4(np.zeros((4, 32, 32, 3), np.uint8), 10, 20)[:HEAD_BYTES])
