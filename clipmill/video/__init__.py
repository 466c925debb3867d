"""The only door to codecs: probing, decoding in a killable child, encoding, pictures."""

from __future__ import annotations

from clipmill.video.decoders.by_decord import decord_version
from clipmill.video.encode import decode_mp4, encode_mp4, write_raw_video
from clipmill.video.errors import VideoError
from clipmill.video.mjpeg import decode_mjpeg, encode_mjpeg
from clipmill.video.probe import VideoInfo, probe
from clipmill.video.sandbox import BadVideo, Clip, Decoder, DecoderLost, Limits, Outcome

__all__ = [
    "BadVideo",
    "Clip",
    "Decoder",
    "DecoderLost",
    "Limits",
    "Outcome",
    "VideoError",
    "VideoInfo",
    "decode_mjpeg",
    "decode_mp4",
    "decord_version",
    "encode_mjpeg",
    "encode_mp4",
    "probe",
    "write_raw_video",
]
