"""Decides which files are videos: by file extension, else by the first bytes.

The extensions are those that FFmpeg's demuxers and muxers of video formats claim, and a few common ones that none
claims. Some claimed extensions mostly name other things (``.png``, ``.ogg``, ``.dat``). For these, and for names
without an extension, the first bytes decide. Audio, single pictures, text, playlists and raw pixels (whose size no
header states) are not videos; ``tests/video/test_kinds.py`` lists their extensions.
"""

from __future__ import annotations

import re
import struct

__all__ = [
    "HEAD_BYTES",
    "PICTURE_SUFFIXES",
    "SNIFFED_SUFFIXES",
    "VIDEO_SUFFIXES",
    "is_video_head",
    "stem_of",
    "suffix_of",
]

HEAD_BYTES = 16 * 2**10
"""Bytes that `is_video_head` needs: in a PNG, colour profiles may precede the chunk that marks an animation."""

_CONTAINERS = (
    "mp4 m4v mov qt 3gp 3g2 f4v ismv mj2 psp mkv mk3d webm avi divx amv asf wmv flv kux ts m2t m2ts mts tp trp "
    "mpg mpeg mpe m2p vob dvd mxf gxf nut ogv ogm rm rmvb ivr wtv ty ty+ swf dv gif apng ivf y4m"
)
_STREAMS = (
    "h261 h263 h264 264 h26l avc h265 265 hevc h266 266 vvc obu avs2 avs3 cavs vc2 vc1 rcv m1v m2v mjpeg mjpg apv evc "
    "dnxhd dnxhr"
)
_CAMERAS = "dav ifv lvf mxg viv"
_GAMES = "bik smk fli flc roq bmv cdg cdxl xl cpk flm imx ipu mods moflex mvi pdv sga usm xmv yop"

VIDEO_SUFFIXES = frozenset(f".{name}" for name in " ".join((_CONTAINERS, _STREAMS, _CAMERAS, _GAMES)).split())
"""File extensions, in lower case, that mark a video."""

_DOUBTFUL = "png webp avif heic heif ogg ism dat avs drc dif ser v vb son cgi"

SNIFFED_SUFFIXES = frozenset(("", *(f".{name}" for name in _DOUBTFUL.split())))
"""File extensions, in lower case, for which the first bytes decide. The empty one means no extension."""

PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"))
"""File extensions, in lower case, of still pictures that `clipmill.video.Decoder.picture` reads."""

_SUFFIX = re.compile(r"\.(?=.*[a-z])[a-z0-9_+-]{1,12}|\.26[456]|\.302|\.722")
"""An extension contains a letter, so ``take.0001`` has none; raw streams (``.264``) are exceptions."""

_MAGICS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"GIF87a",
    b"GIF89a",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG-1, MPEG-2
    b"\x00\x00\x01\xb0",  # MPEG-4 part 2, Chinese AVS
    b"\x00\x00\x00\x01\x09",  # H.264: access unit delimiter, parameters
    b"\x00\x00\x00\x01\x27",
    b"\x00\x00\x00\x01\x67",
    b"\x00\x00\x00\x01\x40",  # HEVC: parameters, access unit delimiter
    b"\x00\x00\x00\x01\x46",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02",  # MXF
    b"\x00\x00\x00\x00\x01\xbc",  # GXF
    b"\x1f\x07\x00",  # DV
    b"nut/multimedia container\0",
    b"YUV4MPEG2 ",
    b"DKIF",  # IVF
    b".RMF",  # RealMedia
    b"BBCD\0",  # Dirac
    b"LUCAM-RECORDER",  # SER, of telescopes
    b"luo ",  # surveillance recorders: .dat, .v, .cgi
    b"\x00\x00\x01\xa5",
    b"MJPG",
)
_RIFF_FORMS = (b"AVI ", b"AMV ", b"CDXA")
_OGG_VIDEO = (b"\x80theora", b"\x01video\0", b"BBCD\0", b"OVP80\x01", b"\x80daala")
"""First bytes of a video stream's first packet: Theora, OGM, Dirac, VP8, Daala."""

_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"sidx", b"moof", b"uuid")
"""Boxes that may open a QuickTime or MP4 file instead of ``ftyp``."""
_NO_VIDEO_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"avif", b"heic", b"heix", b"mif1", b"miaf", b"crx ", b"jpx ", b"jp2 ")
"""Brands of audio and single pictures; picture sequences have brands of their own (``avis``, ``msf1``, ``hevc``)."""

_TS_PACKETS = ((0, 188), (4, 192), (0, 204))
"""(offset of the first sync byte, packet size) of MPEG transport streams: plain, Blu-ray, with error correction."""


def suffix_of(name: str) -> str:
    """The extension of a file name in lower case (``.mp4``); empty if it has none.

    An extension has at most 12 letters, digits or ``_+-``, including a letter. Raw streams (``.264``) are exceptions.
    """
    last = name[name.rfind("/") + 1 :]
    dot = last.rfind(".")  # the same as pathlib in a tenth of its time; a listing needs it twice per object
    suffix = last[dot:].lower() if 0 < dot < len(last) - 1 else ""
    return suffix if _SUFFIX.fullmatch(suffix) else ""


def stem_of(name: str) -> str:
    """A file's name without its extension; its sidecar files share it."""
    return name[: len(name) - len(suffix_of(name))]


def is_video_head(head: bytes) -> bool:
    """Whether a file that begins with these bytes (`HEAD_BYTES` or all) is a video.

    A still picture is not a video; but the first bytes of a GIF do not tell, so every GIF counts as one.
    """
    if head.startswith(_MAGICS):
        return True
    if head.startswith(b"RIFF"):
        return head[8:12] in _RIFF_FORMS or _is_animated_webp(head)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _is_animated_png(head)
    if head.startswith(b"SIFF"):
        return head[8:12] == b"VBV1"
    if head.startswith(b"OggS"):
        return any(mark in head for mark in _OGG_VIDEO)
    return _is_bmff(head) or any(_is_transport_stream(head, *packets) for packets in _TS_PACKETS)


def _is_bmff(head: bytes) -> bool:
    """QuickTime and its successors: boxes of (size, kind, content)."""
    kind = head[4:8]
    if kind == b"ftyp":
        return head[8:12] not in _NO_VIDEO_BRANDS
    return kind in _BOXES and head[0] == 0  # text with such a word at this place has no zero byte


def _is_transport_stream(head: bytes, first: int, packet_bytes: int) -> bool:
    """Whether every packet begins with the sync byte; three are enough to know."""
    syncs = head[first::packet_bytes][:16]
    return len(syncs) > 2 and set(syncs) == {0x47}


def _is_animated_webp(head: bytes) -> bool:
    """Whether the flags of the extended header say so (https://developers.google.com/speed/webp/docs/riff_container)."""
    return head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 0x02)


def _is_animated_png(head: bytes) -> bool:
    """An ``acTL`` chunk before the image data makes a PNG an animation (https://www.w3.org/TR/png-3)."""
    position = 8
    while position + 8 <= len(head):
        num_bytes, kind = struct.unpack_from(">I4s", head, position)
        if kind in (b"acTL", b"IDAT"):
            return kind == b"acTL"
        position += 12 + num_bytes
    return False
